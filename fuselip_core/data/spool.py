"""An append-only list that keeps only its newest items in memory and the rest on disk."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Generic, TypeVar

Item = TypeVar("Item")
ITEMS_A_BLOCK = 4096


class Spool(Generic[Item]):
    """Items in order: `append`, `extend`, `len`, indexing, any number of passes.

    Blocks of ITEMS_A_BLOCK items are pickled to an unnamed temporary file, which disappears with the process and which
    no other process can write to.
    """

    def __init__(self, items: Iterable[Item] = ()) -> None:
        self._newest: list[Item] = []
        self._blocks: list[tuple[int, int]] = []
        self._file: int | None = None
        self._size = 0
        self.extend(items)

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._file)  # type: ignore[arg-type]

    def append(self, item: Item) -> None:
        self._newest.append(item)
        if len(self._newest) >= ITEMS_A_BLOCK:
            self._spill()

    def extend(self, items: Iterable[Item]) -> None:
        for item in items:
            self.append(item)

    def _spill(self) -> None:
        if self._file is None:
            with tempfile.TemporaryFile(prefix="fuselip-") as stream:
                self._file = os.dup(stream.fileno())
        data = pickle.dumps(self._newest, protocol=pickle.HIGHEST_PROTOCOL)
        written = 0
        while written < len(data):
            written += os.pwrite(self._file, data[written:], self._size + written)
        self._blocks.append((self._size, len(data)))
        self._size += len(data)
        self._newest = []

    def __len__(self) -> int:
        return len(self._blocks) * ITEMS_A_BLOCK + len(self._newest)

    def __iter__(self) -> Iterator[Item]:
        for number in range(len(self._blocks)):
            yield from self._block(number)
        yield from self._newest

    def _block(self, number: int) -> list[Item]:
        start, length = self._blocks[number]
        assert self._file is not None
        parts = []
        while length:
            parts.append(os.pread(self._file, length, start))
            start, length = start + len(parts[-1]), length - len(parts[-1])
        block: list[Item] = pickle.loads(b"".join(parts))  # noqa: S301 - written above, by this process
        return block

    def __getitem__(self, place: int) -> Item:
        """The item at `place`, from the end if negative. Reads one block."""
        place = place + len(self) if place < 0 else place
        if not 0 <= place < len(self):
            raise IndexError(place)
        number, within = divmod(place, ITEMS_A_BLOCK)
        return self._newest[within] if number == len(self._blocks) else self._block(number)[within]

    def parts(self, size: int) -> Iterator[tuple[Item, ...]]:
        """Its items in tuples of `size`; the last may be shorter."""
        items = iter(self)
        while part := tuple(islice(items, size)):
            yield part

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spool | list):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Spool of {len(self)} items"
