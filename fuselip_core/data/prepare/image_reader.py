"""Reads the bytes of an image from a file or an archive, and makes cropped and edited images."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fuselip_core.data.places import Derived, Place, Readable
from fuselip_core.images import MOST_MEGAPIXELS, UnreadableImage, decode

ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError, NotImplementedError, StopIteration)
# The most that an image of the allowed size can need: 8 bytes a pixel, and 64 MiB of metadata.
MOST_BYTES = int(8e6 * MOST_MEGAPIXELS) + (64 << 20)
PNG_LEVEL = 3  # twice as fast as the default, 5 % larger


class ImageReader:
    """Reads images from their places; keeps one archive or Parquet file open, and one decoded original."""

    def __init__(self) -> None:
        self._archive: tuple[Path, zipfile.ZipFile] | None = None
        self._rows: dict[tuple[Path, str], tuple[int, Iterator[bytes]]] = {}
        self._original: tuple[Place, Image.Image] | None = None

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._archive:
            self._archive[1].close()

    def read(self, place: Place | Derived) -> bytes:
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
        """The original of a derived image; the last one is cached, since its crops and edits are consecutive."""
        if self._original is None or self._original[0] != place.source:
            self._original = place.source, decode(self.read(place.source))
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
        if size > MOST_BYTES:
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
        """Reads a row; requests come in ascending order, so one pass over the row groups suffices for a shard."""
        key = path, column
        if key not in self._rows or self._rows[key][0] > row:
            # Forget other files.
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
    """Index of the first row in the row group of `row`, and the image bytes from there on."""
    file = pq.ParquetFile(path)
    first = group = 0
    while first + file.metadata.row_group(group).num_rows <= row:
        first += file.metadata.row_group(group).num_rows
        group += 1
    groups = list(range(group, file.metadata.num_row_groups))
    batches = file.iter_batches(batch_size=32, row_groups=groups, columns=[f"{column}.bytes"])
    return first, ((value or {}).get("bytes") or b"" for batch in batches for value in batch.column(column).to_pylist())


def _png(image: Image.Image) -> bytes:
    """The image as PNG, in its own mode if PNG supports it, else in RGB."""
    image = image if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else image.convert("RGB")
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=PNG_LEVEL)
    return stream.getvalue()
