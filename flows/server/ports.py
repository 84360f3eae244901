"""Allows one server for a checkout, and checks that ports are free."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from flows.server.stack import HOST
from fuselip_core.errors import FuselipError
from fuselip_core.files import find_json, write_json
from fuselip_core.lock import sole_process


@contextlib.contextmanager
def served_once(home: Path, prefect: str, mlflow: str) -> Iterator[None]:
    """Holds the database in `home` for one server; raises FuselipError with the other's address if there is one.

    The lock is the kernel's and ends with its process, however that ends: a file that is left behind locks nothing.
    """
    home.mkdir(parents=True, exist_ok=True)
    places = find_json(home / "served.json")
    refusal = FuselipError(
        f"this checkout is served already on {places.get('prefect', 'an unknown port')}; open that page, or end it "
        "with Ctrl-C where `make serve-flows` was typed"
    )
    with sole_process(home / "served.lock", refusal):
        write_json(home / "served.json", {"prefect": prefect, "mlflow": mlflow})
        try:
            yield
        finally:
            (home / "served.json").unlink(missing_ok=True)


def mlflow_page(home: Path) -> str | None:
    """Address of the MLflow page that `make serve-flows` of this checkout shows right now; None if it does not run."""
    place = find_json(home / "served.json").get("mlflow")
    if place is None:
        return None
    try:
        with sole_process(home / "served.lock", FuselipError()):
            return None
    except FuselipError:
        return str(place)


def require_free(port: int, other: str) -> None:
    """Raises FuselipError if something listens on `port` of this machine; `other` is a command with another port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise FuselipError(
                f"port {port} is taken by {_holder(port)}; end it, or choose another port: {other}"
            ) from error


def _holder(port: int) -> str:
    """The program that listens on `port`, as far as this user may see."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and (HOST, port) == connection.laddr and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return "another program"
