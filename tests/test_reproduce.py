"""A registered model made once more from what is kept with it, and data pushed to a folder and to an S3 server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from repository_copy import REPOSITORY, add_data, copy_repository, dvc
from stack import Stack, s3_store

from flows.reproduce.compare import differences
from flows.reproduce.restore import Recorded, _draw_sample, restore
from fuselip_core.data.phantom.data_set import draw_data_set
from fuselip_core.errors import FuselipError

SMALL = {
    "prepare": {"root": "data"},
    "codebook": {"steps": 2, "batch_size": 16},
    "train": {"steps": 3, "batch_size": 16, "validate_every": 3, "checkpoint_every": 3},
    "evaluate": {"examples": 2},
}
# Stand-ins for the stages that leave what is compared; LUCK is what no seed fixes.
STAGES = """
import hashlib
import os
import time

from fuselip_core.files import write_json


def prepare(settings):
    content = (settings.prepare.root / "file.txt").read_bytes()
    write_json(settings.artifacts / "prepared" / "manifest.json", {"data_version": hashlib.sha256(content).hexdigest()})


def codebook(settings):
    write_text(settings.artifacts / "codebook" / "model.safetensors", "codebook")


def tokenize(settings):
    write_text(settings.artifacts / "tokens" / "made", "tokens")


def train(settings):
    write_text(settings.artifacts / "model" / "model.safetensors", str(settings.train.steps))
    write_text(settings.artifacts / "history.jsonl", "{}")


def evaluate(settings):
    write_text(settings.artifacts / "report" / "index.html", "report")
    luck = float(os.environ["LUCK"])
    write_json(settings.artifacts / "metrics.json", {"recall": luck, "train/seconds": time.time()})


