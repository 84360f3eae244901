"""The parts of flows, without a server: forms, plans, locks, processes, pages, and what a run's page shows."""

from __future__ import annotations

import base64
import io
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from PIL import Image
from prefect.client.schemas.objects import FlowRun
from prefect.states import Crashed, Pending, Running
from prefect.types._datetime import now
from prefect_stack import wait_until
from pydantic import ValidationError
from rich.console import Console

from flows.download import DownloadRequest, _misplaced
from flows.evaluate import EvaluateRequest
from flows.page import artifacts
from flows.page.flow_run import LABEL, run_name
from flows.page.progress import ProgressArtifact
from flows.page.summary import print_summary
from flows.promote import PromoteRequest
from flows.run.folder import RunRequest, open_run_folder, plan_run
from flows.run.forms import TrainCorrections
from flows.run.lock import run_lock
from flows.run.processes import Process, children_of, is_starting_here, parent_of
from flows.run.runner import Ending, Outcome, _status
from flows.server import recover, serve
from flows.server.serve import silence
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.comparisons import comparison_rows
from fuselip_core.registry.register import promote
from fuselip_core.tracking.services import mlflow_client


@pytest.fixture
def bare(tmp_path: Path, repository: Path) -> Path:
    """A repository with nothing but the two files that a run folder is made from."""
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text((repository / name).read_text())
    (tmp_path / "images").mkdir()
    return tmp_path


# Forms


def test_a_form_shows_ranges_choices_and_what_recipes_have() -> None:
    fields = TrainCorrections.model_json_schema()["properties"]
    steps, precision = fields["steps"], fields["precision"]
    assert (steps["type"], steps["minimum"]) == ("integer", 1) and "default" not in steps
    assert "in sample" in steps["description"]
    assert precision["enum"] == ["auto", "float32", "bfloat16"]
    request = RunRequest.model_json_schema()
    assert "sample" in request["properties"]["recipe"]["enum"]
    assert request["$defs"]["Train"]["additionalProperties"] is False


def test_a_form_shows_no_value_that_it_would_send_though_nobody_gave_it() -> None:
    """A part within a section too: `prepare.dicom` with defaults would put a folder's own dicom.yaml aside."""
    parts = RunRequest.model_json_schema()["$defs"]
    assert [
        name for name, part in parts.items() if any("default" in each for each in part["properties"].values())
    ] == []
    assert "Empty: file." in parts["Dicom"]["properties"]["window"]["description"]
    assert RunRequest.model_validate({"prepare": {"dicom": {}}}).corrections() == {}
    request = RunRequest.model_validate({"prepare": {"dicom": {"window": "lung"}}})
    assert request.corrections() == {"prepare": {"dicom": {"window": "lung"}}}
    with pytest.raises(ValidationError):
        RunRequest.model_validate({"prepare": {"dicom": {"windows": "lung"}}})


def test_a_form_keeps_limits_and_writes_down_only_what_is_filled() -> None:
    with pytest.raises(ValidationError):
        RunRequest.model_validate({"train": {"steps": 0}})
    request = RunRequest.model_validate({"size": "small", "train": {"steps": 5}, "overrides": ["train.steps=7"]})
    assert request.model_dump(exclude_defaults=True) == {
        "size": "small",
        "train": {"steps": 5},
        "overrides": ("train.steps=7",),
    }
    assert request.corrections() == {"model": {"size": "small"}, "train": {"steps": 7}}, "overrides win"


def test_fields_of_a_form_become_the_runs_settings(bare: Path) -> None:
    request = RunRequest.model_validate(
        {"recipe": "rocov2-tiny", "size": "tiny", "root": bare / "images", "evaluate": {"examples": 3}}
    )
    plan = plan_run(bare, request)
    assert not (bare / "runs").exists(), "a plan writes nothing"
    run = plan.write()
    assert run.folder.name == "rocov2-tiny-tiny" and run.settings.evaluate.examples == 3
    assert open_run_folder(bare, request).settings == run.settings


