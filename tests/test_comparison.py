"""Any model without training: two towers of other projects, measured beside ours, in one table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from training_data import small_settings, write_raw
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast, SiglipConfig, SiglipModel
from typer.testing import CliRunner, Result

from fuselip_core import stages
from fuselip_core.cli.main import app
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.store import ABSENT
from fuselip_core.encoding.open import TEXTS, open_measuring
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.embed import embed
from fuselip_core.evaluation.published import published
from fuselip_core.evaluation.report.comparison import as_text, write_comparison
from fuselip_core.evaluation.result import EvaluationResult
from fuselip_core.images import decode
from fuselip_core.model.comparison import TwoTowers, load_comparison
from fuselip_core.tokenizer.tokenize import tokenize_texts

CPU = torch.device("cpu")
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = ["[PAD]", "[UNK]", "[END]", "a", "skull", "chest"]
END = WORDS.index("[END]")


def open_clip_folder(folder: Path, tokens: int = 12) -> str:
    """A tiny CLIP with random weights, as open_clip publishes one; it reads `tokens` of a text."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
        "text_cfg": {"context_length": tokens, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    folder.mkdir()
    model = open_clip.CLIP(**config)
    save_file(dict(model.state_dict()), folder / "open_clip_model.safetensors")
    content = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return f"open_clip:{folder}"


def transformers_folder(folder: Path, kind: str) -> str:
    """A tiny CLIP or SigLIP with random weights and a tokenizer of words, as transformers saves one."""
    torch.manual_seed(0)
    text = LAYERS | {"vocab_size": len(WORDS), "max_position_embeddings": 8, "projection_size": 16}
    text |= {"eos_token_id": END, "bos_token_id": 1, "pad_token_id": 0}
    vision = LAYERS | {"image_size": 32, "patch_size": 16}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(folder)
    return f"transformers:{folder}"


def picture(grey: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(grey).integers(0, 255, (40, 48), np.uint8))


@pytest.fixture(params=["open_clip", "clip", "siglip"])
def towers(request: pytest.FixtureRequest, tmp_path: Path) -> TwoTowers:
    make = open_clip_folder(tmp_path / "m") if request.param == "open_clip" else None
    return load_comparison(make or transformers_folder(tmp_path / "m", request.param), CPU)


def test_a_pair_is_the_sum_of_its_parts(towers: TwoTowers) -> None:
    images, texts = [picture(1), None, picture(1), picture(2)], [None, "a skull", "a skull", None]
    found = towers.embed(images, texts, batch_size=3)
    assert found.shape == (4, 16) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    both = found[0] + found[1]
    np.testing.assert_allclose(found[2], both / np.linalg.norm(both), atol=1e-5)
    assert not np.allclose(found[0], found[3], atol=1e-3)
    np.testing.assert_allclose(towers.embed(images, texts, batch_size=1), found, atol=1e-5)


def test_features_are_those_of_the_library(tmp_path: Path) -> None:
    name = open_clip_folder(tmp_path / "clip")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'clip'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")(["a chest"])
    with torch.no_grad():
        image = model.encode_image(preprocess(picture(3).convert("RGB"))[None], normalize=True)[0]
        text = model.encode_text(tokens, normalize=True)[0]
    towers = load_comparison(name, CPU)
    np.testing.assert_allclose(towers.embed([picture(3)], [None])[0], image, atol=1e-5)
    np.testing.assert_allclose(towers.embed([None], ["a chest"])[0], text, atol=1e-5)


def test_what_cannot_be_opened_is_a_sentence(tmp_path: Path) -> None:
    for name, said in (
        ("open_clip:ViT-B-32", "names no weights"),
        ("open_clip:local-dir:/no/such", "cannot be opened"),
        (f"transformers:{tmp_path / 'none'}", "there is no folder"),
    ):
        with pytest.raises(FuselipError, match=said):
            load_comparison(name, CPU)
    name = open_clip_folder(tmp_path / "clip")
    path = tmp_path / "clip" / "open_clip_model.safetensors"
    weights = load_file(path)
    weights["text_projection"][0, 0] = torch.nan
    save_file(weights, path)
    with pytest.raises(FuselipError, match=r"NaN or infinite in text_projection"):
        load_comparison(name, CPU)
    name = transformers_folder(tmp_path / "siglip", "siglip")
    path = tmp_path / "siglip" / "model.safetensors"
    weights = {key: value for key, value in load_file(path).items() if "vision_model.head.probe" not in key}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(FuselipError, match=r"lacks 1 weights, vision_model\.head\.probe"):
        load_comparison(name, CPU)


def evaluate(raw: Path, artifacts: Path, *models: str) -> Result:
    chosen = [f"--set=prepare.root={raw}", "--set=prepare.source=rocov2", f"--artifacts={artifacts}"]
    return CliRunner().invoke(app, ["evaluate", "--recipe", "sample", *chosen, *(f"--model={name}" for name in models)])


def test_any_model_is_measured_on_a_source_without_training(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=16, held_out=8)
    names = [open_clip_folder(tmp_path / "clip"), transformers_folder(tmp_path / "siglip", "siglip")]
    failed = evaluate(tmp_path / "raw", tmp_path / "artifacts", names[0], "transformers:/no/such")
    assert "there is no folder '/no/such'" in str(failed.exception)
    assert not (tmp_path / "artifacts" / "comparison").exists()
    done = evaluate(tmp_path / "raw", tmp_path / "artifacts", *names)
    assert done.exit_code == 0, done.exception
    found = json.loads((tmp_path / "artifacts" / "comparison" / "results.json").read_text())
    assert list(found["models"]) == names and found["split"] == "test"
    for numbers in found["models"].values():
        assert numbers["retrieval/pool_images"] == 8
        assert numbers["retrieval/text_to_image/recall_at_10/low"] >= 0
    assert all(name in done.output for name in names)
    assert not (tmp_path / "artifacts" / "tokens").exists() and not (tmp_path / "artifacts" / "work/pixels").exists()


def test_an_encoder_on_rows_is_the_model_itself(tmp_path: Path) -> None:
    """What evaluation embeds through the store of a prepared split is what the model makes of picture and text."""
    write_raw(tmp_path / "raw", train=16, held_out=8)
    settings = small_settings(tmp_path / "raw", tmp_path / "artifacts")
    stages.prepare(settings)
    prepared = PreparedData(settings.artifacts / "prepared")
    tokenize_texts(prepared, settings.artifacts / TEXTS)
    towers = load_comparison(open_clip_folder(tmp_path / "clip"), CPU)
    store, encoder = open_measuring(towers, settings.artifacts, "test", CPU)
    files = [decode(blob) for batch in prepared.iter_images("test") for blob in batch.column("bytes").to_pylist()]
    text = store.texts_of([1])[0]
    pairs = np.array([2, 2, ABSENT]), np.array([ABSENT, 1, 1])
    expected = towers.embed([files[2], files[2], None], [None, text, text])
    np.testing.assert_allclose(embed(encoder, store, *pairs, 2), expected, atol=1e-5)
    black = towers.embed([Image.new("RGB", (32, 32))], [text])
    np.testing.assert_allclose(embed(encoder, store, pairs[0][1:2], pairs[1][1:2], 2, blank=True), black, atol=1e-5)


def result(recall: float) -> EvaluationResult:
    name = "retrieval/image_to_text/recall_at_1"
    metrics = {name: recall, "retrieval/image_to_text/chance_at_1": 0.025, "concepts/probe/f1": 0.5}
    for part in ("image_to_text/chance_at_10", "image_to_text/gain/recall_at_10", "pool"):
        metrics[f"retrieval/{part}"] = 0.25
    metrics |= {"retrieval/image_to_text/recall_at_10": 0.5, "concepts/most_frequent/f1": 0.25}
    metrics["concepts/gain/probe/f1"] = 0.25
    names = [each for each in metrics if "recall" in each or each.endswith("/f1")]
    return EvaluationResult("test", metrics, {each: (metrics[each] - 0.05, metrics[each] + 0.05) for each in names})


def test_one_table_of_models_and_published_numbers(tmp_path: Path) -> None:
    table = write_comparison(tmp_path, {"ours": result(0.25), "theirs": result(0.5)}, beside_published=True)
    rows = {row[0]: row[1:] for row in table["rows"]}
    assert table["head"] == ["", "ours", "theirs", "chance or control", "published"]
    assert rows["Image → caption, recall at 1"] == ["25.0 ± 5.0 %", "50.0 ± 5.0 %", "2.5 %", ""]
    words = "0.589 (winner of 2025); 0.559 (a single DenseNet-121)"
    assert rows["Concepts, F1 of a linear probe"] == ["0.500 ± 0.050", "0.500 ± 0.050", "0.250", words]
    words = "70.8 % (FuseLIP-B, CC3M); 48.9 % (SigLIP-B MLF, CC12M)"
    assert rows["oi-pos, not measured here"] == ["", "", "", words]
    words = "19.8 % (FuseLIP-B, CC12M); 17.0 % (SigLIP-B SF, CC12M)"
    assert rows["mmeb/vqa, mean, not measured here"] == ["", "", "", words]
    text = as_text(table["head"], table["rows"]).splitlines()
    assert text[0].split() == ["ours", "theirs", "chance", "or", "control", "published"]
    assert len({line.index("50.0 ± 5.0 %") for line in text if "recall at 1 " in line}) == 1
    found = json.loads((tmp_path / "comparison" / "results.json").read_text())
    assert found["models"]["theirs"]["retrieval/image_to_text/recall_at_1"] == 0.5
    assert "a tie is wrong" in (tmp_path / "comparison" / "index.html").read_text().lower()


def test_chance_stands_for_each_model_where_it_differs(tmp_path: Path) -> None:
    """A tokenizer that knows few words makes captions equal, which raises recall and chance alike."""
    coarse = result(0.5)
    coarse.metrics["retrieval/image_to_text/chance_at_1"] = 0.4
    rows = {row[0]: row[1:] for row in write_comparison(tmp_path, {"ours": result(0.25), "x": coarse})["rows"]}
    assert rows["Image → caption, recall at 1"][-1] == "2.5 % / 40.0 %"


def test_long_names_are_numbered() -> None:
    text = as_text(["", "open_clip:hf-hub:somebody/something", "b"], [["row", "1", "2"]])
    assert text.splitlines() == ["[1] open_clip:hf-hub:somebody/something", "     [1]  b", "row  1    2"]


def test_published_numbers_name_their_source() -> None:
    assert len(published()) == 12 * 9 + 2
    assert all(each["source"] and 0 < each["value"] < 1 for each in published())
    assert published("no/such/metric") == []
