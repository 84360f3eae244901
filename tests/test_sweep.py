"""Sweeps: what may be varied, trials that share the stages before them, interruptions, and what is left at the end."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import optuna
import pytest
from repository_copy import copy_of, environment
from stack import database

from flows.run.folder import Run
from flows.run.runner import Outcome
from flows.study.pruning import PruningRunner
from flows.study.space import SweptField, first_stage, read_space
from flows.sweep import SweepRequest, _open_study
from fuselip_core.config import Settings, SettingsError
from fuselip_core.errors import FuselipError

METRIC = "retrieval/image_to_text/mean_reciprocal_rank"
# In the stand-ins' metrics: best at a learning rate of 0.003, a little better with each seed.
MEASURES = f"""
def measures(settings):
    rate = settings.train.learning_rate
    return {{"{METRIC}": 1 - abs(rate - 0.003) * 100 + settings.train.seed / 1000}}
"""


def test_a_space_of_ranges_whole_numbers_and_choices() -> None:
    found = read_space(
        [
            "train.learning_rate=1e-4..1e-2 log",
            "train.batch_size=64..256",
            "model.family=fuselip,siglip-sf",
            "train.ema=0,1e-2",
        ]
    )
    assert found == [
        SweptField("train.learning_rate", low=1e-4, high=1e-2, log=True),
        SweptField("train.batch_size", low=64, high=256),
        SweptField("model.family", choices=("fuselip", "siglip-sf")),
        SweptField("train.ema", choices=(0, 0.01)),
    ]
    trial = optuna.create_study().ask()
    values = [field.suggest(trial) for field in found]
    assert 1e-4 <= values[0] <= 1e-2 and isinstance(values[1], int) and values[2] in found[2].choices


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ([], "search is empty"),
        (["learning_rate=1..2"], "'learning_rate=1..2' names no field"),
        (["register.name=a,b"], "names no field"),
        (["train.learning_rate=1e-2..1e-4"], "must rise"),
        (["train.weight_decay=0..1 log"], "start above 0 for log"),
        (["train.seed=3"], "needs a range LOW..HIGH or at least two choices"),
        (["train.seed=1,2", "train.seed=1..2"], "names train.seed twice"),
    ],
)
def test_what_is_no_space_is_one_sentence(texts: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence.replace("(", r"\(")):
        read_space(texts)


@pytest.mark.parametrize(
    ("name", "stage"),
    [("evaluate.seed", "train"), ("train.ema", "train"), ("model.family", "codebook"), ("prepare.seed", "prepare")],
)
def test_stages_before_the_swept_one_run_once(name: str, stage: str) -> None:
    assert first_stage([SweptField(name, low=1, high=2)]) == stage


def test_trials_are_measured_on_dev_unless_a_split_is_named() -> None:
    assert SweepRequest().run_request().corrections()["evaluate"]["split"] == "dev"
    assert SweepRequest(split="valid").run_request().corrections()["evaluate"]["split"] == "valid"
    request = SweepRequest(overrides={"train": {"steps": 5}}).run_request("-3-0", {"train.learning_rate": 0.1})
    assert request.overrides == {"train": {"steps": 5, "learning_rate": 0.1}} and request.name == "sweep-3-0"


def test_a_training_behind_the_others_is_ended(tmp_path: Path) -> None:
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    good = study.ask()
    good.report(0.9, 10)
    study.tell(good, 0.9)
    (tmp_path / "tracking" / "train").mkdir(parents=True)

    class Training:
        artifacts = tmp_path

        def run(self, stage: str, run: Any, on_line: Any, force: bool = False) -> Outcome:
            with (tmp_path / "tracking" / "train" / "events.jsonl").open("w") as stream:
                for step in (5, 10, 20):
                    values = {"valid/retrieval/image_to_text/recall_at_1": 0.1}
                    stream.write(json.dumps({"type": "metrics", "values": values, "step": step}) + "\n")
                    stream.flush()
                    on_line(f"train: {step} of 20")
            return Outcome(stage, "done", 1.0, "")

    runner = PruningRunner(study.ask(), METRIC).around(Training())
    assert runner.run("tokenize", Training(), lambda line: None).status == "done"  # type: ignore[arg-type]
    outcome = runner.run("train", Training(), lambda line: None)  # type: ignore[arg-type]
    assert outcome.status == "failed" and "pruned at step 10" in outcome.message == runner.pruned


@pytest.fixture
def copy(template: Path, tmp_path: Path) -> Path:
    """A copy of the repository with stand-ins whose measures depend on the learning rate and the seed."""
    folder = copy_of(template, tmp_path / "repository")
    stages = folder / "fuselip_core" / "stages.py"
    text = stages.read_text().replace("CONTENT.get(name, {})", 'measures(settings) if name == "metrics.json" else {}')
    stages.write_text(text.replace("TICK = 0.2", MEASURES + "\nTICK = 0.2"))
    return folder


def command(trials: int, *more: str) -> list[str]:
    words = ["--search", "train.learning_rate=1e-3..1e-2 log", "--trials", str(trials), "--name", "s", *more]
    return [sys.executable, "-m", "fuselip_core", "sweep", *words]


def sweep(copy: Path, *more: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run(command(2, *more), cwd=copy, capture_output=True, text=True, env=environment(), timeout=1200)
    assert run.returncode in (0, 1), run.stderr[-3000:]
    return run


def wait_for(path: Path, child: subprocess.Popen[bytes]) -> None:
    late = time.monotonic() + 600
    while not path.exists() and child.poll() is None:
        assert time.monotonic() < late
        time.sleep(0.2)


def mlflow_runs(copy: Path) -> tuple[mlflow.MlflowClient, Any, list[Any]]:
    """Client, the sweep's run, and the runs below it."""
    client = mlflow.MlflowClient(f"sqlite:///{copy / 'mlflow' / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == "fuselip-sample"]
    (parent,) = client.search_runs([experiment.experiment_id], "tags.stage = 'sweep'")
    below = f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    return client, parent, list(client.search_runs([experiment.experiment_id], below))


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_sweep_finds_the_best_resumes_and_runs_the_first_stages_once(copy: Path) -> None:
    (copy / "order").write_text("train slow 50")
    with (copy.parent / "said").open("wb") as log:
        first = subprocess.Popen(command(2, "--seeds", "2"), cwd=copy, env=environment(), stderr=log, stdout=log)
    wait_for(copy / "ticks", first)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=120) == 128 + signal.SIGTERM, (copy.parent / "said").read_text()[-3000:]
    (copy / "order").unlink()

    other = sweep(copy, "--metric", "answers/accuracy")
    assert other.returncode == 1 and "was begun with another metric, seeds; give this one another name" in other.stderr

    done = sweep(copy, "--seeds", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    calls = (copy / "calls").read_text().split()
    assert [calls.count(stage) for stage in ("prepare", "codebook", "tokenize")] == [1, 1, 1]
    out = copy / "runs" / "s" / "artifacts" / "sweep"
    trials = json.loads((out / "trials.json").read_text())["trials"]
    # What the stopped process was at is the first that the next one runs, in the same folder and with the same values.
    assert [each["state"] for each in trials] == ["fail", "complete", "complete"]
    assert trials[0]["settings"] == trials[1]["settings"]
    assert sorted(path.name for path in (copy / "runs").iterdir()) == ["s", "s-0-0", "s-0-1", "s-2-0", "s-2-1"]
    best = max(trials[1:], key=lambda each: each["value"])
    rate = best["settings"]["train.learning_rate"]
    assert best["value"] == pytest.approx(1 - abs(rate - 0.003) * 100 + 0.0005)
    assert {path.name for path in out.iterdir()} >= {"history.png", "importance.png", "parallel.png", "index.html"}

    shutil.copy(out / "best.yaml", copy / "fuselip_core" / "recipes" / "best.yaml")
    shown = subprocess.run(
        [sys.executable, "-m", "fuselip_core", "recipes", "diff", "sample", "best"],
        cwd=copy, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert [line.partition(":")[0] for line in shown.stdout.splitlines()] == ["train.learning_rate"], shown.stderr

    client, parent, _ = mlflow_runs(copy)
    assert parent.data.metrics["best"] == pytest.approx(best["value"])
    assert "sweep/best.yaml" in [each.path for each in client.list_artifacts(parent.info.run_id, "sweep")]


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_two_workers_share_a_study_in_postgresql(copy: Path, tmp_path: Path) -> None:
    with database(tmp_path) as address:
        where = {**environment(), "FUSELIP_STUDIES": address}
        workers = []
        for name in ("one", "two"):
            with (tmp_path / name).open("wb") as log:
                workers.append(subprocess.Popen(command(4), cwd=copy, env=where, stderr=log, stdout=log))
            # Prefect's own database must be there: two temporary servers at once would both make it.
            wait_for(copy / "runs" / "s", workers[0])
        for worker, name in zip(workers, ("one", "two"), strict=True):
            assert worker.wait(timeout=1200) == 0, (tmp_path / name).read_text()[-3000:]
            assert "is best" in (tmp_path / name).read_text()
        trials = optuna.load_study(study_name="s", storage=address).trials
    states = [trial.state.name for trial in trials]
    assert states.count("COMPLETE") == len(states) and len(states) in (4, 5)  # two may end as the fourth
    assert {path.name for path in (copy / "runs").iterdir()} == {
        "s",
        *(f"s-{trial.number}-0" for trial in trials),
    }
    calls = (copy / "calls").read_text().split()
    assert [calls.count(stage) for stage in ("prepare", "codebook", "tokenize")] == [1, 1, 1]
    assert not (copy / "runs" / "s" / "artifacts" / "study.db").exists()


def test_a_study_that_cannot_be_kept_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELIP_STUDIES", "postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(FuselipError, match=r"no study can be kept at postgresql.*see FUSELIP_STUDIES"):
        _open_study(SweepRequest(), Run(tmp_path, tmp_path / "s", Settings(artifacts=tmp_path / "artifacts")))
