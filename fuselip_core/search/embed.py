"""Bulk embedding: rows of an archive → vectors, written in parts so that an interrupted run can resume.

Memory use is constant: only a few batches exist at a time, and threads read and decode the next ones while the model
works. Unusable rows are set aside with a reason. Legend: N rows, W the width of an embedding.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
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
from fuselip_core.data.shards.in_order import decoding_threads
from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_write, find_json, write_json
from fuselip_core.images import UnreadableImage, decode, quiet_decoders
from fuselip_core.lock import sole_process
from fuselip_core.progress import logger, track
from fuselip_core.search.inputs import Archive, Row

if TYPE_CHECKING:
    from fuselip_core.model.embedder import Embedder

BATCHES_AHEAD = 2
# A part is written after this many rows or seconds, which is the most that an interrupted run loses.
PART_ROWS, PART_SECONDS = 2048, 30.0
THUMBNAIL_SIDE = 256
SET_ASIDE_SUFFIX = ".set_aside.jsonl"
UNCHANGED = "unchanged"

Judge = Callable[[Row, str], str | None]  # row and stamp → None to embed it, UNCHANGED, or the reason to set it aside


@dataclass(frozen=True, slots=True)
class Look:
    """SHA-256 of a picture's file, its fingerprint, and a JPEG of at most THUMBNAIL_SIDE pixels a side."""

    sha256: str
    mark: Fingerprint
    thumbnail: bytes


@dataclass(frozen=True, slots=True)
class Embedded:
    """A row with its stamp, its vector (W) float32 of unit norm and, if it has a picture, the look of that."""

    row: Row
    stamp: str
    vector: NDArray[np.float32]
    look: Look | None


@dataclass
class Batch:
    """Rows to embed together, each with its stamp, and the position in the archive after them.

    used: rows of the archive read so far. digest: hash of those. The other fields count since the last batch.
    """

    rows: list[tuple[Row, str]] = field(default_factory=list)
    used: int = 0
    digest: str = ""
    unchanged: int = 0
    cut: int = 0
    set_aside: list[SetAside] = field(default_factory=list)


@dataclass
class Outcome:
    """Counts of an archive's rows. cut: texts longer than the model's context."""

    rows: int = 0
    unchanged: int = 0
    cut: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)

    def sentence(self) -> str:
        parts = [f"{self.rows:,} rows embedded"]
        parts += [f"{self.unchanged:,} unchanged"] if self.unchanged else []
        parts += [f"{self.cut:,} texts cut to the model's length"] if self.cut else []
        if self.set_aside:
            reasons = (f"{count:,} {reason.replace('_', ' ')}" for reason, count in self.set_aside.most_common())
            parts.append(f"set aside: {', '.join(reasons)}")
        return "; ".join(parts)


# ---- rows → vectors --------------------------------------------------------------------------------------------------


def read_batches(archive: Archive, size: int, judge: Judge) -> Iterator[Batch]:
    """The rows that `judge` accepts, `size` at a time; the last batch may have fewer, or none."""
    hashed, batch = hashlib.sha256(), Batch()
    listed: list[SetAside] = []
    for used, row in enumerate(archive.rows(listed.append), 1):
        if len(batch.rows) == size:  # checked here, so that rows set aside at the very end still get a batch
            batch.set_aside += listed
            listed.clear()
            yield batch
            batch = Batch()
        stamp = row.stamp()
        hashed.update(stamp.encode())
        batch.used, batch.digest = used, hashed.hexdigest()
        verdict = judge(row, stamp)
        if verdict is None:
            batch.rows.append((row, stamp))
        elif verdict == UNCHANGED:
            batch.unchanged += 1
        else:
            listed.append(SetAside(row.id, row.split, verdict))
    batch.set_aside += listed
    yield batch


def embed_batches(batches: Iterable[Batch], embedder: Embedder) -> Iterator[tuple[Batch, list[Embedded]]]:
    """Yields each batch with its embedded rows; unusable rows are added to its `set_aside`.

    Raises FuselipError for an embedding that is not finite.
    """
    with decoding_threads() as pool, ImageReader() as reader, discreet(), quiet_decoders():
        waiting: deque[tuple[Batch, list[Future[_Opened]]]] = deque()
        for batch in batches:
            waiting.append((batch, [_started(row, pool, reader, embedder) for row, _ in batch.rows]))
            if len(waiting) > BATCHES_AHEAD:
                yield _embedded(*waiting.popleft(), embedder)
        while waiting:
            yield _embedded(*waiting.popleft(), embedder)


