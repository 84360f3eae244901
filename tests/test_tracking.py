"""Tracking: everything on disk, MLflow behind it, and a server that may vanish and come back."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow import MlflowClient

from fuselip_core.config import Settings, load_settings
from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.files import write_json
from fuselip_core.tracking import events as run_log
from fuselip_core.tracking import run as tracking
from fuselip_core.tracking.events import Event, EventLog, read_events
from fuselip_core.tracking.store import mlflow_client, tracking_uri
from fuselip_core.training.train import curves


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store on SQLite, made once."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
    mlflow_client(uri).search_experiments()
    return uri


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> Settings:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("FUSELIP_TRACKERS", "mlflow")
    monkeypatch.setenv("FUSELIP_FLOW_RUN", "flow-7")
    monkeypatch.setenv("FUSELIP_FLOW_URL", "http://127.0.0.1:4200/v2/runs/flow-run/flow-7")
    (tmp_path / "artifacts" / "prepared").mkdir(parents=True)
    (tmp_path / "artifacts" / "prepared" / "manifest.json").write_text('{"data_version": "abcdef0123456789"}')
    return load_settings(recipe="sample", artifacts=tmp_path / "artifacts")


class Server:
    """A tracking service that can be switched off."""

    name = "server"

    def __init__(self) -> None:
        self.up, self.calls, self.got = True, 0, list[Event]()

    def send(self, run: dict[str, Any], events: list[Event]) -> None:
        self.calls += 1
        if not self.up:
            raise ConnectionError("connection refused")
        self.got += events


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(tracking, "services_from_environment", lambda: [server])
    return server


def test_run_reaches_mlflow_with_tags_params_metrics_and_files(settings: Settings, store: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"png")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("hi")
    with tracking.open_run(settings, "train") as run:
        for step in range(0, 300, 100):
            run.metrics({"loss/total": 3.0 - step / 100, "rate": 2}, step)
        run.artifact(picture)
        run.artifact(tmp_path / "report", "report")
    client = MlflowClient(store)
    known = tracking.run_of(settings.artifacts)
    found = client.get_run(known["mlflow_run_id"])
    assert found.info.status == "FINISHED"
    assert found.data.params["train.steps"] == str(settings.train.steps)
    assert found.data.tags["recipe"] == "sample" and found.data.tags["size"] == "tiny"
    assert found.data.tags["data_version"] == "abcdef0123456789"
    assert found.data.tags["prefect_flow_run"] == "flow-7"
    assert "](http://127.0.0.1:4200/v2/runs/flow-run/flow-7)" in found.data.tags["mlflow.note.content"]
    assert len(found.data.tags["git_commit"]) == 40 and found.data.tags["git_dirty"] in ("true", "false")
    history = client.get_metric_history(known["mlflow_run_id"], "loss/total")
    assert [(each.step, each.value) for each in history] == [(0, 3.0), (100, 2.0), (200, 1.0)]
    assert {each.path for each in client.list_artifacts(known["mlflow_run_id"])} == {
        "picture.png",
        "report",
        "recipe.yaml",
    }
    recipe = client.download_artifacts(known["mlflow_run_id"], "recipe.yaml", str(tmp_path))
    assert yaml.safe_load(Path(recipe).read_text())["train"]["steps"] == settings.train.steps
    experiment = client.get_experiment(found.info.experiment_id)
    assert experiment.name == "fuselip-sample"
    assert experiment.artifact_location.endswith("/artifacts")


def test_evaluation_adds_to_the_training_run(settings: Settings, store: str) -> None:
    with tracking.open_run(settings, "train") as run:
        run.metrics({"loss": 1.0}, 5)
    trained = tracking.run_of(settings.artifacts)["mlflow_run_id"]
    with tracking.open_run(settings, "evaluate") as run:
        run.metrics({"recall": 0.5}, 5)
    assert tracking.run_of(settings.artifacts, "evaluate")["mlflow_run_id"] == trained
    data = MlflowClient(store).get_run(trained).data
    assert data.metrics == {"loss": 1.0, "recall": 0.5}


def test_resumed_run_goes_on_in_mlflow_and_a_new_one_does_not(settings: Settings) -> None:
    with tracking.open_run(settings, "train") as run:
        run.metrics({"loss": 1.0}, 1)
    first = tracking.run_of(settings.artifacts)["mlflow_run_id"]
    changed = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": 9})})
    with tracking.open_run(changed, "train", resume=True) as run:
        run.metrics({"loss": 0.5}, 2)
    assert tracking.run_of(settings.artifacts)["mlflow_run_id"] == first
    with tracking.open_run(settings, "train") as run:
        run.metrics({"loss": 0.1}, 1)
    assert tracking.run_of(settings.artifacts)["mlflow_run_id"] != first


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("bad"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (Interrupted("stopped and saved"), "KILLED")],
)
def test_failed_run_is_marked_and_the_error_goes_on(settings: Settings, store: str, error: Any, status: str) -> None:
    with pytest.raises(type(error)), tracking.open_run(settings, "train"):
        raise error
    run_id = tracking.run_of(settings.artifacts)["mlflow_run_id"]
    assert MlflowClient(store).get_run(run_id).info.status == status


def test_lost_server_warns_once_and_is_caught_up_with(
    settings: Settings, server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "SEND_EVERY_EVENTS", 2)
    monkeypatch.setattr(run_log, "RETRY_AFTER_SECONDS", 0.0)
    server.up = False
    with caplog.at_level(logging.WARNING, logger="fuselip"), tracking.open_run(settings, "train") as run:
        for step in range(10):
            run.metrics({"loss": float(step)}, step)
        assert server.calls > 1 and server.got == []
        server.up = True
        run.metrics({"loss": 10.0}, 10)
        run.metrics({"loss": 11.0}, 11)
    assert len(caplog.records) == 1 and "connection refused" in caplog.records[0].message
    assert [event["step"] for event in server.got if event["type"] == "metrics"] == list(range(12))
    assert [event["type"] for event in server.got][-1] == "end"


def test_silent_server_is_left_alone_for_a_while(
    settings: Settings, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "SEND_EVERY_EVENTS", 1)
    server.up = False
    with tracking.open_run(settings, "train") as run:
        for step in range(20):
            run.metrics({"loss": 1.0}, step)
        assert server.calls == 1


def test_sync_sends_what_a_finished_run_could_not(settings: Settings, server: Server) -> None:
    server.up = False
    with tracking.open_run(settings, "train") as run:
        run.metrics({"loss": 1.0}, 1)
    assert tracking.sync(settings.artifacts) == 1
    server.up = True
    assert tracking.sync(settings.artifacts) == 0
    assert [event["type"] for event in server.got] == ["params", "artifact", "data", "metrics", "end"]
    server.got.clear()
    assert tracking.sync(settings.artifacts) == 0
    assert server.got == [], "nothing is sent twice"


def test_emptied_store_gets_the_whole_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    with tracking.open_run(settings, "train") as run:
        run.metrics({"loss": 1.0}, 1)
    path = settings.artifacts / "tracking" / "train" / "run.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps({**known, "mlflow_run_id": "0" * 32}))
    with tracking.open_run(settings, "evaluate") as run:
        run.metrics({"recall": 0.5}, 1)
    data = MlflowClient(store).get_run(tracking.run_of(settings.artifacts)["mlflow_run_id"]).data
    assert data.metrics == {"loss": 1.0, "recall": 0.5}
    assert data.params["recipe"] == "sample"


def test_unreachable_mlflow_does_not_stop_a_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, logger="fuselip"), tracking.open_run(settings, "train") as run:
        run.metrics({"loss": 1.0}, 1)
    assert "mlflow does not answer" in caplog.text
    events, _ = read_events(settings.artifacts / "tracking" / "train" / "events.jsonl", 0)
    assert [event["type"] for event in events] == ["params", "artifact", "data", "metrics", "end"]


def test_half_a_line_is_not_read_yet(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    first, second = {"type": "end"}, {"type": "params"}
    path.write_bytes(b'{"type": "end"}\n{"type": ')
    assert read_events(path, 0) == ([first], 16)
    path.write_bytes(b'{"type": "end"}\n{"type": "params"}\n')
    assert read_events(path, 16) == ([second], 35)


def test_half_a_line_of_a_killed_run_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"type": "params", "values": {}}\n{"type": "metr')
    with EventLog(tmp_path, {"name": "x"}, []) as log:
        log.metrics({"a": 1.0}, step=2)
    events, end = read_events(tmp_path / "events.jsonl", 0)
    assert [event["type"] for event in events] == ["params", "metrics"]
    assert events[1]["step"] == 2 and end == (tmp_path / "events.jsonl").stat().st_size


def test_disk_alone_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELIP_TRACKERS", "")
    assert tracking.services_from_environment() == []
    with EventLog(tmp_path, {"name": "x"}, []) as log:
        log.metrics({"a": 1})
        assert log.flush(force=True)


def test_unknown_tracker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELIP_TRACKERS", "mlflow,comet")
    with pytest.raises(FuselipError, match="comet"):
        tracking.services_from_environment()


def test_a_run_names_the_data_as_dvc_knows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "data.dvc").write_text("outs:\n- md5: 0123abcd.dir\n  path: data\n")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs" / "mine")
    monkeypatch.setenv("FUSELIP_TRACKERS", "")
    for root, known in (("data", "0123abcd.dir"), ("elsewhere", "unknown")):
        settings = load_settings(recipe="sample", overrides=[f"prepare.root={root}"], artifacts=tmp_path / root)
        with tracking.open_run(settings, "train"):
            pass
        assert tracking.run_of(settings.artifacts)["tags"]["dvc_data"] == known


def test_default_store_lies_in_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "er")
    assert tracking_uri() == f"sqlite:///{tmp_path}/mlflow/mlflow.db"


def test_a_run_names_its_data_and_shows_its_results_as_a_table(settings: Settings, store: str) -> None:
    counts = {"train": {"images": 7, "pairs": {"caption": 9}}}
    manifest = {"data_version": "fedcba9876543210", "source": "phantom", "counts": counts}
    write_json(settings.artifacts / "prepared" / "manifest.json", manifest)
    with tracking.open_run(settings, "train") as run:
        run.metrics({"train/loss": 1.0}, 1)
    for recall in (0.25, 0.5):
        with tracking.open_run(settings, "evaluate") as run:
            run.results({"recall": recall, "recall/low": recall - 0.25, "recall/high": recall + 0.25, "pool": 40})
    known = tracking.run_of(settings.artifacts)
    found = MlflowClient(store).get_run(known["mlflow_run_id"])
    (data,) = (each.dataset for each in found.inputs.dataset_inputs)
    assert (data.name, data.digest, json.loads(data.profile)) == ("phantom", "fedcba9876543210", counts)
    mlflow.set_tracking_uri(store)  # `load_table` looks where the process did last, whatever its client says
    table = MlflowClient(store).load_table(found.info.experiment_id, "results.json", [known["mlflow_run_id"]])
    rows = table[["metric", "value", "low", "high"]].astype(object).where(table.notna(), None).to_numpy().tolist()
    assert rows == [["pool", 40.0, None, None], ["recall", 0.5, 0.25, 0.75]]


def test_names_tell_runs_apart_and_nothing_is_said_twice(settings: Settings) -> None:
    names = set()
    for _ in range(3):
        with tracking.open_run(settings, "train"):
            pass
        names.add(tracking.run_of(settings.artifacts)["name"])
    assert len(names) == 3 and all(name.startswith("train-tiny-") for name in names)
    assert tracking.experiment_name("fuselip-rocov2") == "fuselip-rocov2"
    assert tracking.experiment_name("sample") == "fuselip-sample"


def test_params_hold_no_place_of_this_machine(settings: Settings, store: str, tmp_path: Path) -> None:
    far = settings.model_copy(
        update={
            "prepare": settings.prepare.model_copy(update={"root": tmp_path / "secret" / "archive"}),
            "train": settings.train.model_copy(update={"init": str(tmp_path / "secret" / "model")}),
        }
    )
    with tracking.open_run(far, "train"):
        pass
    params = MlflowClient(store).get_run(tracking.run_of(settings.artifacts)["mlflow_run_id"]).data.params
    assert params["prepare.root"] == ".../archive" and params["train.init"] == ".../model"
    assert not [name for name, value in params.items() if value.startswith("/") or str(tmp_path) in value]


def test_training_shows_few_curves() -> None:
    logged = {"loss": 1, "contrastive": 1, "masked": 1, "lr": 1, "grad_norm": 1, "pairs_per_second": 1}
    more = {"logit_scale": 1, "valid/image_to_text/recall_at_1": 1, "system/memory_mb": 1, "preflight/loss": 1}
    assert sorted(curves({**logged, **more})) == [
        "system/memory_mb",
        "train/gradient_norm",
        "train/learning_rate",
        "train/loss",
        "train/loss_contrastive",
        "train/loss_masked",
        "train/pairs_per_second",
        "train/valid_image_to_text_recall_at_1",
    ]


def test_wandb_offline_is_one_folder_a_run_and_says_how_to_upload_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The real library: several flushes, an interruption, and a stage that adds to the run in another process."""
    monkeypatch.setenv("FUSELIP_TRACKERS", "wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(run_log, "SEND_EVERY_EVENTS", 2)
    caplog.set_level(logging.INFO, "fuselip")
    with pytest.raises(Interrupted), tracking.open_run(settings, "train") as run:
        for step in range(5):
            run.metrics({"train/loss": 5.0 - step}, step)
        raise Interrupted("stopped and saved")
    with tracking.open_run(settings, "train", resume=True) as run:
        run.metrics({"train/loss": 0.5}, 5)
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    page.write_text("<p>the report</p>")
    with tracking.open_run(settings, "evaluate") as run:
        run.results({"recall": 0.5})
        run.artifact(page.parent, "report")
    folder = settings.artifacts / "tracking" / "train"
    (made,) = folder.rglob("offline-run-*")
    (name,) = made.glob("*.wandb")
    kept = name.read_bytes()
    losses = re.findall(rb'"train/loss"|train/loss', kept)
    assert len(losses) >= 6 and b"tiny" in kept and b"abcdef0123456789" in kept
    assert [path.read_text() for path in made.rglob("*.html") if "the report" in path.read_text()]
    known = tracking.run_of(settings.artifacts)
    assert known["wandb_run_id"] in made.name
    assert known["sent"]["wandb"] == (folder / "events.jsonl").stat().st_size
    said = [record.message for record in caplog.records if record.message.startswith("W&B: the run is in")]
    assert said[-1].endswith(f"wandb sync {os.path.relpath(made)}")
    program = said[-1].rpartition("upload it with: ")[2].split()[0]
    assert (
        subprocess.run([program, "sync", "--help"], capture_output=True, env={"PATH": "/usr/bin:/bin"}).returncode == 0
    )
