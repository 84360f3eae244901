"""Going on from a trained model on other data, through the stages: before and after, guards, and torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from training_data import small_settings, write_raw

from fuselip_core import stages
from fuselip_core.config import Settings, check_settings, merge
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.hub import load_pretrained


@pytest.fixture(scope="module", autouse=True)
def _trackers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}")
        patch.setenv("FUSELIP_TRACKERS", "")
        yield


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A finished run on general data, which adaptations start from."""
    folder = tmp_path_factory.mktemp("general")
    write_raw(folder / "raw")
    settings = small_settings(folder / "raw", folder / "artifacts", steps=20, mask_probability=0.05)
    for stage in (stages.prepare, stages.codebook, stages.tokenize, stages.train, stages.evaluate):
        stage(settings)
    return settings


@pytest.fixture(scope="module")
def target(general: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts with other images, in the codes of the general run's tokenizer, ready to train on."""
    folder = tmp_path_factory.mktemp("target")
    write_raw(folder / "raw", train=32, held_out=12)
    settings = adaptation(general, folder / "raw", folder / "artifacts")
    for stage in (stages.prepare, stages.codebook, stages.tokenize):
        stage(settings)
    return folder


def adaptation(general: Settings, raw: Path, artifacts: Path, **train: Any) -> Settings:
    base = small_settings(raw, artifacts).model_dump(mode="json", by_alias=True)
    changes = {
        "model": {"context_length": 160},
        "codebook": {"init": str(general.artifacts / "codebook"), "steps": 0},
        "tokenize": {"views": 1},
        "train": {
            "init": str(general.artifacts / "model"),
            "learning_rate": 1e-4,
            "ema": 0.5,
            "alike_pairs": "ignored",
            "tokens": {"general": str(general.artifacts / "tokens")},
            **train,
        },
        "evaluate": {"retention": str(general.artifacts)},
    }
    values = merge(base, changes)
    values["train"]["mixture"] = {"caption": 0.5, "vqa": 0.25, "general:caption": 0.25}
    return check_settings(values, "test")


def trained(general: Settings, target: Path, folder: Path, **train: Any) -> tuple[Settings, dict[str, float]]:
    for name in ("prepared", "codebook", "tokens"):
        (folder / "artifacts").mkdir(exist_ok=True)
        (folder / "artifacts" / name).symlink_to(target / "artifacts" / name, target_is_directory=True)
    settings = adaptation(general, target / "raw", folder / "artifacts", **train)
    stages.train(settings)
    return settings, stages.evaluate(settings)


def test_before_and_after_stand_side_by_side_on_both_data(general: Settings, target: Path, tmp_path: Path) -> None:
    settings, metrics = trained(general, target, tmp_path, interpolate=0.8)
    for part in ("target", "retention"):
        for measure in ("retrieval/image_to_text/recall_at_10", "answers/fused/accuracy"):
            place = f"adaptation/{part}/{measure}"
            assert metrics[f"{place}/gain"] == pytest.approx(metrics[f"{place}/after"] - metrics[f"{place}/before"])
    # Before, on the general data, is what the general run measured of itself.
    known = json.loads((general.artifacts / "metrics.json").read_text())
    for measure in ("retrieval/text_to_image/recall_at_10", "answers/fused/accuracy"):
        assert metrics[f"adaptation/retention/{measure}/before"] == known[measure]
        assert metrics[f"adaptation/target/{measure}/after"] == metrics[measure]
    page = (settings.artifacts / "report" / "index.html").read_text(encoding="utf-8")
    assert 'id="adaptation"' in page and "retention" in page


def test_a_context_is_lengthened_and_no_share_of_new_weights_is_the_old_model(
    general: Settings, target: Path, tmp_path: Path
) -> None:
    settings, metrics = trained(general, target, tmp_path, interpolate=0.0)
    before, after = (load_pretrained(each.artifacts / "model", "cpu")[0] for each in (general, settings))
    assert isinstance(before, FuseLIPModel) and isinstance(after, FuseLIPModel)
    own = before.config.context_length
    assert (own, after.config.context_length) == (128, 160)
    for name, p in before.named_parameters():
        now = after.get_parameter(name)
        assert torch.equal(p, now[:own] if name == "positional_embedding" else now), name
    gains = {
        name: value for name, value in metrics.items() if name.startswith("adaptation/") and name.endswith("/gain")
    }
    assert len(gains) >= 14 and set(gains.values()) == {0.0}


def test_forgetting_keeps_the_alias_where_it_was(general: Settings, target: Path, tmp_path: Path) -> None:
    settings, metrics = trained(general, target, tmp_path, learning_rate=0.02, steps=6, ema=0.0)
    kept = "adaptation/retention/retrieval/image_to_text/recall_at_10/kept"
    gates = [{"metric": kept, "at_least": metrics[kept] + 0.1}]
    values = settings.model_dump(mode="json", by_alias=True) | {"register": {"name": "adapted", "gates": gates}}
    registered = stages.register(check_settings(values, "test"))
    assert registered["alias"] is None
    # Under another name, since a version that is found again moves no alias.
    values["register"] = {"name": "kept", "gates": [{"metric": kept, "at_least": metrics[kept]}]}
    assert stages.register(check_settings(values, "test"))["alias"] == "champion"


def test_tokenizer_is_measured_by_modality_before_and_after(general: Settings, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=32, held_out=12)
    values = adaptation(general, tmp_path / "raw", tmp_path / "artifacts").model_dump(mode="json", by_alias=True)
    values["codebook"]["steps"] = 4
    settings = check_settings(values, "test")
    stages.prepare(settings)
    measured = stages.codebook(settings)
    # What the general run measured of its own tokenizer on its own images; these are others, but drawn alike.
    known = json.loads((general.artifacts / "codebook" / "codebook.json").read_text())["codebook/psnr"]
    assert measured["codebook/before/psnr"] == pytest.approx(known, abs=3.0)
    for part in ("reconstruction_mse", "psnr"):
        for when in ("codebook", "codebook/before"):
            # All images here are CT.
            assert measured[f"{when}/{part}/CT"] == pytest.approx(measured[f"{when}/{part}"])
    assert measured["codebook/before/psnr"] != measured["codebook/psnr"]
    assert 0 < measured["codebook/before/use"] <= 1


def test_two_processes_that_torchrun_starts_are_one_process(general: Settings, target: Path, tmp_path: Path) -> None:
    losses = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        for name in ("prepared", "codebook", "tokens"):
            (folder / name).symlink_to(target / "artifacts" / name, target_is_directory=True)
        values = adaptation(general, target / "raw", folder, steps=4).model_dump(mode="json", by_alias=True)
        # Without what each process draws for itself: hidden tokens, and views of the replayed pairs.
        values["train"] |= {"mask_weight": 0.0, "mixture": {"caption": 0.5, "vqa": 0.5}, "tokens": {}}
        params = {name: values[name] for name in ("model", "prepare", "codebook", "tokenize", "train")}
        (folder / "params.yaml").write_text(yaml.safe_dump({"recipe": "sample", **params}), encoding="utf-8")
        values["train"]["processes"] = processes
        options = ["--settings", str(folder / "params.yaml"), "--artifacts", str(folder)]
        command = [sys.executable, "-m", "fuselip_core", "train", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        losses.append({line["step"]: line["loss"] for line in lines if "loss" in line})
    assert losses[1][1] == pytest.approx(losses[0][1], rel=1e-5)
    assert losses[1][4] == pytest.approx(losses[0][4], rel=1e-4)
