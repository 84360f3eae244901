"""Places of image files, and images cropped or edited from others.

A crop or an edit that is listed as an image is stored as its own row, losslessly as PNG, so that readers treat all
images alike.
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
    """A place with its own reading code, such as a DICOM frame; raises UnreadableImage."""

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Place:
    """The place of an image's bytes: a file, a part of it (tar member), a zip member, or a row of a Parquet file.

    span: offset and length in bytes. column: Parquet column, a struct with the field `bytes`.
    """

    file: Path
    member: str | None = None
    row: int | None = None
    span: tuple[int, int] | None = None
    column: str = "image"


class Box(NamedTuple):
    """Edges of a crop in pixels, which are rounded and clipped to the image."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Derived:
    """A crop or an edit of the image at `source`."""

    source: Place
    change: Box | Edit

    @property
    def file(self) -> Path:
        return self.source.file

    def make(self, picture: Image.Image) -> Image.Image:
        """The cropped or edited picture; raises UnreadableImage for a box outside the image."""
        if not isinstance(self.change, Box):
            return apply_edit(self.change, picture)
        left, top, right, bottom = (round(edge) for edge in self.change)
        box = max(0, left), max(0, top), min(picture.width, right), min(picture.height, bottom)
        if box[0] >= box[2] or box[1] >= box[3]:
            raise UnreadableImage("empty_crop", f"{self.change} of {picture.width} x {picture.height} pixels")
        return picture.crop(box)
