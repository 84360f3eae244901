"""Runs in containers on a real engine, as Prefect's page starts, cancels and recovers them.

Two ways: the flow is a process and its stages are containers (``runner: docker``), or Prefect's docker worker starts
the flow as a container too, with its stages beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import engine, image_of
from prefect_stack import Served, serve, wait_until
from repository_copy import copy_of, dvc, environment

from flows.run.container import LABEL as OF_STAGE
from flows.run.gpu import limit_name
from flows.run.processes import LABEL, Process
from fuselip_core.data.phantom.data_set import draw_data_set

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]
DEPLOYMENT = "pipeline/adapt-rocov2-small-docker"
SHORT = {
    "codebook.steps": 2,
    "codebook.batch_size": 8,
    "tokenize.views": 1,
    "evaluate.batch_size": 16,
    "train.steps": 4,
    "train.batch_size": 16,
    "train.validate_every": 2,
    "prepare.dev_share": 0.2,
    "prepare.extra_pairs": ["concepts"],
}


class Pool:
    """`make serve-flows`, and beside it a pool of the type docker with a worker, set up as docs/flows.md says."""

    def __init__(self, served: Served) -> None:
        self.served, self.repository = served, served.repository
        for words in (("work-pool", "create", "docker", "--type", "docker"), ("deploy", "--name", DEPLOYMENT)):
            done = self.prefect("--no-prompt", *words)
            assert done.wait(300) == 0, served.said()
        self.worker = self.prefect("worker", "start", "--pool", "docker")

    def prefect(self, *words: str) -> subprocess.Popen[bytes]:
        around = {**environment(), "PREFECT_API_URL": self.served.api, "PWD": str(self.repository)}
        around["PREFECT_HOME"] = str(self.repository / ".prefect")
        with (self.repository / ".prefect" / "logs" / "docker.log").open("ab") as said:
            command = [sys.executable, "-m", "prefect", *words]
            return subprocess.Popen(command, cwd=self.repository, env=around, stdout=said, stderr=said)

    def order(self, words: str) -> None:
        (self.repository / "order").write_text(words)

    def steps(self) -> list[int]:
        """The steps of the slow stage, in the order in which they were taken."""
        ticks = self.repository / "ticks"
        return [int(tick.split(":")[0]) for tick in ticks.read_text().split()] if ticks.exists() else []

    def stages(self) -> list[Any]:
        """Containers of stages that run."""
        return list(engine().containers.list(filters={"label": f"{OF_STAGE}.repository={self.repository}"}))

    def flow(self, run_id: str) -> list[Any]:
        """The container of the flow run."""
        return list(engine().containers.list(filters={"label": f"io.prefect.flow-run-id={run_id}"}))


@pytest.fixture(scope="module")
def running(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    for name in ("download", "train", "docker/server"):
        image_of(name)
    served = serve(copy_of(template, tmp_path_factory.mktemp("served") / "repository"))
    pool = None
    try:
        pool = Pool(served)
        yield pool
    finally:
        if pool:
            pool.worker.terminate()
            pool.worker.wait(60)
        served.stop()


@pytest.fixture
def pool(running: Pool) -> Pool:
    """The pool, with no orders to its stages and nothing noted by them."""
    for name in ("order", "ticks", "saved", "calls", "real"):
        (running.repository / name).unlink(missing_ok=True)
    return running


def test_a_flow_in_a_container_runs_its_stages_beside_it(pool: Pool) -> None:
    """The real stages on a small sample, from raw data to a registered model."""
    (pool.repository / "real").touch()
    draw_data_set(pool.repository / "sample", 0, {"train": 48, "valid": 16, "test": 16})
    request = {"source": "phantom", "root": "sample", "name": "pool", "overrides": SHORT}
    run_id = pool.served.start(DEPLOYMENT, request=request, runner="docker")
    seen: set[str] = set()

    def ended() -> dict[str, Any] | None:
        seen.update(each.labels[f"{OF_STAGE}.stage"] for each in pool.stages())
        run = pool.served.run(run_id)
        return run if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED") else None

    run = wait_until(ended, "the end of the run")
    assert run["state"]["name"] == "Completed", f"{run['state']['message']}\n{pool.served.said()}"
    assert seen >= {"prepare", "train", "evaluate"}
    process = Process.read(run["labels"][LABEL])
    assert process is not None and not process.is_here, "the flow was no container"
    made = pool.repository / "runs" / "pool"
    assert json.loads((made / "artifacts" / "registered.json").read_text())["version"] == 1
    assert {path.stat().st_uid for path in made.rglob("*")} == {os.getuid()}
    assert "up to date" in dvc(pool.repository, "status", "runs/pool/dvc.yaml")
    wait_until(lambda: not pool.stages() and not pool.flow(run_id), "the end of the containers", seconds=60)


@pytest.mark.parametrize("deployment", ["train/train", DEPLOYMENT])
def test_a_cancelled_run_saves_its_state_and_a_second_click_goes_on(pool: Pool, deployment: str) -> None:
    pool.order("prepare slow 100000")
    request = {"name": f"cancelled-{deployment.count('docker')}"}
    run_id = pool.served.start(deployment, request=request, runner="docker")
    wait_until(lambda: len(pool.steps()) > 5, "the work of the stage")
    (container,) = pool.stages()
    assert container.labels[f"{OF_STAGE}.flow-run"] == run_id
    clicked = time.monotonic()
    pool.served.post(f"flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
    wait_until(lambda: not pool.stages(), "the end of the container", seconds=60)
    pool.served.wait(run_id, {"Cancelled"})
    wait_until(lambda: not pool.flow(run_id), "the end of the flow's container", seconds=60)
    assert time.monotonic() - clicked < 60
    done = len(pool.steps())
    assert (pool.repository / "saved").read_text().split() == [str(done)]
    pool.order(f"prepare slow {done + 5}")
    pool.served.wait(pool.served.start(deployment, request=request, runner="docker"), {"Completed"})
    assert pool.steps() == list(range(done + 5)), "a step was lost or repeated"


def test_a_run_whose_worker_and_container_are_killed_goes_on_elsewhere(pool: Pool) -> None:
    """As when a machine loses power: another one has the next container, whose host is called otherwise.

    It holds the machine's GPU and its deployment's only slot, for which a second run waits.
    """
    pool.order("codebook slow 400")
    run_id = pool.served.start(DEPLOYMENT, request={"name": "killed"}, runner="docker")
    wait_until(lambda: len(pool.steps()) > 5, "the work of the stage")
    first = Process.read(pool.served.run(run_id)["labels"][LABEL])
    assert pool.served.get(f"v2/concurrency_limits/{limit_name()}")["active_slots"] == 1
    second = pool.served.start(DEPLOYMENT, request={"name": "second"}, runner="docker")
    pool.worker.kill()
    pool.worker.wait()
    for each in (*pool.flow(run_id), *pool.stages()):
        each.kill()
    killed, at = time.monotonic(), len(pool.steps())
    assert pool.served.run(run_id)["state"]["type"] == "RUNNING", "somebody has noticed"
    pool.order(f"codebook slow {at + 5}")
    pool.worker = pool.prefect("worker", "start", "--pool", "docker")
    run = pool.served.wait(run_id, {"Completed"})
    assert run["run_count"] == 2 and Process.read(run["labels"][LABEL]) != first
    assert pool.steps()[: at + 5] == list(range(at + 5)), "a step was lost or repeated"
    pool.served.wait(second, {"Completed"})
    assert time.monotonic() - killed < 600
