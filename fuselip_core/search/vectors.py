"""The vectors of an index in memory: an exact search is one matrix product and reads no file."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

READ_ROWS = 8192


class Vectors:
    """All vectors (N, W) float32 of one version of a table, and the table's row ids (N)."""

    def __init__(self, table: Any, width: int) -> None:
        """Reads the table, and starts over if it changes meanwhile."""
        self.version = None
        while self.version != table.version:
            self.version, count = table.version, table.count_rows()
            self.vectors = np.empty((count, width), np.float32)
            self.ids = np.empty(count, np.uint64)
            first = 0
            for batch in table.search().select(["vector"]).with_row_id(True).to_batches(READ_ROWS):
                rows = slice(first, first + batch.num_rows)
                if rows.stop > count:
                    break
                self.vectors[rows] = batch["vector"].flatten().to_numpy().reshape(-1, width)
                self.ids[rows] = batch["_rowid"].to_numpy()
                first = rows.stop
        self._order = np.argsort(self.ids)

    def nearest(
        self, query: NDArray[np.float32], count: int, allowed: NDArray[np.uint64] | None = None
    ) -> NDArray[np.uint64]:
        """At most `count` row ids, nearest to `query` (W) by cosine first; only ids from `allowed` if given."""
        if allowed is None:
            scores, ids = self.vectors @ query, self.ids
        else:
            places = self._order[np.searchsorted(self.ids, allowed, sorter=self._order)]
            few = len(places) < len(self.ids) // 8
            scores = self.vectors[places] @ query if few else (self.vectors @ query)[places]
            ids = allowed
        best = np.argpartition(-scores, count - 1)[:count] if count < len(scores) else np.arange(len(scores))
        return ids[best[np.argsort(-scores[best], kind="stable")]]
