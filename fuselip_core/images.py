"""Image files → pictures: the project's only decoder, so that all parts treat a file alike.

Prepare, tokenize, evaluate, the report, the embedder and the server all call `decode`. The image processor, which gets
opened Pillow images from users, calls `checked`, the second half of `decode`. The rules:

- Raster formats only (FORMATS), and the first frame of an animation.
- At most MOST_MEGAPIXELS, checked before a pixel is decoded.
- The EXIF orientation is applied; an unreadable EXIF block is ignored.
- Grey values of 9 to 16 bits are reduced to their upper 8 bits and never stretched to the picture's own range, so that
  equal values stay equal across pictures. A picture that uses less than a quarter of its bit depth (such as 12 bits in
  a 16-bit file) would turn black and is refused: it needs a window.
- Signed, 32-bit and floating-point values have no defined range and are refused.
"""

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
from PIL import ExifTags, Image, ImageOps

from fuselip_core.errors import FuselipError, one_line
from fuselip_core.files import foreign_content

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")

# Raster formats of radiology collections, but none that runs other programs (PostScript) or fetches files.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "MPO")
# Errors of Pillow's decoders on damaged input.
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
MOST_MEGAPIXELS = 120.0
PILLOWS_MEGAPIXELS = 178  # Pillow's own limit
CROP_ATTEMPTS = 10
CROP_RATIO = (3 / 4, 4 / 3)
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags
WINDOW = "window it to 8 bits"


class UnreadableImage(FuselipError):
    """A file that is not a usable image. `reason`: words with underscores, counted in the manifest of prepare."""

    def __init__(self, reason: str, detail: str, remedy: str = "replace the file or leave it out") -> None:
        super().__init__(f"{reason.replace('_', ' ')}: {detail}; {remedy}")
        self.reason, self.detail = reason, detail


def decode(data: bytes, max_megapixels: float = MOST_MEGAPIXELS) -> Image.Image:
    """The picture in an image file, loaded, in an 8-bit mode of Pillow (not always RGB).

    Raises UnreadableImage: empty_image, not_an_image, too_large (before memory is allocated), damaged_image, too_deep
    or too_dark. Safe to call from many threads.
    """
    if not data:
        raise UnreadableImage("empty_image", "0 bytes")
    try:
        picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UnreadableImage("too_large", f"more than {PILLOWS_MEGAPIXELS} million pixels") from error
    except DECODER_ERRORS as error:
        fault = foreign_content(data[:200])
        what = f"the file {fault}" if fault else f"{len(data)} bytes in no known image format"
        raise UnreadableImage("not_an_image", what) from error
    return checked(picture, max_megapixels)


def checked(picture: Image.Image, max_megapixels: float = MOST_MEGAPIXELS) -> Image.Image:
    """Applies the rules above to an opened Pillow image: loaded, upright, 8 bits; raises UnreadableImage."""
    if picture.width * picture.height > max_megapixels * 1e6:
        raise UnreadableImage(
            "too_large", f"{picture.width} x {picture.height} pixels, more than {max_megapixels:g} million"
        )
    try:
        picture.load()
        return _upright(_to_8_bits(picture) if picture.mode.startswith(("I", "F")) else picture)
    except UnreadableImage:
        raise
    except DECODER_ERRORS as error:
        raise UnreadableImage("damaged_image", one_line(error) or type(error).__name__) from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    except DECODER_ERRORS:  # unreadable EXIF is ignored
        return picture
    return ImageOps.exif_transpose(picture) if turned else picture


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """The upper 8 bits of unsigned grey values of up to 16 bits; Pillow would clip them at 255."""
    tags = getattr(picture, "tag_v2", {})  # of TIFF, the only format whose stated depth may differ from the stored one
    # Pillow reads deep PPM files as 32 bits, scaled to 16.
    if not picture.mode.startswith("I;16") and picture.format != "PPM":
        raise UnreadableImage("too_deep", f"values of mode {picture.mode} have no defined range", WINDOW)
    depth = int(max(tags.get(BITS_PER_SAMPLE, (16,))))
    values = np.asarray(picture)
    if 0 < int(values.max()) < 1 << (depth - 2):
        raise UnreadableImage("too_dark", f"values up to {int(values.max())} of {(1 << depth) - 1}", WINDOW)
    grey = (values >> (depth - 8)).astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else grey)


@contextlib.contextmanager
def quiet_decoders() -> Iterator[None]:
    """Silences warnings of the decoders (large pictures, odd metadata), since `decode` judges pictures itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def to_pixels(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Pixels (size, size, 3) uint8: RGB, resized to a square, bicubic with antialiasing.

    The published evaluation preprocessing (FuseLIP, arXiv 2506.03096): changes the aspect ratio, crops nothing.
    """
    return squashed(_grey_or_rgb(picture), size)


def random_crop(
    picture: Image.Image,
    size: int,
    scale: tuple[float, float],
    rng: np.random.Generator,
    rotation: float = 0.0,
    contrast: float = 0.0,
) -> NDArray[np.uint8]:
    """Pixels (size, size, 3) uint8 of a random crop, resized to a square.

    The crop has between scale[0] and scale[1] of the picture's area and an aspect ratio between 3/4 and 4/3
    (log-uniform), as in the published training; if no attempt fits, the largest central crop. The picture is first
    changed as by `random_variation`.
    """
    varied = random_variation(picture, rotation, contrast, rng)
    left, top, width, height = draw_part(picture.width, picture.height, scale, rng)
    return squashed(varied.crop((left, top, left + width, top + height)), size)


def random_variation(picture: Image.Image, degrees: float, contrast: float, rng: np.random.Generator) -> Image.Image:
    """The picture in grey or RGB, turned by up to `degrees` either way, its values changed by up to a factor.

    Corners that turning leaves empty are black. Values v in 0..1 become f v^g with f and g between exp(-contrast) and
    exp(contrast), drawn evenly on a logarithmic scale.
    """
    picture = _grey_or_rgb(picture)
    if degrees:
        picture = picture.rotate(rng.uniform(-degrees, degrees), Image.Resampling.BILINEAR)
    if contrast:
        factor, power = np.exp(rng.uniform(-contrast, contrast, 2))
        values = np.clip(255 * factor * (np.arange(256) / 255) ** power, 0, 255).round().astype(int)
        picture = picture.point(values.tolist() * len(picture.getbands()))
    return picture


def squashed(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Pixels (size, size, 3) uint8: resized in the picture's own mode, then RGB.

    A grey picture gives what its copy in RGB would, for a third of the work. The late-fusion baselines squash every
    mode so, a palette with its nearest neighbours; published weights were trained so.
    """
    small = picture.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(small if small.mode == "RGB" else small.convert("RGB"))


def _grey_or_rgb(picture: Image.Image) -> Image.Image:
    """Itself if it is grey or RGB, since Pillow's `convert` would copy it for every view; else in RGB."""
    return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")


def draw_part(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, width and height of the crop of `random_crop`, in pixels."""
    for _ in range(CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            return int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1)), across, down
    across = max(1, min(width, round(height * CROP_RATIO[1])))
    down = max(1, min(height, round(width / CROP_RATIO[0])))
    return (width - across) // 2, (height - down) // 2, across, down
