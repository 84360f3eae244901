"""Reads images where their places say, and makes those that are parts or edits of others.

A crop or an edit is stored as a row of its own, losslessly as PNG: then every reader treats all images alike, and no
table has to be joined to see one. Its pixels are those of the decoded original; nothing is resampled but by the edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from fuselip_core.data import transforms
from fuselip_core.data.transforms import apply_instruction
from fuselip_core.images import UnreadableImage


@runtime_checkable
class Readable(Protocol):
    """A place that reads itself, such as a DICOM frame; raises UnreadableImage."""

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of an image are: a file, a part of it (a tar member), a zip member, or a row of a Parquet file.

    span: offset and length in bytes. column: the Parquet column, a struct with the field `bytes`.
    """

    file: Path
    member: str | None = None
    row: int | None = None
    span: tuple[int, int] | None = None
    column: str = "image"


@dataclass(frozen=True, slots=True)
class Derived(Place):
    """An image that is made from the one at the place."""

    def make(self, image: Image.Image) -> Image.Image:
        """The new image; raises UnreadableImage."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Crop(Derived):
    """The part of an image within `box`: left, top, right, bottom in pixels, rounded and cut at the image's edges."""

    box: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)

    def make(self, image: Image.Image) -> Image.Image:
        left, top, right, bottom = (round(edge) for edge in self.box)
        box = max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)
        if box[0] >= box[2] or box[1] >= box[3]:
            raise UnreadableImage("empty_crop", f"box {self.box} of {image.width} x {image.height} pixels")
        return image.crop(box)


@dataclass(frozen=True, slots=True)
class Edited(Derived):
    """What an instruction of transforms.py makes of an image."""

    instruction: str = ""

    def make(self, image: Image.Image) -> Image.Image:
        try:
            return Image.fromarray(apply_instruction(np.array(image.convert("RGB")), self.instruction))
        except transforms.TransformError as error:
            raise UnreadableImage("no_edit", str(error)) from error
