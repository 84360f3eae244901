"""Finds near duplicates (pictures that look the same but have different bytes) without comparing all pairs.

A picture's fingerprint is a difference hash of 64 bits (whether each cell of a 9 x 8 grey thumbnail is darker than its
right neighbour) and a grey thumbnail of 16 x 16. Rescaling or recompressing changes only a few bits of the hash. Hashes
that differ in at most 7 bits share at least one of their 8 bytes, so only pictures that share a byte are compared. If
few bits differ, the correlation of the thumbnails decides, because radiographs of the same region look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BANDS = 8
MOST_BITS = 7  # pigeonhole: at most BANDS - 1
THUMBNAIL = 16
# The hash of a uniform picture is meaningless, so below this standard deviation only equal bytes count.
LEAST_SPREAD = 4.0
LEAST_CORRELATION = 0.995


@dataclass(frozen=True)
class Fingerprint:
    """`bits`: the difference hash; `thumbnail`: uint8 (THUMBNAIL * THUMBNAIL)."""

    bits: int
    thumbnail: NDArray[np.uint8]


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of a decoded picture."""
    grey = image if image.mode == "L" else (image if image.mode == "RGB" else image.convert("RGB")).convert("L")
    # One pass over all pixels; 144 x 128 is a multiple of both grids.
    small = grey.resize((9 * THUMBNAIL, 8 * THUMBNAIL), Image.Resampling.BOX)
    grid = np.asarray(small.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = int.from_bytes(np.packbits(grid[:, :-1] < grid[:, 1:]).tobytes(), "little")
    thumbnail = small.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return Fingerprint(bits, np.asarray(thumbnail, dtype=np.uint8).reshape(-1))


def looks_same(one: Fingerprint, other: Fingerprint) -> bool:
    """Whether two pictures are near duplicates."""
    near = (one.bits ^ other.bits).bit_count() <= MOST_BITS
    return near and _correlation(one.thumbnail, other.thumbnail[None]) >= LEAST_CORRELATION


def _correlation(mine: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> float:
    """The highest correlation of a thumbnail with N others (N, THUMBNAIL * THUMBNAIL); 0 for a uniform one."""
    one, others = mine.astype(np.float64), theirs.astype(np.float64)
    if not len(others) or one.std() < LEAST_SPREAD:
        return 0.0
    one, others = one - one.mean(), others - others.mean(1, keepdims=True)
    norms = np.linalg.norm(others, axis=1) * np.linalg.norm(one)
    return float(np.max(others @ one / np.maximum(norms, 1e-9)))


class HeldOutIndex:
    """Exact and perceptual hashes of held-out images in memory-mapped files, which any process can open."""

    def __init__(self, folder: Path) -> None:
        # As plain arrays: np.memmap's overhead exceeds the cost of a look-up.
        self._digests, self._bits, self._thumbnails, self._order, self._starts = (
            np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
            for name in ("digests", "bits", "thumbnails", "order", "starts")
        )

    @staticmethod
    def build(folder: Path, digests: Sequence[str], bits: NDArray[np.uint64], thumbnails: NDArray[np.uint8]) -> None:
        """Writes the index of N images: hex digests, hashes (N), thumbnails (N, THUMBNAIL * THUMBNAIL)."""
        folder.mkdir(parents=True, exist_ok=True)
        by_band = bits.view(np.uint8).reshape(-1, BANDS)
        np.save(folder / "digests.npy", np.sort(np.array([digest.encode() for digest in digests], dtype="S64")))
        np.save(folder / "bits.npy", bits)
        np.save(folder / "thumbnails.npy", thumbnails)
        np.save(folder / "order.npy", np.argsort(by_band, axis=0, kind="stable").T.astype(np.int32))
        counts = [np.bincount(column, minlength=256) for column in by_band.T]
        np.save(folder / "starts.npy", np.array([np.concatenate([[0], np.cumsum(count)]) for count in counts]))

    def has(self, digest: str) -> bool:
        """Whether an image with the same bytes is held out."""
        place = int(np.searchsorted(self._digests, digest.encode()))
        return place < len(self._digests) and bool(self._digests[place] == digest.encode())

    def nearest(self, image: Fingerprint) -> float:
        """Highest correlation with the thumbnails of held-out images with a similar hash; 0 without any."""
        wanted = np.array([image.bits], dtype=np.uint64)
        rows = np.unique(
            np.concatenate([self._sharing(band, int(wanted.view(np.uint8)[band])) for band in range(BANDS)])
        )
        rows = rows[np.bitwise_count(self._bits[rows] ^ wanted[0]) <= MOST_BITS]
        return _correlation(image.thumbnail, self._thumbnails[rows])

    def has_near(self, image: Fingerprint) -> bool:
        """Whether a held-out image is a near duplicate."""
        return self.nearest(image) >= LEAST_CORRELATION

    def _sharing(self, band: int, value: int) -> NDArray[np.int32]:
        """Rows whose hash has `value` in byte `band`."""
        first, last = self._starts[band, value : value + 2]
        return np.asarray(self._order[band, first:last])
