"""Text-guided image transformations: an image, an instruction, and the edited image.

FuseLIP (arXiv 2506.03096, "text-guided image transformations") trains on pairs whose query is an image with a sentence
such as "rotate 30 degrees clockwise", and whose target is the transformed image. An `Edit` is a small record, stored as
JSON; the sentence is generated from it and never parsed. All functions are pure; pixels are uint8 arrays (H, W, 3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from pydantic import Field, TypeAdapter

from fuselip_core.errors import FuselipError

Pixels = NDArray[np.uint8]
Region = Literal[
    "upper left", "upper center", "upper right", "center left", "center center", "center right",
    "lower left", "lower center", "lower right",
]  # fmt: skip
Direction = Literal["clockwise", "counter-clockwise"]
Axis = Literal["horizontal", "vertical"]
Property = Literal["brightness", "contrast", "saturation"]

REGIONS: Final = tuple(Region.__args__)  # type: ignore[attr-defined]
ANGLES: Final = tuple(range(10, 100, 10))
DIRECTIONS: Final[tuple[Direction, ...]] = ("clockwise", "counter-clockwise")
AXES: Final[tuple[Axis, ...]] = ("horizontal", "vertical")
ENHANCERS: Final = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}
FACTOR_RANGE: Final = (0.3, 2.0)
# A crop is half the image's width, but at most this many pixels (as published).
LARGEST_CROP: Final = 256


class TransformError(FuselipError):
    """An unsuitable array or an unknown family."""


@dataclass(frozen=True, slots=True)
class Crop:
    """The part at `region`, half as wide and high, enlarged bicubically to the full size."""

    region: Region
    kind: Literal["crop"] = "crop"

    @property
    def instruction(self) -> str:
        return f"crop to {self.region}"

    def apply(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        side = min(width // 2, LARGEST_CROP, height)
        row, column = self.region.split()
        top = {"upper": 0, "center": (height - side) // 2, "lower": height - side}[row]
        left = {"left": 0, "center": (width - side) // 2, "right": width - side}[column]
        part = picture.crop((left, top, left + side, top + side))
        return part.resize(picture.size, Image.Resampling.BICUBIC)


@dataclass(frozen=True, slots=True)
class Rotate:
    """Rotation about the centre, nearest neighbour; empty corners are black."""

    degrees: int
    direction: Direction
    kind: Literal["rotate"] = "rotate"

    @property
    def instruction(self) -> str:
        return f"rotate {self.degrees} degrees {self.direction}"

    def apply(self, picture: Image.Image) -> Image.Image:
        return picture.rotate(-self.degrees if self.direction == "clockwise" else self.degrees)


@dataclass(frozen=True, slots=True)
class Adjust:
    """Multiplies properties by their factors (at least 0; 1 changes nothing), one after the other."""

    changes: tuple[tuple[Property, Annotated[float, Field(ge=0)]], ...]
    kind: Literal["adjust"] = "adjust"

    @property
    def instruction(self) -> str:
        verbs = [("increase" if factor > 1 else "decrease", what, factor) for what, factor in self.changes]
        return " and ".join(f"{verb} {what} by factor {factor}" for verb, what, factor in verbs)

    def apply(self, picture: Image.Image) -> Image.Image:
        for what, factor in self.changes:
            picture = ENHANCERS[what](picture).enhance(factor)
        return picture


@dataclass(frozen=True, slots=True)
class Flip:
    """Mirrored left to right ("horizontal") or top to bottom ("vertical")."""

    axis: Axis
    kind: Literal["flip"] = "flip"

    @property
    def instruction(self) -> str:
        return f"{self.axis} flip"

    def apply(self, picture: Image.Image) -> Image.Image:
        sideways = self.axis == "horizontal"
        return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT if sideways else Image.Transpose.FLIP_TOP_BOTTOM)


@dataclass(frozen=True, slots=True)
class Grayscale:
    """Removes colours (ITU-R 601-2 luma), but keeps three channels."""

    kind: Literal["grayscale"] = "grayscale"

    @property
    def instruction(self) -> str:
        return "grayscale"

    def apply(self, picture: Image.Image) -> Image.Image:
        return picture.convert("L").convert("RGB")


Edit = Crop | Rotate | Adjust | Flip | Grayscale
_EDITS: TypeAdapter[Edit] = TypeAdapter(Annotated[Edit, Field(discriminator="kind")])


def edit_to_json(edit: Edit) -> str:
    """The edit as JSON for prepared data; equal for equal edits."""
    return _EDITS.dump_json(edit).decode()


def edit_from_json(text: str) -> Edit:
    """The edit that `edit_to_json` wrote; raises pydantic's ValidationError (a ValueError) for anything else."""
    return _EDITS.validate_json(text)


def apply_edit(edit: Edit, picture: Image.Image) -> Image.Image:
    """Applies an edit to a picture of any mode; returns RGB. A picture one pixel wide or high is enlarged first."""
    size = max(2, picture.width), max(2, picture.height)
    picture = picture.convert("RGB")
    return edit.apply(picture if size == picture.size else picture.resize(size))


