"""Several token stores read as one, for a mixture over several data sets, or for replaying general pairs.

Kinds of the first store keep their names; those of other stores become name:kind. Rows of pairs, texts, images and
groups are numbered across the stores in order. Legend: B pairs of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fuselip_core.data.tokens.store import Array, SideName, SideTokens, TokenStore, gather
from fuselip_core.errors import FuselipError

OWN = ""  # name of the run's own store


@dataclass(frozen=True)
class JoinedColumn:
    """A column of row numbers over all stores: `parts` in order, each offset by the rows of earlier stores."""

    parts: tuple[Array, ...]
    starts: Array
    moves: tuple[int, ...]

    def __getitem__(self, rows: Array) -> Array:
        """Values (B) int64 for pair rows (B); ABSENT (-1) is kept."""
        rows = np.asarray(rows, np.int64)
        values = np.empty(len(rows), np.int64)
        part_of = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(part_of):
            chosen = part_of == number
            found = self.parts[number][rows[chosen] - self.starts[number]].astype(np.int64)
            values[chosen] = np.where(found < 0, found, found + self.moves[number])
        return values


@dataclass(frozen=True)
class JoinedPairs:
    """The columns of store.PairColumns that training reads."""

    query_image: JoinedColumn
    query_text: JoinedColumn
    target_image: JoinedColumn
    target_text: JoinedColumn
    group: JoinedColumn
    alike: JoinedColumn


class JoinedStore:
    """The training pairs of several stores, with the part of TokenStore's interface that training uses.

    Raises FuselipError if the stores were made with different codebooks.
    """

    def __init__(self, own: TokenStore, further: Mapping[str, TokenStore]) -> None:
        self.stores = {OWN: own, **further}
        self.split, self.folder = own.split, own.folder
        for name, store in further.items():
            for field in ("codebook", "codes_per_image"):
                if store.manifest[field] != own.manifest[field]:
                    raise FuselipError(
                        f"the token stores {own.folder} and {store.folder} ({name}) differ in {field}; "
                        "tokenize both with the same codebook"
                    )
        stores = list(self.stores.values())
        self._starts = np.cumsum([0, *map(len, stores)])[:-1]
        self.manifest: dict[str, Any] = own.manifest | {"further": {n: s.manifest for n, s in further.items()}}
        images, texts = [store.images for store in stores], [len(store.text_offsets) - 1 for store in stores]
        groups, sets = (
            [int(getattr(store.pairs, name).max(initial=-1)) + 1 for store in stores] for name in ("group", "alike")
        )
        self.pairs = JoinedPairs(
            self._column("query_image", images),
            self._column("query_text", texts),
            self._column("target_image", images),
            self._column("target_text", texts),
            self._column("group", groups),
            self._column("alike", sets),
        )

    def __len__(self) -> int:
        return sum(map(len, self.stores.values()))

    def rows_of(self, kind: str) -> Array:
        """Pair rows of `kind`, or of name:kind in a further store, uint32 ascending."""
        name, _, bare = kind.rpartition(":")
        if name not in self.stores:
            raise FuselipError(
                f"the mixture's {kind} names no store; there are: {', '.join(filter(None, self.stores))}"
            )
        start = self._starts[list(self.stores).index(name)]
        rows: Array = self.stores[name].rows_of(bare) + np.uint32(start)
        return rows

    def locate(self, row: int) -> tuple[TokenStore, int]:
        """The store of a pair row, and its row there."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return list(self.stores.values())[number], row - int(self._starts[number])

    def gather(self, rows: Array, side: SideName, view_rng: np.random.Generator | None = None) -> SideTokens:
        """One side of the pairs `rows` (B); see store.gather."""
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        parts, places = [], []
        for number, store in enumerate(self.stores.values()):
            chosen = np.flatnonzero(part_of == number)
            if len(chosen):
                parts.append(gather(store, rows[chosen] - self._starts[number], side, view_rng))
                places.append(chosen)
        return _in_order(parts, np.argsort(np.concatenate(places)))

    def _column(self, name: str, sizes: list[int]) -> JoinedColumn:
        parts = tuple(getattr(store.pairs, name) for store in self.stores.values())
        return JoinedColumn(parts, self._starts, tuple(np.cumsum([0, *sizes])[:-1].tolist()))


def _in_order(parts: list[SideTokens], order: Array) -> SideTokens:
    """Concatenates sides, pads their texts to the longest, and sorts by `order`."""
    longest = max(part.text_ids.shape[1] for part in parts)
    padded = [np.pad(part.text_ids, ((0, 0), (0, longest - part.text_ids.shape[1]))) for part in parts]
    return SideTokens(
        np.concatenate([part.codes for part in parts])[order],
        np.concatenate([part.has_image for part in parts])[order],
        np.concatenate(padded)[order],
        np.concatenate([part.text_lengths for part in parts])[order],
    )


Store = TokenStore | JoinedStore
