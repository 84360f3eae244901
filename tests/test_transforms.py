"""Text-guided image transformations, against the reference implementation's pictures and by hand."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fuselip_core.data.transforms import (
    FAMILIES,
    GENERAL,
    MEDICAL,
    REGIONS,
    Adjust,
    Crop,
    Edit,
    Flip,
    Grayscale,
    Rotate,
    TransformError,
    apply_edit,
    draw_edits,
    edit_from_json,
    edit_to_json,
    edited_pixels,
    random_family,
)


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    path = shared / "fixtures" / "upstream" / "expected.safetensors"
    if not path.is_file():
        pytest.skip("needs ../shared/fixtures/upstream")
    return {name.removeprefix("tgit."): a for name, a in load_file(path).items() if name.startswith("tgit.")}


@pytest.fixture
def picture() -> np.ndarray:
    """A coloured picture without any symmetry, (64, 64, 3)."""
    return np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def test_every_transformation_equals_the_reference(reference: dict[str, np.ndarray]) -> None:
    source = reference["source"]
    assert len(reference) == 14
    for name, expected in reference.items():
        if name == "source":
            continue
        got = _by_reference_name(name, source)
        tolerance = 1 if name.startswith("rotate") else 0
        assert np.abs(got.astype(int) - expected.astype(int)).max() <= tolerance, name


def _by_reference_name(name: str, source: np.ndarray) -> np.ndarray:
    kind, _, rest = name.partition("/")
    if kind == "crop":
        return changed(source, Crop(rest))
    if kind == "rotate":
        degrees, direction = rest.split()
        return changed(source, Rotate(int(degrees), direction))
    if kind == "adjust":
        what, factor = rest.split()
        return changed(source, Adjust(((what, float(factor)),)))
    if kind.endswith(" flip"):
        return changed(source, Flip(kind.removesuffix(" flip")))
    return changed(source, Grayscale())


def changed(source: np.ndarray, edit: Edit) -> np.ndarray:
    return np.array(apply_edit(edit, Image.fromarray(source)))


def test_instructions_equal_the_reference(shared: Path, reference: dict[str, np.ndarray]) -> None:
    manifest = json.loads((shared / "fixtures" / "upstream" / "manifest.json").read_text(encoding="utf-8"))
    source, rng = reference["source"], np.random.default_rng(0)
    everything = [
        e for family in ("crop", "rotate", "flip", "colorize") for e in edited_pixels(source, rng, family, count=18)
    ]
    by_text = {}
    for edit in everything:
        by_text.setdefault(edit.instruction, edit)
    for name, text in manifest["tgit_texts"].items():
        found = by_text[text].query if name == "colorize" else by_text[text].target
        if text.endswith("flip"):  # both ways round; either may be the first
            found = found if not np.array_equal(found, source) else by_text[text].query
        assert np.array_equal(found, reference[name]), name
    words = manifest["tgit_color_text_example"].split()
    drawn = edited_pixels(source, rng, "colour", count=1)[0].instruction.split()
    assert [w for w in drawn if not w[0].isdigit()][1:4] == [w for w in words if not w[0].isdigit()][1:4]
    assert len(drawn) == len(words)


def test_colour_text_says_what_was_done(picture: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    for edit in edited_pixels(picture, rng, "colour", count=40):
        expected = picture
        for part in edit.instruction.split(" and "):
            verb, what, factor = part.split()[0], part.split()[1], ast.literal_eval(part.split()[-1])
            assert 0.3 <= factor <= 2.0 and factor != 1.0 and round(factor, 1) == factor
            assert verb == ("increase" if factor > 1 else "decrease")
            expected = changed(expected, Adjust(((what, factor),)))
        assert np.array_equal(expected, edit.target)


def test_crops_cover_the_nine_regions(picture: np.ndarray) -> None:
    drawn = edited_pixels(picture, np.random.default_rng(2), "crop")
    assert {edit.instruction for edit in drawn} == {f"crop to {region}" for region in REGIONS}
    corner = np.zeros((64, 64, 3), dtype=np.uint8)
    corner[40:, 40:] = 255
    lit = {region for region in REGIONS if changed(corner, Crop(region)).any()}
    assert lit == {"center center", "center right", "lower center", "lower right"}


def test_crop_of_a_wide_picture_keeps_the_size() -> None:
    wide = np.zeros((50, 200, 3), dtype=np.uint8)
    assert all(changed(wide, Crop(region)).shape == wide.shape for region in REGIONS)


def test_rotation_turns_the_named_way() -> None:
    image = np.zeros((65, 65, 3), dtype=np.uint8)
    image[:20, 22:43] = 200  # bright at the top
    assert changed(image, Rotate(90, "clockwise"))[22:43, 45:].mean() > 190
    assert changed(image, Rotate(90, "counter-clockwise"))[22:43, :20].mean() > 190


def test_flips_come_both_ways_round(picture: np.ndarray) -> None:
    four = edited_pixels(picture, np.random.default_rng(3), "flip")
    assert Counter(edit.instruction for edit in four) == {"horizontal flip": 2, "vertical flip": 2}
    for edit in four:
        assert np.array_equal(changed(edit.query, Flip(edit.instruction.split()[0])), edit.target)


def test_colorize_asks_for_the_colours_back(picture: np.ndarray) -> None:
    pair = {edit.instruction: edit for edit in edited_pixels(picture, np.random.default_rng(4), "colorize")}
    assert np.array_equal(pair["colorize"].target, picture)
    assert np.array_equal(pair["colorize"].query, pair["grayscale"].target)


def test_same_seed_same_edit_and_the_source_stays_as_it_is(picture: np.ndarray) -> None:
    before = picture.copy()
    for seed in range(20):
        family = list(FAMILIES)[seed % len(FAMILIES)]
        first, second = (edited_pixels(picture, np.random.default_rng(seed), family, 1)[0] for _ in range(2))
        assert first.instruction == second.instruction
        assert np.array_equal(first.query, second.query) and np.array_equal(first.target, second.target)
        assert first.target.shape == picture.shape and first.target.dtype == np.uint8
    assert np.array_equal(before, picture)


def test_weights_are_shares_of_pairs() -> None:
    rng = np.random.default_rng(6)
    single = Counter(random_family(rng) for _ in range(7000))
    assert all(abs(single[name] / 1000 - weight) < 0.2 for name, weight in GENERAL.items())
    groups = Counter(random_family(rng, grouped=True) for _ in range(7000))
    pairs = {name: groups[name] * FAMILIES[name].training for name in GENERAL}
    total = sum(pairs.values())
    assert all(abs(7 * pairs[name] / total - weight) < 0.25 for name, weight in GENERAL.items())


def test_medical_edits_keep_left_and_right_apart() -> None:
    rng = np.random.default_rng(7)
    texts = " ".join(draw_edits(rng, random_family(rng, MEDICAL), 1)[0].instruction for _ in range(200))
    for word in ("flip", "colorize", "grayscale", "saturation"):
        assert word not in texts
    for word in ("crop", "rotate", "brightness", "contrast"):
        assert word in texts


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((1, 1, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(TransformError, match="uint8 images of shape"):
        edited_pixels(wrong, np.random.default_rng(0), "crop")


def test_unknown_names_are_refused(picture: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    for call in (
        lambda: edited_pixels(picture, rng, "blur"),
        lambda: draw_edits(rng, "blur"),
        lambda: random_family(rng, {"blur": 1.0}),
        lambda: random_family(rng, {"crop": 0.0}),
    ):
        with pytest.raises(TransformError):
            call()


def test_every_edit_is_stored_and_read_back_as_it_is() -> None:
    rng = np.random.default_rng(8)
    pairs = [pair for family in FAMILIES for pair in draw_edits(rng, family, 20)]
    found = {edit for pair in pairs for edit in (pair.before, pair.after) if edit is not None}
    assert {type(edit) for edit in found} == {Crop, Rotate, Adjust, Flip, Grayscale}
    assert {edit_from_json(edit_to_json(edit)) for edit in found} == found
    assert len(set(map(edit_to_json, found))) == len(found)


@pytest.mark.parametrize(
    "stored",
    [
        '{"kind": "crop", "region": "middle"}',
        '{"kind": "rotate", "degrees": 10, "direction": "left"}',
        '{"kind": "adjust", "changes": [["hue", 1.2]]}',
        '{"kind": "adjust", "changes": [["contrast", -1]]}',
        '{"kind": "flip", "axis": "diagonal"}',
        '{"kind": "blur"}',
        "crop to upper left",
    ],
)
def test_what_is_no_edit_is_not_read(stored: str) -> None:
    with pytest.raises(ValueError, match="validation error"):
        edit_from_json(stored)


def test_a_line_of_pixels_is_widened_before_it_is_edited() -> None:
    line = Image.fromarray(np.arange(40, dtype=np.uint8)[None])
    for pair in draw_edits(np.random.default_rng(9), "crop"):
        assert pair.after and apply_edit(pair.after, line).size == (40, 2)
