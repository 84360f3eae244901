"""Tables of pairs, and of evaluation candidates as two tables: questions, and lists of options, which can be shared.

    candidates-<split>-*.parquet   candidates_id, task, query, `options` (an options_id), `answer` (index in that list)
    options-<split>-*.parquet      options_id, and two lists of equal length: images (ids) and texts, null if absent

Benchmarks list the right option first. Here, equal options are merged and sorted by hash, so that the order gives
nothing away and questions with the same options share one list.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fuselip_core.data.pair import Candidates, Pair, SetAside, Side
from fuselip_core.data.shards.schemas import CANDIDATES_SCHEMA, OPTIONS_SCHEMA, PAIR_SCHEMA
from fuselip_core.files import atomic_write

PAIR_GROUP_ROWS = 1 << 14

# Row groups of lists are limited by their number of options, since a list has between 2 and 1,000.
OPTIONS_A_GROUP, ROWS_A_GROUP = 1 << 17, 1 << 13


def write_candidates(
    questions: Path, options: Path, candidates: Iterable[Candidates], missing: set[str]
) -> tuple[dict[str, int], dict[str, int], list[SetAside]]:
    """Writes both tables; returns rows by file name, questions by task, and questions with an image in `missing`."""
    tasks: dict[str, int] = {}
    set_aside: list[SetAside] = []
    lists: set[str] = set()
    with _table(questions, CANDIDATES_SCHEMA, ROWS_A_GROUP) as add, _table(options, OPTIONS_SCHEMA) as add_list:
        for item in candidates:
            lacking = sorted(missing.intersection(item.images)) if missing else []
            if lacking:
                set_aside.append(SetAside(item.candidates_id, item.split, "missing_option", f"no image {lacking[0]}"))
                continue
            sides, answer = canonical(item)
            name = _name_of(sides)
            if name not in lists:
                lists.add(name)
                texts, images = [side.text for side in sides], [side.image for side in sides]
                add_list({"options_id": name, "images": images, "texts": texts}, len(sides))
            add(_row(item, name, answer), 1)
            tasks[item.task] = tasks.get(item.task, 0) + 1
    return {questions.name: sum(tasks.values()), options.name: len(lists)}, tasks, set_aside


def canonical(item: Candidates) -> tuple[list[Side], int]:
    """The distinct options in the order of their hashes, and the index of the right one."""
    sides = sorted(set(item.options), key=_hash_of)
    return sides, sides.index(item.options[item.answer])


def _hash_of(side: Side) -> bytes:
    return hashlib.sha256(json.dumps([side.image, side.text], ensure_ascii=False).encode()).digest()


def _name_of(sides: list[Side]) -> str:
    return hashlib.sha256(b"".join(map(_hash_of, sides))).hexdigest()[:32]


def _row(item: Candidates, options: str, answer: int) -> dict[str, Any]:
    row = {
        "candidates_id": item.candidates_id,
        "split": item.split,
        "task": item.task,
        "query_image": item.query.image,
        "query_text": item.query.text,
        "options": options,
        "answer": answer,
    }
    return {**row, "row_hash": row_hash(row)}


@contextlib.contextmanager
def _table(path: Path, schema: pa.Schema, size: int = OPTIONS_A_GROUP) -> Iterator[Any]:
    """Yields a function that adds a row of a given weight; a row group is written once their sum reaches `size`."""
    waiting: list[dict[str, Any]] = []
    held = 0
    with atomic_write(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:

        def add(row: dict[str, Any], weight: int) -> None:
            nonlocal held
            waiting.append(row)
            held += weight
            if held >= size:
                writer.write_table(pa.Table.from_pylist(waiting, schema))
                waiting.clear()
                held = 0

        yield add
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, schema))


def row_hash(row: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a row's columns; image bytes are represented by their hash."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_pair_shard(path: Path, pairs: Iterable[Pair]) -> int:
    """Writes pairs in order, atomically, with one row group in memory; returns their number."""
    return write_table(path, map(_pair_row, pairs), PAIR_SCHEMA)


def write_table(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> int:
    """Writes rows in order, atomically, with one row group in memory; returns their number."""
    with atomic_write(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        total = 0
        for part in _parts(rows, PAIR_GROUP_ROWS):
            writer.write_table(pa.Table.from_pylist(part, schema))
            total += len(part)
    return total


def _parts(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    remaining = iter(rows)
    while part := list(islice(remaining, size)):
        yield part


def _pair_row(pair: Pair) -> dict[str, Any]:
    row = {
        "pair_id": pair.pair_id,
        "split": pair.split,
        "kind": pair.kind,
        "group": pair.group,
        "case": pair.case,
        "query_image": pair.query.image,
        "query_text": pair.query.text,
        "target_image": pair.target.image,
        "target_text": pair.target.text,
        "answer_type": pair.answer_type,
    }
    return {**row, "row_hash": row_hash(row)}
