"""One Parquet shard of checked images at a time, in any process: bytes stay as published, memory stays flat.

A finished shard has a sidecar `<shard>.json` that says what is in it; a shard without one is written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fuselip_core.data.columns import table_of
from fuselip_core.data.images import UnreadableImage, decode
from fuselip_core.data.pair import ImageEntry, Pair, Place, SetAside
from fuselip_core.files import atomic_write, sha256_of, write_json
from fuselip_core.progress import track

IMAGE_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("split", pa.string()),
        ("bytes", pa.binary()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("modality", pa.string()),
        ("concepts", pa.list_(pa.string())),
        ("case", pa.string()),
        ("source", pa.string()),
        ("licence", pa.string()),
        ("attribution", pa.string()),
    ]
)
PAIR_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in (
            "pair_id",
            "split",
            "kind",
            "group",
            "case",
            "query_image",
            "query_text",
            "target_image",
            "target_text",
            "answer_type",
        )
    ]
)
# A row group is what a reader holds at once.
GROUP_ROWS, GROUP_BYTES = 256, 32 << 20
# Nothing that is stored in fewer pixels than allowed needs more bytes than this: 8 a pixel, and metadata.
BYTES_A_PIXEL, METADATA_BYTES = 8, 64 << 20
ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class ShardTask:
    """What one worker writes: `entries` into `path`. Images whose hash is listed in `held_out` are left out."""

    path: Path
    source: str
    entries: tuple[ImageEntry, ...]
    max_megapixels: float
    held_out: Path | None = None


@dataclass(frozen=True)
class ShardResult:
    """What a shard holds: image ids with the hashes of their bytes, and what was set aside."""

    path: str
    sha256: str
    images: tuple[tuple[str, str], ...]
    set_aside: tuple[SetAside, ...]


class ImageReader:
    """Reads images where their places say; keeps one archive or Parquet file open."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._archive: tuple[Path, zipfile.ZipFile] | None = None
        self._rows: tuple[Path, int, Iterator[bytes]] | None = None

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._archive:
            self._archive[1].close()

    def read(self, place: Place) -> bytes:
        """The bytes of an image; raises UnreadableImage (missing_image, too_large, damaged_archive)."""
        try:
            if place.member is not None:
                return self._member(place.file, place.member)
            if place.row is not None:
                return self._row(place.file, place.row)
            self._refuse_if_large(place.file.stat().st_size)
            return place.file.read_bytes()
        except FileNotFoundError as error:
            raise UnreadableImage("missing_image", f"no file {place.file.name}") from error
        except ARCHIVE_ERRORS as error:
            raise UnreadableImage("damaged_archive", f"{place.file.name}: {' '.join(str(error).split())}") from error

    def _refuse_if_large(self, size: int) -> None:
        if size > self._max_bytes:
            raise UnreadableImage("too_large", f"{size} bytes")

    def _member(self, path: Path, member: str) -> bytes:
        if self._archive is None or self._archive[0] != path:
            if self._archive:
                self._archive[1].close()
            self._archive = path, zipfile.ZipFile(path)
        archive = self._archive[1]
        self._refuse_if_large(archive.getinfo(member).file_size)
        return archive.read(member)

    def _row(self, path: Path, row: int) -> bytes:
        """Rows of a Parquet file are asked for in rising order, so one pass over its row groups serves a shard."""
        if self._rows is None or self._rows[0] != path or self._rows[1] > row:
            self._rows = path, *_rows_from(path, row)
        _, at, rows = self._rows
        for _ in range(row - at):
            next(rows)
        self._rows = path, row + 1, rows
        data = next(rows)
        self._refuse_if_large(len(data))
        return data


def _rows_from(path: Path, row: int) -> tuple[int, Iterator[bytes]]:
    """Index of the first row of the row group that has `row`, and the image bytes from there on."""
    file = pq.ParquetFile(path)
    first = group = 0
    while first + file.metadata.row_group(group).num_rows <= row:
        first += file.metadata.row_group(group).num_rows
        group += 1
    groups = list(range(group, file.metadata.num_row_groups))
    batches = file.iter_batches(batch_size=32, row_groups=groups, columns=["image.bytes"])
    return first, (value["bytes"] or b"" for batch in batches for value in batch.column("image").to_pylist())


