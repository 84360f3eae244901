"""Prefect's server with its UI, a worker, and MLflow's page, on this machine only: ``make serve-flows``.

Everything listens on 127.0.0.1. Ctrl-C ends all of it: running stages save a checkpoint first, and the next
``make serve-flows`` resumes their runs (flows/server/recover.py).
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from flows.environment import MLFLOW_TRAININGS, REPOSITORY
from flows.server.ports import require_free, served_once
from flows.server.recover import POOL
from flows.server.stack import HOST, Stack, ending
from flows.server.worker import start_worker
from fuselip_core.errors import run_to_exit
from fuselip_core.tracking.store import prepare_store, tracking_uri

RUNS_AT_ONCE = 4


def main(
    port: Annotated[int, typer.Option(help="Port of Prefect's API and UI.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's page.")] = 5000,
) -> None:
    """Serve flows on this machine until Ctrl-C: Prefect's server, UI and worker, and MLflow's page."""
    console = Console(stderr=True)
    try:
        with (
            served_once(Path(os.environ["PREFECT_HOME"]), f"http://{HOST}:{port}", f"http://{HOST}:{mlflow_port}"),
            _serving(port, mlflow_port, console) as stack,
        ):
            stack.keep(console.print)
    except KeyboardInterrupt:
        return


@contextlib.contextmanager
def _serving(port: int, mlflow_port: int, console: Console) -> Iterator[Stack]:
    """Starts all processes, prints their addresses, waits, and ends them."""
    for each, option in ((port, "--port"), (mlflow_port, "--mlflow-port")):
        require_free(each, f".venv/bin/python -m flows.server.serve {option} {each + 1}")
    prefect, mlflow = f"http://{HOST}:{port}", f"http://{HOST}:{mlflow_port}"
    environment = environment_of(prefect, mlflow)
    logs = Path(environment["PREFECT_HOME"]) / "logs"
    stack = Stack(environment, logs)
    with ending(stack, console.status("ending; running stages save their state")):
        with console.status("starting Prefect's server; the first time takes half a minute"):
            stack.start("server", "prefect", "server", "start", "--host", HOST, "--port", str(port))
            prepare_store(tracking_uri())
            page = ("--backend-store-uri", tracking_uri(), "--host", HOST, "--port", str(mlflow_port), "--workers", "1")
            stack.start("mlflow", "mlflow", "ui", *page)
            stack.wait_for(f"{prefect}/api/health")
        with console.status("deploying the flows of prefect.yaml"):
            prepare_server(environment["PREFECT_API_URL"])
            stack.run("deploy", "prefect", "--no-prompt", "deploy", *_deployments())
            start_worker(stack, ("--pool", POOL, "--type", "process", "--name", socket.gethostname()))
            stack.wait_for(f"{mlflow}/health")
        _say_where(console, prefect, mlflow, logs)
        yield stack


def _say_where(console: Console, prefect: str, mlflow: str, logs: Path) -> None:
    places = (
        ("Flows", f"{prefect}/v2/deployments"),
        ("Runs", f"{prefect}/v2/runs"),
        ("Models", f"{mlflow}/#/models?{MLFLOW_TRAININGS}"),
        ("Logs", logs),
    )
    for what, where in places:
        console.print(f"{what:<10} {where}", highlight=False, soft_wrap=True)
    console.print("Ctrl-C ends all; unfinished runs save a checkpoint and resume next time.")


def environment_of(prefect: str, mlflow: str) -> dict[str, str]:
    """The environment of every process: where the servers are, and what flows/environment.py sets."""
    return {
        **os.environ,
        "PREFECT_API_URL": f"{prefect}/api",
        "PREFECT_UI_URL": f"{prefect}/v2",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # By default leases are forgotten when the server ends, and the GPU of a run that ended with it stays taken.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
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


def _deployments() -> list[str]:
    """Options of ``prefect deploy`` for what this machine's worker can run."""
    content = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text(encoding="utf-8"))
    names = [each["name"] for each in content["deployments"] if each["work_pool"]["name"] == POOL]
    return [word for name in names for word in ("--name", name)]


if __name__ == "__main__":
    run_to_exit(lambda: typer.run(main))
