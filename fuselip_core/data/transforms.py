"""Text-guided image transformations: an image, an instruction, and what the instruction makes of the image.

FuseLIP (arXiv 2506.03096, "text-guided image transformations") trains on pairs whose query is an image with a sentence
such as "rotate 30 degrees clockwise" and whose target is the changed image. Everything here is a pure function of
uint8 arrays of shape (H, W, 3); `random_edit` and `edits` also take the random generator they draw from.

Colorize is grayscale turned round: its query is the grey picture and its target the coloured original. That is why an
`Edit` carries both sides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from fuselip_core.data import transforms
from fuselip_core.errors import FuselipError

Pixels = NDArray[np.uint8]
Direction = Literal["clockwise", "counter-clockwise"]
Axis = Literal["horizontal", "vertical"]
Property = Literal["brightness", "contrast", "saturation"]

PLACES: Final = tuple(
    f"{row} {column}" for row in ("upper", "center", "lower") for column in ("left", "center", "right")
)
ANGLES: Final = tuple(range(10, 100, 10))
DIRECTIONS: Final[tuple[Direction, ...]] = ("clockwise", "counter-clockwise")
AXES: Final[tuple[Axis, ...]] = ("horizontal", "vertical")
PROPERTIES: Final[tuple[Property, ...]] = ("brightness", "contrast", "saturation")
FACTOR_RANGE: Final = (0.3, 2.0)
# A crop is half the image's width, but at most this many pixels (published, for crops from large pictures).
LARGEST_CROP: Final = 256


class TransformError(FuselipError):
    """An image or a parameter that no transformation takes."""


class Edit(NamedTuple):
    """One pair: `query` and `instruction` ask for `target`. Both images are uint8 (H, W, 3) of one size."""

    query: Pixels
    instruction: str
    target: Pixels


# ---- single transformations --------------------------------------------------------------------------------------


def crop(image: Pixels, place: str) -> Pixels:
    """The part of `image` at `place` (one of PLACES), half as wide and high, enlarged bicubically to the whole size."""
    if place not in PLACES:
        raise TransformError(f"no place '{place}' to crop to; there are: {', '.join(PLACES)}")
    picture = _picture(image)
    width, height = picture.size
    side = min(width // 2, LARGEST_CROP, height)
    row, column = place.split()
    top = {"upper": 0, "center": (height - side) // 2, "lower": height - side}[row]
    left = {"left": 0, "center": (width - side) // 2, "right": width - side}[column]
    part = picture.crop((left, top, left + side, top + side))
    return _pixels(part.resize(picture.size, Image.Resampling.BICUBIC))


def rotate(image: Pixels, degrees: int, direction: Direction) -> Pixels:
    """`image` turned about its centre by nearest neighbour; corners that come from outside are black."""
    if direction not in DIRECTIONS:
        raise TransformError(f"no direction '{direction}' to rotate in; there are: {', '.join(DIRECTIONS)}")
    return _pixels(_picture(image).rotate(-degrees if direction == "clockwise" else degrees))


def adjust(image: Pixels, what: Property, factor: float) -> Pixels:
    """Brightness, contrast or saturation of `image` times `factor` (at least 0; 1 changes nothing)."""
    if what not in PROPERTIES:
        raise TransformError(f"no property '{what}' to adjust; there are: {', '.join(PROPERTIES)}")
    enhancer = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }[what]
    return _pixels(enhancer(_picture(image)).enhance(factor))


def flip(image: Pixels, axis: Axis) -> Pixels:
    """`image` mirrored left to right ("horizontal") or top to bottom ("vertical")."""
    if axis not in AXES:
        raise TransformError(f"no axis '{axis}' to flip; there are: {', '.join(AXES)}")
    _check(image)
    return np.ascontiguousarray(image[:, ::-1] if axis == "horizontal" else image[::-1])


def grayscale(image: Pixels) -> Pixels:
    """`image` without its colours (ITU-R 601-2 luma), still three channels."""
    return _pixels(_picture(image).convert("L").convert("RGB"))


# ---- families: the kinds of instruction, each with several variants of one image -----------------------------------


def _crops(image: Pixels, rng: np.random.Generator, count: int) -> list[Edit]:
    places = rng.permutation(len(PLACES))[:count]
    return [Edit(image, f"crop to {PLACES[i]}", crop(image, PLACES[i])) for i in places]


def _rotations(image: Pixels, rng: np.random.Generator, count: int) -> list[Edit]:
    choices = [(angle, direction) for angle in ANGLES for direction in DIRECTIONS]
    chosen = [choices[i] for i in rng.permutation(len(choices))[:count]]
    return [Edit(image, f"rotate {angle} degrees {way}", rotate(image, angle, way)) for angle, way in chosen]


def _colour_changes(image: Pixels, rng: np.random.Generator, count: int) -> list[Edit]:
    return [_colour_change(image, rng, PROPERTIES) for _ in range(count)]


def _light_changes(image: Pixels, rng: np.random.Generator, count: int) -> list[Edit]:
    return [_colour_change(image, rng, ("brightness", "contrast")) for _ in range(count)]


def _colour_change(image: Pixels, rng: np.random.Generator, properties: tuple[Property, ...]) -> Edit:
    parts, changed = [], image
    for what in properties:
        factor = _random_factor(rng)
        parts.append(f"{'increase' if factor > 1 else 'decrease'} {what} by factor {factor}")
        changed = adjust(changed, what, factor)
    return Edit(image, " and ".join(parts), changed)


def _random_factor(rng: np.random.Generator) -> float:
    factor = round(float(rng.uniform(*FACTOR_RANGE)), 1)
    # A factor of one would ask for nothing; published code moves it up by a tenth.
    return 1.1 if factor == 1.0 else factor


def _flips(image: Pixels, rng: np.random.Generator, count: int) -> list[Edit]:
    """Each axis both ways round: original → mirrored, then mirrored → original."""
    both: list[Edit] = []
    for i in rng.permutation(len(AXES)):
        mirrored = flip(image, AXES[i])
        instruction = f"{AXES[i]} flip"
        both += [Edit(image, instruction, mirrored), Edit(mirrored, instruction, image)]
    return both[:count]


def _colour_and_grey(image: Pixels, rng: np.random.Generator, count: int) -> list[Edit]:
    grey = grayscale(image)
    both = [Edit(image, "grayscale", grey), Edit(grey, "colorize", image)]
    return [both[i] for i in rng.permutation(2)[:count]]


@dataclass(frozen=True)
class Family:
    """A kind of instruction.

    `draw(image, rng, count)` gives up to `count` different edits of one image; `training` and `evaluation` are the
    published counts: variants of one image that stand together in a batch, and candidates in the evaluation.
    """

    draw: Callable[[Pixels, np.random.Generator, int], list[Edit]]
    training: int
    evaluation: int


FAMILIES: Final[Mapping[str, Family]] = {
    "crop": Family(_crops, training=9, evaluation=9),
    "rotate": Family(_rotations, training=3, evaluation=18),
    "colour": Family(_colour_changes, training=3, evaluation=10),
    "flip": Family(_flips, training=4, evaluation=4),
    "colorize": Family(_colour_and_grey, training=2, evaluation=2),
    "light": Family(_light_changes, training=3, evaluation=10),
}

# Share of each family among the pairs, as published with the reference implementation (to be normalised).
GENERAL: Final[Mapping[str, float]] = {"crop": 2.0, "rotate": 1.0, "colour": 1.0, "flip": 2.0, "colorize": 1.0}
# For medicine. A mirrored patient has the heart on the wrong side, so nothing is flipped; grey pictures have neither
# colour nor saturation to ask for, so brightness and contrast stand in for the colour changes.
MEDICAL: Final[Mapping[str, float]] = {"crop": 2.0, "rotate": 1.0, "light": 1.0}


def edits(image: Pixels, rng: np.random.Generator, family: str, count: int | None = None) -> list[Edit]:
    """`count` different edits of `image` from one family: a group, hard negatives of each other.

    `image` is uint8 (H, W, 3); by default there are as many as the published training puts together (FAMILIES).
    Raises TransformError for another kind of array or an unknown family.
    """
    _check(image)
    if family not in FAMILIES:
        raise TransformError(f"no family of transformations '{family}'; there are: {', '.join(FAMILIES)}")
    kind = FAMILIES[family]
    return kind.draw(image, rng, kind.training if count is None else count)


def random_family(rng: np.random.Generator, weights: Mapping[str, float] = GENERAL, *, grouped: bool = False) -> str:
    """Name of a family, drawn so that `weights` are the shares of *pairs*.

    With `grouped` every draw stands for a whole group of variants (`edits`), so a family with many variants is drawn
    less often; without, for one edit (`random_edit`).
    """
    names = list(weights)
    unknown = sorted(set(names) - set(FAMILIES))
    if unknown or not names or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise TransformError(
            f"weights of transformations name {', '.join(FAMILIES)}, none below zero and one above; got {dict(weights)}"
        )
    shares = np.array([weights[name] / (FAMILIES[name].training if grouped else 1) for name in names])
    return names[int(rng.choice(len(names), p=shares / shares.sum()))]


def random_edit(image: Pixels, rng: np.random.Generator, weights: Mapping[str, float] = GENERAL) -> Edit:
    """One edit of `image` (uint8 (H, W, 3)), its family drawn by `weights` (GENERAL, MEDICAL or your own)."""
    return edits(image, rng, random_family(rng, weights), count=1)[0]


# ---- arrays and pictures ---------------------------------------------------------------------------------------------


def _check(image: Pixels) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape) < 2:
        raise TransformError(
            f"a transformation takes uint8 images of shape (H, W, 3), at least 2 x 2, not {image.dtype} {image.shape}"
        )


def _picture(image: Pixels) -> Image.Image:
    _check(image)
    return Image.fromarray(image)


def _pixels(picture: Image.Image) -> Pixels:
    return np.array(picture, dtype=np.uint8)


def made_picture(image: Image.Image, instruction: str) -> Image.Image:
    """What `instruction` makes of an image of any mode, as RGB; one of a single pixel's width is widened first."""
    size = max(2, image.width), max(2, image.height)
    picture = image.convert("RGB")
    return Image.fromarray(
        apply_instruction(np.array(picture if size == image.size else picture.resize(size)), instruction)
    )


