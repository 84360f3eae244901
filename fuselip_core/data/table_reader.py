"""Reads all tables of the project: CSV, TSV, JSON, JSON lines and Parquet, by the file's suffix.

No row is cut or lost silently. A faulty row (an unquoted comma, a quote that never closes, damaged JSON) is passed to
`bad_rows` with its line number, and reading continues with the next one. A file that is not a table is refused with the
reason. Blank lines, and spaces around column names, are ignored.
"""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from fuselip_core.data.pair import DataError, require_columns
from fuselip_core.files import foreign_content

Row = dict[str, Any]
BadRows = Callable[[int, str], None]  # line number from 1 (row number in a JSON list), fault

JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".csv", ".tsv", ".json", *JSON_LINES, ".parquet")
DELIMITERS = ",;\t"
MOST_CHARACTERS = 1 << 24  # of a field, so that an unclosed quote does not load the whole file
READ_CHARACTERS = 1 << 20
HEAD_BYTES = 512
BATCH_ROWS = 256
# First bytes of binary files, and what they are.
BINARY = ((b"PK\3\4", "a zip archive or an Excel sheet"), (b"\x1f\x8b", "a gzip archive"), (b"PAR1", "a Parquet file"))


def read_table(
    path: Path, columns: Sequence[str], optional: Sequence[str] = (), bad_rows: BadRows | None = None
) -> Iterator[Row]:
    """Yields the rows of a table, each with `columns` and `optional`; a missing optional value is None.

    Values are strings in CSV, and have the file's types in JSON and Parquet. Raises DataError for a file that is not a
    table or lacks one of `columns`, and for the first bad row unless `bad_rows` is given.
    """
    _require_table(path)
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, columns, optional)
    elif path.suffix in (".json", *JSON_LINES):
        yield from _json_rows(path, columns, optional, bad_rows or _refusal_of(path))
    else:
        yield from _csv_rows(path, columns, optional, bad_rows or _refusal_of(path))


def columns_of(path: Path) -> tuple[str, ...]:
    """The columns of a table; for JSON, the keys of its first row. Raises DataError as `read_table` does."""
    _require_table(path)
    if path.suffix == ".parquet":
        with _parquet_file(path) as file:
            return tuple(file.schema_arrow.names)
    if path.suffix in (".json", *JSON_LINES):
        return next((tuple(row) for _, row in _json_objects(path, _refusal_of(path))), ())
    with _text_of(path) as stream:
        return _CsvForm(path, _header(enumerate(stream, 1))[1]).columns


def _refusal_of(path: Path) -> BadRows:
    def refuse(line: int, fault: str) -> None:
        raise DataError(f"{path}, line {line}: {fault}; correct this line")

    return refuse


def _require_table(path: Path) -> None:
    """Raises DataError if a file is missing, or if its first bytes do not fit its suffix."""
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"there is no file {path}; download the data set again") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder, not a table; name a file in it") from error
    if fault := foreign_content(head):
        raise DataError(f"{path} {fault}")
    if path.suffix == ".parquet":
        return
    kind = next((kind for magic, kind in BINARY if head.startswith(magic)), None)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head[1::2].count(0) > len(head) // 4:
        kind = "UTF-16"
    elif path.suffix in (".csv", ".tsv") and head.lstrip(b"\xef\xbb\xbf \r\n").startswith((b"{", b"[{")):
        kind = "JSON"
    elif kind is None and b"\0" in head:
        kind = "binary data"
    if kind:
        raise DataError(f"{path} is {kind}, not a text table; save it as UTF-8 {path.suffix.lstrip('.') or 'text'}")