_Opened = tuple[Any, Look | None, bool]  # pixels as the model takes them, look, whether the text is too long


def _started(row: Row, pool: ThreadPoolExecutor, reader: ImageReader, embedder: Embedder) -> Future[_Opened]:
    """Reads archives and Parquet files here, in order and with one reader; everything else in a thread."""
    data = row.image
    if data is not None and not isinstance(data, bytes | Readable):
        try:
            data = reader.read(data)
        except UnreadableImage as error:
            failed: Future[_Opened] = Future()
            failed.set_exception(error)
            return failed
    return pool.submit(_opened, data, row.text, embedder)


def _opened(data: bytes | Readable | None, text: str | None, embedder: Embedder) -> _Opened:
    too_long = text is not None and embedder.cuts(text)
    if data is None:
        return None, None, too_long
    data = data if isinstance(data, bytes) else data.read()
    picture = decode(data)
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    look = Look(hashlib.sha256(data).hexdigest(), fingerprint(picture), stream.getvalue())
    return embedder.pixels(picture), look, too_long


def _embedded(batch: Batch, jobs: list[Future[_Opened]], embedder: Embedder) -> tuple[Batch, list[Embedded]]:
    good: list[tuple[Row, str, Any, Look | None]] = []
    for (row, stamp), job in zip(batch.rows, jobs, strict=True):
        try:
            pixels, look, too_long = job.result()
        except UnreadableImage as error:
            batch.set_aside.append(SetAside(row.id, row.split, error.reason, error.detail))
            continue
        if pixels is None and row.text is None:
            batch.set_aside.append(SetAside(row.id, row.split, "empty_row", "neither image nor text"))
            continue
        batch.cut += too_long
        good.append((row, stamp, pixels, look))
    images, texts = [pixels for *_, pixels, _ in good], [row.text for row, *_ in good]
    vectors = embedder.embed(images, texts, batch_size=max(1, len(good)))
    return batch, [
        Embedded(row, stamp, vector, look) for (row, stamp, _, look), vector in zip(good, vectors, strict=True)
    ]


