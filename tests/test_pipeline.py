"""The main job as a user types it, for real and small: drawn data in, a registered model out."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient
from repository_copy import copy_of, dvc, run_flow, terminate_flow

from fuselip_core.config import STAGES

Done = subprocess.CompletedProcess[str]


@pytest.fixture
def small(demo_checkout: Path) -> Path:
    return demo_checkout


@pytest.fixture
def first(demo: Done) -> Done:
    return demo


def client(folder: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")


def test_main_job_ends_with_a_registered_model(small: Path, first: Done) -> None:
    assert first.returncode == 0, first.stderr[-3000:]
    metrics = json.loads((small / "artifacts" / "metrics.json").read_text())
    assert all(isinstance(value, int | float) for value in metrics.values())
    for name in (
        "retrieval/image_to_text/recall_at_1",
        "retrieval/image_to_text/chance_at_1",
        "retrieval_shuffled/text_to_image/recall_at_1",
        "answers/fused/accuracy",
        "answers/question_only/accuracy",
    ):
        assert name in metrics
    registered = json.loads((small / "artifacts" / "registered.json").read_text())
    version = client(small).get_model_version(registered["name"], str(registered["version"]))
    run = client(small).get_run(version.run_id)
    assert run.data.params["train.steps"] == "6"
    assert run.data.metrics["results/image_to_text_recall_at_1"] == metrics["retrieval/image_to_text/recall_at_1"]
    assert len(run.data.tags["prefect_flow_run"]) == 36
    assert (small / "artifacts" / "report" / "index.html").is_file()


def test_summary_says_what_to_look_at_and_to_type_next(first: Done) -> None:
    for words in ("recall@1", "chance", "artifacts/metrics.json", "report/index.html", "fuselip-sample-tiny version 1"):
        assert words in first.stdout
    assert all(f"make {words}" in first.stdout for words in ("serve-ui", "serve-model MODEL=models:", "demo SET="))


def test_everything_made_is_versioned_or_ignored(small: Path, first: Done) -> None:
    assert first.returncode == 0
    assert "up to date" in dvc(small, "status")
    status = subprocess.run(["git", "status", "--porcelain"], cwd=small, capture_output=True, text=True, check=True)
    changed = {line.split()[-1] for line in status.stdout.splitlines()}
    assert changed <= {"dvc.lock", "data.dvc", "params.yaml", ".gitignore"}, changed


def test_second_run_skips_everything_but_a_lost_registration(small: Path, first: Done) -> None:
    assert first.returncode == 0
    shutil.rmtree(small / "mlflow" / "artifacts")
    (small / "mlflow" / "mlflow.db").unlink()
    again = run_flow(small)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "train unchanged" in again.stdout and "evaluate unchanged" in again.stdout
    registered = json.loads((small / "artifacts" / "registered.json").read_text())
    assert client(small).get_model_version(registered["name"], str(registered["version"]))


def test_wrong_parameter_ends_before_anything_starts(small: Path) -> None:
    done = run_flow(small, "--set", "train.stepz=1")
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1]
        == "error: run phantom: train.stepz: there is no such field; did you mean steps?"
    )


def test_failing_stage_ends_with_its_sentence(small: Path) -> None:
    done = run_flow(small, "--set", "train.batch_size=100000", "--name", "too-large")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()
    errors = [line for line in last if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: train: ")
    assert "Traceback" not in done.stderr
    sentence = errors[0].removeprefix("error: train: ")
    assert done.stderr.count(sentence) == 2, "once by the stage, once at the end"


def test_a_terminated_flow_ends_its_stage_and_says_what_follows(template: Path, tmp_path: Path) -> None:
    folder = copy_of(template, tmp_path / "repository")
    code, said = terminate_flow(folder)
    assert code == 128 + signal.SIGTERM, said
    assert (folder / "saved").is_file(), said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert errors == ["error: stopped; the same command resumes it"] and "Traceback" not in said


def test_a_source_archive_without_git_runs(template: Path, tmp_path: Path) -> None:
    folder = copy_of(template, tmp_path / "repository")
    shutil.rmtree(folder / ".git")
    done = run_flow(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (folder / "calls").read_text().split() == list(STAGES)


def test_a_read_only_checkout_is_one_sentence(template: Path, tmp_path: Path) -> None:
    folder = copy_of(template, tmp_path / "repository")
    for options in (["--bind", folder], ["-o", "remount,bind,ro"]):
        if subprocess.run(["mount", *options, folder]).returncode:
            pytest.skip("needs the right to mount")
    try:
        done = run_flow(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    wanted = f"error: permission denied at {folder}/.prefect; change the owner or mode"
    assert done.stderr.splitlines()[-1].startswith(wanted)
