"""Building an index and changing it: build, add, remove, verify.

Rows are embedded into parts on disk first (`embed.write_parts`), where a killed run goes on. What then changes the
table is one transaction. Old versions of the table are deleted at once, since they hold what was removed.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs
import pyarrow as pa
import pyarrow.parquet as pq

from fuselip_core.errors import FuselipError
from fuselip_core.lock import sole_process
from fuselip_core.search.embed import QUARANTINE_SUFFIX, Embedded, Outcome, write_parts, write_set_aside
from fuselip_core.search.index import ANN_ROWS, TABLE, Index, _quoted, connect, schema_of
from fuselip_core.search.inputs import Archive

if TYPE_CHECKING:
    from fuselip_core.model.embedder import Embedder


def build(
    source: Path, folder: str | Path, embedder: Embedder, kind: str | None = None, batch_size: int = 64
) -> Outcome:
    """Builds the index in `folder` of the rows of `source`; an older one is replaced when the new one is whole."""
    with _sole_builder(folder) as work:
        schema = schema_of(embedder.width, embedder.name, embedder.digest)
        parts, outcome = _embedded_parts(Archive(source, kind), work, embedder, schema, batch_size)
        if not outcome.rows:
            raise FuselipError(f"no row of {source} can be embedded ({outcome.sentence()})")
        table = connect(folder).create_table(TABLE, _reader(parts, schema), mode="overwrite")
        _finish(table, folder, work, parts)
    return outcome


def add(source: Path, folder: str | Path, embedder: Embedder, kind: str | None = None, batch_size: int = 64) -> Outcome:
    """Adds the rows of `source`; those with an id that the index has take its place."""
    index = Index.open(folder)
    index.check_model(embedder.digest)
    with _sole_builder(folder) as work:
        schema = schema_of(index.width, index.model_name, index.model_digest)
        parts, outcome = _embedded_parts(Archive(source, kind), work, embedder, schema, batch_size)
        table = connect(folder).open_table(TABLE)
        if outcome.rows:
            merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(_reader(parts, schema))
        _finish(table, folder, work, parts)
    return outcome


def remove(folder: str | Path, case: str | None = None, ids: Sequence[str] = ()) -> int:
    """Removes a case, or pictures by their ids, for good: no file of the index holds them afterwards.

    Returns how many were removed. Raises FuselipError where there is nothing to remove.
    """
    condition = f"case = {_quoted([case])}" if case is not None else f"id IN ({_quoted(ids)})"
    index = Index.open(folder)
    with _sole_builder(folder) as work:
        database = connect(folder)
        table = database.open_table(TABLE)
        count = int(table.count_rows(condition))
        if not count:
            raise FuselipError(f"the index in {folder} has no picture of {case or ', '.join(ids)}; nothing is removed")
        # Not `delete`, which marks rows and keeps them in their files.
        rest = table.search().where(f"NOT ({condition})").to_batches(1024)
        schema = schema_of(index.width, index.model_name, index.model_digest)
        table = database.create_table(TABLE, rest.cast(schema), mode="overwrite")
        _finish(table, folder, work, ())
    return count


def verify(folder: str | Path) -> dict[str, Any]:
    """Reads all of an index; raises FuselipError for repeated ids and for vectors that are not of unit length."""
    index = Index.open(folder)
    columns = connect(folder).open_table(TABLE).search().select(["id", "vector"]).to_batches(4096)
    seen: set[str] = set()
    for batch in columns:
        vectors = np.asarray(batch["vector"].flatten()).reshape(-1, index.width)
        if not np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3):
            raise FuselipError(f"the index in {folder} has vectors that are damaged; build it again")
        names = batch["id"].to_pylist()
        if len(seen | set(names)) < len(seen) + len(names):
            raise FuselipError(f"the index in {folder} has an id twice; build it again")
        seen.update(names)
    return {"rows": len(seen), "model_digest": index.model_digest}


@contextmanager
def _sole_builder(folder: str | Path) -> Iterator[Path]:
    """Yields the folder of unfinished work while no other process changes the index."""
    if str(folder).startswith("s3://"):
        name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        work = platformdirs.user_cache_path("fuselip") / f"index-{name}"
    else:
        place = Path(folder).absolute()
        work = place.with_name(f".{place.name}.parts")
    work.parent.mkdir(parents=True, exist_ok=True)
    busy = FuselipError(f"another process changes the index in {folder}; wait for it, or name another folder")
    with sole_process(work.with_suffix(".lock"), busy):
        yield work


def _embedded_parts(
    archive: Archive, work: Path, embedder: Embedder, schema: pa.Schema, batch_size: int
) -> tuple[list[Path], Outcome]:
    return write_parts(archive, embedder, work, schema, _records, batch_size)


def _records(items: Sequence[Embedded]) -> list[dict[str, Any]]:
    now = datetime.now(UTC)
    found = []
    for item in items:
        row, look = item.row, item.look
        record = {
            name: getattr(row, name)
            for name in ("id", "concepts", "modality", "case", "split", "source", "licence", "place")
        }
        record["caption"] = row.caption or row.text or ""
        record["sha256"] = look.sha256 if look else ""
        record["row_hash"] = hashlib.sha256(repr((sorted(record.items()), row.text)).encode()).hexdigest()
        if look:
            mark = look.mark
            record |= {"thumbnail": look.thumbnail, "bits": mark.bits, "grey": mark.thumbnail.tobytes()}
        found.append({**record, "indexed_at": now, "vector": item.vector})
    return found


def _reader(parts: Sequence[Path], schema: pa.Schema) -> pa.RecordBatchReader:
    batches = (
        batch.cast(schema) if batch.schema != schema else batch
        for part in parts
        for batch in pq.ParquetFile(part).iter_batches(1024)
    )
    return pa.RecordBatchReader.from_batches(schema, batches)


def _finish(table: Any, folder: str | Path, work: Path, parts: Sequence[Path]) -> None:
    """Full text and, in a large index, approximate search; old versions go, and the parts with them."""
    from lancedb.index import FTS, HnswSq

    table.create_index("caption", config=FTS(), replace=True)
    if table.count_rows() > ANN_ROWS:
        table.create_index("vector", config=HnswSq(distance_type="cosine"), replace=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that readers of old versions fail: they are meant to
        table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)
    if parts:
        place = Path(Path(folder).name if str(folder).startswith("s3://") else folder)
        write_set_aside(parts, place.with_name(place.name + QUARANTINE_SUFFIX))
    shutil.rmtree(work, ignore_errors=True)