class EditPair(NamedTuple):
    """The query is the edit `before` of an image with the instruction, the target its edit `after`; None: no edit.

    Colorize is the reverse of grayscale: its query is the grey image and its target the original.
    """

    before: Edit | None
    instruction: str
    after: Edit | None


class EditedPixels(NamedTuple):
    """An EditPair applied to an image: `query` and `target` are uint8 (H, W, 3) of the same size."""

    query: Pixels
    instruction: str
    target: Pixels


# ---- families of instructions, each with several variants ----------------------------------------------------------


def _crops(rng: np.random.Generator, count: int) -> list[EditPair]:
    return [_forward(Crop(REGIONS[i])) for i in rng.permutation(len(REGIONS))[:count]]


def _rotations(rng: np.random.Generator, count: int) -> list[EditPair]:
    choices = [Rotate(angle, direction) for angle in ANGLES for direction in DIRECTIONS]
    return [_forward(choices[i]) for i in rng.permutation(len(choices))[:count]]


def _colour_changes(rng: np.random.Generator, count: int) -> list[EditPair]:
    return [_forward(_adjustment(rng, ("brightness", "contrast", "saturation"))) for _ in range(count)]


def _light_changes(rng: np.random.Generator, count: int) -> list[EditPair]:
    return [_forward(_adjustment(rng, ("brightness", "contrast"))) for _ in range(count)]


def _adjustment(rng: np.random.Generator, properties: tuple[Property, ...]) -> Adjust:
    drawn = ((what, round(float(rng.uniform(*FACTOR_RANGE)), 1)) for what in properties)
    # A factor of 1 would change nothing; the published code replaces it by 1.1.
    return Adjust(tuple((what, 1.1 if factor == 1.0 else factor) for what, factor in drawn))


def _flips(rng: np.random.Generator, count: int) -> list[EditPair]:
    """Both axes in both directions: original → mirrored, then mirrored → original."""
    pairs: list[EditPair] = []
    for i in rng.permutation(len(AXES)):
        flip = Flip(AXES[i])
        pairs += [_forward(flip), EditPair(flip, flip.instruction, None)]
    return pairs[:count]


def _colour_and_grey(rng: np.random.Generator, count: int) -> list[EditPair]:
    pairs = _forward(Grayscale()), EditPair(Grayscale(), "colorize", None)
    return [pairs[i] for i in rng.permutation(2)[:count]]


def _forward(edit: Edit) -> EditPair:
    return EditPair(None, edit.instruction, edit)


@dataclass(frozen=True)
class Family:
    """A kind of instruction.

    draw(rng, count): up to `count` different pairs of an image. training, evaluation: the published numbers of variants
    of an image in a batch, and of candidates in the evaluation.
    """

    draw: Callable[[np.random.Generator, int], list[EditPair]]
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

# Unnormalised share of each family among the pairs, as in the published implementation.
GENERAL: Final[Mapping[str, float]] = {"crop": 2.0, "rotate": 1.0, "colour": 1.0, "flip": 2.0, "colorize": 1.0}
# For medicine: no flips, since a mirrored patient has the heart on the wrong side; and only brightness and contrast
# instead of colour changes, since the images are grey.
MEDICAL: Final[Mapping[str, float]] = {"crop": 2.0, "rotate": 1.0, "light": 1.0}


def draw_edits(rng: np.random.Generator, family: str, count: int | None = None) -> list[EditPair]:
    """`count` different pairs of an image from one family, by default as many as in the published training.

    Raises TransformError for an unknown family.
    """
    if family not in FAMILIES:
        raise TransformError(f"unknown family of transformations '{family}'; use one of {', '.join(FAMILIES)}")
    kind = FAMILIES[family]
    return kind.draw(rng, kind.training if count is None else count)


def edited_pixels(image: Pixels, rng: np.random.Generator, family: str, count: int | None = None) -> list[EditedPixels]:
    """Applies `draw_edits` to `image`, uint8 (H, W, 3), at least 2 x 2; raises TransformError for other arrays."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape) < 2:
        raise TransformError(
            f"transformations need uint8 images of shape (H, W, 3), at least 2 x 2, not {image.dtype} {image.shape}"
        )
    picture = Image.fromarray(image)

    def made(edit: Edit | None) -> Pixels:
        return image if edit is None else np.array(edit.apply(picture), dtype=np.uint8)

    pairs = draw_edits(rng, family, count)
    return [EditedPixels(made(pair.before), pair.instruction, made(pair.after)) for pair in pairs]


def random_family(rng: np.random.Generator, weights: Mapping[str, float] = GENERAL, *, grouped: bool = False) -> str:
    """A random family, so that `weights` are the shares of *pairs*.

    grouped: each draw stands for a group of variants, so families with many variants are drawn less often.
    """
    names = list(weights)
    unknown = sorted(set(names) - set(FAMILIES))
    if unknown or not names or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise TransformError(
            f"weights of transformations must be for {', '.join(FAMILIES)}, not negative and not all zero, but are "
            f"{dict(weights)}"
        )
    shares = np.array([weights[name] / (FAMILIES[name].training if grouped else 1) for name in names])
    return names[int(rng.choice(len(names), p=shares / shares.sum()))]
