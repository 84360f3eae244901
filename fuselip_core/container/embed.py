"""Embeddings of many rows: a table with the columns `image` and `text`, or a folder of images, to one Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_write
from fuselip_core.images import SUFFIXES
from fuselip_core.progress import track

ROWS_A_CHUNK = 1024
Row = tuple[str | None, str | None]


def embed_table(model: str, source: Path, out: Path, batch_size: int = 64) -> int:
    """Writes image, text and embedding (D float32, unit norm) of every row of `source` to `out`; returns the rows.

    Paths of images in a table are relative to the table. Raises FuselipError for a table that cannot be used.
    """
    from fuselip_core.model.embedder import Embedder

    rows = read_rows(source)
    embedder = Embedder.from_pretrained(model)
    schema = pa.schema(
        [("image", pa.string()), ("text", pa.string()), ("embedding", pa.list_(pa.float32(), embedder.width))]
    )
    folder = source if source.is_dir() else source.parent
    with atomic_write(out) as partial, pq.ParquetWriter(partial, schema) as writer:
        for chunk in track(list(_chunks(rows)), "embedding"):
            images = [None if image is None else folder / image for image, _ in chunk]
            vectors = embedder.embed(images=images, texts=[text for _, text in chunk], batch_size=batch_size)
            values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), embedder.width)
            columns: list[Any] = [[image for image, _ in chunk], [text for _, text in chunk], values]
            writer.write_table(pa.table(columns, schema=schema))
    return len(rows)


def read_rows(source: Path) -> list[Row]:
    """Image path and text of every row, either one None."""
    if not source.exists():
        raise FuselipError(f"there is no {source} (a container sees only what is mounted, under the path it has there)")
    if source.is_dir():
        names = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        rows: list[Row] = [(str(path.relative_to(source)), None) for path in names]
    else:
        rows = _table_rows(source)
    if not rows:
        raise FuselipError(f"{source} holds nothing to embed; give a folder of images, or a table with image and text")
    return rows


def _table_rows(path: Path) -> list[Row]:
    readers: dict[str, Any] = {".csv": pa.csv.read_csv, ".jsonl": pa.json.read_json, ".parquet": pq.read_table}
    if path.suffix not in readers:
        raise FuselipError(f"{path} is neither a folder nor one of {', '.join(readers)}")
    try:
        table = readers[path.suffix](path)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise FuselipError(f"{path} can't be read as a table ({' '.join(str(error).split())[:200]})") from error
    if not {"image", "text"} & set(table.column_names):
        raise FuselipError(f"{path} has neither a column image nor text, but: {', '.join(table.column_names)}")
    images, texts = (_column(table, name) for name in ("image", "text"))
    return list(zip(images, texts, strict=True))


def _column(table: pa.Table, name: str) -> list[str | None]:
    if name not in table.column_names:
        return [None] * table.num_rows
    return [None if value is None or not str(value).strip() else str(value) for value in table[name].to_pylist()]


def _chunks(rows: list[Row]) -> Iterator[list[Row]]:
    for start in range(0, len(rows), ROWS_A_CHUNK):
        yield rows[start : start + ROWS_A_CHUNK]
