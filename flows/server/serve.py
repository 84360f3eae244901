"""Prefect's server with its UI, a worker, and MLflow's page, on this machine only: ``make serve-flows``.

Everything listens on 127.0.0.1 and reports to nobody. Ctrl-C ends all of it: stages that run save a checkpoint first,
and the next ``make serve-flows`` goes on with their runs (flows/server/recover.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import yaml
from rich.console import Console

from flows.environment import MLFLOW_TRAININGS, REPOSITORY
from flows.run.lock import try_lock
from flows.server.stack import HOST, Stack
from fuselip_core.errors import FuselipError
from fuselip_core.tracking.services import tracking_uri

KEY = re.compile(r"(?<=return`)[0-9a-f]{32}(?=`)")
SERVICE = "amplitude"

POOL = "process"
CHECK_EVERY_SECONDS = 5.0
RUNS_AT_ONCE = 4
RECOVER_EVERY = 30


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C or SIGTERM; an error is one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m flows.server.serve", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--port", type=int, default=4200, help="of Prefect's API and UI")
    parser.add_argument("--mlflow-port", type=int, default=5000, help="of MLflow's page")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    # Both by name: a shell starts what stands in the background with SIGINT ignored, and Python leaves that so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        once = served_once(Path(os.environ["PREFECT_HOME"]), options.port)
        with once, _serving(options.port, options.mlflow_port, console) as stack:
            while True:
                for name in stack.check():
                    console.print(f"the {name} had ended; another one is at work")
                time.sleep(CHECK_EVERY_SECONDS)
    except KeyboardInterrupt:
        return 0
    except FuselipError as error:
        console.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return 1


@contextlib.contextmanager
def _serving(port: int, mlflow_port: int, console: Console) -> Iterator[Stack]:
    """Starts everything, says where it is, and ends it."""
    for each in (port, mlflow_port):
        require_free(each)
    prefect, mlflow = f"http://{HOST}:{port}", f"http://{HOST}:{mlflow_port}"
    environment = environment_of(prefect, mlflow)
    stack = Stack(environment, Path(environment["PREFECT_HOME"]) / "logs")
    try:
        with console.status("starting Prefect's server; the first time takes half a minute"):
            stack.start("server", "prefect", "server", "start", "--host", HOST, "--port", str(port))
            page = ("--backend-store-uri", tracking_uri(), "--host", HOST, "--port", str(mlflow_port), "--workers", "1")
            stack.start("mlflow", "mlflow", "ui", *page)
            stack.wait_for(f"{prefect}/api/health")
            silence(Path(environment["PREFECT_UI_STATIC_DIRECTORY"]))
        with console.status("deploying the flows of prefect.yaml"):
            prepare_server(environment["PREFECT_API_URL"])
            stack.run("deploy", "prefect", "--no-prompt", "deploy", *_deployments())
            worker = ("--pool", POOL, "--type", "process", "--name", socket.gethostname())
            stack.start("recover", "flows.server.recover", "--every", str(RECOVER_EVERY), replaceable=True)
            stack.start("worker", "prefect", "worker", "start", *worker, replaceable=True)
            stack.wait_for(f"{mlflow}/health")
        _say_where(console, prefect, mlflow, stack.log_folder)
        yield stack
    finally:
        with console.status("ending; stages that run save their state"):
            # A second Ctrl-C must not leave half of it running.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            stack.stop()


def _say_where(console: Console, prefect: str, mlflow: str, logs: Path) -> None:
    places = (
        ("Flows", f"{prefect}/v2/deployments"),
        ("Runs", f"{prefect}/v2/runs"),
        ("Models", f"{mlflow}/#/models?{MLFLOW_TRAININGS}"),
        ("Logs", logs),
    )
    for what, where in places:
        console.print(f"{what:<10} {where}", highlight=False, soft_wrap=True)
    console.print("Ctrl-C ends all; runs that are under way save a checkpoint and go on next time.")


def environment_of(prefect: str, mlflow: str) -> dict[str, str]:
    """The environment of every process: where the servers are, and what flows/environment.py sets."""
    return {
        **os.environ,
        "PREFECT_API_URL": f"{prefect}/api",
        "PREFECT_UI_URL": f"{prefect}/v2",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # By default leases are forgotten when the server ends, and the GPU of a run that ended with it stays taken.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # A copy of the pages that can be changed; see flows/quiet_ui.py.
        "PREFECT_UI_STATIC_DIRECTORY": str(Path(os.environ["PREFECT_HOME"]) / "ui"),
        "FUSELIP_MLFLOW_UI": mlflow,
        # A page of curves and models needs none of the ten processes that judge language models.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # `{{ $PWD }}` in prefect.yaml.
        "PWD": str(REPOSITORY),
        "PYTHONPATH": str(REPOSITORY),
    }


def prepare_server(api: str) -> None:
    """Makes the worker's pool and the GPU limit, with as many slots as this machine has GPUs, at least one."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    from flows.run.gpu import limit_name

    with SyncPrefectClient(api) as client:
        with contextlib.suppress(ObjectAlreadyExists):
            template = ProcessWorker.get_default_base_job_template()
            # The pool's limit and not the worker's: with one of its own, a worker of Prefect 3.8 ends when a run that
            # it has not quite finished with is scheduled again.
            pool = WorkPoolCreate(name=POOL, type="process", base_job_template=template, concurrency_limit=RUNS_AT_ONCE)
            client.create_work_pool(pool)
        client.upsert_global_concurrency_limit_by_name(limit_name(), max(1, gpu_count()))


def gpu_count() -> int:
    """GPUs that NVIDIA's driver shows."""
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


@contextlib.contextmanager
def served_once(home: Path, port: int) -> Iterator[None]:
    """Holds the database in `home` for one server; raises FuselipError with the other's address if there is one."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "served.lock").open("a+", encoding="utf-8") as file:
        if not try_lock(file.fileno()):
            file.seek(0)
            raise FuselipError(
                f"this checkout is being served already, on {file.read()}; open that page, or end it with Ctrl-C where "
                "`make serve-flows` was typed"
            )
        file.truncate(0)
        file.write(f"http://{HOST}:{port}")
        file.flush()
        yield


def require_free(port: int) -> None:
    """Raises FuselipError if something listens on `port` of this machine already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise FuselipError(
                f"port {port} is taken by another program; end that, or choose other ports: "
                ".venv/bin/python -m flows.server.serve --port 4201 --mlflow-port 5001"
            ) from error


def _deployments() -> list[str]:
    """Options of ``prefect deploy`` for what this machine's worker can run."""
    content = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text(encoding="utf-8"))
    names = [each["name"] for each in content["deployments"] if each["work_pool"]["name"] == POOL]
    return [word for name in names for word in ("--name", name)]


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def silence(folder: Path) -> int:
    """Takes the key out of the scripts below `folder`, the server's own copy of its pages; returns how many had one."""
    changed = 0
    for path in folder.rglob("*.js"):
        text = path.read_text(encoding="utf-8")
        if SERVICE in text and KEY.search(text):
            path.write_text(KEY.sub("", text), encoding="utf-8")
            changed += 1
    return changed


if __name__ == "__main__":
    sys.exit(main())
