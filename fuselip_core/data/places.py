"""Where an image's file is, and how an image is cropped or edited from another.

A crop or an edit that is listed as an image is stored as a row of its own, losslessly as PNG: then every reader treats
all images alike, and no table has to be joined to see one. Nothing is resampled but by the edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from PIL import Image

from fuselip_core.data.transforms import Edit, apply_edit
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


class Box(NamedTuple):
    """Edges of a crop in pixels, rounded and cut at the edges of the image."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Derived:
    """An image that is made from the one at `source`: its part within a box, or an edit of it."""

    source: Place
    change: Box | Edit

    @property
    def file(self) -> Path:
        return self.source.file

    def make(self, picture: Image.Image) -> Image.Image:
        """The new picture; raises UnreadableImage for a box outside the image."""
        if not isinstance(self.change, Box):
            return apply_edit(self.change, picture)
        left, top, right, bottom = (round(edge) for edge in self.change)
        box = max(0, left), max(0, top), min(picture.width, right), min(picture.height, bottom)
        if box[0] >= box[2] or box[1] >= box[3]:
            raise UnreadableImage("empty_crop", f"{self.change} of {picture.width} x {picture.height} pixels")
        return picture.crop(box)
