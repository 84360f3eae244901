"""Evaluation candidates as two tables: the questions, and the lists of options that questions may share.

    candidates-<split>-*.parquet   candidates_id, task, query, `options` (an options_id), `answer` (place in that list)
    options-<split>-*.parquet      options_id, and two lists of equal length: images (ids) and texts, null where absent

Benchmarks publish the right option first. Here equal options are one, and a list is in the order of its options'
hashes: a model that scores all options alike gains nothing, and questions with the same options share one list.
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
from fuselip_core.data.shards.schemas import CANDIDATES_SCHEMA, OPTIONS_SCHEMA, PAIR_SCHEMA, table_of
from fuselip_core.files import atomic_write

PAIR_GROUP_ROWS = 1 << 14

# Options, not lists, bound what is held at once: a list has 2 to 1,000 of them.
OPTIONS_A_GROUP, ROWS_A_GROUP = 1 << 17, 1 << 13


def write_candidates(
    questions: Path, options: Path, candidates: Iterable[Candidates], missing: set[str]
) -> tuple[dict[str, int], dict[str, int], list[SetAside]]:
    """Writes both tables; returns rows by file name, questions by task, and those that lack an image in `missing`."""
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
    """The options without repetitions in the order of their hashes, and the place of the right one."""
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
    """Yields a function that takes a row and its size; a row group is written when `size` is reached."""
    waiting: list[dict[str, Any]] = []
    held = 0
    with atomic_write(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:

        def add(row: dict[str, Any], weight: int) -> None:
            nonlocal held
            waiting.append(row)
            held += weight
            if held >= size:
                writer.write_table(table_of(waiting, schema))
                waiting.clear()
                held = 0

        yield add
        if waiting:
            writer.write_table(table_of(waiting, schema))


def row_hash(row: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a row: of its columns but the image bytes, for which their own hash stands."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_pair_shard(path: Path, pairs: Iterable[Pair]) -> int:
    """Writes pairs in their order, atomically, holding one row group at a time; returns their number."""
    return write_table(path, map(_pair_row, pairs), PAIR_SCHEMA)


def write_table(path: Path, rows: Iterable[dict[str, Any]], schema: pa.Schema) -> int:
    """Writes rows as `write_pair_shard` does."""
    with atomic_write(path) as partial, pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        total = 0
        for part in _parts(rows, PAIR_GROUP_ROWS):
            writer.write_table(table_of(part, schema))
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
