"""The stack of docker/compose.yaml at work: PostgreSQL, S3 store, MLflow, Prefect, and two workers, one killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import stack_flow
from mlflow import MlflowClient
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.settings import PREFECT_API_URL, temporary_settings
from stack import REPOSITORY, Stack, _postgresql, whole_stack

from flows.server.serve import POOL, prepare_server

RUNS = 8
WAIT_SECONDS = 600.0
pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with whole_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


@pytest.fixture(scope="module")
def prefect(stack: Stack) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: stack.api}), get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def mlflow(stack: Stack) -> MlflowClient:
    client = MlflowClient(stack.tracking)
    client.create_experiment(stack_flow.MODEL)
    client.create_registered_model(stack_flow.MODEL)
    return client


def test_eight_runs_survive_the_death_of_a_worker(
    stack: Stack, prefect: SyncPrefectClient, mlflow: MlflowClient, tmp_path: Path
) -> None:
    """Eight runs at once on two workers, one of which dies with all of its runs; the other one ends them."""
    prepare_server(stack.api)
    prefect.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=RUNS))
    deployment = stack_flow.counted.from_source(
        source=str(Path(stack_flow.__file__).parent), entrypoint="stack_flow.py:counted"
    )
    identity = deployment.deploy("stack", work_pool_name=POOL, print_next_steps=False)
    for name in ("one", "two"):
        start_worker(stack, name)
    runs = [
        prefect.create_flow_run_from_deployment(identity, parameters={"number": n, "folder": str(tmp_path)}).id
        for n in range(RUNS)
    ]
    wait_until(lambda: len(training(tmp_path)) == RUNS, stack)
    assert set(training(tmp_path)) == {"one", "two"}
    assert kill_worker("one") > RUNS // 2, "the worker and its runs"
    (tmp_path / stack_flow.GO).touch()
    wait_until(lambda: all(prefect.read_flow_run(run).state.is_completed() for run in runs), stack)
    ledgers = [[json.loads(line) for line in (tmp_path / f"{n}.jsonl").open()] for n in range(RUNS)]
    for lines in ledgers:
        done = Counter(line["step"] for line in lines if line["event"] == "done")
        assert done == dict.fromkeys(stack_flow.STEPS, 1), lines
    resumed = [lines for lines in ledgers if {line["worker"] for line in lines} == {"one", "two"}]
    assert resumed, "a run that one worker began was ended by the other"
    versions = mlflow.search_model_versions(f"name = '{stack_flow.MODEL}'")
    assert sorted(int(version.tags["number"]) for version in versions) == list(range(RUNS))
    kept = boto3.client("s3", endpoint_url=stack.store, **keys(stack)).list_objects_v2(Bucket="mlflow")
    assert sum(entry["Key"].endswith("/model.txt") for entry in kept["Contents"]) == RUNS


def test_what_a_backup_saved_comes_back(stack: Stack, mlflow: MlflowClient, tmp_path: Path) -> None:
    """docker/backup.sh and restore.sh as docs/flows.md says, with `docker compose exec` replaced by this machine."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "model.txt").write_text("model")
    compose = tmp_path / "compose"
    lines = (
        "#!/bin/sh",
        "shift 3",
        f"export PATH={_postgresql()}:$PATH PGHOST=127.0.0.1 PGPORT={stack.ports['database']}",
        f"export PGPASSWORD={stack.values['POSTGRES_PASSWORD']}",
        f'[ "$1" != tar ] || {{ shift 3; set -- tar -C {files} "$@"; }}',
        'exec "$@"',
    )
    compose.write_text("\n".join(lines))
    compose.chmod(0o755)

    def follow(script: str) -> None:
        command = ["sh", REPOSITORY / "docker" / script, tmp_path / "saved"]
        done = subprocess.run(command, env={**os.environ, "COMPOSE": str(compose)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    kept = mlflow.create_experiment("kept")
    follow("backup.sh")
    assert (tmp_path / "saved").stat().st_mode & 0o077 == 0
    mlflow.create_experiment("later")
    (files / "model.txt").unlink()
    follow("restore.sh")
    assert (files / "model.txt").read_text() == "model"
    wait_until(lambda: answers(lambda: mlflow.get_experiment_by_name("kept")), stack)
    assert mlflow.get_experiment_by_name("kept").experiment_id == kept
    assert mlflow.get_experiment_by_name("later") is None


def answers(ask: Callable[[], object]) -> bool:
    """Whether the server has found its database again, whose connections the restoring has cut."""
    with contextlib.suppress(Exception):
        return bool(ask())
    return False


def test_the_servers_report_to_nobody(stack: Stack) -> None:
    assert "telemetry" not in stack.said("prefect") + stack.said("mlflow")


def start_worker(stack: Stack, name: str) -> None:
    """compose.yaml's worker, and beside it what recovers runs; with a limit, so that both get their share."""
    command = [*stack.command("worker"), "--name", name, "--limit", str(RUNS // 2)]
    stack.start(f"worker-{name}", command, {**stack.environment("worker"), stack_flow.WORKER: name})


def kill_worker(name: str) -> int:
    """SIGKILL to a worker and its runs, as when their machine loses power; returns how many processes there were."""
    found = 0
    for place in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{stack_flow.WORKER}={name}".encode() in place.read_bytes().split(b"\0"):
                os.kill(int(place.parent.name), signal.SIGKILL)
                found += 1
    return found


def training(ledgers: Path) -> list[str]:
    """The workers of all runs that are in the middle of the step `train`."""
    last = [json.loads(path.read_text().splitlines()[-1]) for path in ledgers.glob("*.jsonl") if path.stat().st_size]
    return [line["worker"] for line in last if (line["event"], line["step"]) == ("begun", "train")]


def wait_until(true: Callable[[], bool], stack: Stack) -> None:
    late = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < late, stack.said("worker-two")
        time.sleep(0.3)


def keys(stack: Stack) -> dict[str, str]:
    """Keyword arguments of a client of the store."""
    names = {"aws_access_key_id": "STORE_ACCESS_KEY", "aws_secret_access_key": "STORE_SECRET_KEY"}
    return {name: stack.values[variable] for name, variable in names.items()} | {"region_name": "us-east-1"}
