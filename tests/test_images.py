"""Reading images: every odd but valid one is read, every unusable one is named with its reason."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fuselip_core.images import UnreadableImage, decode, random_crop, random_variation, to_pixels
from fuselip_core.model.processing import ImageProcessor


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def ramp(width: int = 60, height: int = 40) -> Image.Image:
    values = np.add.outer(np.arange(height) * 3, np.arange(width) * 2) % 256
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize(
    "data",
    [
        encoded(ramp(), "JPEG"),
        encoded(ramp().convert("CMYK"), "JPEG"),
        encoded(ramp().convert("P"), "PNG"),
        encoded(ramp().convert("LA"), "PNG"),
        encoded(ramp().convert("1"), "TIFF"),
        encoded(ramp().convert("RGB"), "WEBP"),
        encoded(ramp(), "GIF", save_all=True, append_images=[ramp().rotate(90)]),
        encoded(ramp(1, 1), "PNG"),
        encoded(ramp(3000, 1), "BMP"),
    ],
    ids=["grey", "cmyk", "palette", "alpha", "bilevel", "webp", "animated", "1x1", "line"],
)
def test_odd_images_become_pixels(data: bytes) -> None:
    pixels = to_pixels(decode(data), 32)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8


def deep(low: int, high: int) -> Image.Image:
    return Image.fromarray(np.linspace(low, high, 64 * 64).reshape(64, 64).astype(np.uint16))


def test_sixteen_bits_become_their_upper_eight_whatever_else_is_in_the_picture() -> None:
    values = np.asarray(deep(1000, 30_000))
    grey = np.asarray(decode(encoded(deep(1000, 30_000), "PNG")))
    assert grey.dtype == np.uint8 and np.array_equal(grey, values // 256)
    brighter = values.copy()
    brighter[0, 0] = 65_535  # stretched by its extremes, every other value would change
    assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(brighter), "PNG")))[1:], grey[1:])
    for form in ("TIFF", "PPM", "JPEG2000"):
        options = {"irreversible": False} if form == "JPEG2000" else {}
        assert np.array_equal(np.asarray(decode(encoded(deep(1000, 30_000), form, **options))), grey), form


def test_a_deep_tiff_says_its_depth_and_which_end_is_white() -> None:
    """12 bits in 12 bits: two values in three bytes. Bits 258, compression 259, white is zero 262."""
    values = np.asarray(deep(0, 4095))
    pairs = values.reshape(-1, 2)
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=-1)
    twelve = tiff(packed.astype(np.uint8).tobytes(), bits=12, photometric=1)
    assert np.array_equal(np.asarray(decode(twelve)), values // 16)
    sixteen = np.asarray(deep(0, 65_535)).astype("<u2").tobytes()
    black_is_zero, white_is_zero = (np.asarray(decode(tiff(sixteen, 16, white))) for white in (1, 0))
    assert np.array_equal(black_is_zero, 255 - white_is_zero) and black_is_zero[0, 0] == 0


def tiff(data: bytes, bits: int, photometric: int, side: int = 64) -> bytes:
    """A TIFF of one strip, by hand: Pillow writes no 12 bits."""
    start = 8 + 2 + 12 * 9 + 4
    # width, height, bits, no compression, which end is white, start, one sample, rows of the strip, length
    tags = {256: side, 257: side, 258: bits, 259: 1, 262: photometric, 273: start, 277: 1, 278: side, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.parametrize(
    ("image", "form", "reason"),
    [
        (deep(0, 4095), "PNG", "too_dark"),
        (deep(0, 16_383), "PNG", "too_dark"),
        (Image.fromarray(np.full((8, 8), 40_000, np.int32)), "TIFF", "too_deep"),
        (Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF", "too_deep"),
    ],
    ids=["12 bits in 16", "14 bits in 16", "32 bits", "float"],
)
def test_values_without_a_window_are_refused_with_the_remedy(image: Image.Image, form: str, reason: str) -> None:
    with pytest.raises(UnreadableImage, match="window it to 8 bits") as raised:
        decode(encoded(image, form))
    assert raised.value.reason == reason


def test_the_case_of_12_bits_in_16_is_refused(shared: Path) -> None:
    cases = shared / "cases" / "deep_images"
    with pytest.raises(UnreadableImage, match="too dark: values up to 4080 of 65535; window it"):
        decode((cases / "g12in16.png").read_bytes())
    assert decode((cases / "l8.png").read_bytes()).mode == "L"


def test_a_deep_picture_that_is_blank_is_black() -> None:
    assert not np.asarray(decode(encoded(deep(0, 0), "PNG"))).any()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_orientation_that_exif_states_is_applied(turn: int, form: str) -> None:
    # Bright at the top left of the picture as it should be seen.
    seen = np.zeros((32, 64), np.uint8)
    seen[:16, :16] = 255
    stored = {
        1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1], 5: seen.T, 6: np.rot90(seen),
        7: seen[::-1, ::-1].T, 8: np.rot90(seen, -1),
    }[turn]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = turn
    picture = decode(encoded(Image.fromarray(stored).convert("RGB"), form, exif=exif))
    grey = np.asarray(picture.convert("L"), dtype=int)
    assert grey.shape == seen.shape
    assert np.abs(grey - seen).mean() < 4
    assert picture.getexif().get(0x0112, 1) == 1  # else the next reader turns it once more


def test_damaged_metadata_costs_no_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(ramp(), "JPEG", exif=exif.tobytes())
    damaged = data.replace(b"Exif\0\0MM", b"Exif\0\0??").replace(b"Exif\0\0II", b"Exif\0\0??")
    assert damaged != data
    assert decode(damaged).size == ramp().size


JPEG, PNG = encoded(ramp(400, 300), "JPEG"), encoded(ramp(400, 300), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty_image"),
        (b"<html>404 Not Found</html>", "not_an_image"),
        (JPEG[: len(JPEG) // 2], "damaged_image"),
        (PNG[: len(PNG) // 2], "damaged_image"),
        (PNG[:60] + bytes(20) + PNG[80:], "damaged_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
    ],
)
def test_unusable_bytes_are_named(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage) as raised:
        decode(data)
    assert raised.value.reason == reason
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [11_000, 20_000])
def test_decompression_bombs_are_refused_by_their_size(side: int) -> None:
    bomb = encoded(Image.new("1", (side, side)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(UnreadableImage) as raised:
        decode(bomb)
    assert raised.value.reason == "too_large"


def test_pixels_are_squashed_not_cropped() -> None:
    wide = Image.new("RGB", (200, 50), (255, 0, 0))
    wide.paste((0, 0, 255), (100, 0, 200, 50))
    pixels = to_pixels(wide, 20)
    assert (pixels[:, :9, 0] == 255).all()
    assert (pixels[:, 11:, 2] == 255).all()


def test_random_crops_repeat_by_seed_and_keep_to_their_scale() -> None:
    # The picture tells of each pixel where it was: red is the column, green the row.
    across, down = np.meshgrid(np.arange(200), np.arange(200))
    image = Image.fromarray(np.stack([across, down, across * 0], axis=-1).astype(np.uint8))
    crops = [random_crop(image, 100, (0.5, 0.6), np.random.default_rng(seed)) for seed in range(40)]
    assert np.array_equal(crops[0], random_crop(image, 100, (0.5, 0.6), np.random.default_rng(0)))
    assert not np.array_equal(crops[0], crops[1])
    sides = np.array([[np.ptp(crop[..., channel].astype(float)) for channel in (0, 1)] for crop in crops])
    areas = sides.prod(axis=1) / 200**2
    assert areas.min() > 0.45
    assert areas.max() < 0.62
    whole = random_crop(image, 50, (4.0, 4.0), np.random.default_rng(0))
    assert np.array_equal(whole, to_pixels(image, 50))


def test_a_picture_varies_within_its_limits_and_the_same_way_for_a_seed() -> None:
    grey = Image.new("L", (64, 64), 128)
    same = random_variation(grey, 0.0, 0.0, np.random.default_rng(0))
    assert np.array_equal(np.asarray(same), np.full((64, 64), 128))
    shades = [np.asarray(random_variation(grey, 0.0, 0.3, np.random.default_rng(seed)))[0, 0] for seed in range(60)]
    # 255 f v^g with f and g between exp(-0.3) and exp(0.3).
    assert 255 * np.exp(-0.3) * 0.502 ** np.exp(0.3) - 1 <= min(shades) < 90
    assert 170 < max(shades) <= 255 * np.exp(0.3) * 0.502 ** np.exp(-0.3) + 1

    bar = Image.new("L", (65, 65))
    bar.paste(255, (0, 32, 65, 33))  # a line across the middle, which a turn tilts
    turned = [np.asarray(random_variation(bar, 10.0, 0.0, np.random.default_rng(seed))) for seed in range(60)]
    assert np.array_equal(turned[0], np.asarray(random_variation(bar, 10.0, 0.0, np.random.default_rng(0))))
    rise = [float(picture[:, 60].argmax() - picture[:, 4].argmax()) / 56 for picture in turned]
    degrees = np.degrees(np.arctan(rise))
    assert -11.5 < degrees.min() < -7 and 7 < degrees.max() < 11.5


def test_a_grey_picture_gives_the_pixels_of_its_copy_in_colour() -> None:
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120), np.uint8))
    found = []
    for picture in (grey, grey.convert("RGB")):
        rng = np.random.default_rng(1)
        crop = random_crop(picture, 32, (0.5, 0.9), rng, rotation=10.0, contrast=0.3)
        assert not np.array_equal(crop, random_crop(picture, 32, (0.5, 0.9), np.random.default_rng(1)))
        found.append((to_pixels(picture, 48), crop, ImageProcessor(48)(picture).numpy()))
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one, other) and 3 in (one.shape[0], one.shape[-1])


def test_a_pointer_of_git_lfs_in_place_of_a_picture_is_named() -> None:
    with pytest.raises(UnreadableImage, match="Git LFS") as raised:
        decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    assert raised.value.reason == "not_an_image"
