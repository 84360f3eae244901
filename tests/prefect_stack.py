"""``make serve-flows`` for tests: Prefect's server, a worker and MLflow's page, serving a copy of this checkout."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

# The machine may be busy: what counts is that it happens.
PATIENCE = 900.0
# What a test's own surroundings must not decide. The last would have every stage's process compile torch's files anew.
FOREIGN = ("PREFECT_", "MLFLOW_", "PYTHONDONTWRITEBYTECODE")


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(happened: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """What `happened` returns once that is not empty; fails after a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := happened():
            return found
        time.sleep(0.3)
    raise AssertionError(f"{what} did not happen within {seconds:.0f} s")


def answer_of(ask: Callable[[], httpx.Response]) -> Any:
    """The JSON that `ask` brings, asked again while the server says that its database is busy (503)."""
    deadline = time.monotonic() + 60
    while (answer := ask()).status_code == httpx.codes.SERVICE_UNAVAILABLE and time.monotonic() < deadline:
        time.sleep(0.5)
    return answer.raise_for_status().json()


@dataclass
class Prefect:
    """A repository whose flows are served, and the servers' addresses."""

    repository: Path
    prefect: str
    mlflow: str

    @property
    def api(self) -> str:
        return f"{self.prefect}/api"

    def said(self) -> str:
        """The last words of all that serves, for the reader of a failure."""
        raise NotImplementedError

    def get(self, path: str) -> Any:
        """An answer of Prefect's API."""
        return answer_of(lambda: httpx.get(f"{self.api}/{path}", timeout=60))

    def post(self, path: str, content: dict[str, Any]) -> Any:
        """An answer of Prefect's API to `content`."""
        return answer_of(lambda: httpx.post(f"{self.api}/{path}", json=content, timeout=60))

    def start(self, deployment: str, environment: dict[str, str] | None = None, **parameters: Any) -> str:
        """Starts a deployment, such as ``pipeline/pipeline-nightly``, and returns the flow run's id."""
        found = self.get(f"deployments/name/{deployment}")
        content: dict[str, Any] = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        if environment:
            content["job_variables"] = {"env": {"PYTHONPATH": str(self.repository), **environment}}
        return str(self.post(f"deployments/{found['id']}/create_flow_run", content)["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        """The flow run as the server knows it."""
        return dict(self.get(f"flow_runs/{run_id}"))

    def wait(self, run_id: str, states: Collection[str]) -> dict[str, Any]:
        """The flow run once its state has one of these names; fails at once if it ends otherwise."""

        def arrived() -> dict[str, Any] | None:
            found = self.run(run_id)
            name = found["state"]["name"]
            ends = {"Completed", "Failed", "Cancelled"}
            assert name in states or name not in ends, f"{name}: {found['state']['message']}\n{self.said()}"
            return found if name in states else None

        return dict(wait_until(arrived, f"{' or '.join(states)} of {run_id}"))


@dataclass
class Served(Prefect):
    """``make serve-flows`` in a copy of the repository."""

    process: subprocess.Popen[bytes]

    def said(self) -> str:
        """What the command has printed so far, and the ends of its processes' logs."""
        logs = [path.read_text(errors="replace")[-3000:] for path in (self.repository / ".prefect" / "logs").glob("*")]
        return "\n".join([(self.repository / "served").read_text(), *logs])

    def stop(self) -> int:
        """Ctrl-C, and the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE)


def serve(repository: Path) -> Served:
    """Starts ``python -m flows.server.serve`` in `repository` and waits until everything is up."""
    ports = free_port(), free_port()
    plain = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    command = [sys.executable, "-m", "flows.server.serve", "--port", str(ports[0]), "--mlflow-port", str(ports[1])]
    with (repository / "served").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=repository, env={**plain, "PYTHONPATH": str(repository)}, stdout=log, stderr=log
        )
    served = Served(repository, f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}", process)
    try:
        wait_until(lambda: process.poll() is not None or "Ctrl-C ends all" in served.said(), "the start of everything")
        assert process.poll() is None, served.said()
    except BaseException:
        process.kill()
        raise
    return served
