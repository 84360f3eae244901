"""Reads pictures of a prepared split by row number, in any order, from memory-mapped shards.

Parquet is read by row groups, but training needs single images at random. Prepared shards store image bytes without
compression or dictionary (prepare/image_shards.py), so every file is contiguous in its shard, and one pass over the
shards finds its offset. The memory-mapped index takes 16 bytes an image.
"""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from fuselip_core.data.pair import DataError
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.transforms import apply_edit, edit_from_json
from fuselip_core.files import atomic_write
from fuselip_core.images import decode
from fuselip_core.progress import track

# shard, length in bytes, offset in the shard
ENTRY = np.dtype([("shard", np.uint32), ("size", np.uint32), ("offset", np.uint64)])
ROWS_AT_ONCE = 64


class PictureReader:
    """Random access to the pictures of `split`. The index at `path` is written on first use."""

    def __init__(self, path: Path, prepared: PreparedData, split: str) -> None:
        """Raises DataError if the shards are not in the format that prepare writes."""
        self._shards = prepared.shards("images", split)
        version = prepared.data_version[:16]
        path = path.with_name(f"{path.stem}-{version}.npy")
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as partial, partial.open("wb") as stream:
                np.save(stream, _find_all(self._shards, prepared.image_count(split)))
        self._entries: NDArray[np.void] = np.load(path, mmap_mode="r")
        self._sources = prepared.sources_of_made(split)
        self._edits = prepared.made(split).column("edit").combine_chunks()
        self._maps: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of images, including made ones."""
        return len(self._entries) + len(self._sources)

    def picture(self, row: int) -> Image.Image:
        """The picture of a row, stored or made; thread-safe."""
        number = row - len(self._entries)
        image = decode(self.file(row if number < 0 else int(self._sources[number])))
        return image if number < 0 else apply_edit(edit_from_json(self._edits[number].as_py()), image)

    def file(self, row: int) -> bytes:
        """The image file of a row."""
        entry = self._entries[row]
        start = int(entry["offset"])
        return self._mapped(int(entry["shard"]))[start : start + int(entry["size"])]

    def _mapped(self, shard: int) -> mmap.mmap:
        with self._lock:
            if shard not in self._maps:
                with self._shards[shard].open("rb") as stream:
                    self._maps[shard] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            return self._maps[shard]


def _find_all(shards: list[Path], count: int) -> NDArray[np.void]:
    entries = np.zeros(count, ENTRY)
    row = 0
    for number, path in enumerate(track(shards, "index images")):
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            end = 0
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(ROWS_AT_ONCE, columns=["bytes"]):
                    for blob in batch.column("bytes").to_pylist():
                        # Each value follows its length in four bytes; values are in order.
                        start = mapped.find(len(blob).to_bytes(4, "little") + blob, end)
                        if start < 0:
                            raise DataError(f"{path} has compressed images; run `fuselip prepare` again")
                        end = start + 4 + len(blob)
                        entries[row] = number, len(blob), start + 4
                        row += 1
    if row != count:
        raise DataError(f"{shards[0].parent} has {row} images but its manifest says {count}; run `fuselip prepare`")
    return entries
