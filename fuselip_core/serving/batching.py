"""Dynamic batching: requests that arrive at about the same time share a forward pass.

A request waits up to `batch_wait_ms` for others that are being read, or until there are `batch_rows` rows. While one
batch runs, the next one fills up. Each request gets its rows in order, and is unaffected by others that fail or are
cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fuselip_core.serving.limits import Limits, TooBusy

Row = tuple[Tensor | None, str | None]  # pixels (3, S, S) float32, text
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class _Waiting:
    rows: Sequence[Row]
    answer: asyncio.Future[Vectors]
    since: float  # in the event loop's time


class Batcher:
    """Runs `embed` (rows → (N, W) float32) in one thread, on batches of several requests; `note` gets their sizes."""

    def __init__(self, embed: Callable[[Sequence[Row]], Vectors], limits: Limits, note: Callable[[int], None]) -> None:
        self._embed, self._limits, self._note = embed, limits, note
        # One core is left to HTTP and decoding: threads of a matrix product that wait for each other are slower.
        threads = max(1, torch.get_num_threads() - 1)
        self._thread = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(threads,))
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._read = 0  # requests that are being read and will come
        self.waiting = 0  # rows

    def start(self) -> None:
        """Starts processing; call it in the running event loop."""
        self._queue = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def stop(self) -> None:
        """Stops after the current batch."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._task = None

    @property
    def runs(self) -> bool:
        """Whether requests are processed."""
        return self._task is not None and not self._task.done()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around the reading of a request's rows: a batch waits for it, though never longer than `batch_wait_ms`."""
        self._read += 1
        try:
            yield
        finally:
            self._read -= 1

    async def embed(self, rows: Sequence[Row]) -> Vectors:
        """Rows (N) → unit-norm embeddings (N, W) float32; raises TooBusy if the queue is full."""
        if self.waiting + len(rows) > self._limits.waiting_rows:
            raise TooBusy(f"{self.waiting} rows are waiting already; try again in a moment")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(rows, loop.create_future(), loop.time())
        self.waiting += len(rows)
        self._queue.put_nowait(waiting)
        try:
            return await waiting.answer
        finally:
            self.waiting -= len(rows)

    async def _serve(self) -> None:
        while True:
            await self._run(await self._gather())

    async def _run(self, batch: list[_Waiting]) -> None:
        """Answers the requests of a batch; if it fails, runs each alone, so that only the faulty one fails."""
        batch = [asked for asked in batch if not asked.answer.done()]
        rows = [row for asked in batch for row in asked.rows]
        if not rows:
            return
        self._note(len(rows))
        try:
            vectors = await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, rows)
        except Exception as error:
            if len(batch) > 1:
                for asked in batch:
                    await self._run([asked])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        start = 0
        for asked in batch:
            if not asked.answer.done():
                asked.answer.set_result(vectors[start : start + len(asked.rows)])
            start += len(asked.rows)

    async def _gather(self) -> list[_Waiting]:
        """The next request, and those that are being read until it has waited, up to `batch_rows` rows."""
        batch = [await self._queue.get()]
        loop = asyncio.get_running_loop()
        late = batch[0].since + self._limits.batch_wait_ms / 1000
        while sum(len(asked.rows) for asked in batch) < self._limits.batch_rows:
            if not self._queue.empty():
                batch.append(self._queue.get_nowait())
                continue
            if not self._read:
                break
            try:
                batch.append(await asyncio.wait_for(self._queue.get(), late - loop.time()))
            except TimeoutError:
                break
        return batch
