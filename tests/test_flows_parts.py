"""The parts of flows, without a server: forms, plans, locks, processes, pages, and what a run's page shows."""

from __future__ import annotations

import base64
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mlflow import MlflowClient
from PIL import Image
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling, Crashed, Pending, Running
from prefect.types._datetime import now
from prefect_stack import free_port, wait_until
from pydantic import ValidationError
from rich.console import Console

from flows.download import DownloadRequest, _misplaced
from flows.evaluate import EvaluateRequest
from flows.page import artifacts
from flows.page.flow_run import LABEL, run_name
from flows.page.progress import ProgressArtifact
from flows.page.summary import print_summary
from flows.promote import PromoteRequest
from flows.run import processes
from flows.run.estimate import estimates, preview
from flows.run.folder import plan
from flows.run.forms import RunRequest, StageRequest
from flows.run.lock import run_lock
from flows.run.processes import HEARTBEAT, Process, children_of, processes_of
from flows.run.runner import Ending, Outcome, _status
from flows.server import recover, serve
from flows.server.ports import mlflow_page, require_free, served_once
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.comparisons import comparison_rows
from fuselip_core.files import write_json
from fuselip_core.registry.register import promote
from fuselip_core.tracking.store import mlflow_client

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def bare(tmp_path: Path, repository: Path) -> Path:
    """A repository with nothing but the two files that a run folder is made from."""
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).write_text((repository / name).read_text())
    (tmp_path / "images").mkdir()
    return tmp_path


# Forms


def test_the_form_is_short_and_names_each_thing_once() -> None:
    fields = RunRequest.model_json_schema()["properties"]
    first = ["recipe", "size", "source", "root", "name", "steps", "epochs", "split", "overrides", "dry_run"]
    assert list(fields) == first
    assert "$defs" not in RunRequest.model_json_schema(), "no section within the form"
    assert (fields["steps"]["type"], fields["steps"]["minimum"]) == ("integer", 1)
    assert "sample" in fields["recipe"]["enum"] and fields["split"]["enum"] == ["dev", "valid", "test"]


@pytest.mark.parametrize("kind", [RunRequest, EvaluateRequest, StageRequest, DownloadRequest, PromoteRequest])
def test_a_form_shows_no_value_that_is_not_used(kind: type[Any]) -> None:
    """An empty field means the recipe's value, whichever recipe it is: no default is shown for it."""
    for name, field in kind.model_json_schema()["properties"].items():
        optional = kind.model_fields[name].default is None
        assert ("default" not in field) == optional, name
        assert ("Empty:" in field["description"]) == (optional or name == "include"), name


def test_a_form_keeps_limits_and_writes_down_only_what_is_filled() -> None:
    with pytest.raises(ValidationError):
        RunRequest.model_validate({"steps": 0})
    with pytest.raises(ValidationError):
        RunRequest.model_validate({"stepz": 5})
    request = RunRequest.model_validate({"size": "small", "steps": 5, "overrides": {"train.steps": 7}})
    assert request.model_dump(exclude_defaults=True) == {
        "size": "small",
        "steps": 5,
        "overrides": {"train": {"steps": 7}},
    }
    assert request.corrections() == {"model": {"size": "small"}, "train": {"steps": 7}}, "overrides win"


def test_overrides_may_be_nested_or_dotted(bare: Path) -> None:
    given = {"train.steps": 5, "train": {"batch_size": 8}, "prepare.dicom.window": "lung"}
    wanted = {"train": {"steps": 5, "batch_size": 8}, "prepare": {"dicom": {"window": "lung"}}}
    assert RunRequest(overrides=given).corrections() == wanted
    mixture = {"train.mixture.caption": 1.0, "train.mixture.vqa": 0.5}
    assert RunRequest(overrides=mixture).overrides == {"train": {"mixture": {"caption": 1.0, "vqa": 0.5}}}
    with pytest.raises(FuselipError, match=r"train\.stepz: there is no such field; did you mean steps\?"):
        plan(bare, RunRequest(overrides={"train.stepz": 5}))
    with pytest.raises(FuselipError, match="steps and epochs are both given"):
        plan(bare, RunRequest(steps=5, epochs=1.0))


def test_length_and_split_become_settings(bare: Path) -> None:
    settings = plan(bare, RunRequest(epochs=2.0, split="valid")).run.settings
    assert (settings.train.steps, settings.train.epochs, settings.evaluate.split) == (None, 2.0, "valid")
    assert plan(bare, RunRequest(steps=9)).run.settings.train.steps == 9


