"""A flow that is cheap and counts: what the workers of tests/test_stack.py run.

It behaves as the project's flows do where a worker may die: a step that is done is not repeated, two processes never
work on one run at a time, and a model that is registered already gets no second version.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows.page.flow_run import sign

STEPS = ("prepare", "train", "register")
# The step `train` ends when there is such a file, so that a test can kill a worker in the middle of it.
GO = "go"
GO_SECONDS = 900.0
WORKER = "FUSELIP_TEST_WORKER"
MODEL = "counted"


@flow(name="counted")
def counted(number: int, folder: Path) -> None:
    """Run `number`, whose ledger in `folder` gets a line a step that was begun and a line a step that was done."""
    sign()
    with (folder / f"{number}.jsonl").open("a+", encoding="utf-8") as ledger:
        fcntl.flock(ledger.fileno(), fcntl.LOCK_EX)
        ledger.seek(0)
        done = {line["step"] for line in map(json.loads, ledger) if line["event"] == "done"}
        for step in STEPS:
            if step not in done:
                _note(ledger, "begun", step)
                work.with_options(name=step)(step, number, folder)
                _note(ledger, "done", step)


@task(cache_policy=NO_CACHE)
def work(step: str, number: int, folder: Path) -> None:
    """The step itself."""
    late = time.monotonic() + GO_SECONDS
    while step == "train" and not (folder / GO).exists():
        assert time.monotonic() < late, "nobody said go"
        time.sleep(0.2)
    if step == "register":
        register(number)


def register(number: int) -> None:
    """A version of the model for this run, whose artifact goes to the object store; found again if it is there."""
    client = MlflowClient()
    if client.search_model_versions(f"name = '{MODEL}' and tags.number = '{number}'"):
        return
    experiment = client.get_experiment_by_name(MODEL)
    assert experiment
    run = client.create_run(experiment.experiment_id, tags={"prefect_flow_run": str(flow_run.get_id())})
    client.log_text(run.info.run_id, f"model of run {number}", "model.txt")
    source = f"{run.info.artifact_uri}/model.txt"
    client.create_model_version(MODEL, source, run.info.run_id, tags={"number": str(number)})
    client.set_terminated(run.info.run_id)


def _note(ledger: Any, event: str, step: str) -> None:
    line = {"event": event, "step": step, "process": os.getpid(), "worker": os.environ[WORKER]}
    ledger.write(json.dumps(line) + "\n")
    ledger.flush()
    os.fsync(ledger.fileno())