def test_source_without_a_recipe_of_its_own_asks_for_one(bare: Path) -> None:
    with pytest.raises(FuselipError, match="no recipe is meant for slake; name one with --recipe"):
        plan_run(bare, RunRequest(source="slake", root=bare / "images"))


def test_an_earlier_run_is_opened_again_with_what_it_had(bare: Path) -> None:
    made = open_run_folder(bare, RunRequest(source="rocov2", root=bare / "images", overrides=("train.steps=7",)))
    request = EvaluateRequest.model_validate({"run": "rocov2", "evaluate": {"split": "test"}})
    again = request.plan(bare).write()
    assert again.settings.train == made.settings.train and again.settings.evaluate.split == "test"
    assert EvaluateRequest.model_validate({"run": "rocov2"}).plan(bare).run.settings == again.settings
    with pytest.raises(FuselipError, match=r"there is no run .*/nope; there are: rocov2"):
        EvaluateRequest.model_validate({"run": "nope"}).plan(bare)


# Turns and processes


def test_a_second_flow_on_the_same_run_waits(bare: Path) -> None:
    said: list[str] = []
    order: list[str] = []
    folder = bare / "runs" / "one"

    def second() -> None:
        with run_lock(bare, folder, "second", said.append):
            order.append("second")

    with run_lock(bare, folder, "first", said.append), run_lock(bare, bare / "runs" / "two", "other", said.append):
        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 30
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"] and said == ["waiting for another run that is at work here: first"]


def test_a_process_is_told_from_its_successor() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={"PREFECT__FLOW_RUN_ID": "7"})
    try:
        here = Process(socket.gethostname(), child.pid, started_of(child.pid))
        assert here.lives and here.is_here and Process.read(str(here)) == here
        assert not Process(here.host, here.pid, "1").lives
        assert child.pid in children_of(parent_of(child.pid) or 0)
        assert is_starting_here("7")  # type: ignore[arg-type]
    finally:
        child.kill()
    wait_until(lambda: not here.lives, "the end of the process, whose remains are still there")
    child.wait()
    assert not here.lives and Process.read("nonsense") is None and parent_of(child.pid) is None


def started_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@pytest.mark.parametrize(("code", "status"), [(0, "done"), (3, "unchanged"), (75, "interrupted"), (143, "interrupted")])
def test_exit_codes_become_states(code: int, status: str) -> None:
    assert _status(code) == status


@pytest.mark.parametrize("code", [1, 2, 137, 255])
def test_what_would_happen_again_is_no_interruption(code: int) -> None:
    assert _status(code) == "failed"


# Recovery: whom it believes to be gone


def flow_run(state: Any, process: Process | None, starts: int = 1) -> FlowRun:
    labels = {LABEL: str(process)} if process else {}
    return FlowRun.model_construct(id="x", name="run", state=state, labels=labels, run_count=starts)


def test_only_a_run_whose_process_is_gone_from_here_is_lost() -> None:
    said: list[str] = []
    alive = Process.current()
    gone, elsewhere = Process(alive.host, alive.pid, "1"), Process("other-machine", 1, "1")

    def lost(state: Any, process: Process | None, starts: int = 1, hosts: tuple[str, ...] = ()) -> bool:
        return recover._loss(flow_run(state, process, starts), hosts, said.append) is not None

    assert lost(Running(), gone) and lost(Crashed(), gone)
    assert not lost(Running(), alive) and not lost(Running(), None)
    assert not lost(Running(), gone, starts=recover.MOST_STARTS), "it crashes by itself"
    assert not lost(Running(), elsewhere) and "add --gone other-machine" in said[-1]
    assert lost(Running(), elsewhere, hosts=("other-machine",))


def test_a_run_that_its_worker_never_started_is_lost_after_a_while() -> None:
    def reason(age: float) -> str | None:
        state = Pending(timestamp=now("UTC") - timedelta(seconds=age))
        return recover._loss(flow_run(state, None), (), print)

    assert reason(recover.PENDING_SECONDS - 60) is None
    assert reason(recover.PENDING_SECONDS + 60) == "its worker took it and never started it"