def test_fields_of_a_form_become_the_runs_settings(bare: Path) -> None:
    request = RunRequest.model_validate(
        {"recipe": "rocov2-tiny", "size": "tiny", "root": bare / "images", "overrides": {"evaluate.examples": 3}}
    )
    planned = plan(bare, request)
    assert not (bare / "runs").exists(), "a plan writes nothing"
    run = planned.write()
    assert run.folder.name == "rocov2-tiny-tiny" and run.settings.evaluate.examples == 3
    assert plan(bare, request).write().settings == run.settings


@pytest.mark.parametrize(
    ("request_", "on_the_form", "as_option"),
    [
        (
            RunRequest(source="rocov2", root=Path("/nowhere")),
            "the field Root",
            "--root (make demo SOURCE=rocov2 ROOT=...)",
        ),
        (StageRequest(run="nope"), "the field Run may be", "--run may be"),
        (RunRequest(source="slake"), "with the field Recipe", "with --recipe"),
    ],
)
def test_messages_name_the_fields_of_the_place_where_they_are_read(
    bare: Path, monkeypatch: pytest.MonkeyPatch, request_: Any, on_the_form: str, as_option: str
) -> None:
    with pytest.raises(FuselipError) as caught:
        plan(bare, request_)
    assert as_option in str(caught.value)
    monkeypatch.setattr("prefect.runtime.deployment.id", "a-deployment", raising=False)
    with pytest.raises(FuselipError) as caught:
        plan(bare, request_)
    assert on_the_form in str(caught.value) and "--" not in str(caught.value)


@pytest.mark.parametrize("source", ["folder", "dicom"])
def test_pictures_of_ones_own_have_a_recipe(bare: Path, source: str) -> None:
    """README: make demo SOURCE=folder ROOT=..., with nothing else."""
    settings = plan(bare, RunRequest(source=source, root=bare / "images")).run.settings
    assert (settings.recipe, settings.prepare.source) == ("pictures", source)
    assert dict(settings.train.mixture) == {"caption": 1.0} and not settings.prepare.extra_pairs


def test_a_dry_run_shows_what_would_be(bare: Path) -> None:
    run = plan(bare, RunRequest(steps=100, overrides={"train.batch_size": 60})).run
    text = preview(run)
    assert "training: 100 steps of 60 pairs" in text and "time: unknown until a first run" in text
    assert "  steps: 100  # " in text
    write_json(bare / "artifacts" / "metrics.json", {"train/pairs_per_second": 50.0})
    write_json(bare / "artifacts" / "model" / "config.json", {"width": 128})
    assert "time: about 2.0 min of training" in preview(run), "100 steps of 60 pairs, 50 pairs a second"
    other = plan(bare, RunRequest(overrides={"model.family": "siglip-sf"})).run
    assert "no estimate for the family siglip-sf" in preview(other)


def test_memory_is_estimated_near_what_was_measured(bare: Path) -> None:
    """benchmarks/README.md: small at a batch of 32 takes 3.5 GB with all libraries, base at 16 takes 3.3 GB."""
    for size, batch, measured in (("small", 32, 3.5), ("base", 16, 3.3)):
        run = plan(bare, RunRequest(size=size, overrides={"train.batch_size": batch})).run
        line = next(line for line in estimates(run) if line.startswith("memory"))
        estimated = float(line.split("about ")[1].split(" GB")[0])
        assert 0.75 * measured < estimated + 0.7 < 1.25 * measured, line


def test_source_without_a_recipe_of_its_own_asks_for_one(bare: Path) -> None:
    with pytest.raises(FuselipError, match="slake has no recipe of its own; choose one with --recipe"):
        plan(bare, RunRequest(source="slake", root=bare / "images"))


