"""Search in an index of many vectors: exact and approximate, beside FAISS flat and HNSW where faiss is installed.

    python benchmarks/search.py --rows 1000000 [--folder FOLDER]

Vectors are drawn around random centres, as embeddings of pictures are. Reported are the time to build, the memory of
the process, the median and the fastest time of a query, and recall at 10 against the exact result. What is built lies
in --folder, where the next run finds it and measures queries alone.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # behind Python's own modules, one of which is called tokenize

import argparse
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from numpy.typing import NDArray

from fuselip_core.search.build import index_vectors
from fuselip_core.search.index import TABLE, Index, connect, schema_of

BATCH = 10_000
TOP = 10
Search = Callable[[NDArray[np.float32]], list[int]]


def drawn(count: int, width: int, seed: int, centres: NDArray[np.float32]) -> NDArray[np.float32]:
    """(count, width) float32 of unit norm."""
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(len(centres), size=count)] + 0.7 * rng.standard_normal((count, width), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def batches(vectors: NDArray[np.float32], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    width = vectors.shape[1]
    for first in range(0, len(vectors), BATCH):
        part = vectors[first : first + BATCH]
        columns = {"id": pa.array([str(first + place) for place in range(len(part))])}
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), width)
        empty = {name: pa.nulls(len(part), schema.field(name).type) for name in schema.names if name not in columns}
        yield pa.RecordBatch.from_pydict({**columns, **empty}, schema=schema)


def measured(name: str, search: Search, queries: NDArray[np.float32], truth: list[list[int]]) -> None:
    found, seconds = [], []
    search(queries[0])
    for query in queries:
        start = time.perf_counter()
        found.append(search(query))
        seconds.append(time.perf_counter() - start)
    recall = float(np.mean([len(set(one) & set(other)) / TOP for one, other in zip(found, truth, strict=True)]))
    say(name, median_ms=1000 * np.median(seconds), fastest_ms=1000 * min(seconds), recall_at_10=recall)


def say(name: str, **values: float) -> None:
    values["process_gb"] = psutil.Process().memory_info().rss / 1e9
    print(json.dumps({"name": name, **{key: round(float(value), 3) for key, value in values.items()}}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="keeps the indexes for the next run")
    options = parser.parse_args()
    centres = np.random.default_rng(0).standard_normal((1000, options.width), np.float32)
    vectors = drawn(options.rows, options.width, 1, centres)
    queries = drawn(options.queries, options.width, 2, centres)
    truth = [np.argsort(-(vectors @ query))[:TOP].tolist() for query in queries]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        of_lance(folder, vectors, queries, truth)
        of_faiss(folder, vectors, queries, truth)


def of_lance(folder: Path, vectors: NDArray[np.float32], queries: NDArray[np.float32], truth: list[list[int]]) -> None:
    database = connect(folder)
    if (folder / f"{TABLE}.lance").exists():
        table = database.open_table(TABLE)
    else:
        schema = schema_of(vectors.shape[1], "benchmark", "0" * 64, "benchmark")
        reader = pa.RecordBatchReader.from_batches(schema, batches(vectors, schema))
        with timed("write"):
            table = database.create_table(TABLE, reader)
    scanned, held = Index.open(folder), Index.open(folder, in_memory=True)

    def search(index: Index, exact: bool) -> Search:
        return lambda query: [int(hit.id) for hit in index.search(query, limit=TOP, fold=False, exact=exact)]

    measured("index, exact, read from disk", search(scanned, True), queries[:10], truth[:10])
    measured("index, exact, in memory", search(held, True), queries, truth)
    if not table.list_indices():
        with timed("build approximate"):
            index_vectors(table)
    measured("index, approximate", search(scanned, False), queries, truth)


def of_faiss(folder: Path, vectors: NDArray[np.float32], queries: NDArray[np.float32], truth: list[list[int]]) -> None:
    try:
        import faiss  # type: ignore[import-not-found]
    except ImportError:
        print("faiss is not installed: only the index is measured")
        return
    makers = {
        "faiss flat": lambda: faiss.IndexFlatIP(vectors.shape[1]),
        "faiss HNSW": lambda: faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT),
    }
    for name, make in makers.items():
        file = folder / f"{name}.faiss"
        if file.exists():
            index = faiss.read_index(str(file))
        else:
            index = make()
            with timed(f"build {name}"):
                index.add(vectors)
            faiss.write_index(index, str(file))
        measured(name, functools.partial(nearest_of, index), queries, truth)


def nearest_of(index: Any, query: NDArray[np.float32]) -> list[int]:
    found: list[int] = index.search(query[None], TOP)[1][0].tolist()
    return found


@contextmanager
def timed(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    say(name, seconds=time.perf_counter() - start)


if __name__ == "__main__":
    main()
