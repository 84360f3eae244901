"""Bulk embedding: rows of an archive → vectors, in parts on disk, so that a killed run goes on where it was.

Memory stays flat: a few batches exist at a time. Threads read and decode the next ones while the model works. A row
that cannot be used is set aside with its reason. Legend: N rows, W the width of an embedding.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fuselip_core.data.dicom.file import discreet
from fuselip_core.data.pair import SetAside
from fuselip_core.data.places import Readable
from fuselip_core.data.prepare.image_reader import ImageReader
from fuselip_core.data.prepare.near_duplicates import Fingerprint, fingerprint
from fuselip_core.encoding.from_pixels import decoding_threads
from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_write, find_json, write_json
from fuselip_core.images import UnreadableImage, decode, quiet_decoders
from fuselip_core.lock import sole_process
from fuselip_core.progress import logger, track
from fuselip_core.search.inputs import Archive, Row

if TYPE_CHECKING:
    from fuselip_core.model.embedder import Embedder

BATCHES_AHEAD = 2
# A part is written when it has so many rows, or is so old: what a killed run loses.
PART_ROWS, PART_SECONDS = 2048, 30.0
THUMBNAIL_SIDE = 256
QUARANTINE_SUFFIX = ".set_aside.jsonl"


@dataclass(frozen=True, slots=True)
class Look:
    """What is kept of a picture: SHA-256 of its file, fingerprint, and a JPEG of at most THUMBNAIL_SIDE pixels."""

    sha256: str
    mark: Fingerprint
    thumbnail: bytes


@dataclass(frozen=True, slots=True)
class Embedded:
    """A row, its vector (W) float32 of unit norm, and the look of its picture where it has one."""

    row: Row
    vector: NDArray[np.float32]
    look: Look | None


@dataclass
class Outcome:
    """What became of the rows of an archive."""

    rows: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)

    def sentence(self) -> str:
        reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in self.set_aside.most_common())
        return f"{self.rows:,} rows" + (f"; set aside: {reasons}" if reasons else "")


# ---- rows → vectors --------------------------------------------------------------------------------------------------


def embed_rows(
    rows: Iterable[Row], embedder: Embedder, set_aside: Callable[[SetAside], None], batch_size: int = 64
) -> Iterator[list[Embedded]]:
    """Yields batches of embedded rows in their order; raises FuselipError where an embedding is not finite."""
    with decoding_threads() as pool, ImageReader() as reader, discreet(), quiet_decoders():

        def started(row: Row) -> Future[tuple[Any, Look | None]]:
            # Archives and Parquet files are read in order by one reader; a DICOM frame reads itself.
            data = row.image
            if data is not None and not isinstance(data, bytes | Readable):
                try:
                    data = reader.read(data)
                except UnreadableImage as error:
                    failed: Future[tuple[Any, Look | None]] = Future()
                    failed.set_exception(error)
                    return failed
            return pool.submit(_opened, data, embedder)

        waiting: deque[list[tuple[Row, Future[tuple[Any, Look | None]]]]] = deque()
        source = iter(rows)
        while batch := list(islice(source, batch_size)):
            waiting.append([(row, started(row)) for row in batch])
            if len(waiting) > BATCHES_AHEAD:
                yield _embedded(waiting.popleft(), embedder, set_aside)
        while waiting:
            yield _embedded(waiting.popleft(), embedder, set_aside)


def _opened(data: bytes | Readable | None, embedder: Embedder) -> tuple[Any, Look | None]:
    """Pixels as the model takes them, and the look, of an image file; runs in a thread."""
    if data is None:
        return None, None
    data = data if isinstance(data, bytes) else data.read()
    picture = decode(data)
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    look = Look(hashlib.sha256(data).hexdigest(), fingerprint(picture), stream.getvalue())
    return embedder.pixels(picture), look


def _embedded(
    batch: list[tuple[Row, Future[tuple[Any, Look | None]]]], embedder: Embedder, set_aside: Callable[[SetAside], None]
) -> list[Embedded]:
    good: list[tuple[Row, Any, Look | None]] = []
    for row, job in batch:
        try:
            pixels, look = job.result()
        except UnreadableImage as error:
            set_aside(SetAside(row.id, row.split, error.reason, error.detail))
            continue
        if pixels is None and row.text is None:
            set_aside(SetAside(row.id, row.split, "empty_row", "neither image nor text"))
            continue
        good.append((row, pixels, look))
    vectors = embedder.embed(
        images=[pixels for _, pixels, _ in good], texts=[row.text for row, _, _ in good], batch_size=max(1, len(good))
    )
    return [Embedded(row, vector, look) for (row, _, look), vector in zip(good, vectors, strict=True)]


# ---- parts on disk ---------------------------------------------------------------------------------------------------


def write_parts(
    archive: Archive,
    embedder: Embedder,
    work: Path,
    schema: pa.Schema,
    records: Callable[[Sequence[Embedded]], list[dict[str, Any]]],
    batch_size: int = 64,
    wanted: Callable[[Row], bool] = lambda row: True,
) -> tuple[list[Path], Outcome]:
    """Embeds an archive into Parquet files in `work`; finished ones of a killed run with the same input are kept.

    `records` makes the rows of a part, as `schema` has them. Each part names in its metadata how many rows of the
    archive it used up, a hash of them, and what it set aside.
    """
    key = hashlib.sha256(f"{archive.source} {archive.kind} {embedder.digest} {schema}".encode()).hexdigest()
    if find_json(work / "key.json").get("key") != key:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(work / "key.json", {"key": key})
    listed: list[SetAside] = []
    source = _Counted(archive.rows(listed.append), wanted)
    parts = _finished_parts(work, source)
    fresh: list[Embedded] = []
    started = time.monotonic()

    def flush() -> None:
        nonlocal started
        path = work / f"part-{len(parts):06d}.parquet"
        state = {"used": used, "digest": digest, "set_aside": [asdict(item) for item in listed]}
        table = pa.Table.from_pylist(records(fresh), schema=schema.with_metadata({"fuselip": json.dumps(state)}))
        with atomic_write(path) as partial:
            pq.write_table(table, partial)
        parts.append(path)
        fresh.clear()
        listed.clear()
        started = time.monotonic()

    # Rows are counted when they are embedded, not when the threads ahead of the model fetch them.
    marks: deque[tuple[int, str]] = deque()
    used, digest = source.used, source.digest
    batches = embed_rows(source.noting(marks, batch_size), embedder, listed.append, batch_size)
    total = None if archive.total is None else -(-archive.total // batch_size)
    for batch in track(batches, "embed", total=total, start=source.used // batch_size):
        fresh += batch
        used, digest = marks.popleft()
        if len(fresh) >= PART_ROWS or time.monotonic() - started > PART_SECONDS:
            flush()
    used, digest = source.used, source.digest
    if fresh or listed or not parts:
        flush()
    return parts, _outcome_of(parts)


class _Counted:
    """The rows of an archive, with how many were taken and a hash over them."""

    def __init__(self, rows: Iterator[Row], wanted: Callable[[Row], bool]) -> None:
        self._rows, self._wanted, self._digest, self.used = rows, wanted, hashlib.sha256(), 0

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def skip(self, count: int) -> None:
        for row in islice(self._rows, count):
            self._count(row)

    def noting(self, marks: deque[tuple[int, str]], batch_size: int) -> Iterator[Row]:
        """The wanted rows; after each `batch_size` of them, and at the end, `marks` takes count and hash."""
        given = 0
        for row in self._rows:
            self._count(row)
            if self._wanted(row):
                given += 1
                if given % batch_size == 0:
                    marks.append((self.used, self.digest))
                yield row
        if given % batch_size:
            marks.append((self.used, self.digest))

    def _count(self, row: Row) -> None:
        self.used += 1
        image = hashlib.sha256(row.image).hexdigest() if isinstance(row.image, bytes) else row.image
        self._digest.update(repr((row.id, image, row.text, row.caption)).encode())


def _finished_parts(work: Path, source: _Counted) -> list[Path]:
    """Parts of an earlier run, as far as the archive still begins with the same rows; the others are removed."""
    parts = sorted(work.glob("part-*.parquet"))
    kept: list[Path] = []
    for path in parts:
        state = state_of(path)
        source.skip(state["used"] - source.used)
        if (state["used"], state["digest"]) != (source.used, source.digest):
            raise FuselipError(f"the archive has changed since {work} was begun; remove that folder and start again")
        kept.append(path)
    return kept


def state_of(part: Path) -> dict[str, Any]:
    """What a part says of itself: rows of the archive used up to its end, their hash, what was set aside."""
    return dict(json.loads(pq.read_schema(part).metadata[b"fuselip"]))


def _outcome_of(parts: Sequence[Path]) -> Outcome:
    outcome = Outcome()
    for part in parts:
        outcome.rows += pq.read_metadata(part).num_rows
        outcome.set_aside.update(item["reason"] for item in state_of(part)["set_aside"])
    return outcome


def write_set_aside(parts: Sequence[Path], path: Path) -> None:
    """One JSON line for each row that was set aside; no file where there is none."""
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for part in parts for item in state_of(part)["set_aside"]]
    path.unlink(missing_ok=True)
    if lines:
        with atomic_write(path) as partial:
            partial.write_text("".join(lines), encoding="utf-8")


# ---- to a Parquet file -----------------------------------------------------------------------------------------------


def embed_archive(
    source: Path, out: Path, embedder: Embedder, batch_size: int = 64, kind: str | None = None
) -> Outcome:
    """Writes id, image, text and embedding (W float32, unit norm) of every row of `source` to the Parquet file `out`.

    Rows that were set aside are named in a file beside `out`. Raises FuselipError for a source that cannot be used.
    """
    archive = Archive(source, kind)
    schema = pa.schema(
        [(name, pa.string()) for name in ("id", "image", "text")]
        + [("embedding", pa.list_(pa.float32(), embedder.width))]
    )

    def records(items: Sequence[Embedded]) -> list[dict[str, Any]]:
        return [
            {"id": item.row.id, "image": item.row.place, "text": item.row.text, "embedding": item.vector}
            for item in items
        ]

    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.parts")
    busy = FuselipError(f"another process embeds into {out}; wait for it, or name another file with --out")
    with sole_process(out.with_name(f".{out.name}.lock"), busy):
        parts, outcome = write_parts(archive, embedder, work, schema, records, batch_size)
        if not outcome.rows:
            raise FuselipError(f"no row of {source} can be embedded ({outcome.sentence()})")
        with atomic_write(out) as partial, pq.ParquetWriter(partial, schema) as writer:
            for part in parts:
                writer.write_table(pq.read_table(part, schema=schema))
        write_set_aside(parts, out.with_name(out.name + QUARANTINE_SUFFIX))
        shutil.rmtree(work)
    logger.info("%s", outcome.sentence())
    return outcome
