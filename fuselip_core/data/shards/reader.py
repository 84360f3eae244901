"""Reads a prepared data set: images in the order of their shards, and the pairs of a split as one table."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fuselip_core.data.pair import SPLITS, DataError, Side
from fuselip_core.data.shards.schemas import CANDIDATES_SCHEMA, MADE_SCHEMA, PAIR_SCHEMA
from fuselip_core.errors import one_line
from fuselip_core.files import read_json

MANIFEST = "manifest.json"
AGAIN = "run `fuselip prepare` again"
FIRST = "run `fuselip prepare` first"


def validation_split(splits: Collection[str]) -> str:
    """The split for validation during training: dev if there is one, else valid; raises DataError without either."""
    for split in ("dev", "valid"):
        if split in splits:
            return split
    raise DataError("the prepared data has no dev or valid split; set prepare.dev_share above 0")


def _of_raw(folder: Path) -> str:
    return f"if it is raw data, run `fuselip data prepare --root {folder}` and give its output"


class PreparedData:
    """A folder written by `prepare_data`. Row i of a split's images is row i of its token store."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError if the manifest or one of its shards is missing."""
        self.folder = Path(folder)
        self._sources: dict[str, NDArray[np.int64]] = {}
        if not (self.folder / MANIFEST).is_file():
            # No advice about --out for raw data, since prepared data would replace that folder.
            raw = self.folder.is_dir() and any(self.folder.iterdir())
            raise DataError(
                f"{folder} holds no prepared data (it has no {MANIFEST}); {_of_raw(folder) if raw else FIRST}"
            )
        self.manifest = read_json(self.folder / MANIFEST, AGAIN)
        counts, shards = self.manifest.get("counts"), self.manifest.get("shards")
        listed = isinstance(shards, list) and all(isinstance(shard, dict) and "path" in shard for shard in shards)
        if not (isinstance(counts, dict) and listed and "data_version" in self.manifest):
            raise DataError(
                f"{self.folder / MANIFEST} is damaged or foreign (no counts, shards or data_version); "
                f"{AGAIN}, or {_of_raw(folder)}"
            )
        missing = [shard["path"] for shard in self.manifest["shards"] if not (self.folder / shard["path"]).is_file()]
        if missing:
            raise DataError(f"{folder} lacks {missing[0]}, which its manifest lists; {AGAIN}")

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits with images, in the order train, dev, valid, test."""
        return tuple(split for split in SPLITS if split in self.manifest["counts"])

    @property
    def data_version(self) -> str:
        """Hash over the content of all shards."""
        return str(self.manifest["data_version"])

    def image_count(self, split: str) -> int:
        """Number of images of a split."""
        self._require(split)
        return int(self.manifest["counts"][split]["images"])

    def iter_images(
        self, split: str, columns: Sequence[str] | None = None, batch_rows: int = 256, first: int = 0
    ) -> Iterator[pa.RecordBatch]:
        """Batches of at most `batch_rows` images in order (schemas.IMAGE_SCHEMA), with one row group in memory.

        Starts with row `first`, without reading earlier row groups.
        """
        for path in self._shards("images", split):
            with _reading(path), pq.ParquetFile(path) as file:
                if first >= file.metadata.num_rows:
                    first -= file.metadata.num_rows
                    continue
                yield from _rows_from(file, first, batch_rows, None if columns is None else list(columns))
                first = 0

    def made(self, split: str) -> pa.Table:
        """Images derived from others on reading (schemas.MADE_SCHEMA), in the order of their originals."""
        table = self._table("made", split, MADE_SCHEMA)
        if table.column("edit").null_count:
            raise DataError(f"{self.folder} was prepared by an earlier version; {AGAIN}")
        return table

    def row_count(self, split: str) -> int:
        """Number of images including made ones: the rows of the split's token store."""
        return self.image_count(split) + int(self.manifest["counts"][split].get("made_images", 0))

    def row_ids(self, split: str) -> pa.ChunkedArray:
        """Ids of the images, followed by those of made images."""
        own = [batch.column("image_id") for batch in self.iter_images(split, ["image_id"], batch_rows=1 << 16)]
        return pa.chunked_array([*own, *self.made(split).column("image_id").chunks], pa.string())

    def sources_of_made(self, split: str) -> NDArray[np.int64]:
        """Row of each made image's original, in ascending order; raises DataError if one is missing."""
        if split in self._sources:
            return self._sources[split]
        made = self.made(split).column("source")
        own = self.row_ids(split).slice(0, self.image_count(split))
        rows = pc.index_in(made, value_set=own.combine_chunks() if own.num_chunks > 1 else own.chunk(0))
        if rows.null_count:
            raise DataError(f"{self.folder} lacks originals of made images; run `fuselip prepare` again")
        self._sources[split] = np.asarray(rows, dtype=np.int64)
        return self._sources[split]

    def pairs(self, split: str) -> pa.Table:
        """All pairs of a split in order (schemas.PAIR_SCHEMA)."""
        return self._table("pairs", split, PAIR_SCHEMA)

    def candidates(self, split: str, task: str | None = None) -> pa.Table:
        """Evaluation questions of a split, of one task or all (schemas.CANDIDATES_SCHEMA)."""
        table = self._table("candidates", split, CANDIDATES_SCHEMA)
        return table if task is None else table.filter(pc.equal(table["task"], task))

    def options(self, split: str, names: Collection[str] | None = None) -> dict[str, list[Side]]:
        """Lists of options by id (column `options` of the questions): those in `names`, or all."""
        found: dict[str, list[Side]] = {}
        for path in self._shards("options", split):
            with _reading(path), pq.ParquetFile(path) as file:
                for row in (row for batch in file.iter_batches(64) for row in batch.to_pylist()):
                    if names is None or row["options_id"] in names:
                        sides = zip(row["images"], row["texts"], strict=True)
                        found[row["options_id"]] = [Side(image, text) for image, text in sides]
        return found

    def _table(self, name: str, split: str, schema: pa.Schema) -> pa.Table:
        tables = []
        for path in self._shards(name, split):
            with _reading(path):
                tables.append(pq.read_table(path, schema=schema))
        return pa.concat_tables(tables) if tables else schema.empty_table()

    def shards(self, table: str, split: str) -> list[Path]:
        """The shards of a table of a split, in order; none if the split has no such table."""
        names = (shard["path"] for shard in self.manifest["shards"])
        return [self.folder / name for name in names if name.startswith(f"{table}-{split}-")]

    def _shards(self, table: str, split: str) -> list[Path]:
        self._require(split)
        return self.shards(table, split)

    def _require(self, split: str) -> None:
        if split not in self.manifest["counts"]:
            raise DataError(f"{self.folder} has no split '{split}'; there are: {', '.join(self.splits)}")


def _rows_from(
    file: pq.ParquetFile, first: int, batch_rows: int, columns: list[str] | None
) -> Iterator[pa.RecordBatch]:
    """Batches of a shard from row `first` on, without reading earlier row groups."""
    groups = list(range(file.num_row_groups))
    while groups and first >= file.metadata.row_group(groups[0]).num_rows:
        first -= file.metadata.row_group(groups.pop(0)).num_rows
    for batch in file.iter_batches(batch_rows, row_groups=groups, columns=columns):
        rest, first = batch.slice(first), max(0, first - batch.num_rows)
        if rest.num_rows:
            yield rest


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns Arrow's errors on a damaged shard into a sentence."""
    try:
        yield
    except pa.ArrowException as error:
        reason = one_line(error)[:200]
        raise DataError(f"{path} is damaged ({reason}); {AGAIN}") from error
    except OSError as error:
        if error.errno is not None:  # an error of the disk, which `errors.sentence_of` explains
            raise
        reason = one_line(error)[:200]
        raise DataError(f"{path} is damaged ({reason}); {AGAIN}") from error
