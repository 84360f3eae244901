"""Pictures of a late-fusion model that are decoded when they are asked for, where a cache of pixels would be too large.

Threads decode (Pillow lets go of Python's lock), and those of the next batch while the model works on this one. At most
the pictures of two batches are held. Legend: B pictures, V views, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fuselip_core.data.shards.in_order import decoders
from fuselip_core.encoding.from_pixels import BLACK, DrawView, normalised


class PictureFiles(Protocol):
    """Pictures by row (data/image_index.py)."""

    def __len__(self) -> int: ...

    def picture(self, row: int) -> Image.Image: ...


class DecodedPictures:
    """Pixels by number, as pictures.Pictures has them; of several sources behind one another.

    A source is its image files with `views` pictures each, numbered row * V + view; `draw` makes a picture of one.
    """

    def __init__(self, sources: Sequence[tuple[PictureFiles, int, DrawView]], size: int, device: torch.device) -> None:
        self._sources, self._size, self.device = list(sources), size, device
        self._starts = np.cumsum([0, *(len(files) * views for files, views, _ in sources)])[:-1]
        self._pool = decoders()
        self._held: dict[int, Future[np.ndarray]] = {}  # of the batch at hand and the next
        self._expected: set[int] = set()

    def expect(self, numbers: np.ndarray) -> None:
        """Begins to decode the pictures of the next batch; those before the one at hand are forgotten."""
        coming = {int(number) for number in numbers if number != BLACK}
        self._held = {number: job for number, job in self._held.items() if number in self._expected | coming}
        for number in sorted(coming - self._held.keys()):
            self._held[number] = self._pool.submit(self._decoded, number)
        self._expected = coming

    def rows(self, numbers: np.ndarray) -> Tensor:
        """Numbers (B), BLACK allowed → normalised pixels (B, 3, S, S) float32 on the device."""
        wanted = {int(number) for number in numbers if number != BLACK}
        jobs = {n: self._held.get(n) or self._pool.submit(self._decoded, n) for n in sorted(wanted)}
        picked = np.zeros((len(numbers), self._size, self._size, 3), np.uint8)
        for place, number in enumerate(numbers):
            if number != BLACK:
                picked[place] = jobs[int(number)].result()
        return normalised(picked, self.device)

    def _decoded(self, number: int) -> np.ndarray:
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        files, views, draw = self._sources[source]
        row, view = divmod(number - int(self._starts[source]), views)
        return draw(files.picture(row), row, view)
