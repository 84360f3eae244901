"""Images of a prepared data set as batches of pixels, decoded by threads while the model works on the batch before.

Pillow decodes and resizes without holding Python's lock, so threads do; no worker process, no shared memory.
Legend: N images, V views, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fuselip_core.data.images import decode, to_pixels
from fuselip_core.data.prepared import PreparedData
from fuselip_core.errors import FuselipError
from fuselip_core.files import take_space
from fuselip_core.progress import track

Draw = Callable[[Image.Image, int], np.ndarray]  # (image, row) → uint8 (V, S, S, 3)


def evaluation_view(size: int) -> Draw:
    """The published evaluation preprocessing as the only view."""
    return lambda image, row: to_pixels(image, size)[None]


def decoded_batches(
    prepared: PreparedData,
    split: str,
    draw: Draw,
    batch_rows: int,
    start: int = 0,
    stop: int | None = None,
    threads: int = 2,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first row, uint8 (N, V, S, S, 3)) for the rows from `start` to before `stop`, in the shards' order.

    While the caller works on a batch the next one is decoded.
    """

    def decode_and_draw(blob: bytes, row: int) -> np.ndarray:
        try:
            # Prepared images were checked against the limit of the prepare stage; no second limit here.
            return draw(decode(blob, max_megapixels=float("inf")), row)
        except FuselipError as error:
            raise FuselipError(
                f"image {row} of split '{split}' in {prepared.folder} is no longer what was prepared ({error}); "
                "run `fuselip prepare` again"
            ) from error

    with ThreadPoolExecutor(threads) as pool:
        waiting: tuple[int, list[Future[np.ndarray]]] | None = None
        for first, blobs in _encoded_batches(prepared, split, batch_rows, start, stop):
            jobs = [pool.submit(decode_and_draw, blob, first + place) for place, blob in enumerate(blobs)]
            if waiting:
                yield waiting[0], np.stack([job.result() for job in waiting[1]])
            waiting = (first, jobs)
        if waiting:
            yield waiting[0], np.stack([job.result() for job in waiting[1]])


def _encoded_batches(
    prepared: PreparedData, split: str, batch_rows: int, start: int, stop: int | None
) -> Iterator[tuple[int, list[bytes]]]:
    """(first row, image files) of the rows from `start` to before `stop`."""
    row = 0
    for batch in prepared.iter_images(split, columns=["bytes"], batch_rows=batch_rows):
        first, row = row, row + batch.num_rows
        if stop is not None and first >= stop:
            return
        begin, end = max(start - first, 0), min((stop or row) - first, batch.num_rows)
        if begin < end:
            yield first + begin, batch.column("bytes")[begin:end].to_pylist()


def as_pixels(batch: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (N, S, S, 3) → float32 (N, 3, S, S) in 0..1 on `device`."""
    return torch.from_numpy(np.ascontiguousarray(batch)).to(device).permute(0, 3, 1, 2).float().div_(255.0)


class PixelCache:
    """Up to `limit` images of a split, squashed to one size, as a memory-mapped file for random access."""

    def __init__(self, path: Path, prepared: PreparedData, split: str, size: int, limit: int) -> None:
        count = min(prepared.image_count(split), limit)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
        take_space(path)
        batches = decoded_batches(prepared, split, evaluation_view(size), batch_rows=256, stop=count)
        for first, batch in track(batches, f"decoding {split} images", total=-(-count // 256)):
            self.pixels[first : first + len(batch)] = batch[:, 0]

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """Rows (B) → float32 (B, 3, S, S) in 0..1, in ascending order, in which a disk reads best."""
        return as_pixels(self.pixels[np.sort(rows)], device)
