"""Pictures to pixels, strings to ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from fuselip_core.errors import FuselipError
from fuselip_core.model.fuselip_config import FuseLIPConfig
from fuselip_core.model.late_fusion import LateFusionConfig
from fuselip_core.model.processing import FuseLIPProcessor, ImageProcessor, TextTokenizer
from fuselip_core.model.vocabulary import BEGIN_OF_TEXT, END_OF_TEXT


@pytest.fixture
def palette() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(values).quantize(16)


def test_pixels_are_squashed_to_a_square_in_0_to_1() -> None:
    wide = Image.fromarray(np.full((10, 40), 255, dtype=np.uint8))
    pixels = ImageProcessor(16)(wide)
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.ones(3, 16, 16))


def test_families_differ_in_the_order_of_resize_and_rgb(palette: Image.Image) -> None:
    early = np.asarray(palette.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    assert torch.equal(ImageProcessor(16)(palette), torch.from_numpy(early).permute(2, 0, 1))
    late = np.asarray(palette.resize((16, 16), Image.Resampling.BICUBIC).convert("RGB"), dtype=np.float64) / 255
    late = (late - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    normalised = ImageProcessor(16, normalise=True)(palette).permute(1, 2, 0).double()
    torch.testing.assert_close(normalised, torch.from_numpy(late), atol=1e-5, rtol=0)


def test_wrong_images_are_told() -> None:
    with pytest.raises(FuselipError, match="not ndarray"):
        ImageProcessor(16)(np.zeros((4, 4)))  # type: ignore[arg-type]
    with pytest.raises(FuselipError, match="window it to 8 bits"):
        ImageProcessor(16)(Image.fromarray(np.full((4, 4), 4000, dtype=np.uint16)))


def test_texts_become_ids_of_one_length() -> None:
    ids = TextTokenizer(12)(["CT", "", "a chest x-ray " * 10])
    assert ids.dtype == torch.int64
    assert ids.shape == (3, 12)
    assert ids[0, 0] == BEGIN_OF_TEXT
    assert ids[1].tolist() == [BEGIN_OF_TEXT, END_OF_TEXT, *[0] * 10]
    assert ids[2, -1] == END_OF_TEXT
    assert TextTokenizer(12)([]).shape == (0, 12)
    with pytest.raises(FuselipError, match="text 1 is no string but NoneType"):
        TextTokenizer(12)(["a", None])  # type: ignore[list-item]


def test_encode_and_decode() -> None:
    tokenizer = TextTokenizer(12)
    ids = tokenizer.encode("Widened  esophagus.")
    assert tokenizer([" widened esophagus."])[0, 1 : len(ids) + 1].tolist() == ids
    assert tokenizer.decode([*ids, 53000]) == "widened esophagus ."


@pytest.mark.parametrize(
    "config", [FuseLIPConfig.of_size("tiny"), LateFusionConfig.of_size("tiny", "add")], ids=["fuselip", "late"]
)
def test_processor_comes_back_from_disk(config: FuseLIPConfig | LateFusionConfig, tmp_path: Path) -> None:
    processor = FuseLIPProcessor.of_config(config)
    processor.save_pretrained(tmp_path)
    picture = Image.new("L", (50, 30), 128)
    for loaded in (FuseLIPProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, FuseLIPProcessor)
        batch, again = processor(images=[picture], text="a"), loaded(images=picture, text=["a"])
        assert batch["pixel_values"].shape == (1, 3, 96, 96)
        assert batch["input_ids"].shape == (1, config.context_length)
        assert all(torch.equal(batch[name], again[name]) for name in ("pixel_values", "input_ids"))


def test_processor_without_input_is_told() -> None:
    with pytest.raises(FuselipError, match="neither images nor text"):
        FuseLIPProcessor()()