@contextmanager
def _text_of(path: Path) -> Iterator[TextIO]:
    """The open file; raises DataError while reading invalid UTF-8."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error


# ---- CSV -------------------------------------------------------------------------------------------------------------


def _header(lines: Iterator[tuple[int, str]]) -> tuple[int, str]:
    """The first line that is not blank, with its number."""
    return next(((number, line) for number, line in lines if line.strip()), (1, ""))


class _CsvForm:
    """The format of a CSV file according to its header: delimiter, spaces after it, column names."""

    def __init__(self, path: Path, header: str) -> None:
        self.delimiter = max(DELIMITERS, key=header.count)  # the first one if none occurs
        self.spaced = f"{self.delimiter} " in header
        try:
            names = [name.strip() for name in next(self.reader(iter([header])), [])]
        except csv.Error as error:
            raise DataError(f"{path} has a header with a faulty quote ({error}); correct its first line") from error
        while names and not names[-1]:
            names.pop()
        repeated = next((name for name in names if name and names.count(name) > 1), None)
        if repeated:
            raise DataError(f"{path} has several columns {repeated}; rename all but one of them")
        self.columns = tuple(names)

    def reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        csv.field_size_limit(MOST_CHARACTERS)
        return csv.reader(lines, delimiter=self.delimiter, skipinitialspace=self.spaced, strict=True)


def _csv_rows(path: Path, columns: Sequence[str], optional: Sequence[str], bad_rows: BadRows) -> Iterator[Row]:
    with _text_of(path) as stream:
        lines = enumerate(stream, 1)
        number, header = _header(lines)
        form = _CsvForm(path, header)
        require_columns(form.columns, columns, path)
        width, asked = len(form.columns), (*columns, *optional)
        places = [(name, form.columns.index(name)) for name in asked if name in form.columns]
        needed = 1 + max((form.columns.index(name) for name in columns), default=0)
        absent = dict.fromkeys(name for name in optional if name not in form.columns)
        for line, fields in _records((text for _, text in lines), number + 1, form):
            if isinstance(fields, str):
                bad_rows(line, fields)
            elif any(map(str.strip, fields[width:])):
                bad_rows(line, f"{len(fields)} fields in {width} columns; a text that contains a comma needs quotes")
            elif len(fields) >= needed:
                yield {name: fields[at] if at < len(fields) else None for name, at in places} | absent
            elif fields:
                bad_rows(line, f"only {len(fields)} of {width} fields")


def _records(lines: Iterator[str], first: int, form: _CsvForm) -> Iterator[tuple[int, list[str] | str]]:
    """Yields the number of each record's first line and its fields, or the fault of its quotes.

    After an unclosed quote, reading continues with the next line, so that a bad row does not affect others.
    """
    again: deque[str] = deque()
    taken: list[str] = []

    def next_lines() -> Iterator[str]:
        while (line := again.popleft() if again else next(lines, None)) is not None:
            taken.append(line)
            yield line

    reader = form.reader(next_lines())
    while True:
        taken.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error:
            again.extendleft(reversed(taken[1:]))
            yield first, _quote_fault(taken, first)
            first += 1
            reader = form.reader(next_lines())
            continue
        swallowed = len(taken) > 1 and _swallowed(fields, taken, form)
        yield first, f"a quote swallows the rows up to line {first + len(taken) - 1}" if swallowed else fields
        first += len(taken)


def _quote_fault(taken: Sequence[str], first: int) -> str:
    if sum(map(len, taken)) > MOST_CHARACTERS:
        return f"a field of more than {MOST_CHARACTERS:,} characters, or a quote that never closes"
    if len(taken) > 1:
        return f"a quote that does not close before line {first + len(taken) - 1}"
    return "a quote that never closes, or one within a text that is not doubled"


def _swallowed(fields: Sequence[str], taken: Sequence[str], form: _CsvForm) -> bool:
    """Whether a line within a quoted text begins like a row, with an id that differs from this row's only in digits."""
    shape = _shape(fields[0])
    for line in taken[1:]:
        start, delimiter, rest = line.partition(form.delimiter)
        if delimiter and (form.spaced or not rest.startswith(" ")) and _shape(start.strip().strip('"')) == shape:
            return True
    return False


def _shape(text: str) -> str:
    return re.sub(r"\d+", "0", text)


# ---- JSON and Parquet ------------------------------------------------------------------------------------------------


class _RepeatedKey(Exception):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKey(f"the key {next(name for name in names if names.count(name) > 1)} occurs twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)
JSON_FAULTS = (ValueError, RecursionError, _RepeatedKey)


def _json_rows(path: Path, columns: Sequence[str], optional: Sequence[str], bad_rows: BadRows) -> Iterator[Row]:
    asked, first = (*columns, *optional), True
    for number, row in _json_objects(path, bad_rows):
        if first:
            require_columns(tuple(row), columns, path)
            first = False
        if missing := [name for name in columns if name not in row]:
            bad_rows(number, f"no {', '.join(missing)}")
        else:
            yield {name: row.get(name) for name in asked}


def _json_objects(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON list or of JSON lines, with their numbers from 1."""
    with _text_of(path) as stream:
        is_list = path.suffix == ".json" or stream.read(READ_CHARACTERS).lstrip().startswith("[")
    number = 0
    for number, value in enumerate(json_array(path), 1) if is_list else _json_lines(path, bad_rows):
        if isinstance(value, dict):
            yield number, value
        elif number == 1:
            raise DataError(f"{path} does not contain a list of objects; compare it with the published file")
        else:
            bad_rows(number, "no JSON object")
    if not number:
        raise DataError(f"{path} contains an empty list; download it again")


def _json_lines(path: Path, bad_rows: BadRows) -> Iterator[tuple[int, Any]]:
    with _text_of(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                if line.strip():
                    yield number, _DECODER.decode(line)
            except JSON_FAULTS as error:
                bad_rows(number, f"invalid JSON ({error})")


def json_array(path: Path) -> Iterator[Any]:
    """Yields the elements of a JSON file with one list, without loading it as a whole; raises DataError."""
    _require_table(path)
    try:
        with _text_of(path) as stream:
            text, at = stream.read(READ_CHARACTERS).lstrip(), 1
            if not text.startswith("["):
                raise DataError(f"{path} does not contain a list; download it again")
            while True:
                while text[at : at + 1] in (" ", ",", "\n", "\t", "\r"):
                    at += 1
                if text[at : at + 1] == "]":
                    return
                try:
                    value, end = _DECODER.raw_decode(text, at)
                    # A number at the end of the buffer may continue.
                    if end == len(text):
                        raise json.JSONDecodeError("more may follow", text, end)
                except json.JSONDecodeError:
                    more = stream.read(max(READ_CHARACTERS, len(text)))
                    if not more:
                        raise
                    text, at = text[at:] + more, 0
                    continue
                yield value
                at = end
    except (json.JSONDecodeError, RecursionError, _RepeatedKey) as error:
        raise DataError(f"{path} is not valid JSON ({error}); download it again") from error


@contextmanager
def _parquet_file(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{path} has several columns with the same name; rename all but one of them")
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({error}); download it again") from error


def _parquet_rows(path: Path, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    with _parquet_file(path) as file:
        names = file.schema_arrow.names
        require_columns(names, columns, path)
        asked = [name for name in (*columns, *optional) if name in names]
        absent = dict.fromkeys(name for name in optional if name not in names)
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=asked):
            for row in batch.to_pylist():
                yield row | absent