def test_an_earlier_run_is_opened_again_with_what_it_had(bare: Path) -> None:
    made = plan(bare, RunRequest(source="rocov2", root=bare / "images", overrides={"train.steps": 7})).write()
    request = EvaluateRequest.model_validate({"run": "rocov2", "split": "test"})
    again = plan(bare, request).write()
    assert again.settings.train == made.settings.train and again.settings.evaluate.split == "test"
    assert plan(bare, EvaluateRequest.model_validate({"run": "rocov2"})).run.settings == again.settings
    with pytest.raises(FuselipError, match=r"there is no run .*/nope; --run may be: rocov2"):
        plan(bare, EvaluateRequest.model_validate({"run": "nope"}))


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
        here = Process(Process.current().host, child.pid, started_of(child.pid))
        assert here.lives and here.is_here and Process.read(str(here)) == here
        assert not Process(here.host, here.pid, "1").lives
        assert child.pid in [each.pid for each in children_of(Process.current().pid)]
        assert [process.pid for process in processes_of("7")] == [child.pid]  # type: ignore[arg-type]
    finally:
        child.kill()
    wait_until(lambda: not here.lives, "the end of the process, whose remains are still there")
    child.wait()
    assert not here.lives and Process.read("nonsense") is None and children_of(child.pid) == []


def started_of(pid: int) -> str:
    """The kernel's ticks, 100 a second, as seconds after boot."""
    return f"{int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]) / 100:.2f}"


@pytest.mark.parametrize(("code", "status"), [(0, "done"), (3, "unchanged"), (75, "interrupted"), (143, "interrupted")])
def test_exit_codes_become_states(code: int, status: str) -> None:
    assert _status(code) == status


@pytest.mark.parametrize("code", [1, 2, 137, 255])
def test_what_would_happen_again_is_no_interruption(code: int) -> None:
    assert _status(code) == "failed"


# Recovery: whom it believes to be gone


def flow_run(state: Any, process: Process | None, starts: int = 1) -> FlowRun:
    labels = {LABEL: str(process)} if process else {}
    return FlowRun.model_construct(id="x", name="run", state=state, labels=labels, run_count=starts, deployment_id="y")


class Server:
    """Prefect's, which has heard of a run or not; `variables` are those of the run's deployment."""

    def __init__(self, heard: bool = False, variables: dict[str, str] | None = None) -> None:
        self.heard, self.variables = heard, variables or {}

    def read_deployment(self, deployment_id: str) -> Any:
        assert deployment_id == "y"
        return SimpleNamespace(job_variables={"env": self.variables})

    def read_events(self, wanted: Any, limit: int) -> Any:
        assert wanted.resource.id == ["prefect.flow-run.x"]
        return SimpleNamespace(events=["heartbeat"] if self.heard else [])


def loss(run: FlowRun, heard: bool = False, **variables: str) -> str | None:
    return recover._loss(cast(SyncPrefectClient, Server(heard, variables)), run)


def test_only_a_run_whose_process_is_gone_from_here_is_lost() -> None:
    alive = Process.current()
    gone = Process(alive.host, alive.pid, "1")
    assert loss(flow_run(Running(), gone)) and loss(flow_run(Crashed(), gone)) and loss(flow_run(Cancelling(), gone))
    assert not loss(flow_run(Running(), alive)) and not loss(flow_run(Running(), None))
    assert loss(flow_run(Running(), gone, starts=9)), "Prefect counts each wait for a GPU as a start"
    often = flow_run(Running(), gone)
    often.labels[recover.RECOVERIES] = str(recover.MOST_STARTS - 1)
    assert not loss(often), "it crashes by itself"


def test_a_run_of_another_host_is_lost_once_it_is_silent() -> None:
    """A pod's name never comes back, so nobody can look for its processes."""
    elsewhere = Process("pod-x7d2q:4026532001", 1, "1.00")

    def lost(age: float, heard: bool, beat: int = 30, state: Callable[..., Any] = Running) -> bool:
        run = flow_run(state(timestamp=now("UTC") - timedelta(seconds=age)), elsewhere)
        run.labels[HEARTBEAT] = beat
        return loss(run, heard) is not None

    assert lost(1000, heard=False) and lost(1000, heard=False, state=Crashed) and lost(1000, False, state=Cancelling)
    assert not lost(1000, heard=True)
    assert not lost(30 * recover.MISSED - 5, heard=False), "it may not have sent the first one yet"
    assert not lost(1000, heard=False, beat=0), "it sends none"
    unsigned = flow_run(Running(timestamp=now("UTC") - timedelta(hours=9)), None)
    assert not loss(unsigned), "it may be of another project"
    unsigned.labels[HEARTBEAT] = 30
    assert loss(unsigned), "it was signed before, and its next process ended before it signed"


