"""Deployments for real: prefect.yaml on Prefect's server, a worker that runs them, cancelling, crashes, and turns."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import yaml
from fake_hub import FakeHub, Fault
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate
from prefect_stack import Served, wait_until
from repository_copy import copy_of, dvc

from flows.run.gpu import WAITING, limit_name
from flows.run.processes import Process, processes_of

# Whichever test comes first waits for the start of everything.
pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]
REPOSITORY = Path(__file__).parents[1]
DEPLOYMENTS = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())["deployments"]
POD = REPOSITORY / "flows" / "pools" / "kubernetes.json"
WANTED = {
    "download",
    "adapt-rocov2-small",
    "adapt-rocov2-base",
    "pretrain-cc3m",
    "pretrain-cc12m",
    "embed",
    "evaluate",
    "index",
    "promote",
    "pipeline-nightly",
}


# prefect.yaml, without a server


def test_everything_that_is_asked_for_is_declared() -> None:
    by_name = {each["name"]: each for each in DEPLOYMENTS}
    assert set(by_name) >= WANTED and len(by_name) == len(DEPLOYMENTS)
    assert {each["work_pool"]["name"] for each in DEPLOYMENTS} == {"process", "docker", "kubernetes"}
    assert by_name["pipeline-nightly"]["schedules"][0]["active"] is False


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda each: each["name"])
def test_parameters_fit_the_flow(deployment: dict[str, Any]) -> None:
    flow = load_flow_from_entrypoint(str(REPOSITORY / deployment["entrypoint"]))
    given = deployment["parameters"]
    validate(given, parameter_schema(flow).model_dump_for_openapi(), raise_on_error=True)
    request = flow.validate_parameters(given).get("request")
    assert request is not None or "request" not in given


def test_what_a_pod_gets_is_known_to_its_pool() -> None:
    template = json.loads(POD.read_text())
    known = set(template["variables"]["properties"])
    manifest = json.dumps(template["job_configuration"])
    assert '"nvidia.com/gpu": "{{ gpus }}"' in manifest
    for each in DEPLOYMENTS:
        if each["work_pool"]["name"] == "kubernetes":
            assert set(each["work_pool"]["job_variables"]) <= known
            assert each["work_pool"]["job_variables"]["gpus"] >= 1
    assert all(f"{{{{ {name} }}}}" in manifest for name in known)
    spec = template["job_configuration"]["job_manifest"]["spec"]
    assert (spec["completions"], spec["parallelism"]) == (1, 1)
    assert spec["template"]["spec"]["containers"][0]["name"] == "prefect-job"


# A worker that serves a copy with stand-ins for the stages


@pytest.fixture
def served(prefect_served: Served) -> Iterator[Served]:
    """What is served, with no orders to its stages and nothing noted by them."""
    names = ("order", "ticks", "saved", "calls")
    for name in names:
        (prefect_served.repository / name).unlink(missing_ok=True)
    yield prefect_served
    (prefect_served.repository / "order").unlink(missing_ok=True)


def order(served: Served, words: str) -> None:
    (served.repository / "order").write_text(words)


def noted(served: Served, name: str) -> list[str]:
    path = served.repository / name
    return path.read_text().split() if path.exists() else []


def steps(served: Served) -> list[int]:
    """The steps of the slow stage, in the order in which they were taken."""
    return [int(tick.split(":")[0]) for tick in noted(served, "ticks")]


def started(served: Served, **parameters: Any) -> str:
    """A run of the flow `train` whose first stage is under way."""
    run_id = served.start("train/train", **parameters)
    wait_until(lambda: noted(served, "ticks"), "the stage's first step")
    return run_id


def process_of(served: Served, run_id: str) -> Process:
    process = Process.read(served.run(run_id)["labels"]["fuselip.process"])
    assert process is not None
    return process


def test_only_this_machine_is_served(served: Served) -> None:
    listening = Path("/proc/net/tcp").read_text().splitlines()[1:]
    ports = {httpx.URL(served.prefect).port, httpx.URL(served.mlflow).port}
    places = [line.split()[1].split(":") for line in listening if line.split()[3] == "0A"]
    hosts = {host for host, port in places if int(port, 16) in ports}
    assert hosts == {"0100007F"}
    settings = served.get("admin/settings")
    assert settings["server"]["analytics_enabled"] is False


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"steps": 0}, "0 is less than the minimum of 1"),
        ({"stepz": 1}, "'stepz' was unexpected"),
        ({"size": "huge"}, "'huge' is not one of"),
        ({"recipe": "nope"}, "'nope' is not one of"),
        ({"name": "../x"}, "does not match"),
    ],
)
def test_wrong_parameter_is_refused_before_there_is_a_run(served: Served, request_: dict[str, Any], words: str) -> None:
    with pytest.raises(httpx.HTTPStatusError) as caught:
        served.start("train/train", request=request_)
    assert caught.value.response.status_code == 409 and words in caught.value.response.text


def test_worker_runs_a_deployment_and_leaves_its_results_on_the_page(served: Served) -> None:
    run_id = served.start("pipeline/pipeline-nightly", request={"name": "first", "steps": 7})
    run = served.wait(run_id, {"Completed"})
    assert run["name"] == f"sample-tiny-0d4a7e11-{run_id[:6]}"
    assert noted(served, "calls")[-3:] == ["train", "evaluate", "register"]
    assert (served.repository / "runs" / "first" / "artifacts" / "model" / "made").read_text() == "train 7"
    asked = {"artifacts": {"flow_run_id": {"any_": [run_id]}}}
    found = {each["key"]: each for each in served.post("artifacts/filter", asked)}
    assert found["results"]["type"] == "markdown" and "| 0.400 | chance | 0.010 |" in found["results"]["data"]
    assert found["metrics"]["type"] == "table"


def test_download_fetches_and_keeps_the_version(served: Served) -> None:
    files = {"train.bin": b"shard" * 5000, "README.md": b"a data set"}
    hub = FakeHub()
    hub.add_repo("someone/pictures", dict(files), {"train.bin"})
    hub.fail("/store/", Fault(cut_after=1000))
    where = {"HF_ENDPOINT": hub.url}
    request = {"source": "hub:someone/pictures", "folder": "Pictures_data"}
    with hub.running():
        missing = served.start("download/download", where, request={**request, "source": "hub:someone/nothing"})
        failed = served.wait(missing, {"Failed"})
        run = served.wait(served.start("download/download", where, request=request), {"Completed"})
    message = failed["state"]["message"]
    assert "someone/nothing" in message and "Traceback" not in message
    assert run["name"] == f"download-pictures-{run['id'][:6]}"
    folder = served.repository / request["folder"]
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert "up to date" in dvc(served.repository, "status", "Pictures_data.dvc")
    asked = {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}}
    found = {each["key"]: each for each in served.post("artifacts/filter", asked)}
    assert "version: `Pictures_data.dvc`" in found["download"]["data"]


def logs_of(served: Served, run_id: str) -> list[dict[str, Any]]:
    """What the page of a flow run shows as its log."""
    return list(served.post("logs/filter", {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200}))


@pytest.mark.parametrize(
    ("request_", "name", "words"),
    [
        ({"source": "rocov2", "root": "/nowhere"}, "pipeline-rocov2", "of your rocov2 files with the field Root"),
        ({"overrides": {"train.stepz": 1}, "name": "wrong"}, "pipeline-wrong", "did you mean steps?"),
        ({"name": "wrong", "steps": 5, "epochs": 2}, "pipeline-wrong", "steps and epochs are both given"),
    ],
)
def test_a_users_mistake_is_a_sentence_with_the_forms_fields(
    served: Served, request_: dict[str, Any], name: str, words: str
) -> None:
    run_id = served.start("pipeline/pipeline-nightly", request=request_)
    run = served.wait(run_id, {"Failed"})
    assert words in run["state"]["message"] and "--" not in run["state"]["message"]
    assert run["name"] == f"{name}-{run_id[:6]}", "a failed run too says what it was for"
    assert not [each for each in logs_of(served, run_id) if "Traceback" in each["message"]]


def test_a_dry_run_shows_the_settings_and_runs_nothing(served: Served) -> None:
    request = {"name": "looked-at", "steps": 40, "overrides": {"train.batch_size": 32}, "dry_run": True}
    run = served.wait(served.start("pipeline/pipeline-nightly", request=request), {"Completed"})
    asked = {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}}
    (shown,) = served.post("artifacts/filter", asked)
    assert "training: 40 steps of 32 pairs" in shown["data"] and "  batch_size: 32  # " in shown["data"]
    assert noted(served, "calls") == [] and not (served.repository / "runs" / "looked-at").exists()


def test_cancelling_stops_the_stage_which_saves_its_state(served: Served) -> None:
    order(served, "prepare slow 100000")
    run_id = started(served, request={"name": "cancelled"})
    served.post(f"flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
    served.wait(run_id, {"Cancelled"})
    assert len(noted(served, "saved")) == 1
    ticks = noted(served, "ticks")
    assert noted(served, "saved") == [str(len(ticks))]
    child = int(ticks[-1].split(":")[2])
    assert not Path(f"/proc/{child}").exists()
    assert not [each for each in logs_of(served, run_id) if "Crash" in each["message"] or each["level"] >= 50]


def test_run_whose_process_is_killed_goes_on_from_its_checkpoint(served: Served) -> None:
    order(served, "prepare slow 40")
    run_id = started(served, request={"name": "crashed"})
    process = process_of(served, run_id)
    os.kill(process.pid, signal.SIGKILL)
    run = served.wait(run_id, {"Completed"})
    assert run["run_count"] == 2
    assert [int(tick.split(":")[0]) for tick in noted(served, "ticks")] == list(range(40)), (
        "a step was lost or repeated"
    )
    # The stage saw that its flow had gone, and saved; the second time it went on from there.
    assert len(noted(served, "saved")) == 1
    assert noted(served, "calls") == ["prepare", "prepare", "codebook", "tokenize", "train"]


def test_a_run_whose_worker_is_killed_before_it_starts_is_run(served: Served) -> None:
    """The worker has taken the run, and dies with the process that it has just started."""
    run_id = served.start("train/train", request={"name": "not-begun"})
    (process,) = wait_until(lambda: processes_of(UUID(run_id)), "the start of a process")
    worker = process.parent()
    for each in (worker, process):
        each.kill()
    run = served.wait(run_id, {"Completed"})
    assert noted(served, "calls") == ["prepare", "codebook", "tokenize", "train"] and run["run_count"] <= 2


def test_two_runs_take_turns_on_one_gpu(served: Served, tmp_path: Path, template: Path) -> None:
    """In two checkouts, so that only the GPU's limit can keep them apart."""
    limit = served.get(f"v2/concurrency_limits/{limit_name()}")
    assert limit["limit"] == 1
    first, second = (copy_of(template, tmp_path / name) for name in ("first", "second"))
    with train_in(first, served, "codebook slow 100000") as one:
        wait_until(lambda: (first / "ticks").exists(), "the first run's turn")
        with train_in(second, served, "codebook slow 3") as two:
            wait_until(lambda: "waiting for a GPU" in (second / "said").read_text(), "the second run's coming to wait")
            assert not (second / "ticks").exists()
            # What a person sees in the list of runs: which one waits, and for whom.
            wanted = {"flow_runs": {"state": {"name": {"any_": [WAITING]}}}}
            (waiting,) = wait_until(lambda: served.post("flow_runs/filter", wanted), "the waiting run's state")
            (working,) = served.post("flow_runs/filter", {"flow_runs": {"state": {"name": {"any_": ["Running"]}}}})
            assert f"{working['name']} has all of {limit_name()} (1)" in waiting["state"]["message"]
            one.terminate()
            assert one.wait(600) != 0 and (first / "saved").exists()
            assert two.wait(600) == 0, (second / "said").read_text()[-3000:]
            assert served.run(waiting["id"])["state"]["name"] == "Completed"
    assert times(first)[-1] <= times(second)[0], "both were at work at the same time"


@contextlib.contextmanager
def train_in(folder: Path, served: Served, words: str) -> Iterator[subprocess.Popen[bytes]]:
    """The flow `train` of a checkout, which says what it has to say in `said`; ended at the end."""
    (folder / "order").write_text(words)
    environment = {**os.environ, "PREFECT_API_URL": served.api, "PYTHONPATH": str(folder)}
    with (folder / "said").open("wb") as log:
        command = [sys.executable, "-m", "flows.train"]
        run = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield run
    finally:
        run.terminate()
        run.wait(600)


def times(folder: Path) -> list[float]:
    """When the slow stage of a checkout took its steps."""
    return [float(tick.split(":")[1]) for tick in (folder / "ticks").read_text().split()]
