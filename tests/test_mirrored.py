"""Training images read mirrored: their pixels, their texts, and what must not change."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from training_data import write_raw

from fuselip_core.config import PrepareSettings
from fuselip_core.data.prepare.mirrored_pairs import exchange_sides
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.data.shards.in_order import pixel_batches
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.images import to_pixels


def test_mirrored_images_have_their_sides_exchanged_in_pixels_and_words(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", train=8, held_out=4)
    fields = {"source": "rocov2", "root": tmp_path / "raw", "workers": 1, "extra_pairs": ["statements", "mirrored"]}
    prepare_data(PrepareSettings.model_validate(fields), tmp_path / "prepared", tmp_path / "work")
    data = PreparedData(tmp_path / "prepared")
    drawn = pixel_batches(data, "train", lambda image, row: to_pixels(image, 32), 64)
    pixels = np.concatenate([batch for _, batch in drawn]).astype(float)
    ids = data.row_ids("train").to_pylist()
    assert len(ids) == len(pixels) == 16
    for row, name in enumerate(ids[8:], start=8):
        np.testing.assert_allclose(pixels[row], pixels[ids.index(name.removesuffix("/mirrored"))][:, ::-1], atol=8)
    sides = {name: pixels[row, :, :16].mean() - pixels[row, :, 16:].mean() for row, name in enumerate(ids)}
    pairs = data.pairs("train").to_pylist()
    told = {"left": 0, "right": 0, "top": 0, "bottom": 0}
    for pair in pairs:
        (shape,) = re.findall(r"\b(left|right|top|bottom)\b", pair["target_text"])
        # Bright on the left is above 100, bright on the right below -100, and the others near 0.
        assert abs(sides[pair["query_image"]] - {"left": 180, "right": -180}.get(shape, 0)) < 40
        told[shape] += 1
    assert len({pair["pair_id"] for pair in pairs}) == len(pairs) == 8 * 3 * 2
    assert set(told.values()) == {12}
    assert data.row_count("valid") == data.image_count("valid") == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Left-sided mass, right of the midline.", "Right-sided mass, left of the midline."),
        ("What is upright, or leftover?", "What is upright, or leftover?"),
    ],
)
def test_sides_are_whole_words(text: str, expected: str) -> None:
    assert exchange_sides(text) == expected
    assert exchange_sides(expected) == text