def register(settings):
    import json
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from fuselip_core.registry.state import write_state
    from fuselip_core.tracking.store import experiment_id, mlflow_client, tracking_uri

    client = mlflow_client(tracking_uri())
    run = client.create_run(experiment_id(client, "stand-in", tracking_uri())).info.run_id
    with TemporaryDirectory() as folder:
        write_state(Path(folder), settings, json.loads((settings.artifacts / "metrics.json").read_text()))
        client.log_artifacts(run, folder, "state/stand-in")
    client.create_registered_model("fuselip-sample")
    client.create_model_version("fuselip-sample", "nowhere", run, tags={"state": "state/stand-in"})
    client.set_registered_model_alias("fuselip-sample", "champion", "1")
    write_json(settings.artifacts / "registered.json", {})


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
"""
Done = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with s3_store(tmp_path_factory.mktemp("store")) as running:
        yield running


def test_differences_leave_out_times_and_what_is_close() -> None:
    nan = float("nan")
    before = {"train/seconds": 1.0, "same": 0.5, "close": 0.5, "far": 0.5, "gone": 1.0, "undefined": nan}
    after = {"train/seconds": 9.0, "same": 0.5, "close": 0.51, "far": 0.6, "new": 1.0, "undefined": nan}
    assert [each.metric for each in differences(before, after, 0.02)] == ["far", "gone", "new"]
    assert "close" in [each.metric for each in differences(before, after, 0.0)]


def test_data_goes_to_the_default_folder_and_comes_back(tmp_path: Path) -> None:
    folder = copy_repository(tmp_path / "repository")
    (folder / "data.dvc").unlink(missing_ok=True)
    add_data(folder)
    dvc(folder, "push", "-q")
    assert any((tmp_path / "fuselip-rocov2-dvc").rglob("*.dir"))
    assert_comes_back(folder, tmp_path / "clone")


def test_data_goes_to_an_s3_store_and_comes_back(tmp_path: Path, store: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy_repository(tmp_path / "repository")
    (folder / "data.dvc").unlink(missing_ok=True)
    use_store(folder, store, monkeypatch)
    add_data(folder)
    dvc(folder, "push", "-q")
    assert not (tmp_path / "fuselip-rocov2-dvc").exists()
    assert_comes_back(folder, tmp_path / "clone")


@pytest.fixture
def trained(tmp_path: Path, store: Stack, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout in which stand-ins for the stages have made `fuselip-sample` from uncommitted changes."""
    folder = copy_repository(tmp_path / "first" / "repository")
    (folder / "data.dvc").unlink(missing_ok=True)
    use_store(folder, store, monkeypatch)
    add_data(folder)
    (folder / "fuselip_core" / "stages.py").write_text(STAGES)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump({**params, "train": {"steps": 7}}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("LUCK", "0.5")
    repeat_with_dvc(folder)
    dvc(folder, "push", "-q", "data.dvc")
    return folder


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_a_model_is_made_again_in_another_clone(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code, settings, lock and data come back though nothing of them was committed; the clone stays as it was."""
    clone = tmp_path / "second" / "clone"
    subprocess.run(["git", "clone", "-q", trained, clone], check=True)
    (clone / ".dvc" / "config").write_text((trained / ".dvc" / "config").read_text())
    before = sorted(path for path in clone.iterdir())
    done = reproduce(clone, "models:/fuselip-sample@champion")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "prepared data: the same bytes" in done.stdout and "all 2 metrics but for times are the same" in done.stdout
    made = tmp_path / "second" / "clone-fuselip-sample-v1"
    assert (made / "params.yaml").read_text() == (trained / "params.yaml").read_text()
    assert (made / "data.dvc").read_text() == (trained / "data.dvc").read_text()
    record = json.loads((made / "artifacts" / "reproduction.json").read_text())
    assert record["differences"] == record["other_results"] == [] and len(record["results"]) == 3
    assert not (made / "artifacts" / "registered.json").exists()
    assert sorted(path for path in clone.iterdir()) == before
    monkeypatch.setenv("LUCK", "0.6")
    other = reproduce(clone, "models:/fuselip-sample/1", "--into", str(tmp_path / "other"))
    assert other.returncode == 1 and "recall" in other.stdout
    assert "error: 1 of 2 metrics of fuselip-sample version 1 differ by more than 0" in other.stderr


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    recorded = Recorded("name", "1", tmp_path, {"commit": "0" * 40}, {}, {})
    with pytest.raises(FuselipError, match=r"is there already; remove it .* or choose --into"):
        restore(recorded, tmp_path, tmp_path, None)
    with pytest.raises(FuselipError, match=r"commit 000000000000 can't be checked out .*`git fetch`"):
        restore(recorded, REPOSITORY, tmp_path / "new", None)


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_a_real_champion_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages on a small sample, then all of them once more: bit for bit the same weights and metrics."""
    folder = copy_repository(tmp_path / "repository")
    draw_data_set(folder / "data", 0, {"train": 48, "valid": 24, "test": 24})
    (folder / "data.dvc").unlink(missing_ok=True)
    dvc(folder, "add", "-q", "data")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump({**params, **SMALL, "register": {"gates": []}}))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    repeat_with_dvc(folder)
    done = reproduce(folder, "models:/fuselip-sample@champion")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    record = json.loads((tmp_path / "repository-fuselip-sample-v1" / "artifacts" / "reproduction.json").read_text())
    assert record["differences"] == record["other_results"] == [] and len(record["results"]) == 3
    assert len(record["metrics"]) > 20


def test_another_sample_does_not_stand_in_for_lost_data(tmp_path: Path) -> None:
    folder = copy_repository(tmp_path / "repository")
    (folder / "data.dvc").unlink(missing_ok=True)
    add_data(folder)
    subprocess.run(["rm", "-rf", folder / ".dvc" / "cache", folder / ".dvc" / "tmp"], check=True)
    (folder / "fuselip_core" / "__main__.py").write_text("import pathlib; pathlib.Path('data').mkdir()")
    with pytest.raises(FuselipError, match="what this machine draws is another sample"):
        _draw_sample(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fuselip-sample@champion", "is not a registered model; write models:/NAME@champion"),
        ("models:/nothing@champion", "has no models:/nothing@champion"),
    ],
)
def test_what_is_not_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    done = reproduce(tmp_path, name)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0] and "Traceback" not in done.stderr


def repeat_with_dvc(folder: Path) -> None:
    """``dvc repro`` of all stages, with the folder's own code."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", "repro", "-q"]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": tools}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def reproduce(folder: Path, *arguments: str) -> Done:
    """``fuselip reproduce`` in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(folder if (folder / "flows").is_dir() else REPOSITORY)}
    command = [sys.executable, "-m", "fuselip_core", "reproduce", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=1200)


def use_store(folder: Path, store: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the S3 server the default remote, as README and .dvc/config say."""
    dvc(folder, "remote", "add", "-q", "--default", "store", "s3://dvc")
    dvc(folder, "remote", "modify", "-q", "store", "endpointurl", store.store)
    for name, value in store.environment("buckets").items():
        if name.startswith("AWS_") and "ENDPOINT" not in name:
            monkeypatch.setenv(name, value)


def assert_comes_back(folder: Path, clone: Path) -> None:
    """Another checkout, with a cache of its own, pulls the same bytes."""
    subprocess.run(["cp", "-r", folder, clone], check=True)
    subprocess.run(["rm", "-rf", clone / "data", clone / ".dvc" / "cache", clone / ".dvc" / "tmp"], check=True)
    dvc(clone, "pull", "-q", "data.dvc")
    assert (clone / "data" / "file.txt").read_text() == "data"
