"""Cards of models and data, and a model with its cards on the Hub and back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pyarrow.parquet as pq
import pytest
import torch
from fake_hub import FakeHub
from huggingface_hub import DatasetCard, ModelCard

from fuselip_core.cards.data_card import cell, data_card
from fuselip_core.cards.model_card import cards_of, model_card, write_cards
from fuselip_core.cards.push import push_model
from fuselip_core.config import Settings
from fuselip_core.errors import FuselipError
from fuselip_core.files import read_json, write_json
from fuselip_core.model.hub import load_pretrained


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub().running() as running:
        yield running


def edit(path: Path, **values: object) -> None:
    write_json(path, read_json(path) | values)


@pytest.fixture
def run(finished_run: Settings, tmp_path: Path) -> Settings:
    """The finished run in a folder of its own, to be changed."""
    artifacts = tmp_path / "artifacts"
    for name in ("model", "prepared", "report", "tracking"):
        shutil.copytree(finished_run.artifacts / name, artifacts / name)
    shutil.copy(finished_run.artifacts / "metrics.json", artifacts)
    return finished_run.model_copy(update={"artifacts": artifacts})


def test_the_model_card_says_what_was_measured_and_how_it_was_made(run: Settings) -> None:
    numbers = read_json(run.artifacts / "metrics.json")
    manifest = read_json(run.artifacts / "prepared" / "manifest.json")
    card = ModelCard(model_card(run))
    results = {each.metric_name: each for each in card.data.eval_results or ()}
    recall = results["Image to caption, recall@1"]
    assert recall.metric_value == pytest.approx(numbers["retrieval/image_to_text/recall_at_1"], abs=1e-4)
    assert recall.dataset_split == json.loads((run.artifacts / "report" / "results.json").read_text())["split"]
    low, high = (100 * numbers[f"retrieval/image_to_text/recall_at_1/{end}"] for end in ("low", "high"))
    for text in (
        f"[{low:.1f} to {high:.1f} %]",
        "| shuffled pairs |",
        "| chance |",
        "not a medical device",
        manifest["data_version"],
        f"`{run.recipe}`",
        f"| Steps | {numbers['train/steps']:,.0f} |",
    ):
        assert text in card.text, text
    modalities = [name.removeprefix("codebook/psnr/") for name in numbers if name.startswith("codebook/psnr/")]
    assert modalities
    for name in modalities:
        assert f"| PSNR, {name} | {numbers[f'codebook/psnr/{name}']:.1f} dB |" in card.text


def test_base_models_data_and_licence_are_in_the_metadata(run: Settings) -> None:
    origin = {"source": "hub:eltorio/ROCOv2-radiology", "revision": "abc", "licence": "CC-BY-NC-4.0"}
    edit(run.artifacts / "prepared" / "manifest.json", source="rocov2", origin=origin)
    write_json(run.artifacts / "model" / "started_from.json", {"init": "chs20/FuseLIP-S-CC3M-MM", "interpolate": 0.0})
    data = ModelCard(model_card(run)).data
    assert data.base_model == ["chs20/FuseLIP-S-CC3M-MM"]
    assert data.datasets == "eltorio/ROCOv2-radiology"
    assert data.license == "cc-by-nc-4.0"
    assert DatasetCard(data_card(run.artifacts / "prepared")).data.license == "cc-by-nc-4.0"


def test_a_licence_that_the_hub_does_not_know_is_named(run: Settings) -> None:
    origin = {"source": "zenodo:10821435", "revision": "10821435", "licence": "CC BY for most"}
    edit(run.artifacts / "prepared" / "manifest.json", source="rocov2", origin=origin)
    data = ModelCard(model_card(run)).data
    assert (data.license, data.license_name) == ("other", "CC BY for most")


def test_the_data_card_counts_what_is_there(run: Settings) -> None:
    prepared = run.artifacts / "prepared"
    edit(prepared / "manifest.json", quarantine={"short_caption": 7}, notes=["a | b <b>"])
    manifest = read_json(prepared / "manifest.json")
    card = DatasetCard(data_card(prepared))
    for split, part in manifest["counts"].items():
        assert f"| {split} | {part['images']:,} | {part['cases']:,} |" in card.text
    tables = [pq.read_table(path) for path in prepared.glob("images-*.parquet")]
    licences = {name or "not stated" for table in tables for name in table["licence"].to_pylist()}
    assert all(f"| {cell(name)} | " in card.text for name in licences)
    assert "| short caption | 7 |" in card.text
    assert "- a \\| b \\<b>" in card.text


def test_splits_that_share_cases_are_not_called_apart(run: Settings) -> None:
    manifest = read_json(run.artifacts / "prepared" / "manifest.json")
    assert "No case is in two splits." in data_card(run.artifacts / "prepared")
    edit(run.artifacts / "prepared" / "manifest.json", settings=manifest["settings"] | {"shared_images": "keep"})
    text = data_card(run.artifacts / "prepared")
    assert "No case is in two splits." not in text and "held-out results are too optimistic" in text


def test_a_run_without_measures_gets_no_card(run: Settings) -> None:
    (run.artifacts / "metrics.json").unlink()
    with pytest.raises(FuselipError, match=r"metrics\.json is missing"):
        write_cards(run)
    assert not (run.artifacts / "cards").exists()


def test_the_registered_model_brings_its_cards(finished_run: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = read_json(finished_run.artifacts / "registered.json")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registered["tracking_uri"])
    from fuselip_core.registry.address import fetch_model

    folder = cards_of(fetch_model(registered["model_uri"]))
    assert folder != finished_run.artifacts / "cards"
    for name in ("README.md", "DATA_CARD.md"):
        assert (folder / name).read_text() == (finished_run.artifacts / "cards" / name).read_text()
    mlflow.set_tracking_uri(None)


def cli(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`fuselip` with its words, in an environment that knows nothing of a user's own token."""
    known = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    command = [sys.executable, "-m", "fuselip_core", *words]
    return subprocess.run(command, capture_output=True, text=True, env=known | environment, timeout=200)