def test_a_run_that_crashes_again_before_it_begins_is_not_forgotten() -> None:
    run = flow_run(Crashed(), None)
    assert recover._loss(run, (), print) is None, "never signed, so none of ours"
    run.labels[recover.RECOVERIES] = "1"
    assert recover._loss(run, (), print) == "it crashed before it began"
    run.labels[recover.RECOVERIES] = str(recover.MOST_STARTS)
    assert recover._loss(run, (), print) is None


# Serving


def test_a_taken_port_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve.main(["--port", str(port)]) == 1
    assert f"port {port} is taken" in capsys.readouterr().err


def test_a_checkout_is_served_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On other ports too: two servers would share one database, and two workers one queue."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with serve.served_once(tmp_path, 4200):
        assert serve.main(["--port", "4201", "--mlflow-port", "5001"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: this checkout is being served already, on http://127.0.0.1:4200; ")
    assert len(said.splitlines()) == 1
    with serve.served_once(tmp_path, 4201):
        pass


def test_a_stack_replaces_what_it_may_and_ends_everything(tmp_path: Path) -> None:
    others = set(children_of(Process.current().pid))
    stack = serve.Stack({"PATH": "/usr/bin:/bin"}, tmp_path)
    stack.start("worker", "timeit", "-n1", "-r1", replaceable=True)
    stack.start("server", "http.server", "--bind", "127.0.0.1", "0")
    deadline = time.monotonic() + 60
    while not (replaced := stack.check()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert replaced == ["worker"]
    pids = set(children_of(Process.current().pid)) - others
    stack.stop()
    assert pids and not pids & set(children_of(Process.current().pid))


def test_pages_lose_the_key_of_the_counting_service(tmp_path: Path) -> None:
    key = "0123456789abcdef" * 2
    (tmp_path / "a.js").write_text(f"amplitude;function u(){{return`{key}`}}")
    (tmp_path / "b.js").write_text(f"function u(){{return`{key}`}}")
    assert silence(tmp_path) == 1 and silence(tmp_path) == 0
    assert key not in (tmp_path / "a.js").read_text() and key in (tmp_path / "b.js").read_text()


# What a run's page shows


@pytest.fixture
def run(bare: Path) -> Any:
    made = open_run_folder(bare, RunRequest(name="shown", overrides=("prepare.limit=9",)))
    (made.artifacts / "prepared").mkdir(parents=True)
    (made.artifacts / "prepared" / "manifest.json").write_text('{"data_version": "1a2b3c4d5e6f"}')
    return made


def test_runs_are_named_by_recipe_size_and_data(run: Any) -> None:
    assert run_name(run, with_data=False) == "sample-tiny"
    assert run_name(run, with_data=True) == "sample-tiny-1a2b3c4d"


def test_results_stand_beside_their_controls(run: Any) -> None:
    metrics = {"retrieval/image_to_text/recall_at_1": 0.4, "retrieval/image_to_text/chance_at_1": 0.01}
    page = artifacts.results_page(run, comparison_rows(metrics), metrics)
    assert "| image → text, recall@1 | 0.400 | chance | 0.010 |" in page
    assert "| retrieval/image_to_text/chance_at_1 | 0.01 |" in page


def test_pictures_are_made_small(tmp_path: Path) -> None:
    (tmp_path / "codebook").mkdir()
    Image.new("RGB", (3000, 1500), "red").save(tmp_path / "codebook" / "reconstructions.png")
    (tmp_path / "report").mkdir()
    for name in ("reconstructions", "training"):
        Image.new("RGB", (30, 15)).save(tmp_path / "report" / f"{name}.png")
    path, other = artifacts.pictures_of(tmp_path)
    assert path.parent.name == "codebook" and other.stem == "training", "the report's copy is not shown again"
    head, _, content = artifacts.data_uri(path).partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(content))).size == (900, 450)


def test_mlflow_is_linked_where_its_page_is_known(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.artifacts / "tracking" / "train"
    folder.mkdir(parents=True)
    known = '{"mlflow_run_id": "r", "mlflow_experiment_id": "1", "mlflow_uri": "sqlite:////x.db"}'
    (folder / "run.json").write_text(known)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////x.db")
    monkeypatch.delenv("FUSELIP_MLFLOW_UI", raising=False)
    assert artifacts.mlflow_url(run.artifacts) is None
    monkeypatch.setenv("FUSELIP_MLFLOW_UI", "http://127.0.0.1:5000/")
    page = "http://127.0.0.1:5000/#/experiments/1/runs/r"
    assert artifacts.mlflow_url(run.artifacts) == f"{page}?workflowType=machine_learning"
    assert artifacts.mlflow_url(run.artifacts, "/artifacts") == f"{page}/artifacts?workflowType=machine_learning"
    assert f"[MLflow run]({page}?" in artifacts.results_page(run, [], {"recall": 0.5})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////other.db")
    assert artifacts.mlflow_url(run.artifacts) is None, "the page shows another store"


def test_progress_is_read_from_lines_and_never_ends_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[float] = []
    lines: list[str] = []
    progress = ProgressArtifact("train", lines.append)
    monkeypatch.setattr(progress, "_show", lambda percent, what: shown.append(percent))
    for line in ("going on from step 3", "training: 30 of 60", "training: 31 of 60", "training: 4 of ?"):
        progress(line)
    assert shown == [50.0] and len(lines) == 4, "shown now and then, and every line is passed on"
    silent = ProgressArtifact("no stage! of this name", lines.append)
    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", broken)
    silent("training: 1 of 2")
    assert lines[-1] == "training: 1 of 2"


def broken(*_: Any, **__: Any) -> None:
    raise ConnectionError("no server")


# Download and promotion


def test_a_download_asks_for_what_the_form_says() -> None:
    request = DownloadRequest(source="cc3m", folder=Path("x"), revision="main", include=("*.tar",), verify=True)
    assert " ".join(request.words()) == "data download cc3m --out x --revision main --include *.tar --verify"
    assert "choose a folder below it" in (_misplaced(DownloadRequest(folder=Path("/elsewhere")), "docker") or "")
    assert _misplaced(DownloadRequest(folder=Path("/elsewhere")), "process") is None
    assert "a folder of its own" in (_misplaced(DownloadRequest(folder=Path()), "process") or "")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """A registry with three versions of a model, of which the second missed a gate."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = mlflow_client(uri)
    client.create_registered_model("m")
    for number, gates in enumerate(("passed", "failed", "passed"), 1):
        client.create_model_version("m", str(tmp_path), tags={"gates": gates})
        client.set_registered_model_alias("m", "candidate", str(number))
    client.set_registered_model_alias("m", "champion", "1")
    return client


def test_an_alias_moves_forward_and_back(registry: MlflowClient) -> None:
    assert promote("m", None, "champion") == {"name": "m", "version": 3, "alias": "champion", "before": 1}
    assert promote("m", 1, "champion")["before"] == 3
    assert int(registry.get_model_version_by_alias("m", "champion").version) == 1


def test_a_version_that_missed_a_gate_is_promoted_only_on_purpose(registry: MlflowClient) -> None:
    with pytest.raises(FuselipError, match="version 2 missed a gate"):
        promote("m", 2, "champion")
    assert promote("m", 2, "champion", despite_gates=True)["version"] == 2


def test_promoting_what_is_not_there_is_one_sentence(registry: MlflowClient) -> None:
    for name, version in (("m", 9), ("nope", None)):
        with pytest.raises(FuselipError, match="there is no"):
            promote(name, version, "champion")
    assert PromoteRequest().version is None


def test_the_command_line_prints_what_a_train_flow_has(bare: Path, run: Any) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    print_summary(Ending(run, (Outcome("train", "done", 3.0, ""),)), console)
    text = console.export_text()
    assert "train 3 s" in text and "Model" not in text