def write_image_shard(task: ShardTask, show: bool = False) -> ShardResult:
    """Checks and writes the images of a task, unless an earlier run finished it; `show` shows its progress."""
    sidecar = task.path.with_name(f"{task.path.name}.json")
    if sidecar.exists() and task.path.exists():
        return _read_result(sidecar)
    held_out = set(task.held_out.read_text().split()) if task.held_out else set()
    images: list[tuple[str, str]] = []
    set_aside: list[SetAside] = []
    max_bytes = int(min(task.max_megapixels * 1e6 * BYTES_A_PIXEL, 1 << 40)) + METADATA_BYTES
    with atomic_write(task.path) as partial, _group_writer(partial) as write, ImageReader(max_bytes) as reader:
        for entry in track(task.entries, task.path.stem) if show else task.entries:
            try:
                row = _checked_row(entry, reader.read(entry.place), task)
            except UnreadableImage as error:
                set_aside.append(SetAside(entry.image_id, entry.split, error.reason, error.detail))
                continue
            if row["sha256"] in held_out:
                set_aside.append(SetAside(entry.image_id, entry.split, "copy_in_held_out", "same bytes"))
                continue
            images.append((entry.image_id, row["sha256"]))
            write(row)
    result = ShardResult(task.path.name, sha256_of(task.path), tuple(images), tuple(set_aside))
    write_json(sidecar, asdict(result))
    return result


def _read_result(sidecar: Path) -> ShardResult:
    content = json.loads(sidecar.read_text(encoding="utf-8"))
    images = tuple((name, digest) for name, digest in content["images"])
    return ShardResult(
        content["path"], content["sha256"], images, tuple(SetAside(**item) for item in content["set_aside"])
    )


def _checked_row(entry: ImageEntry, data: bytes, task: ShardTask) -> dict[str, Any]:
    image = decode(data, task.max_megapixels)
    return {
        "image_id": entry.image_id,
        "split": entry.split,
        "bytes": data,
        "sha256": hashlib.sha256(data).hexdigest(),
        "width": image.width,
        "height": image.height,
        "modality": entry.modality,
        "concepts": list(entry.concepts),
        "case": entry.case,
        "source": task.source,
        "licence": entry.licence,
        "attribution": entry.attribution,
    }


@contextlib.contextmanager
def _group_writer(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that takes one row; rows go to disk by row groups of bounded size."""
    # Image bytes are compressed already: packing them again costs time and gains nothing.
    packed = {name: "zstd" for name in IMAGE_SCHEMA.names if name != "bytes"} | {"bytes": "none"}
    packed["concepts.list.element"] = packed.pop("concepts")
    waiting: list[dict[str, Any]] = []
    size = 0
    with pq.ParquetWriter(
        path, IMAGE_SCHEMA, compression=packed, use_dictionary=["split", "source", "licence"], write_statistics=False
    ) as writer:

        def flush() -> None:
            nonlocal size
            writer.write_table(table_of(waiting, IMAGE_SCHEMA), row_group_size=GROUP_ROWS)
            waiting.clear()
            size = 0

        def write(row: dict[str, Any]) -> None:
            nonlocal size
            waiting.append(row)
            size += len(row["bytes"])
            if len(waiting) >= GROUP_ROWS or size >= GROUP_BYTES:
                flush()

        yield write
        if waiting:
            flush()


def write_pair_shard(path: Path, pairs: Iterable[Pair]) -> None:
    """Writes pairs in their order, atomically."""
    rows = [
        {
            "pair_id": pair.pair_id,
            "split": pair.split,
            "kind": pair.kind,
            "group": pair.group,
            "case": pair.case,
            "query_image": pair.query.image,
            "query_text": pair.query.text,
            "target_image": pair.target.image,
            "target_text": pair.target.text,
            "answer_type": pair.answer_type,
        }
        for pair in pairs
    ]
    with atomic_write(path) as partial:
        pq.write_table(table_of(rows, PAIR_SCHEMA), partial, compression="zstd")
