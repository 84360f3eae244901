"""Image bytes → pixels. What cannot be read is named with its reason; the size is known before anything is decoded."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fuselip_core.errors import FuselipError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")

# Raster formats of radiology collections. Formats that run other programs (PostScript) or fetch files stay out.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "MPO")
# What Pillow's decoders raise on damaged input.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
MOST_MEGAPIXELS = 178  # what Pillow opens at most, whatever is allowed
CROP_ATTEMPTS = 10
CROP_RATIO = (3 / 4, 4 / 3)


class UnreadableImage(FuselipError):
    """Bytes that are no usable image. `reason` is one of empty_image, not_an_image, too_large, damaged_image."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason.replace('_', ' ')}: {detail}; replace the file or leave it out")
        self.reason, self.detail = reason, detail


def decode(data: bytes, max_megapixels: float) -> Image.Image:
    """The first frame of an image, loaded, in an 8-bit mode of Pillow; deeper grey values are stretched to 8 bits.

    Raises UnreadableImage for empty, unknown, truncated or damaged bytes, and for more than `max_megapixels` (10^6
    pixels) before anything of that size is allocated. Safe to call from many threads.
    """
    if not data:
        raise UnreadableImage("empty_image", "0 bytes")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UnreadableImage("too_large", f"more than {MOST_MEGAPIXELS} million pixels") from error
    except DECODER_ERRORS as error:
        raise UnreadableImage("not_an_image", f"no picture of a known format in {len(data)} bytes") from error
    megapixels = image.width * image.height / 1e6
    if megapixels > max_megapixels:
        raise UnreadableImage(
            "too_large", f"{image.width} x {image.height} pixels, more than {max_megapixels:g} million"
        )
    try:
        image.load()
        return _to_8_bits(image)
    except DECODER_ERRORS as error:
        raise UnreadableImage("damaged_image", _one_line(error)) from error


@contextlib.contextmanager
def quiet_decoders() -> Iterator[None]:
    """Keeps the decoders' warnings (large pictures, odd metadata) to themselves: pictures are judged by `decode`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Stretches 16- and 32-bit grey values from their smallest to their largest; Pillow would cut them off at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return Image.new("L", image.size)
    low, high = float(values[finite].min()), float(values[finite].max())
    stretched = (np.where(finite, values, low) - low) * (255.0 / (high - low) if high > low else 0.0)
    return Image.fromarray(np.rint(stretched).astype(np.uint8))


def to_pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Pixels (size, size, 3) uint8: RGB, then squashed to a square, bicubic with antialiasing.

    The published evaluation preprocessing (FuseLIP, arXiv 2506.03096): the aspect ratio is given up, nothing is cut.
    """
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def random_crop(
    image: Image.Image, size: int, scale: tuple[float, float], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Pixels (size, size, 3) uint8 of a random part of the image, squashed to a square.

    The part has between scale[0] and scale[1] of the image's area and an aspect ratio between 3/4 and 4/3 (drawn
    evenly on a logarithmic scale), as in the published training; if none fits, the largest part in the middle.
    """
    left, top, width, height = _draw_part(image.width, image.height, scale, rng)
    part = image.convert("RGB").crop((left, top, left + width, top + height))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))


def _draw_part(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, width and height of the part, in pixels."""
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            return int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1)), across, down
    across = max(1, min(width, round(height * CROP_RATIO[1])))
    down = max(1, min(height, round(width / CROP_RATIO[0])))
    return (width - across) // 2, (height - down) // 2, across, down
