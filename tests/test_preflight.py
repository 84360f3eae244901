"""What a run lacks is said in its first seconds, with the field to change; nothing is prepared or trained before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fuselip_core.config import STAGES, Settings, load_settings
from fuselip_core.errors import FuselipError
from fuselip_core.files import write_json
from fuselip_core.preflight import check_prepared, check_run
from fuselip_core.tracking.store import prepare_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store, made once, since that takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    prepare_store(uri)
    return uri


@pytest.fixture(autouse=True)
def own_store(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


def settings_with(tmp_path: Path, *overrides: str, recipe: str = "sample") -> Settings:
    return load_settings(recipe=recipe, overrides=overrides, artifacts=tmp_path / "artifacts")


def test_a_run_that_has_all_it_needs_starts(tmp_path: Path) -> None:
    check_run(settings_with(tmp_path), STAGES)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["codebook.steps=0"], "codebook.steps is 0 and codebook.init is empty"),
        (["train.init=nowhere"], "train.init: there is no folder 'nowhere'"),
        (["train.init=tests", "codebook.init=tests"], "codebook.init and train.init: .*tests has no config.json"),
        (["train.tokens={more: nowhere}"], "train.tokens.more: .*nowhere holds no finished token store"),
        (["evaluate.candidates=[nowhere]"], "evaluate.candidates: .*nowhere holds no prepared data"),
        (["evaluate.retention=nowhere"], "train.init, which is empty.*evaluate.retention: .*nowhere/tokens holds no"),
        (["model.size=large", "train.keep_checkpoints=9999999"], "no space is left on the disk .*keep_checkpoints"),
    ],
)
def test_what_is_missing_is_named_with_its_field(
    tmp_path: Path, repository: Path, overrides: list[str], words: str
) -> None:
    with pytest.raises(FuselipError, match=words):
        check_run(settings_with(tmp_path, *overrides), STAGES, repository)


def test_stages_are_asked_only_for_what_they_need(tmp_path: Path) -> None:
    lacking = settings_with(tmp_path, "train.init=nowhere", "evaluate.retention=nowhere")
    check_run(lacking, ("prepare", "codebook", "tokenize"))


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense://server"])
def test_a_wrong_tracking_address_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(FuselipError, match=f"MLflow does not answer at {uri} .*correct MLFLOW_TRACKING_URI"):
        check_run(settings_with(tmp_path), STAGES)
    check_run(settings_with(tmp_path), ("prepare", "train"))  # only registering can't do without


def test_a_store_on_a_full_disk_is_refused(small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{small_disk}/mlflow/mlflow.db")
    with pytest.raises(FuselipError, match=r"no space is left on the disk .*the registered model"):
        check_run(settings_with(tmp_path), STAGES)


def test_compiling_where_nothing_may_run_is_refused(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["mount", "-o", "remount,noexec", small_disk], check=True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(small_disk))
    with pytest.raises(FuselipError, match=r"which is mounted noexec.*--tmpfs /tmp:exec.*train\.compile=false"):
        check_run(settings_with(tmp_path, "train.compile=true"), STAGES)
    check_run(settings_with(tmp_path), STAGES)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"train": {"images": 2, "pairs": {"caption": 2}}}, "no dev or valid split; set prepare.dev_share"),
        (
            {"train": {"images": 2, "pairs": {"vqa": 2}}, "valid": {"images": 1, "pairs": {}}},
            "no training pairs of kind caption, which train.mixture names, but only: vqa",
        ),
    ],
)
def test_prepared_data_that_do_not_fit_are_refused_at_once(tmp_path: Path, counts: dict[str, Any], words: str) -> None:
    settings = settings_with(tmp_path, "train.mixture={caption: 1.0}")
    (settings.artifacts / "prepared").mkdir(parents=True)
    write_json(settings.artifacts / "prepared" / "manifest.json", {"counts": counts, "shards": [], "data_version": "x"})
    with pytest.raises(FuselipError, match=words):
        check_prepared(settings, STAGES)


def test_small_says_at_once_that_the_published_checkpoint_can_not_be_fetched(tmp_path: Path, repository: Path) -> None:
    """The words of docs/containers.md, with a hub that nobody runs."""
    for name in ("ROCOv2_data", "models", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "ROCOv2_data" / "valid_captions.csv").write_text("ID,Caption\n")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "FUSELIP_WORKSPACE": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-m", "fuselip_core.container", "train", "small"]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert (
        "codebook.init and train.init: 'chs20/FuseLIP-S-CC12M-MM' is neither a folder nor in the cache" in done.stderr
    )
    assert not (tmp_path / "logs" / "mlflow").exists(), "what takes seconds comes later"
    assert not (tmp_path / "models" / ".work" / "fuselip-rocov2-small" / "prepared").exists()
