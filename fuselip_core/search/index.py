"""An index over an archive: vectors, captions and thumbnails in one LanceDB table, in a folder or on S3.

Every change is one transaction of the table, so a killed process never leaves a half-changed index. The index stores
the digest of its model, and queries from another model are refused. Legend: N rows, W width of a vector.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fuselip_core.data.prepare.near_duplicates import THUMBNAIL, Fingerprint, looks_same
from fuselip_core.errors import FuselipError, one_line
from fuselip_core.search import DEFAULT_INDEX
from fuselip_core.search.originals import read_original
from fuselip_core.search.query import require
from fuselip_core.search.vectors import Vectors

TABLE, MAP_TABLE = "pictures", "map"
METADATA = b"fuselip"
ANN_ROWS = 100_000  # above this size, searches are approximate by default
EF = 200  # candidates of an approximate search: more give a higher recall and take longer
RANK_CONSTANT = 60  # of reciprocal rank fusion (Cormack, Clarke and Buettcher 2009)
HYBRID_DEPTH = 50  # rows of each ranking that are fused, at least
MOST_ON_MAP, FEWEST_FOR_UMAP = 10_000, 32
SHOWN = ("id", "caption", "concepts", "modality", "case", "split", "source", "licence", "place", "thumbnail")
LOOK = ("sha256", "bits", "grey")


@dataclass(frozen=True)
class Hit:
    """A found picture. score: cosine similarity, or the BM25 score of a search by words alone.

    thumbnail: JPEG. folded: number of equal pictures with a lower rank, which are not listed.
    """

    id: str
    score: float
    caption: str
    concepts: tuple[str, ...]
    modality: str
    case: str
    split: str
    source: str
    licence: str
    place: str
    thumbnail: bytes
    indexed_at: datetime
    folded: int = 0


@dataclass(frozen=True)
class Filters:
    """Restricts a search: in every field that has values here, a picture must have one of them."""

    modality: tuple[str, ...] = ()
    concept: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    indexed_after: datetime | None = None
    indexed_before: datetime | None = None

    def condition(self) -> str | None:
        """The filter as SQL; None if it is empty."""
        parts = [
            f"{name} IN ({quoted(values)})"
            for name in ("modality", "split", "source")
            if (values := getattr(self, name))
        ]
        if self.concept:
            parts.append(f"array_has_any(concepts, [{quoted(self.concept)}])")
        for sign, moment in ((">=", self.indexed_after), ("<", self.indexed_before)):
            if moment is not None:
                parts.append(f"indexed_at {sign} timestamp '{moment.astimezone(UTC).isoformat(sep=' ')}'")
        return " AND ".join(parts) or None


NO_FILTERS = Filters()


def schema_of(width: int, model_name: str, model_digest: str, model_address: str) -> pa.Schema:
    """Columns of the table. Its metadata identify the model, and `model_address` its exact version."""
    texts = ("id", "caption", "modality", "case", "split", "source", "licence", "place", "origin", "sha256", "stamp")
    about = {"model_name": model_name, "model_digest": model_digest, "model_address": model_address, "width": width}
    return pa.schema(
        [
            *((name, pa.string()) for name in texts),
            ("concepts", pa.list_(pa.string())),
            ("thumbnail", pa.binary()),
            ("bits", pa.uint64()),
            ("grey", pa.binary()),
            ("indexed_at", pa.timestamp("us", tz="UTC")),
            ("vector", pa.list_(pa.float32(), width)),
        ],
        metadata={METADATA: json.dumps(about).encode()},
    )


def connect(folder: str | Path) -> Any:
    """The database in a folder or at an s3:// address; every read returns the newest state."""
    os.environ.setdefault("LANCEDB_LOG", "error")  # LanceDB logs every new table otherwise
    try:
        import lancedb
    except ImportError as error:
        raise FuselipError("an index needs lancedb; install fuselip-rocov2[search]") from error
    return lancedb.connect(str(folder), read_consistency_interval=timedelta(0))


def is_remote(folder: str | Path) -> bool:
    """Whether an index is in an object store."""
    return str(folder).startswith("s3://")


def drop_map(database: Any) -> None:
    """Deletes the map with its files, since it lists pictures by id."""
    if MAP_TABLE in database.list_tables().tables:
        database.drop_table(MAP_TABLE)


class NoIndex(FuselipError):
    """There is no index yet."""


class ReplacedIndex(FuselipError):
    """The index was rebuilt with another model."""