# ---- parts on disk ---------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """Parquet files of embedded rows in the folder `work`, each written atomically; a later run continues after them.

    schema: their columns. records: turns embedded rows into table rows. salt: anything else that the rows depend on.
    """

    work: Path
    schema: pa.Schema
    records: Callable[[Sequence[Embedded]], list[dict[str, Any]]]
    salt: str = ""
    paths: list[Path] = field(default_factory=list)

    def write(self, archive: Archive, embedder: Embedder, batch_size: int, judge: Judge) -> Outcome:
        """Embeds the rows that no part contains yet, and returns the counts of all rows."""
        parts = (archive.source.absolute(), archive.kind, embedder.digest, self.schema, batch_size, self.salt)
        key = hashlib.sha256(repr(parts).encode()).hexdigest()
        if find_json(self.work / "key.json").get("key") != key:
            self.remove()
            self.work.mkdir(parents=True)
            write_json(self.work / "key.json", {"key": key})
        batches = self._behind_finished(read_batches(archive, batch_size, judge))
        if batches is None:
            logger.info("the archive has changed since the interruption: starting again")
            self.remove()
            return self.write(archive, embedder, batch_size, judge)
        total = None if archive.total is None else -(-archive.total // batch_size)
        fresh, state, started = list[Embedded](), Batch(), time.monotonic()
        for batch, items in embed_batches(track(batches, f"embed, in batches of {batch_size}", total), embedder):
            fresh += items
            state = Batch(
                used=batch.used,
                digest=batch.digest,
                unchanged=state.unchanged + batch.unchanged,
                cut=state.cut + batch.cut,
                set_aside=state.set_aside + batch.set_aside,
            )
            if len(fresh) >= PART_ROWS or time.monotonic() - started > PART_SECONDS:
                self._flush(fresh, state)
                fresh, state, started = [], Batch(), time.monotonic()
        if state.used or state.set_aside:
            self._flush(fresh, state)
        return self._outcome()

    def remove(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.paths = []

    def _behind_finished(self, batches: Iterator[Batch]) -> Iterator[Batch] | None:
        """The batches that no part contains; None if the archive no longer starts with the rows of the parts."""
        for path in sorted(self.work.glob("part-*.parquet")):
            state = state_of(path)
            batch = next((batch for batch in batches if batch.used >= state["used"]), Batch())
            if (batch.used, batch.digest) != (state["used"], state["digest"]):
                return None
            self.paths.append(path)
        return batches

    def _flush(self, items: Sequence[Embedded], state: Batch) -> None:
        path = self.work / f"part-{len(self.paths):06d}.parquet"
        said = json.dumps(asdict(state) | {"rows": None})
        table = pa.Table.from_pylist(self.records(items), schema=self.schema)
        with atomic_write(path) as partial:
            pq.write_table(table.replace_schema_metadata({"fuselip": said}), partial)
        self.paths.append(path)

    def _outcome(self) -> Outcome:
        outcome = Outcome()
        for path in self.paths:
            state = state_of(path)
            outcome.rows += pq.read_metadata(path).num_rows
            outcome.unchanged += state["unchanged"]
            outcome.cut += state["cut"]
            outcome.set_aside.update(item["reason"] for item in state["set_aside"])
        return outcome

    def batches(self) -> pa.RecordBatchReader:
        """All rows, in order, a few at a time."""
        found = (batch for path in self.paths for batch in pq.ParquetFile(path).iter_batches(1024))
        return pa.RecordBatchReader.from_batches(self.schema, (batch.cast(self.schema) for batch in found))

    def finish(self, place: Path) -> None:
        """Removes the parts. If rows were set aside, a file beside `place` says why, one JSON line a row."""
        path = place.with_name(place.name + SET_ASIDE_SUFFIX)
        lines = (json.dumps(item, ensure_ascii=False) for part in self.paths for item in state_of(part)["set_aside"])
        path.unlink(missing_ok=True)
        if text := "".join(f"{line}\n" for line in lines):
            with atomic_write(path) as partial:
                partial.write_text(text, encoding="utf-8")
        self.remove()


def state_of(part: Path) -> dict[str, Any]:
    """The fields of `Batch` for a part."""
    return dict(json.loads(pq.read_schema(part).metadata[b"fuselip"]))


# ---- to a Parquet file -----------------------------------------------------------------------------------------------


def embed_archive(
    source: Path, out: Path, embedder: Embedder, batch_size: int = 64, kind: str | None = None
) -> Outcome:
    """Writes id, image, text and embedding (W float32, unit norm) of every row of `source` to the Parquet file `out`.

    Rows that were set aside are listed in a file beside `out`. Raises FuselipError for an unusable source.
    """
    archive = Archive(source, kind)
    base = (source if source.is_dir() else source.parent).absolute()
    strings = [(name, pa.string()) for name in ("id", "image", "text")]
    schema = pa.schema([*strings, ("embedding", pa.list_(pa.float32(), embedder.width))])

    def records(items: Sequence[Embedded]) -> list[dict[str, Any]]:
        return [
            {
                "id": item.row.id,
                "image": None if item.row.image is None else item.row.place.removeprefix(f"{base}/"),
                "text": item.row.text,
                "embedding": item.vector,
            }
            for item in items
        ]

    out.parent.mkdir(parents=True, exist_ok=True)
    parts = Parts(out.with_name(f".{out.name}.parts"), schema, records)
    busy = FuselipError(f"another process is embedding into {out}; wait for it, or name another file with --out")
    with sole_process(out.with_name(f".{out.name}.lock"), busy):
        outcome = parts.write(archive, embedder, batch_size, lambda row, stamp: None)
        if not outcome.rows:
            raise FuselipError(f"{source} has no row that can be embedded ({outcome.sentence()}); name another")
        with atomic_write(out) as partial, pq.ParquetWriter(partial, schema) as writer:
            for batch in parts.batches():
                writer.write_batch(batch)
        parts.finish(out)
    return outcome
