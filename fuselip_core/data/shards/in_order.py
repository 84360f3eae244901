"""Images of a prepared data set as batches of pixels, decoded by threads while the model works on the previous batch.

Threads suffice, without worker processes or shared memory, because Pillow releases the GIL.
Legend: N images, V views, S pixels a side.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.transforms import Edit, apply_edit, edit_from_json
from fuselip_core.errors import FuselipError
from fuselip_core.files import take_space
from fuselip_core.images import decode, to_pixels
from fuselip_core.progress import track

Item = TypeVar("Item")
Draw = Callable[[Image.Image, int], np.ndarray]  # (image, row) → uint8 (V, S, S, 3)
MOST_THREADS = 32
Encoded = tuple[bytes, Edit | None]  # an image file, and the edit of a made image


def decoding_threads() -> ThreadPoolExecutor:
    """A pool with one decoding thread for each core."""
    return ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))


def evaluation_view(size: int) -> Draw:
    """The published evaluation preprocessing as the only view."""
    return lambda image, row: to_pixels(image, size)[None]


def ahead(items: Iterator[Item], most: int) -> Generator[Item, None, None]:
    """The same items, prefetched by a thread, at most `most` at a time."""
    waiting: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(most)
    stopped = threading.Event()

    def put(item: Item | None, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put((item, error), timeout=0.1)
                return

    def take_all() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # raised again in the consumer's thread
            put(None, error)

    thread = threading.Thread(target=take_all, name="ahead", daemon=True)
    thread.start()
    try:
        while (found := waiting.get())[0] is not None:
            yield found[0]
        if found[1] is not None:
            raise found[1]
    finally:
        stopped.set()
        thread.join()


def pixel_batches(
    prepared: PreparedData, split: str, draw: Draw, batch_rows: int, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, uint8 (N, V, S, S, 3)); see `drawn_batches`."""
    for first, drawn in drawn_batches(prepared, split, draw, batch_rows, start, stop):
        yield first, np.stack(drawn)


def drawn_batches(
    prepared: PreparedData,
    split: str,
    draw: Callable[[Image.Image, int], Item],
    batch_rows: int,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[int, list[Item]]]:
    """Yields (first row, results of `draw` for N images) for rows `start` to `stop` (exclusive), in order.

    Made images follow the stored ones. The next batch is decoded while the caller works on one.
    """

    def decode_and_draw(encoded: Encoded, row: int) -> Item:
        blob, edit = encoded
        try:
            image = decode(blob)
            return draw(image if edit is None else apply_edit(edit, image), row)
        except FuselipError as error:
            raise FuselipError(
                f"image {row} of split '{split}' in {prepared.folder} has changed since it was prepared ({error}); "
                "run `fuselip prepare` again"
            ) from error

    with decoding_threads() as pool:
        waiting: tuple[int, list[Future[Item]]] | None = None
        for first, blobs in _encoded_batches(prepared, split, batch_rows, start, stop):
            jobs = [pool.submit(decode_and_draw, blob, first + place) for place, blob in enumerate(blobs)]
            if waiting:
                yield waiting[0], [job.result() for job in waiting[1]]
            waiting = (first, jobs)
        if waiting:
            yield waiting[0], [job.result() for job in waiting[1]]


def _encoded_batches(
    prepared: PreparedData, split: str, batch_rows: int, start: int, stop: int | None
) -> Iterator[tuple[int, list[Encoded]]]:
    """(first row, image files with their edits) of rows `start` to `stop` (exclusive)."""
    images, end = prepared.image_count(split), prepared.row_count(split) if stop is None else stop
    row = start
    for batch in prepared.iter_images(split, ["bytes"], batch_rows, first=start) if row < min(images, end) else ():
        blobs = batch.column("bytes")[: end - row].to_pylist()
        yield row, [(blob, None) for blob in blobs]
        row += len(blobs)
        if row >= end:
            return
    if row < end:
        yield from _made_batches(prepared, split, batch_rows, row, end)


def _made_batches(
    prepared: PreparedData, split: str, batch_rows: int, start: int, stop: int
) -> Iterator[tuple[int, list[Encoded]]]:
    """The same for rows of made images, in one pass over their originals, which are in the same order."""
    images = prepared.image_count(split)
    sources = prepared.sources_of_made(split)[start - images : stop - images]
    edits = prepared.made(split).column("edit")[start - images : stop - images].to_pylist()
    blobs = _blobs_from(prepared, split, int(sources[0]))
    at, blob = next(blobs)
    waiting: list[Encoded] = []
    first = start
    for source, edit in zip(sources.tolist(), edits, strict=True):
        while at < source:
            at, blob = next(blobs)
        waiting.append((blob, edit_from_json(edit)))
        if len(waiting) == batch_rows:
            yield first, waiting
            first, waiting = first + batch_rows, []
    if waiting:
        yield first, waiting


def _blobs_from(prepared: PreparedData, split: str, first: int) -> Iterator[tuple[int, bytes]]:
    row = first
    for batch in prepared.iter_images(split, ["bytes"], batch_rows=64, first=first):
        for blob in batch.column("bytes").to_pylist():
            yield row, blob
            row += 1


class PixelCache:
    """Up to `limit` images of a split, resized to one size, in a memory-mapped file for random access."""

    def __init__(self, path: Path, prepared: PreparedData, split: str, size: int, limit: int) -> None:
        count = min(prepared.image_count(split), limit)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
        take_space(path)
        batches = pixel_batches(prepared, split, evaluation_view(size), batch_rows=256, stop=count)
        for first, batch in track(batches, f"decoding {split} images", total=-(-count // 256)):
            self.pixels[first : first + len(batch)] = batch[:, 0]

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Rows (B) → uint8 (B, S, S, 3), sorted by row, which is faster to read."""
        return self.pixels[np.sort(rows)]
