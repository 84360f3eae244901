"""Columns of the prepared tables: what `prepare` writes and everything behind it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

IMAGE_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("split", pa.string()),
        ("bytes", pa.binary()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("modality", pa.string()),
        ("concepts", pa.list_(pa.string())),
        ("case", pa.string()),
        ("source", pa.string()),
        ("licence", pa.string()),
        ("attribution", pa.string()),
        ("row_hash", pa.string()),
    ]
)
# Images that are made of others while they are read (transforms.apply_edit); their rows follow the images'.
MADE_SCHEMA = pa.schema([("image_id", pa.string()), ("source", pa.string()), ("edit", pa.string())])
PAIR_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in (
            "pair_id",
            "split",
            "kind",
            "group",
            "case",
            "query_image",
            "query_text",
            "target_image",
            "target_text",
            "answer_type",
            "row_hash",
        )
    ]
)
CANDIDATES_SCHEMA = pa.schema(
    [
        ("candidates_id", pa.string()),
        ("split", pa.string()),
        ("task", pa.string()),
        ("query_image", pa.string()),
        ("query_text", pa.string()),
        ("options", pa.string()),
        ("answer", pa.int32()),
        ("row_hash", pa.string()),
    ]
)
OPTIONS_SCHEMA = pa.schema(
    [("options_id", pa.string()), ("images", pa.list_(pa.string())), ("texts", pa.list_(pa.string()))]
)


def table_of(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """A table of `rows`; the schema may have strings, binaries, 32-bit integers and lists of strings."""
    return pa.Table.from_arrays(
        [_column([row[field.name] for row in rows], field.type) for field in schema], schema=schema
    )


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    present = np.array([value is not None for value in values], dtype=bool)
    valid = pa.py_buffer(np.packbits(present, bitorder="little").tobytes())
    if pa.types.is_list(kind):
        offsets = _offsets([len(value or ()) for value in values])
        inner = _column(list(chain.from_iterable(value or () for value in values)), kind.value_type)
        return pa.Array.from_buffers(kind, len(values), [valid, offsets], children=[inner])
    if pa.types.is_int32(kind):
        numbers = np.array([value or 0 for value in values], dtype=np.int32)
        return pa.Array.from_buffers(kind, len(values), [valid, pa.py_buffer(numbers.tobytes())])
    if not (pa.types.is_string(kind) or pa.types.is_binary(kind)):
        raise TypeError(f"no column of {kind}")
    parts = [b"" if value is None else value if isinstance(value, bytes) else value.encode() for value in values]
    return pa.Array.from_buffers(
        kind, len(values), [valid, _offsets([len(part) for part in parts]), pa.py_buffer(b"".join(parts))]
    )


def _offsets(lengths: Sequence[int]) -> pa.Buffer:
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    if ends[-1] > np.iinfo(np.int32).max:
        raise ValueError("more than 2 GiB in one column of a row group")
    return pa.py_buffer(ends.astype(np.int32).tobytes())
