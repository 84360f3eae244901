"""Observations of the rows that a model has seen: their vectors and a few numbers, but no image and no text.

Legend: N rows, W the width of an embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_write
from fuselip_core.search.embed import UNCHANGED, Embedded, embed_batches, read_batches
from fuselip_core.search.inputs import Archive, OnSetAside, Row

if TYPE_CHECKING:
    from fuselip_core.model.embedder import Embedder

SIDES = ("image", "text", "both")
BATCH_ROWS = 64


def schema_of(width: int) -> pa.Schema:
    """Columns. words: number of words, null without a text. brightness: mean grey value from 0 to 1."""
    return pa.schema(
        [
            ("side", pa.string()),
            ("modality", pa.string()),
            ("words", pa.int32()),
            ("brightness", pa.float32()),
            ("vector", pa.list_(pa.float32(), width)),
        ]
    )


@dataclass(frozen=True)
class Observations:
    """Rows with the columns of `schema_of`. unreadable: further rows that could not be read.

    digest: of the model that embedded them. of: data version and number of rows that were asked for.
    """

    table: pa.Table
    unreadable: int
    digest: str
    of: str = ""

    def vectors(self, side: str) -> NDArray[np.float32]:
        """Vectors (N, W) of the rows whose `side` is image, text or both."""
        column = self.table.filter(pc.equal(self.table["side"], side))["vector"].combine_chunks()
        return np.asarray(column.flatten(), dtype=np.float32).reshape(len(column), column.type.list_size)

    def values(self, name: str) -> NDArray[np.float64]:
        """The values of a column that are not null."""
        return np.asarray(self.table[name].drop_null(), dtype=np.float64)

    def modalities(self) -> list[str]:
        """The modality of every row with an image; empty if unknown."""
        return list(self.table.filter(pc.not_equal(self.table["side"], "text"))["modality"].to_pylist())

    def write(self, path: Path) -> None:
        """Writes a Parquet file."""
        about = {"unreadable": str(self.unreadable), "digest": self.digest, "of": self.of}
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            pq.write_table(self.table.replace_schema_metadata(about), partial)

    @classmethod
    def read(cls, path: Path) -> Observations:
        """Reads what `write` wrote; raises FuselipError for any other file."""
        try:
            table = pq.read_table(path)
            about = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
            return cls(table.replace_schema_metadata(), int(about["unreadable"]), about["digest"], about["of"])
        except (OSError, pa.ArrowInvalid, KeyError, ValueError) as error:
            raise FuselipError(f"{path} holds no observations of this project ({error}); name another") from error


def observe(source: Path, embedder: Embedder, limit: int, kind: str | None = None, split: str = "") -> Observations:
    """Embeds about `limit` images of an archive, the same ones each time, and their captions as rows of their own.

    split: use only its rows. Raises FuselipError if there is nothing to embed.
    """
    archive = _WithCaptions(source, kind)
    share = min(1.0, limit / archive.total) if archive.total else 1.0
    taken = 0

    def judge(row: Row, stamp: str) -> str | None:
        nonlocal taken
        if (split and row.split != split) or taken >= 2 * limit or row.id_hash() >= share * 2**64:
            return UNCHANGED
        taken += 1
        return None

    records, unreadable = list[dict[str, Any]](), 0
    for batch, items in embed_batches(read_batches(archive, BATCH_ROWS, judge), embedder):
        records += map(_record, items)
        unreadable += len(batch.set_aside)
    if not records:
        raise FuselipError(f"{source} has no rows to compare{f' in its split {split}' * bool(split)}; name another")
    return Observations(pa.Table.from_pylist(records, schema_of(embedder.width)), unreadable, embedder.digest)


class _WithCaptions(Archive):
    """An archive that yields each image's caption as a row of its own after the image."""

    def rows(self, set_aside: OnSetAside) -> Iterator[Row]:
        for row in super().rows(set_aside):
            yield row
            if row.image is not None and row.caption and row.text is None:
                yield dataclasses.replace(row, image=None, text=row.caption, caption="")


def _record(item: Embedded) -> dict[str, Any]:
    row, look = item.row, item.look
    grey = None if look is None else float(look.mark.thumbnail.mean()) / 255
    return record(row.image is not None, row.text, item.vector, row.modality, grey)


def record(
    image: bool, text: str | None, vector: NDArray[np.float32], modality: str = "", brightness: float | None = None
) -> dict[str, Any]:
    """One row of a table of observations."""
    side = "both" if image and text is not None else "image" if image else "text"
    words = None if text is None else len(text.split())
    return {"side": side, "modality": modality, "words": words, "brightness": brightness, "vector": vector}