@pytest.mark.timeout(1500)
def test_what_is_pushed_loads_without_remote_code(run: Settings, hub: FakeHub, tmp_path: Path) -> None:
    write_cards(run)
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    done = cli("push", str(run.artifacts / "model"), "me/encoder", **environment, HF_TOKEN=hub.token)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.url}/me/encoder/commit/0123456789abcdef0123456789abcdef01234567"
    assert hub.commits == 1
    files = hub.repos["me/encoder"].files
    assert {"config.json", "model.safetensors", "processor_config.json", "README.md", "DATA_CARD.md"} <= set(files)
    assert bytes(files["README.md"]) == (run.artifacts / "cards" / "README.md").read_bytes()  # type: ignore[arg-type]
    code = f"""
import sys, torch, fuselip_core
from transformers import AutoModel, AutoProcessor
from fuselip_core import load_model
model = AutoModel.from_pretrained("me/encoder", trust_remote_code=False).eval()
processor = AutoProcessor.from_pretrained("me/encoder", trust_remote_code=False)
published, _, tokenizer = load_model("me/encoder", device="cpu")
ids = processor(text=["liver lesion"])["input_ids"]
assert torch.equal(ids, tokenizer(["liver lesion"]))
with torch.inference_mode():
    first, second = model.encode_text(ids), published.encode_text(ids)
assert torch.equal(first, second)
torch.save(first, {str(tmp_path / "embedding.pt")!r})
"""
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=200
    )
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    model, processor = load_pretrained(run.artifacts / "model", "cpu")
    with torch.inference_mode():
        expected = model.encode_text(processor(text=["liver lesion"])["input_ids"])
    assert torch.equal(torch.load(tmp_path / "embedding.pt", weights_only=True), expected)


@pytest.mark.timeout(1500)
def test_what_cannot_be_pushed_is_one_sentence(run: Settings, hub: FakeHub, tmp_path: Path) -> None:
    model = str(run.artifacts / "model")
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    for words, given, sentence in (
        (("push", model, "me/encoder"), {}, "has no model card; run `fuselip card`"),
        (("push", model, "encoder"), {}, "'encoder' is not the name of a repository; give OWNER/NAME"),
    ):
        done = cli(*words, **environment, **given)
        assert done.returncode == 1 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
    write_cards(run)
    for given, sentence in (
        ({}, "run `hf auth login` with a write token"),
        ({"HF_TOKEN": "hf_another"}, "the Hub refuses the upload to me/encoder (401); run `hf auth login`"),
        (
            {"HF_TOKEN": hub.token, "HF_ENDPOINT": "http://127.0.0.1:9"},
            "the Hub cannot be reached (http://127.0.0.1:9)",
        ),
    ):
        done = cli("push", model, "me/encoder", **{**environment, **given})
        assert done.returncode == 1 and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "me/encoder" not in hub.repos


def test_damaged_weights_are_not_published(run: Settings) -> None:
    write_cards(run)
    weights = run.artifacts / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FuselipError, match=r"model\.safetensors"):
        push_model(run.artifacts / "model", "me/encoder")
