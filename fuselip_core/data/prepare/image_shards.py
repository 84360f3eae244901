"""Checks images and writes them, bytes unchanged, as one Parquet shard, in any process and with constant memory.

A finished shard has a sidecar `<shard>.json` and a file with the hashes of its images; others are written again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fuselip_core.data.pair import ImageEntry, SetAside
from fuselip_core.data.places import Derived, Place
from fuselip_core.data.prepare.image_reader import ImageReader
from fuselip_core.data.prepare.near_duplicates import THUMBNAIL, Fingerprint, HeldOutIndex, fingerprint
from fuselip_core.data.prepare.tables import row_hash
from fuselip_core.data.shards.schemas import IMAGE_SCHEMA
from fuselip_core.files import atomic_write, read_json, sha256_of, write_json
from fuselip_core.images import UnreadableImage, decode, quiet_decoders
from fuselip_core.progress import track

# Readers hold one row group in memory.
GROUP_ROWS, GROUP_BYTES = 256, 32 << 20


@dataclass(frozen=True)
class ShardTask:
    """A worker's task: write `entries` into `path`.

    licence, attribution: those of the data set, for images without their own. held_out: folder of a HeldOutIndex, whose
    images are left out. near: leave out their near duplicates too. fingerprints: also write what an index is built
    from.
    """

    path: Path
    source: str
    entries: tuple[ImageEntry, ...]
    licence: str | None = None
    attribution: str | None = None
    held_out: Path | None = None
    near: bool = False
    fingerprints: bool = False


@dataclass(frozen=True)
class ShardResult:
    """A written shard; the hashes of its images stay on disk."""

    path: str
    sha256: str
    rows: int
    set_aside: tuple[SetAside, ...]


@dataclass
class _Work:
    """State of a shard that is being written."""

    task: ShardTask
    index: HeldOutIndex | None
    digests: list[str] = field(default_factory=list)
    fingerprints: list[Fingerprint] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    # Originals that were left out as copies, whose crops are left out too.
    copies: set[Place] = field(default_factory=set)


def write_image_shard(task: ShardTask, show: bool = False) -> ShardResult:
    """Checks and writes the images of a task, unless an earlier run finished it. show: show progress."""
    sidecar = sidecar_of(task.path)
    if sidecar.exists() and task.path.exists():
        return _read_result(sidecar)
    work = _Work(task, HeldOutIndex(task.held_out) if task.held_out else None)
    reader = ImageReader()
    with atomic_write(task.path) as partial, _group_writer(partial) as write, reader, quiet_decoders():
        for entry in track(task.entries, task.path.stem) if show else task.entries:
            try:
                write(_checked_row(entry, reader.read(entry.place), work))
            except UnreadableImage as error:
                work.set_aside.append(SetAside(entry.image_id, entry.split, error.reason, error.detail))
    result = ShardResult(task.path.name, sha256_of(task.path), len(work.digests), tuple(work.set_aside))
    if task.fingerprints:
        _save_fingerprints(task.path, work.fingerprints)
    with sidecar_digests(task.path).open("wb") as stream:
        stream.write(b"".join(bytes.fromhex(digest) for digest in work.digests))
    write_json(sidecar, asdict(result))
    return result


def sidecar_of(path: Path) -> Path:
    """The file that marks a shard as finished and lists what was set aside."""
    return path.with_name(f"{path.name}.json")


def sidecar_digests(path: Path) -> Path:
    """The file with the SHA-256 of each image of a shard, 32 bytes each."""
    return path.with_name(f"{path.name}.sha256")


def sidecar_fingerprints(path: Path) -> Path:
    """The file with the fingerprints of a held-out shard."""
    return path.with_name(f"{path.name}.npz")


def _save_fingerprints(path: Path, prints: list[Fingerprint]) -> None:
    bits = np.array([item.bits for item in prints], dtype=np.uint64)
    thumbnails = np.array([item.thumbnail for item in prints], dtype=np.uint8).reshape(len(prints), THUMBNAIL**2)
    with sidecar_fingerprints(path).open("wb") as stream:
        np.savez(stream, bits=bits, thumbnails=thumbnails)


def _read_result(sidecar: Path) -> ShardResult:
    content = read_json(sidecar, "delete its folder and run the same command again")
    set_aside = tuple(SetAside(**item) for item in content.pop("set_aside"))
    return ShardResult(**content, set_aside=set_aside)


def _checked_row(entry: ImageEntry, data: bytes, work: _Work) -> dict[str, Any]:
    """The row of an image; raises UnreadableImage, also for copies of held-out images."""
    image = decode(data)
    digest = hashlib.sha256(data).hexdigest()
    mark = fingerprint(image) if work.task.fingerprints or (work.index and work.task.near) else None
    if work.index:
        _refuse_copies(entry, digest, mark, work.index, work)
    work.digests.append(digest)
    if mark and work.task.fingerprints:
        work.fingerprints.append(mark)
    row = {
        "image_id": entry.image_id,
        "split": entry.split,
        "sha256": digest,
        "width": image.width,
        "height": image.height,
        "modality": entry.modality,
        "concepts": list(entry.concepts),
        "case": entry.case,
        "source": work.task.source,
        "licence": entry.licence or work.task.licence,
        "attribution": entry.attribution or work.task.attribution,
    }
    return {**row, "row_hash": row_hash(row), "bytes": data}


def _refuse_copies(entry: ImageEntry, digest: str, mark: Fingerprint | None, index: HeldOutIndex, work: _Work) -> None:
    """Raises UnreadableImage for a copy or near duplicate of a held-out image.

    Crops and edits are judged by their original, since small crops may look alike by chance.
    """
    if isinstance(entry.place, Derived):
        if entry.place.source in work.copies:
            raise UnreadableImage("copy_in_held_out", "made from a copy")
        return
    same = index.has(digest)
    if same or (mark and work.task.near and index.has_near(mark)):
        work.copies.add(entry.place)
        raise UnreadableImage(*(("copy_in_held_out", "same bytes") if same else ("near_copy_in_held_out", "same look")))


@contextlib.contextmanager
def _group_writer(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yields a function that adds a row; rows are written in row groups of bounded size."""
    # Image files are compressed already.
    packed = {name: "zstd" for name in IMAGE_SCHEMA.names if name != "bytes"} | {"bytes": "none"}
    packed["concepts.list.element"] = packed.pop("concepts")
    waiting: list[dict[str, Any]] = []
    size = 0
    with pq.ParquetWriter(
        path, IMAGE_SCHEMA, compression=packed, use_dictionary=["split", "source", "licence"], write_statistics=False
    ) as writer:

        def flush() -> None:
            nonlocal size
            writer.write_table(pa.Table.from_pylist(waiting, IMAGE_SCHEMA), row_group_size=GROUP_ROWS)
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
