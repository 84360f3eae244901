"""How every table of a data set is read: CSV, JSON, Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fuselip_core.data.pair import DataError, require_columns

SPLIT_OF = {"train": "train", "val": "valid", "valid": "valid", "validation": "valid", "test": "test"}

READ_BYTES = 1 << 20


def read_table(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a CSV file that has at least `columns`; absent values are empty strings. Raises DataError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restval="")
            require_columns(reader.fieldnames, columns, path)
            yield from reader
    except FileNotFoundError as error:
        raise DataError(f"no file {path}; download the data set again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} is no valid CSV ({error}); download it again") from error


def read_questions(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The objects in a JSON file of questions that all have `fields`; raises DataError."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no valid JSON ({error}); download it again") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must hold a list of questions; download the published file")
    for row in rows:
        require_columns(list(row), fields, path)
    return rows


def rows_of(path: Path, columns: tuple[str, ...], needed: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, `columns` only; raises DataError if it lacks one of these or of `needed`."""
    try:
        with pq.ParquetFile(path) as file:
            require_columns(file.schema_arrow.names, (*columns, *needed), path)
            for batch in file.iter_batches(batch_size=256, columns=list(columns)):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file ({error}); download it again") from error


def json_array(path: Path) -> Iterator[Any]:
    """The elements of a JSON file that holds one list, without holding the list; raises DataError."""
    decoder = json.JSONDecoder()
    try:
        with path.open(encoding="utf-8-sig") as stream:
            text, at = stream.read(READ_BYTES).lstrip(), 1
            if not text.startswith("["):
                raise DataError(f"{path} must hold a list; download it again")
            while True:
                at = _skip(text, at)
                if text[at : at + 1] == "]":
                    return
                try:
                    value, end = decoder.raw_decode(text, at)
                    # A number at the end of what was read may go on.
                    if end == len(text):
                        raise json.JSONDecodeError("more may follow", text, end)
                except json.JSONDecodeError:
                    more = stream.read(max(READ_BYTES, len(text)))
                    if not more:
                        raise
                    text, at = text[at:] + more, 0
                    continue
                yield value
                at = end
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no valid JSON ({error}); download it again") from error


def _skip(text: str, at: int) -> int:
    """The next place that is neither white space nor a comma."""
    while text[at : at + 1] in (" ", ",", "\n", "\t", "\r"):
        at += 1
    return at


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no valid JSON ({error}); download it again") from error


def split_of_name(name: str) -> str:
    """The split that a file name tells: a word such as train or validation in it, else train."""
    words = name.lower().replace(".", "-").replace("_", "-").split("-")
    return next((SPLIT_OF[word] for word in words if word in SPLIT_OF), "train")
