"""Starts the server: opens model and index, then runs uvicorn until Ctrl-C."""

from __future__ import annotations

import logging
import socket
import warnings
from pathlib import Path

import uvicorn

from fuselip_core.errors import FuselipError
from fuselip_core.monitoring.seen import Seen
from fuselip_core.serving.api import create_app
from fuselip_core.serving.engine import open_engine
from fuselip_core.serving.guard import LOOPBACK
from fuselip_core.serving.limits import Limits

SHORTEST_KEY = 16
logger = logging.getLogger("fuselip")


def serve(
    model: str | None,
    index: str | Path | None,
    host: str,
    port: int,
    api_key_file: Path | None = None,
    allow_urls: bool = False,
    page: bool = False,
    compared: tuple[str | None, str] | None = None,
    local_names: bool = False,
    observe: Path | None = None,
) -> None:
    """Answers requests on host:port until stopped; raises FuselipError if it cannot start.

    compared: a second model and index, whose hits the page shows beside the first ones. local_names: accept only
    requests to 127.0.0.1 or localhost, whatever `host` is, as in a container whose port is published on its host only.
    """
    key = None if api_key_file is None else read_key(api_key_file)
    # Image decoders quote the file in their warnings.
    warnings.simplefilter("ignore")
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    with _listen(host, port) as listener:
        engine = open_engine(model, index, Limits(), allow_urls)
        if observe:
            engine.seen = Seen(observe)
        beside = open_engine(*compared, Limits()) if compared else None
        app = create_app(engine, key, local=local_names or host in LOOPBACK, compared=beside)
        if page:
            from fuselip_core.serving.page import add_page

            add_page(app, engine, beside)
        address = f"http://{'[' + host + ']' if ':' in host else host}:{listener.getsockname()[1]}"
        logger.info("%s: %s/%s (Ctrl-C ends it)", engine.name, address, "" if page else "docs")
        # No access log: uvicorn's contains query strings.
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="on")
        uvicorn.Server(config).run(sockets=[listener])


def read_key(path: Path) -> str:
    """The API key in a file. Raises FuselipError for a short key, or if other users can read the file."""
    key = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if len(key) < SHORTEST_KEY:
        raise FuselipError(
            f"{path} holds no API key of at least {SHORTEST_KEY} characters; make one with `openssl rand -hex 32`"
        )
    if path.stat().st_mode & 0o007:
        raise FuselipError(f"every user of this machine can read {path}; run `chmod 600 {path}`")
    return key


def _listen(host: str, port: int) -> socket.socket:
    """Binds the port before the model is loaded, so that a busy port fails at once."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        return listener
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FuselipError(f"cannot listen on {host}:{port} ({reason}); give another --port") from error