def apply_instruction(image: transforms.Pixels, instruction: str) -> transforms.Pixels:
    """What `instruction`, in the words of transforms.edits, makes of `image` (uint8 (H, W, 3)); raises TransformError.

    "colorize" asks for the image itself: there the query is the grey picture.
    """
    if match := re.fullmatch(r"crop to (.+)", instruction):
        return transforms.crop(image, match[1])
    if match := re.fullmatch(r"rotate (\d+) degrees (clockwise|counter-clockwise)", instruction):
        return transforms.rotate(image, int(match[1]), cast(transforms.Direction, match[2]))
    if match := re.fullmatch(r"(horizontal|vertical) flip", instruction):
        return transforms.flip(image, cast(transforms.Axis, match[1]))
    if instruction in ("grayscale", "colorize"):
        return transforms.grayscale(image) if instruction == "grayscale" else image
    changes = re.findall(r"(?:increase|decrease) (\w+) by factor ([\d.]+)", instruction)
    if not changes:
        raise transforms.TransformError(f"no transformation '{instruction}'")
    for what, factor in changes:
        image = transforms.adjust(image, what, float(factor))
    return image


def edit_steps(family: str, rng: np.random.Generator, count: int) -> Iterator[tuple[str, str, str]]:
    """`count` edits of one image: what makes the query (nothing, if it is the image), the instruction, the target.

    The draws do not depend on the pixels, so that no image has to be opened for them.
    """
    blank = np.zeros((2, 2, 3), dtype=np.uint8)
    blank[0, 0] = 255, 0, 0
    for edit in transforms.edits(blank, rng, family, count):
        if edit.instruction == "colorize":
            yield "grayscale", edit.instruction, ""
        elif edit.instruction.endswith(" flip") and not np.array_equal(edit.query, blank):
            yield edit.instruction, edit.instruction, ""
        else:
            yield "", edit.instruction, edit.instruction
