"""Reading images: every odd but valid one is read, every unusable one is named with its reason."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fuselip_core.data.images import UnreadableImage, decode, random_crop, to_pixels


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
    pixels = to_pixels(decode(data, max_megapixels=1), 32)
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8


def test_sixteen_bits_are_stretched_not_cut_off() -> None:
    values = np.linspace(1000, 3000, 64 * 64).reshape(64, 64).astype(np.uint16)
    grey = np.asarray(decode(encoded(Image.fromarray(values), "PNG"), max_megapixels=1))
    assert (grey.min(), grey.max()) == (0, 255)
    assert np.all(np.diff(grey.reshape(-1).astype(int)) >= 0)
    flat = decode(encoded(Image.fromarray(np.full((8, 8), 700, np.uint16)), "PNG"), max_megapixels=1)
    assert np.asarray(flat).max() == 0


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
        decode(data, max_megapixels=1)
    assert raised.value.reason == reason
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [11_000, 20_000])
def test_decompression_bombs_are_refused_by_their_size(side: int) -> None:
    bomb = encoded(Image.new("1", (side, side)), "PNG")
    assert len(bomb) < 100_000
    with pytest.raises(UnreadableImage) as raised:
        decode(bomb, max_megapixels=120)
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
