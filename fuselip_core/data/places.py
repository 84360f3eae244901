"""Reads images where their places say, and makes those that are parts or edits of others.

A crop or an edit is stored as a row of its own, losslessly as PNG: then every reader treats all images alike, and no
table has to be joined to see one. Its pixels are those of the decoded original; nothing is resampled but by the edit.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, cast, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fuselip_core.data import transforms
from fuselip_core.data.images import UnreadableImage, decode
from fuselip_core.data.pair import Place

ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError, NotImplementedError, StopIteration)
# Nothing that is stored in fewer pixels than allowed needs more bytes than this: 8 a pixel, and metadata.
BYTES_A_PIXEL, METADATA_BYTES = 8, 64 << 20
PNG_LEVEL = 3  # twice as fast as the default, 5 % larger


@runtime_checkable
class Readable(Protocol):
    """A place that reads itself, such as a DICOM frame; raises UnreadableImage."""

    def read(self) -> bytes: ...


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


class ImageReader:
    """Reads images where their places say; keeps one archive or Parquet file open, and one decoded original."""

    def __init__(self, max_bytes: int, max_megapixels: float = 120.0) -> None:
        self._max_bytes, self._max_megapixels = max_bytes, max_megapixels
        self._archive: tuple[Path, zipfile.ZipFile] | None = None
        self._rows: dict[tuple[Path, str], tuple[int, Iterator[bytes]]] = {}
        self._original: tuple[Place, Image.Image] | None = None

    @classmethod
    def within(cls, max_megapixels: float) -> ImageReader:
        """A reader for images of at most `max_megapixels`."""
        return cls(int(min(max_megapixels * 1e6 * BYTES_A_PIXEL, 1 << 40)) + METADATA_BYTES, max_megapixels)

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._archive:
            self._archive[1].close()

    def read(self, place: Place) -> bytes:
        """The bytes of an image; raises UnreadableImage (missing_image, too_large, damaged_archive, ...)."""
        if isinstance(place, Derived):
            return _png(place.make(self._decoded(place)))
        if isinstance(place, Readable):
            return place.read()
        try:
            return self._stored(place)
        except FileNotFoundError as error:
            raise UnreadableImage("missing_image", f"no file {place.file.name}") from error
        except (*ARCHIVE_ERRORS, pa.ArrowException, OSError) as error:
            detail = f"{place.file.name}: {' '.join(str(error).split()) or type(error).__name__}"
            raise UnreadableImage("damaged_archive", detail) from error

    def _decoded(self, place: Derived) -> Image.Image:
        """The original of a derived image; its crops and edits follow each other, so the last one is kept."""
        source = Place(place.file, place.member, place.row, place.span, place.column)
        if self._original is None or self._original[0] != source:
            self._original = source, decode(self.read(source), self._max_megapixels)
        return self._original[1]

    def _stored(self, place: Place) -> bytes:
        if place.member is not None:
            return self._member(place.file, place.member)
        if place.row is not None:
            return self._row(place.file, place.column, place.row)
        if place.span is not None:
            return self._part(place.file, *place.span)
        self._refuse_if_large(place.file.stat().st_size)
        return place.file.read_bytes()

    def _refuse_if_large(self, size: int) -> None:
        if size > self._max_bytes:
            raise UnreadableImage("too_large", f"{size} bytes")

    def _part(self, path: Path, offset: int, size: int) -> bytes:
        self._refuse_if_large(size)
        with path.open("rb") as stream:
            stream.seek(offset)
            return stream.read(size)

    def _member(self, path: Path, member: str) -> bytes:
        if self._archive is None or self._archive[0] != path:
            if self._archive:
                self._archive[1].close()
            self._archive = path, zipfile.ZipFile(path)
        archive = self._archive[1]
        self._refuse_if_large(archive.getinfo(member).file_size)
        return archive.read(member)

    def _row(self, path: Path, column: str, row: int) -> bytes:
        """Rows of a column are asked for in rising order, so one pass over its row groups serves a shard."""
        key = path, column
        if key not in self._rows or self._rows[key][0] > row:
            # Another file: the passes over the last one are over.
            self._rows = {known: state for known, state in self._rows.items() if known[0] == path}
            self._rows[key] = _rows_from(path, column, row)
        at, rows = self._rows[key]
        for _ in range(row - at):
            next(rows)
        data = next(rows)
        self._rows[key] = row + 1, rows
        self._refuse_if_large(len(data))
        return data


def _rows_from(path: Path, column: str, row: int) -> tuple[int, Iterator[bytes]]:
    """Index of the first row of the row group that has `row`, and the image bytes from there on."""
    file = pq.ParquetFile(path)
    first = group = 0
    while first + file.metadata.row_group(group).num_rows <= row:
        first += file.metadata.row_group(group).num_rows
        group += 1
    groups = list(range(group, file.metadata.num_row_groups))
    batches = file.iter_batches(batch_size=32, row_groups=groups, columns=[f"{column}.bytes"])
    return first, ((value or {}).get("bytes") or b"" for batch in batches for value in batch.column(column).to_pylist())


def _png(image: Image.Image) -> bytes:
    """The image as PNG, in its own mode where PNG has it, else RGB."""
    image = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else image.convert("RGB")
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=PNG_LEVEL)
    return stream.getvalue()
