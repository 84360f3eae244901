"""Compares two prepared data sets row by row, through the row hashes in their shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from fuselip_core.data.pair import DataError
from fuselip_core.data.shards.reader import PreparedData

KEYS = {"images": "image_id", "pairs": "pair_id", "candidates": "candidates_id"}


@dataclass(frozen=True)
class Difference:
    """Ids of the rows that differ in one table of one split. changed: same id, other content."""

    table: str
    split: str
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.added) + len(self.removed) + len(self.changed)


def differences(old: Path, new: Path) -> list[Difference]:
    """The tables of all splits that differ; raises DataError for a folder without prepared data.

    Memory: the ids and hashes of one table of one split at a time.
    """
    before, after = PreparedData(old), PreparedData(new)
    found = []
    for split in sorted({*before.splits, *after.splits}):
        for table, key in KEYS.items():
            was, now = (dict(_rows(data, table, split, key)) for data in (before, after))
            difference = Difference(
                table,
                split,
                added=tuple(name for name in now if name not in was),
                removed=tuple(name for name in was if name not in now),
                changed=tuple(name for name, digest in now.items() if was.get(name, digest) != digest),
            )
            if len(difference):
                found.append(difference)
    return found


def _rows(data: PreparedData, table: str, split: str, key: str) -> Iterator[tuple[str, bytes]]:
    for path in data.shards(table, split):
        with pq.ParquetFile(path) as file:
            if "row_hash" not in file.schema_arrow.names:
                raise DataError(f"{path} has no row hashes; prepare it again with this version")
            for batch in file.iter_batches(1 << 16, columns=[key, "row_hash"]):
                names, hashes = batch.column(key).to_pylist(), batch.column("row_hash").to_pylist()
                yield from ((name, bytes.fromhex(digest)) for name, digest in zip(names, hashes, strict=True))