def test_a_run_that_ended_before_it_was_signed_is_lost_if_its_deployment_sends_signs() -> None:
    def reason(age: float, heard: bool = False) -> str | None:
        run = flow_run(Running(timestamp=now("UTC") - timedelta(seconds=age)), None)
        return loss(run, heard, PREFECT_FLOWS_HEARTBEAT_FREQUENCY="30")

    assert reason(1000) == "nothing was heard of it for 120 s; it ran on another machine"
    assert not reason(30 * recover.MISSED - 5) and not reason(1000, heard=True)


def test_the_same_number_in_another_container_is_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container on the host's network has the host's name, and numbers of its own."""
    mine = Process.current()
    monkeypatch.setattr(processes, "here", lambda: mine.host.replace("4", "5"))
    assert not mine.is_here and Process.current() != mine


def test_a_run_that_its_worker_never_started_is_lost_after_a_while() -> None:
    def reason(age: float, pool: str = recover.POOL) -> str | None:
        run = flow_run(Pending(timestamp=now("UTC") - timedelta(seconds=age)), None)
        run.work_pool_name = pool
        return loss(run)

    assert reason(recover.PENDING_SECONDS - 60) is None
    assert reason(recover.PENDING_SECONDS + 60) == "its worker took it and never started it"
    assert reason(recover.PENDING_SECONDS + 60, "kubernetes") is None, "its image is still on the way"
    assert reason(recover.PENDING_ELSEWHERE_SECONDS + 60, "kubernetes")


def test_a_run_that_crashes_before_it_begins_is_not_forgotten() -> None:
    run = flow_run(Crashed(), None)
    run.work_pool_name = "docker"
    assert loss(run) is None, "a worker of another kind judges that"
    run.work_pool_name = recover.POOL
    assert loss(run) == "it crashed before it began"
    run.labels[recover.RECOVERIES] = str(recover.MOST_STARTS)
    assert loss(run) is None


# Serving


@pytest.mark.parametrize(
    ("command", "way_out"),
    [
        (["serve", "--port"], ".venv/bin/python -m flows.server.serve --port"),
        (["mlflow_pages", "ui", "--port"], "make serve-ui PORT="),
        (["mlflow_pages", "model", "models:/m@champion", "--port"], "make serve-model MODEL=models:/m@champion PORT="),
    ],
)
def test_a_taken_port_is_one_sentence_with_the_way_out(tmp_path: Path, command: list[str], way_out: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = server(tmp_path, *command, str(port))
    separator = " " if way_out.endswith("port") else ""
    assert code == 1 and said.endswith(f"; end it, or choose another port: {way_out}{separator}{port + 1}")
    assert re.match(rf"error: port {port} is taken by \S+ \(process {os.getpid()}\); ", said) and "\n" not in said


def server(home: Path, module: str, *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command of flows/server."""
    command = [sys.executable, "-m", f"flows.server.{module}", *arguments]
    environment = {**os.environ, "PREFECT_HOME": str(home)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPOSITORY, timeout=120)
    return done.returncode, done.stderr.strip()


def test_a_checkout_is_served_once(tmp_path: Path) -> None:
    """On other ports too: two servers would share one database, and two workers one queue."""
    with served_once(tmp_path, "http://127.0.0.1:4200", "http://127.0.0.1:5000"):
        code, said = server(tmp_path, "serve", "--port", "4201", "--mlflow-port", "5001")
        assert code == 1 and len(said.splitlines()) == 1
        assert said.startswith("error: this checkout is served already on http://127.0.0.1:4200; ")
        code, said = server(tmp_path, "mlflow_pages", "ui")
        assert (code, said) == (1, "error: `make serve-flows` shows this page already: open http://127.0.0.1:5000")
    assert mlflow_page(tmp_path) is None


def test_files_that_a_killed_server_left_lock_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / "served.json", {"prefect": "http://127.0.0.1:4200", "mlflow": "http://127.0.0.1:5000"})
    (tmp_path / "served.lock").touch()
    assert mlflow_page(tmp_path) is None
    with served_once(tmp_path, "http://127.0.0.1:4201", "http://127.0.0.1:5001"):
        pass
    require_free(free_port(), "")


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


# What a run's page shows


@pytest.fixture
def run(bare: Path) -> Any:
    made = plan(bare, RunRequest(name="shown", overrides={"prepare.limit": 9})).write()
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
    head, _, content = artifacts.small_picture(path).partition(",")
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
    for line in ("resuming from step 3", "training: 30 of 60", "training: 31 of 60", "training: 4 of ?"):
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
    """A registry with three versions of a model, of which the second failed a gate."""
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
    with pytest.raises(FuselipError, match="version 2 failed a gate"):
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