class Index:
    """An existing index. Safe to use from many threads, also while another process changes the index.

    in_memory: keep the vectors in memory (N * W * 4 bytes) for exact searches; pays off for repeated searches.
    """

    def __init__(self, folder: str | Path, table: Any, in_memory: bool = False) -> None:
        self.folder, self._table, self._in_memory = folder, table, in_memory
        self._vectors: Vectors | None = None
        self._loading = threading.Lock()
        about = json.loads(table.schema.metadata[METADATA])
        self.model_name, self.model_digest = str(about["model_name"]), str(about["model_digest"])
        self.model_address, self.width = str(about["model_address"]), int(about["width"])

    @classmethod
    def open(cls, folder: str | Path = DEFAULT_INDEX, in_memory: bool = False) -> Index:
        """Raises NoIndex if there is none, and FuselipError if it cannot be read."""
        remedy = f"build one with `fuselip index build ARCHIVE --index {folder}`"
        try:
            database = connect(folder) if is_remote(folder) or Path(folder).is_dir() else None
            if database is None or TABLE not in database.list_tables().tables:
                raise NoIndex(f"there is no index in {folder}; {remedy}")
            return cls(folder, database.open_table(TABLE), in_memory)
        except FuselipError:
            raise
        except (KeyError, TypeError) as error:
            raise FuselipError(f"the table in {folder} is not an index of this project; {remedy}") from error
        except (OSError, RuntimeError, ValueError) as error:
            reason = one_line(error)[:200]
            raise FuselipError(f"the index in {folder} cannot be read ({reason}); {remedy}") from error

    def __len__(self) -> int:
        return int(self._table.count_rows())

    def info(self) -> dict[str, Any]:
        """Folder, model, number of pictures and cases, dates."""
        columns = self._columns("case", "indexed_at")
        moments = pc.min_max(columns["indexed_at"]).as_py()
        return {
            "folder": str(self.folder),
            "model": self.model_name,
            "model_digest": self.model_digest,
            "width": self.width,
            "rows": columns.num_rows,
            "cases": pc.count_distinct(columns["case"]).as_py(),
            "search": "approximate" if self._approximate else "exact",
            "first_indexed": moments["min"],
            "last_indexed": moments["max"],
        }

    def facets(self) -> dict[str, dict[str, int]]:
        """Number of pictures by modality, concept, split and source, the most frequent value first."""
        names = {"modality": "modality", "concept": "concepts", "split": "split", "source": "source"}
        columns = self._columns(*names.values())
        return {name: _counts(columns[column]) for name, column in names.items()}

    def check_model(self, digest: str) -> None:
        """Raises FuselipError if a query's model is not the one that built the index."""
        if digest != self.model_digest:
            raise FuselipError(
                f"the index in {self.folder} was built with {self.model_name} (digest {self.model_digest[:12]}), not "
                f"with the model in use (digest {digest[:12]}); use that model, or run `fuselip index update`"
            )

    def search(
        self,
        vector: NDArray[np.float32] | None,
        words: str | None = None,
        limit: int = 10,
        offset: int = 0,
        filters: Filters = NO_FILTERS,
        threshold: float | None = None,
        fold: bool = True,
        exact: bool | None = None,
    ) -> list[Hit]:
        """The pictures nearest to `vector` (W), those whose captions match `words`, or both rankings fused; best first.

        Rankings are fused by reciprocal rank. threshold: smallest cosine similarity. fold: equal pictures become one
        hit. exact: None means approximate if the index is large. Raises FuselipError for an empty query.
        """
        require(words, vector is not None)
        self.require_same_model()
        query = None if vector is None else self._unit(vector)
        wanted = offset + limit
        depth = max(wanted * 2, HYBRID_DEPTH)
        while True:
            try:
                rows, are_all = self._ranked(query, words, depth, filters, exact)
            except (OSError, RuntimeError):  # another process changed the index and deleted the old files
                self._table.checkout_latest()
                rows, are_all = self._ranked(query, words, depth, filters, exact)
            self.require_same_model()
            if query is not None and threshold is not None:
                are_all = are_all or (words is None and rows[-1]["score"] < threshold)
                rows = [row for row in rows if row["score"] >= threshold]
            hits = _folded(rows) if fold else [(row, 0) for row in rows]
            if len(hits) >= wanted or are_all:
                return [_hit(row, folded) for row, folded in hits[offset:wanted]]
            depth *= 2

    def vectors(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Vectors (N, W) of the pictures `ids`, in their order; raises FuselipError for an unknown id."""
        rows = self._named(ids, ("id", "vector"))
        return np.array([rows[name]["vector"] for name in ids], dtype=np.float32).reshape(len(ids), self.width)

    def get(self, name: str) -> Hit:
        """The picture with this id; raises FuselipError if there is none."""
        return _hit(self._named([name], (*SHOWN, "indexed_at"))[name] | {"score": 1.0}, 0)

    def original(self, name: str) -> bytes | None:
        """The original file of a picture; None if it is gone or has changed."""
        row = self._named([name], ("id", "origin", "sha256"))[name]
        return read_original(row["origin"], row["sha256"])

    def map(self) -> tuple[list[str], NDArray[np.float32]]:
        """Ids of at most MOST_ON_MAP pictures and their coordinates (N, 2) by UMAP, which puts similar ones together.

        Computed on first use, which takes some seconds, and stored in the index until its pictures change.
        """
        database, version = connect(self.folder), str(self._table.version)
        if MAP_TABLE in database.list_tables().tables:
            kept = database.open_table(MAP_TABLE).to_arrow()
            if (kept.schema.metadata or {}).get(b"version") == version.encode():
                return kept["id"].to_pylist(), np.stack([kept["x"], kept["y"]], axis=1).astype(np.float32)
        columns = self._columns("id", "vector")
        chosen = np.sort(np.random.default_rng(0).permutation(columns.num_rows)[:MOST_ON_MAP])
        columns = columns.take(chosen)
        places = _plane(columns["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self.width))
        table = pa.table({"id": columns["id"], "x": places[:, 0], "y": places[:, 1]})
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # a read-only index: computed each time
            drop_map(database)
            database.create_table(MAP_TABLE, table.replace_schema_metadata({"version": version}))
        return columns["id"].to_pylist(), places

    def modalities(self, ids: Sequence[str]) -> list[str]:
        """The modality of each picture; empty if unknown."""
        rows = self._named(ids, ("id", "modality"))
        return [rows[name]["modality"] or "" for name in ids]

    # ---- inside ------------------------------------------------------------------------------------------------------

    @property
    def _approximate(self) -> bool:
        return any(index.columns == ["vector"] for index in self._table.list_indices())

    def _columns(self, *names: str) -> pa.Table:
        return self._table.search().select(list(names)).to_arrow()

    def _unit(self, vector: NDArray[np.float32]) -> NDArray[np.float32]:
        query = np.asarray(vector, dtype=np.float32).reshape(-1)
        norm = float(np.linalg.norm(query))
        if len(query) != self.width or not np.isfinite(norm) or norm == 0.0:
            raise FuselipError(
                f"the query is not a vector of {self.width} finite numbers; embed it with {self.model_name}"
            )
        return query / np.float32(norm)

    def require_same_model(self) -> None:
        """Raises ReplacedIndex if the index was rebuilt with another model since it was opened."""
        about = json.loads(self._table.schema.metadata[METADATA])
        if about["model_digest"] != self.model_digest:
            raise ReplacedIndex(f"the index in {self.folder} was rebuilt with another model; open it again")

    def _ranked(
        self, query: NDArray[np.float32] | None, words: str | None, depth: int, filters: Filters, exact: bool | None
    ) -> tuple[list[dict[str, Any]], bool]:
        """The `depth` best rows of each ranking, fused by reciprocal rank; and whether these are all."""
        columns, where = [*SHOWN, "indexed_at", *LOOK, "vector"], filters.condition()
        rankings = []
        if query is not None:
            rankings.append(self._nearest(query, columns, where, depth, exact or not self._approximate))
        if words is not None:
            matching = self._table.search(words, query_type="fts").select([*columns, "_score"])
            rankings.append(_rows(_limited(matching, where, depth), query))
        fused: dict[str, float] = defaultdict(float)
        rows: dict[str, dict[str, Any]] = {}
        for ranking in rankings:
            for rank, row in enumerate(ranking, 1):
                fused[row["id"]] += 1.0 / (RANK_CONSTANT + rank)
                rows.setdefault(row["id"], row)
        order = sorted(fused, key=lambda name: (-fused[name], -rows[name]["score"], name))
        return [rows[name] for name in order], all(len(ranking) < depth for ranking in rankings)

    def _nearest(
        self, query: NDArray[np.float32], columns: Sequence[str], where: str | None, depth: int, exact: bool
    ) -> list[dict[str, Any]]:
        if exact and self._in_memory:
            vectors, allowed = self._held(), None
            if where:
                found = self._table.search().where(where).select(["_rowid"]).to_arrow()["_rowid"]
                allowed = np.asarray(found, np.uint64)
            if self._table.version == vectors.version:  # otherwise the table is changing, and row ids with it
                ids = vectors.nearest(query, depth, allowed).tolist()
                rows = _rows(self._table.take_row_ids(ids).select([*columns, "_rowid"]), query) if ids else []
                if self._table.version == vectors.version:
                    place = {number: rank for rank, number in enumerate(ids)}
                    return sorted(rows, key=lambda row: place[row["_rowid"]])
        nearest = self._table.search(query).distance_type("cosine").select([*columns, "_distance"])
        nearest = nearest.bypass_vector_index() if exact else nearest.ef(max(EF, 2 * depth))
        return _rows(_limited(nearest, where, depth), query)

    def _held(self) -> Vectors:
        with self._loading:
            if self._vectors is None or self._vectors.version != self._table.version:
                self._vectors = None  # freed first: memory may not hold both
                self._vectors = Vectors(self._table, self.width)
            return self._vectors

    def _named(self, ids: Sequence[str], columns: Sequence[str]) -> dict[str, dict[str, Any]]:
        if not ids:
            return {}
        found = self._table.search().where(f"id IN ({quoted(ids)})").select(list(columns)).limit(len(set(ids)))
        rows = {row["id"]: row for row in found.to_arrow().to_pylist()}
        if missing := [name for name in ids if name not in rows]:
            raise FuselipError(f"the index in {self.folder} has no picture '{missing[0]}'; search for it again")
        return rows


def _plane(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N, W) → (N, 2), by UMAP, or by principal components if there are too few vectors for it."""
    if not len(vectors):
        return np.zeros((0, 2), dtype=np.float32)
    if len(vectors) < FEWEST_FOR_UMAP:
        centred = vectors - vectors.mean(axis=0)
        _, _, axes = np.linalg.svd(centred, full_matrices=False)
        places = centred @ axes[:2].T
        return np.pad(places, ((0, 0), (0, 2 - places.shape[1]))).astype(np.float32)
    import umap  # type: ignore[import-untyped]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "n_jobs overridden to 1 by setting random_state"
        plane = umap.UMAP(metric="cosine", n_neighbors=min(15, len(vectors) - 1), random_state=0).fit_transform(vectors)
    return np.nan_to_num(plane).astype(np.float32)


def _limited(found: Any, where: str | None, limit: int) -> Any:
    return (found.where(where, prefilter=True) if where else found).limit(limit)


def _rows(found: Any, query: NDArray[np.float32] | None) -> list[dict[str, Any]]:
    """Rows with a `score`: the cosine to `query` (W), or the BM25 score if there is none."""
    table = found.to_arrow()
    rows: list[dict[str, Any]] = table.drop_columns(["vector"]).to_pylist()
    if query is None:
        return [row | {"score": row["_score"]} for row in rows]
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, len(query))
    return [row | {"score": float(np.dot(query, vector))} for row, vector in zip(rows, vectors, strict=True)]


def quoted(values: Sequence[str]) -> str:
    return ", ".join("'" + value.replace("'", "''") + "'" for value in values)


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    counts = {item["values"]: item["counts"] for item in pc.value_counts(values).to_pylist() if item["values"]}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _folded(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """Drops rows whose picture equals an earlier one; each remaining row comes with the number dropped for it."""
    kept: list[tuple[dict[str, Any], Fingerprint | None]] = []
    counts: list[int] = []
    for row in rows:
        mark = None
        if row["grey"]:
            mark = Fingerprint(row["bits"], np.frombuffer(row["grey"], np.uint8).reshape(THUMBNAIL**2))
        for place, (other, its) in enumerate(kept):
            if mark and its and (row["sha256"] == other["sha256"] or looks_same(mark, its)):
                counts[place] += 1
                break
        else:
            kept.append((row, mark))
            counts.append(0)
    return [(row, count) for (row, _), count in zip(kept, counts, strict=True)]


def _hit(row: dict[str, Any], folded: int) -> Hit:
    values = {name: row[name] for name in (*SHOWN, "score", "indexed_at")}
    return Hit(
        **values | {"concepts": tuple(row["concepts"] or ()), "thumbnail": row["thumbnail"] or b""}, folded=folded
    )
