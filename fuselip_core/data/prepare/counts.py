"""Counts of what was prepared, from the files that the shards left: 8 bytes of memory an image, however many."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fuselip_core.data.pair import Pair
from fuselip_core.data.prepare.image_shards import ShardResult, sidecar_digests

if TYPE_CHECKING:
    from fuselip_core.data.prepare.splits import Plan


class Tally:
    """Counts by split as the manifest has them; `missing` are the listed images that could not be taken."""

    def __init__(self, work: Path, plan: Plan, results: dict[str, list[ShardResult]]) -> None:
        self._work, self._results = work, results
        self.missing = {
            split: {item.id for part in parts for item in part.set_aside} for split, parts in results.items()
        }
        self.counts: dict[str, dict[str, Any]] = {}
        for split in plan.splits:
            cases = array("Q")
            for image in plan.images[split]:
                if image.image_id not in self.missing[split]:
                    cases.append(_short(image.case))
            self.counts[split] = {"images": len(cases), "cases": len(np.unique(np.asarray(cases))), "pairs": {}}

    def counted(self, pairs: Iterable[Pair], split: str) -> Iterator[Pair]:
        """The pairs whose images are all there, counted by kind when the last has come."""
        kinds: Counter[str] = Counter()
        for pair in pairs:
            if self.missing[split].isdisjoint(pair.images):
                kinds[pair.kind] += 1
                yield pair
        self.counts[split]["pairs"] = dict(sorted(kinds.items()))

    @property
    def usable(self) -> bool:
        """True if any pair or question is left."""
        return any(part["pairs"] or part.get("candidates") for part in self.counts.values())

    def duplicates(self) -> dict[str, int]:
        """Images with the same bytes (or look) as another: of the same split, or of another (left out, or kept)."""
        within, across = 0, []
        for parts in self._results.values():
            digests = [self.heads_in(sidecar_digests(self._work / part.path)) for part in parts]
            joined = np.concatenate(digests)
            unique = np.unique(joined)
            within += len(joined) - len(unique)
            across.append(unique)
        kept = len(np.concatenate(across)) - len(np.unique(np.concatenate(across)))
        reasons = Counter(item.reason for parts in self._results.values() for p in parts for item in p.set_aside)
        return {
            "within_splits": within,
            "across_splits_left_out": reasons["copy_in_held_out"],
            "across_splits_near_left_out": reasons["near_copy_in_held_out"],
            "across_splits_kept": kept,
        }

    @staticmethod
    def heads_in(path: Path) -> NDArray[np.uint64]:
        """The first 8 bytes of each SHA-256 of a shard's sidecar: enough to tell millions apart."""
        return np.fromfile(path, dtype=np.uint64).reshape(-1, 4)[:, 0].copy()

    @staticmethod
    def digests_in(path: Path) -> list[bytes]:
        """Each SHA-256 of a shard's sidecar."""
        data = path.read_bytes()
        return [data[start : start + 32] for start in range(0, len(data), 32)]


def _short(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
