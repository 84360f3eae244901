"""Every value that the published code computes is computed here again; ../shared/fixtures/README.md says on what."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import reference
import torch
from open_clip.loss import SigLipLoss
from torch import Tensor

from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.fuselip_config import FuseLIPConfig
from fuselip_core.model.hub import load_model, load_tokenizer
from fuselip_core.model.late_fusion import LateFusionConfig, LateFusionModel
from fuselip_core.model.processing import ImageProcessor, TextTokenizer
from fuselip_core.model.vocabulary import join
from fuselip_core.model.weights import load_strictly
from fuselip_core.training.losses import sigmoid_contrastive

# tgit.* are the text-guided image transformations, which tests/test_transforms.py compares.
KEYS = [key for key in reference.keys() if not key.startswith("tgit.")]  # noqa: SIM118
TEXTS = slice(0, 4)
LONG_TEXT = slice(4, 5)


@pytest.mark.skipif(not KEYS, reason="needs ../shared/fixtures, which this checkout lacks")
@pytest.mark.parametrize("key", KEYS)
def test_reference_value(key: str) -> None:
    value, wanted = _computed(key)[key], reference.expected(key)
    assert value.shape == wanted.shape
    if key.endswith(".token_ids"):
        assert (value == wanted).float().mean() >= 0.995
    elif key.endswith(".image_input_ids"):
        assert (value == wanted).float().mean() >= 0.995
        assert torch.equal(value[:, -2:], wanted[:, -2:])
    elif not wanted.is_floating_point():
        assert torch.equal(value, wanted)
    elif key.endswith(".latents"):
        assert (value - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    elif key.endswith("_loss"):
        assert (value - wanted).abs().max() <= 1e-4
    elif key.endswith(".pixel_sum"):
        assert torch.allclose(value, wanted, rtol=1e-7, atol=1e-3)
    else:
        assert (value - wanted).abs().max() <= 1e-5


def _computed(key: str) -> dict[str, Tensor]:
    """The values of all keys that come from the same weights as `key`."""
    group = key.split(".")[0]
    if group in ("preprocess", "text"):
        return _inputs()
    family, size = group.split("-")[:2]
    if family == "titok":
        return _titok(size)
    if family == "siglip":
        return _late_fusion(size)
    return _fuselip(size)


@functools.cache
def _pixels(normalise: bool) -> Tensor:
    return torch.stack([ImageProcessor(256, normalise)(picture) for picture in reference.pictures()])


@functools.cache
def _text_ids() -> Tensor:
    return TextTokenizer(180)(reference.manifest()["tokenizer_texts"])


@functools.cache
def _inputs() -> dict[str, Tensor]:
    return {
        "preprocess.pixel_sum": _pixels(False).double().sum((1, 2, 3)),
        "preprocess.patch": _pixels(False)[:, :, 100:116, 100:116],
        "text.input_ids.180": _text_ids(),
        "text.input_ids.77": TextTokenizer(77)(reference.manifest()["tokenizer_texts"]),
    }


@functools.cache
@torch.inference_mode()
def _titok(size: str) -> dict[str, Tensor]:
    name = f"titok-{size}"
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(reference.published_folder(name, Path(folder)))
    latents = tokenizer.encode(_pixels(False))
    codes = tokenizer.quantize.nearest(tokenizer.quantize.flatten(latents))
    return {f"{name}.latents": latents, f"{name}.token_ids": codes}


def _load_fuselip(name: str) -> FuseLIPModel:
    """The small one through the published call, the base one without the detour over half a gigabyte on disk."""
    if name == "fuselip-small":
        with tempfile.TemporaryDirectory() as folder:
            model, _, _ = load_model(reference.published_folder(name, Path(folder)), device="cpu")
        assert isinstance(model, FuseLIPModel)
        return model
    with torch.device("meta"):
        model = FuseLIPModel(FuseLIPConfig.from_published(reference.manifest()["models"][name]["config"]))
    load_strictly(model, reference.weights(name), name)
    return model.eval()


@functools.cache
@torch.inference_mode()
def _fuselip(size: str) -> dict[str, Tensor]:
    name = f"fuselip-{size}"
    model, pixels, text = _load_fuselip(name), _pixels(False), _text_ids()[TEXTS]
    own_ids = model.tokenize_image(pixels, append_empty_text=True)
    # A code on a tie may fall to the other side on another machine; what follows must not hang on it.
    codes = reference.expected(f"{name}.image_input_ids")[:, :-2] - model.vocabulary.image_offset
    assert model.image_tokenizer is not None
    model.image_tokenizer.model.codes = lambda pixels: codes  # type: ignore[method-assign]
    long_text = _text_ids()[LONG_TEXT].expand(4, -1)
    text_features, fused = model.encode_text(text), model.encode_multimodal(pixels, text)
    masked, labels = (reference.expected(f"{name}.mmm_{part}") for part in ("input_ids", "labels"))
    output = model(masked, labels=labels)
    contrastive = sigmoid_contrastive(fused, text_features, model.logit_scale.exp(), model.logit_bias)
    torch.testing.assert_close(
        contrastive, SigLipLoss()(fused, text_features, model.logit_scale.exp(), model.logit_bias)
    )
    values = {
        "image_input_ids": own_ids,
        "image_features": model.encode_image(pixels),
        "text_features": text_features,
        "fused_features": fused,
        "fused_long_input_ids": join(model.tokenize_image(pixels), long_text, 180),
        "fused_long_features": model.encode_multimodal(pixels, long_text),
        "mmm_input_ids": _mask_again(masked, labels, join(model.tokenize_image(pixels), text, 180)),
        "mmm_labels": labels,
        "mmm_loss": output.loss[None],
        "mmm_features": output.embeddings,
        "siglip_loss": contrastive[None],
    }
    return {f"{name}.{key}": value for key, value in values.items()}


def _mask_again(masked: Tensor, labels: Tensor, sequence: Tensor) -> Tensor:
    """The fused `sequence`, cut to its longest row, hidden where `labels` say; they must be what was hidden."""
    sequence = sequence[:, : masked.shape[1]]
    places = labels != -100
    assert torch.equal(sequence[places], labels[places])
    return sequence.masked_fill(places, 49408)


@functools.cache
@torch.inference_mode()
def _late_fusion(size: str) -> dict[str, Tensor]:
    """Both baselines of a size; their towers have the same names, so the same weights."""
    values: dict[str, Tensor] = {}
    state, towers = reference.weights(f"siglip-{size}-magiclens"), None
    pixels, text = _pixels(True), _text_ids()[TEXTS]
    for fusion in ("magiclens", "add"):
        name = f"siglip-{size}-{fusion}"
        content = reference.manifest()["models"][name]
        with torch.device("meta"):
            names = set(content["state_dict"])
            model = LateFusionModel(LateFusionConfig.from_published(content["open_clip_config"], names))
        assert model.config.fusion == fusion
        load_strictly(model, {key: state[key] for key in names}, name)
        model.eval()
        if towers is None:
            towers = model.model
            towers.encode_image = _once(towers.encode_image)
        model.model = towers
        values[f"{name}.pixel_sum"] = pixels.double().sum((1, 2, 3))
        values[f"{name}.image_features"] = model.encode_image(pixels)
        values[f"{name}.text_features"] = model.encode_text(text)
        values[f"{name}.fused_features"] = model.encode_multimodal(pixels, text)
    return values


def _once(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`function`, which takes seconds and is only ever given the same pixels, remembering its result."""
    results: list[Tensor] = []

    def remembered(pixels: Tensor) -> Tensor:
        if not results:
            results.append(function(pixels))
        return results[0]

    return remembered
