"""Weights that must not be used: not finite, not there (Git LFS), or under the names of a wrapper."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_store import tiny_model

from fuselip_core.errors import FuselipError
from fuselip_core.model.embedder import Embedder
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.hub import load_pretrained, load_tokenizer, save_model
from fuselip_core.model.late_fusion import LateFusionConfig, LateFusionModel
from fuselip_core.model.titok import TiTok, TiTokConfig
from fuselip_core.training.checkpoint import Checkpoints

TOKENIZER = TiTokConfig(
    image_size=32, patch_size=16, latent_tokens=4, codebook_size=20, code_size=4, width=16, layers=1, heads=2
)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a joint encoder that contains its image tokenizer."""
    torch.manual_seed(0)
    model = tiny_model()
    model.attach_image_tokenizer(TiTok(TOKENIZER))
    save_model(model, tmp_path / "model")
    return tmp_path / "model"


def spoil(folder: Path, name: str, value: float = float("nan")) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["transformer.resblocks.0.mlp.c_fc.weight", "image_tokenizer.model.encoder.class_embedding"]
)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_weights_do_not_load(saved: Path, name: str, value: float) -> None:
    spoil(saved, name, value)
    for load in (load_pretrained, Embedder.from_pretrained, FuseLIPModel.from_pretrained, load_tokenizer):
        if load is load_tokenizer and not name.startswith("image_tokenizer"):
            continue
        with pytest.raises(FuselipError, match=f"NaN or infinite in {name}"):
            load(saved)


def test_non_finite_late_fusion_does_not_load(tmp_path: Path) -> None:
    save_model(LateFusionModel(LateFusionConfig.of_size("tiny", "add")), tmp_path / "late")
    spoil(tmp_path / "late", "model.visual.proj")
    with pytest.raises(FuselipError, match=r"NaN or infinite in model\.visual\.proj"):
        load_pretrained(tmp_path / "late")


def test_a_non_finite_codebook_neither_loads_nor_is_saved(tmp_path: Path) -> None:
    tokenizer = TiTok(TOKENIZER)
    tokenizer.save(tmp_path)
    spoil(tmp_path, "quantize.embedding.weight")
    for load in (TiTok.load, load_tokenizer):
        with pytest.raises(FuselipError, match=r"NaN or infinite in quantize\.embedding\.weight"):
            load(tmp_path)
    tokenizer.latent_tokens.data[0, 0] = float("inf")
    (tmp_path / "new").mkdir()
    with pytest.raises(FuselipError, match="NaN or infinite in latent_tokens; it is not saved"):
        tokenizer.save(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_a_non_finite_model_is_not_saved_over_the_last_good_one(saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    model = tiny_model()
    model.ln_final.weight.data[3] = float("nan")
    with pytest.raises(FuselipError, match=r"NaN or infinite in ln_final\.weight"):
        save_model(model, saved)
    assert (saved / "model.safetensors").read_bytes() == before


def test_a_checkpoint_that_is_not_finite_is_neither_written_nor_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"model": {"w": torch.ones(2)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}})
    bad = {"optimizer": {"state": {0: {"exp_avg": torch.tensor([1.0, float("nan")])}}}}
    with pytest.raises(FuselipError, match=r"state of step 2 .* optimizer\.state\.0\.exp_avg"):
        checkpoints.save(2, bad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fuselip_core.training.checkpoint.refuse_non_finite", lambda *_: None)
        checkpoints.save(2, bad)
    with caplog.at_level(logging.WARNING, logger="fuselip"):
        found = checkpoints.latest()
    assert found is not None and found[0] == 1 and "exp_avg" in caplog.text


def test_embeddings_that_are_not_finite_do_not_leave(saved: Path) -> None:
    model, processor = load_pretrained(saved, "cpu")
    model.ln_final.weight.data[0] = float("nan")
    with pytest.raises(FuselipError, match=r"row 0.*not finite"):
        Embedder(model, processor).embed(texts=["liver"])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_git_lfs_pointer_is_called_so(saved: Path, name: str) -> None:
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(POINTER)
    with pytest.raises(FuselipError, match=r"is a Git LFS pointer.*git lfs pull"):
        load_pretrained(saved)


def test_damaged_pickles_do_not_bring_torchs_advice(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    for content in (b"no pickle", b"\x80\x04garbage"):
        (saved / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(FuselipError, match="no readable checkpoint") as refused:
            load_pretrained(saved)
        assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrappers_load(saved: Path, prefix: str) -> None:
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save({prefix + name: value for name, value in weights.items()}, saved / "pytorch_model.bin")
    model, _ = load_pretrained(saved, "cpu")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
