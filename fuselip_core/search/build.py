"""Builds and changes an index: build, add, update, remove, verify.

Rows are first embedded into parts on disk (`embed.Parts`), from which an interrupted run resumes. The table then
changes in one transaction. Its old versions are deleted at once, since they still contain what was removed.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import platformdirs
import pyarrow as pa
import pyarrow.compute as pc

from fuselip_core.errors import FuselipError
from fuselip_core.files import full_disk_named
from fuselip_core.lock import sole_process
from fuselip_core.registry.address import pin_version
from fuselip_core.search.dicomweb import fetch_studies, is_address
from fuselip_core.search.embed import UNCHANGED, Embedded, Judge, Outcome, Parts
from fuselip_core.search.index import ANN_ROWS, TABLE, Index, NoIndex, connect, drop_map, is_remote, quoted, schema_of
from fuselip_core.search.inputs import Archive, Row
from fuselip_core.search.originals import note_place

if TYPE_CHECKING:
    from fuselip_core.model.embedder import Embedder

OF_ROW = ("id", "concepts", "modality", "case", "split", "source", "licence", "place")


def build(
    source: Path | str,
    folder: str | Path,
    embedder: Embedder,
    kind: str | None = None,
    name: str | None = None,
    batch_size: int = 64,
) -> Outcome:
    """Builds the index in `folder` from the rows of `source`; an existing one is replaced once the new one is complete.

    source: what `Archive` reads, or the address of a DICOMweb server.
    """
    with _sole_builder(folder) as work, _opened(source, kind, name, work) as archive:
        schema = schema_of(embedder.width, embedder.name, embedder.digest, pin_version(embedder.name))
        parts = Parts(work, schema, _records)
        outcome = parts.write(archive, embedder, batch_size, _judge({}))
        if not outcome.rows:
            raise FuselipError(f"{source} has no row that can be indexed ({outcome.sentence()}); name another")
        _finish(connect(folder).create_table(TABLE, parts.batches(), mode="overwrite"), folder)
        parts.finish(_beside(folder))
    return outcome


def add(
    source: Path | str,
    folder: str | Path,
    embedder: Embedder,
    kind: str | None = None,
    name: str | None = None,
    batch_size: int = 64,
) -> Outcome:
    """Adds the rows of `source` that are new, and replaces those that have changed.

    Raises FuselipError for another model than the index's, and for an id that a picture in another place has.
    """
    index = Index.open(folder)
    index.check_model(embedder.digest)
    with _sole_builder(folder) as work, _opened(source, kind, name, work) as archive:
        table = connect(folder).open_table(TABLE)
        known = {row["id"]: row for row in table.search().select(["id", "stamp", "sha256", "place"]).to_list()}
        schema = _schema(index)
        parts = Parts(work, schema, lambda items: _records(items, known), salt=str(table.version))
        outcome = parts.write(archive, embedder, batch_size, _judge(known))
        if outcome.rows:
            merge = table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
            merge.execute(parts.batches())
        if outcome.rows or len(table.list_versions()) > 1:  # more than one: left by a killed process
            _finish(table, folder)
        parts.finish(_beside(folder))
    return outcome


def update(source: Path | str, folder: str | Path, embedder: Embedder, kind: str | None = None) -> Outcome:
    """Brings an index up to date: `add`, or `build` if there is no index yet or it was built with another model."""
    try:
        same = Index.open(folder).model_digest == embedder.digest
    except NoIndex:
        same = False
    return (add if same else build)(source, folder, embedder, kind)


def remove(folder: str | Path, case: str | None = None, ids: Sequence[str] = ()) -> int:
    """Removes a case, or pictures by id, for good: no file of the index contains them afterwards.

    Returns the number removed; raises FuselipError if there is none.
    """
    condition = f"case = {quoted([case])}" if case is not None else f"id IN ({quoted(ids)})"
    index = Index.open(folder)
    with _sole_builder(folder):
        database = connect(folder)
        table = database.open_table(TABLE)
        count = int(table.count_rows(condition))
        if count:
            # Not `delete`, which only marks rows as deleted and leaves them in the files.
            rest = table.search().where(f"NOT ({condition})").to_batches(1024)
            table = database.create_table(TABLE, rest.cast(_schema(index)), mode="overwrite")
        _finish(table, folder)  # in any case: an earlier removal may have been killed before it deleted files
        if not count:
            raise FuselipError(f"the index in {folder} has no picture of {case or ', '.join(ids)}; nothing is removed")
    return count


def verify(folder: str | Path) -> int:
    """Reads the whole index, deletes leftovers of killed processes, and returns the number of pictures.

    Raises FuselipError for repeated ids and vectors without unit norm.
    """
    index = Index.open(folder)
    with _sole_builder(folder):
        table = connect(folder).open_table(TABLE)
        count = 0
        for batch in table.search().select(["vector"]).to_batches(4096):
            vectors = np.asarray(batch["vector"].flatten()).reshape(-1, index.width)
            if not np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-3):
                raise FuselipError(f"the index in {folder} has damaged vectors; build it again")
            count += len(vectors)
        names = table.search().select(["id"]).to_arrow()["id"]
        if pc.count_distinct(names).as_py() != count:
            raise FuselipError(f"the index in {folder} has an id twice; build it again")
        _finish(table, folder)
    return count


@contextmanager
def _sole_builder(folder: str | Path) -> Iterator[Path]:
    """Yields the folder for unfinished work, and keeps other processes from changing the index meanwhile."""
    if is_remote(folder):
        name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        work = platformdirs.user_cache_path("fuselip") / f"index-{name}"
    else:
        place = Path(folder).absolute()
        work = place.with_name(f".{place.name}.parts")
    work.parent.mkdir(parents=True, exist_ok=True)
    busy = FuselipError(f"another process is changing the index in {folder}; wait for it, or name another folder")
    with sole_process(work.with_suffix(".lock"), busy), full_disk_named(work):
        yield work


@contextmanager
def _opened(source: Path | str, kind: str | None, name: str | None, work: Path) -> Iterator[Archive]:
    """The archive. Studies of a DICOMweb server are downloaded beside `work` and deleted once the block succeeds."""
    if not is_address(source):
        yield Archive(Path(source), kind, name)
        return
    studies = work.with_suffix(".studies")
    fetch_studies(str(source), studies)
    yield Archive(studies, "dicom", name, studies_at=str(source))
    shutil.rmtree(studies, ignore_errors=True)


def _schema(index: Index) -> pa.Schema:
    return schema_of(index.width, index.model_name, index.model_digest, index.model_address)


def _judge(known: Mapping[str, Mapping[str, Any]]) -> Judge:
    """Accepts rows that are not in `known` or have changed since, and sets repeated ids aside."""
    seen: set[int] = set()

    def judge(row: Row, stamp: str) -> str | None:
        if row.id_hash() in seen:
            return "repeated_id"
        seen.add(row.id_hash())
        return UNCHANGED if row.id in known and known[row.id]["stamp"] == stamp else None

    return judge


def _records(
    items: Sequence[Embedded], known: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Rows of the table; raises FuselipError if another picture in another place is `known` by the same id."""
    now = datetime.now(UTC)
    found = []
    for item in items:
        row, look = item.row, item.look
        record = {name: getattr(row, name) for name in OF_ROW} | {"stamp": item.stamp, "indexed_at": now}
        record |= {"vector": item.vector, "caption": row.caption or row.text or "", "sha256": ""}
        record["origin"] = row.origin or note_place(row.image)
        if look:
            grey = look.mark.thumbnail.tobytes()
            record |= {"sha256": look.sha256, "thumbnail": look.thumbnail, "bits": look.mark.bits, "grey": grey}
        other = known.get(row.id)
        if other and other["place"] != row.place and other["sha256"] != record["sha256"]:
            raise FuselipError(
                f"'{row.id}' is another picture in the index ({other['place']}) than in the archive ({row.place}); "
                "give the archive a name of its own with --name"
            )
        found.append(record)
    return found


def _beside(folder: str | Path) -> Path:
    """The path of the index, or for one on S3 its name in the current folder: where the list of rejects goes."""
    return Path(Path(folder).name if is_remote(folder) else folder)


def _finish(table: Any, folder: str | Path) -> None:
    """Builds the full-text index and, for a large table, the approximate one; deletes old versions."""
    from lancedb.index import FTS

    drop_map(connect(folder))
    table.create_index("caption", config=FTS(), replace=True)
    if table.count_rows() > ANN_ROWS:
        index_vectors(table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "readers of old versions will fail": they retry (Index.search)
        table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)


def index_vectors(table: Any) -> None:
    """Builds the table's index for approximate search, or rebuilds it."""
    from lancedb.index import HnswSq

    table.create_index("vector", config=HnswSq(distance_type="cosine"), replace=True)
