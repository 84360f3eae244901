"""In which order pairs are trained on: a weighted mixture of kinds, shuffled anew each epoch, resumable in mid-epoch.

Every kind is a stream of units: single pairs, or with `grouped` the whole groups of its pairs (variants that are each
other's hard negatives). A stream deals its units in an order drawn from (seed, kind, epoch), each once an epoch; a unit
that cannot go into the batch at hand, since it is in there already from the epoch before or does not fit, is deferred
to the next batch. Position, epoch and the few deferred units are the whole state.

The order is uniformly random up to WINDOW units. Beyond that, blocks of BLOCK neighbours are dealt in random order to
windows, and the units shuffled within each window: a store larger than memory or caches is then read almost as fast as
a small one, and no permutation of the whole data is held.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fuselip_core.data.tokens.joined import JoinedColumn, JoinedStore
from fuselip_core.data.tokens.store import TokenStore
from fuselip_core.errors import FuselipError

# Units looked at, beyond the first that does not fit, for ones that fill the rest of a batch.
LOOKAHEAD = 32
WINDOW = 1 << 17  # units shuffled together
BLOCK = 512  # neighbours that share a window
# Fraction of the golden ratio, in 64 bits: multiples of it, modulo 1, fill the unit interval evenly.
GOLDEN = 0x9E3779B97F4A7C15

Array = npt.NDArray[Any]


class Mixture:
    """Endless iterator over batches of pair rows (B) int64.

    weights: share of each kind in every batch, rounded so that it is exact on average and off by less than one pair
    in any batch. Without `grouped` every batch has exactly `batch_size` pairs. With it, whole groups stay together and
    a batch is shorter only when no group near at hand fills it; larger groups than a batch are cut to batch size.
    No pair comes twice in a batch, and each pair comes exactly once in an epoch of its kind.
    Raises FuselipError for a kind that the store lacks and for a batch that is larger than the data allow.
    """

    def __init__(
        self,
        store: TokenStore | JoinedStore,
        weights: Mapping[str, float],
        batch_size: int,
        seed: int,
        *,
        grouped: bool = False,
    ) -> None:
        used = {kind: float(weight) for kind, weight in sorted(weights.items()) if weight > 0}
        if not used:
            raise FuselipError("the mixture has no kind with a positive weight; give train.mixture one")
        total = math.fsum(used.values())
        self.weights = {kind: weight / total for kind, weight in used.items()}
        self.batch_size, self.seed, self.grouped, self.step = batch_size, seed, grouped, 0
        self._store = store
        limit = batch_size if grouped else None
        self._streams = {kind: _Stream(store, kind, seed, limit) for kind in self.weights}
        self._debts = dict.fromkeys(self.weights, 0)
        self._check_size()

    def __iter__(self) -> Iterator[Array]:
        return self

    def __next__(self) -> Array:
        owed = self._owed()
        for stream in self._streams.values():
            stream.start_batch()
        space, parts = self.batch_size, list[Array]()
        # First what each kind is owed, the most indebted first; then, for groups that left a gap, whatever fills it.
        for within_debt in (True, False):
            for kind in sorted(owed, key=lambda name: (-owed[name], name)):
                wanted = min(space, owed[kind]) if within_debt else space
                if wanted <= 0:
                    continue
                rows = self._streams[kind].take(wanted)
                parts.append(rows)
                space -= len(rows)
                owed[kind] -= len(rows)
        self._debts = owed
        self.step += 1
        return np.concatenate(parts).astype(np.int64)

    @property
    def pairs(self) -> dict[str, int]:
        """Pairs of each kind in an epoch."""
        return {kind: stream.rows for kind, stream in self._streams.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next batches depend on, as plain JSON values."""
        return {
            "step": self.step,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "grouped": self.grouped,
            "weights": dict(self.weights),
            "pairs": self.pairs,
            "debts": dict(self._debts),
            "streams": {kind: stream.state_dict() for kind, stream in self._streams.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on exactly where `state` was taken.

        Another batch size is fine without `grouped`: the epoch then goes on from the same pair in other portions.
        Raises FuselipError where data, weights or seed are not those of the state.
        """
        mine = self.state_dict()
        fixed = ["seed", "grouped", "weights", "pairs"] + ["batch_size"] * self.grouped
        wrong = [
            f"{name} {state.get(name)!r} against {mine[name]!r} now" for name in fixed if state[name] != mine[name]
        ]
        if wrong:
            raise FuselipError(
                f"the saved order of pairs is of another run ({'; '.join(wrong)}); restore these or start afresh"
            )
        self.step = int(state["step"])
        self._debts = {kind: int(debt) for kind, debt in state["debts"].items()}
        for kind, stream in self._streams.items():
            stream.load_state_dict(state["streams"][kind])

    def _owed(self) -> dict[str, int]:
        """Pairs that each kind should give to this batch: its share, rounded, and what it fell short before.

        Systematic sampling: borders of the shares, moved by an offset that is even over the steps, then rounded down.
        """
        offset = ((self.step + 1) * GOLDEN & (2**64 - 1)) / 2**64
        borders, cumulated = [math.floor(offset)], 0.0
        for weight in self.weights.values():
            cumulated += weight * self.batch_size
            borders.append(math.floor(cumulated + offset))
        borders[-1] = self.batch_size  # against rounding of the sum of weights
        return {
            kind: borders[index + 1] - borders[index] + self._debts[kind] for index, kind in enumerate(self.weights)
        }

    def _check_size(self) -> None:
        most = min(math.floor(stream.rows / self.weights[kind]) for kind, stream in self._streams.items())
        while most and any(math.ceil(most * self.weights[k] - 1e-9) > s.rows for k, s in self._streams.items()):
            most -= 1
        if self.batch_size > most:
            counts = ", ".join(f"{stream.rows} of kind {kind}" for kind, stream in self._streams.items())
            raise FuselipError(
                f"a batch of {self.batch_size} is larger than split '{self._store.split}' allows ({counts}); "
                f"set train.batch_size to at most {most}"
            )


class _Stream:
    """Deals the units of one kind: pairs, or whole groups of at most `group_limit` pairs."""

    def __init__(self, store: TokenStore | JoinedStore, kind: str, seed: int, group_limit: int | None) -> None:
        self._pairs = store.rows_of(kind)
        self.rows = len(self._pairs)
        self._offsets: Array | None = None  # (units + 1): where each unit's pairs start; None: one pair a unit
        if group_limit is not None:
            self._pairs, self._offsets = _group(self._pairs, store.pairs.group, group_limit)
        self._units = len(self._pairs) if self._offsets is None else len(self._offsets) - 1
        self._key = (seed, zlib.crc32(kind.encode()))
        self.start_batch()
        self._begin(0)

    def start_batch(self) -> None:
        """Forgets which units are in the batch."""
        self._in_batch: list[Array] = []
        self._wrapped = False

    def take(self, space: int) -> Array:
        """At most `space` pair rows, in whole units; fewer only where no unit near at hand fits."""
        taken = [self._take_deferred(space)]
        space -= self._count(taken[0])
        may_skip = LOOKAHEAD - len(self.deferred)
        while space > 0:
            if self.position == self._units:
                if self.deferred or self._wrapped:
                    break
                self._begin(self.epoch + 1)
                self._wrapped = True
            before = self.position
            units = self._take_run(space)
            if self.position == before:
                if may_skip <= 0:
                    break
                may_skip -= 1
                self.deferred += self._ahead(1).tolist()
                self.position += 1
            taken.append(units)
            space -= self._count(units)
        return self._expand(np.concatenate(taken))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "dealt": self.dealt, "deferred": list(self.deferred)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._begin(int(state["epoch"]))
        self.position, self.dealt = int(state["position"]), int(state["dealt"])
        self.deferred = [int(unit) for unit in state["deferred"]]

    def _begin(self, epoch: int) -> None:
        generator = np.random.default_rng([*self._key, epoch])
        self._shift = int(generator.integers(self._units))
        self._blocks = generator.permutation(self._units // BLOCK).astype(np.uint32)
        self._window_at: int | None = None
        self.epoch, self.position, self.deferred = epoch, 0, list[int]()
        self.dealt = 0  # pairs of this epoch that went into batches

    def _ahead(self, count: int) -> Array:
        """The next units in order, at most `count` and none beyond the window; uint32."""
        start = self.position // WINDOW * WINDOW
        if self._window_at != start:
            self._window, self._window_at = self._shuffled(start), start
        return self._window[self.position - start : self.position - start + count]

    def _shuffled(self, start: int) -> Array:
        """The units of one window, in order."""
        blocks = self._blocks[start // BLOCK : (start + WINDOW) // BLOCK].astype(np.int64)
        units = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        if start + WINDOW >= self._units:
            # The units behind the last whole block; `shift` makes them others in each epoch.
            units = np.append(units, np.arange(len(self._blocks) * BLOCK, self._units))
        units = ((units + self._shift) % self._units).astype(np.uint32)
        np.random.default_rng([*self._key, self.epoch, start]).shuffle(units)
        return units

    def _take_deferred(self, space: int) -> Array:
        """Of the deferred units, oldest first, those that fit and are not in the batch already."""
        barred = set(np.concatenate(self._in_batch).tolist()) if self.deferred and self._in_batch else set()
        fitting, left = [], []
        for unit in self.deferred:
            size = 1 if self._offsets is None else int(self._offsets[unit + 1] - self._offsets[unit])
            if size <= space and unit not in barred:
                fitting.append(unit)
                space -= size
            else:
                left.append(unit)
        self.deferred = left
        return np.array(fitting, np.uint32)

    def _take_run(self, space: int) -> Array:
        """The next units in order, up to the first that does not fit.

        Units in the batch from the epoch before are deferred, so that they come first in the next batch.
        """
        window = self._ahead(space)
        free = np.ones(len(window), bool)
        if self._wrapped and self._in_batch:
            free = np.isin(window, np.concatenate(self._in_batch), invert=True)
        sizes = np.cumsum(np.where(free, self._sizes(window), 0))
        run = int(np.searchsorted(sizes, space, side="right"))
        self.position += run
        self.deferred += window[:run][~free[:run]].tolist()
        return window[:run][free[:run]]

    def _sizes(self, units: Array) -> Array:
        """Pairs in each unit."""
        if self._offsets is None:
            return np.ones(len(units), np.int64)
        return (self._offsets[units.astype(np.int64) + 1] - self._offsets[units]).astype(np.int64)

    def _count(self, units: Array) -> int:
        """Notes that units go into the batch; returns how many pairs they hold."""
        pairs = int(self._sizes(units).sum())
        self._in_batch.append(units)
        self.dealt += pairs
        return pairs

    def _expand(self, units: Array) -> Array:
        """Units → their pair rows."""
        if self._offsets is None:
            return self._pairs[units]
        starts = self._offsets[units]
        sizes = self._sizes(units)
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self._pairs[np.repeat(starts, sizes) + within]


def _group(pairs: Array, groups: Array | JoinedColumn, limit: int) -> tuple[Array, Array]:
    """Pair rows sorted by group, and where each unit starts (units + 1) uint32; groups over `limit` are cut."""
    of_pair = groups[pairs].astype(np.uint32)
    alone = np.flatnonzero(groups[pairs] < 0)
    of_pair[alone] = 0
    of_pair[alone] = of_pair.max() + 1 + np.arange(len(alone), dtype=np.uint32)  # each its own
    if (of_pair[1:] < of_pair[:-1]).any():
        order = np.argsort(of_pair, kind="stable").astype(np.uint32)
        pairs, of_pair = pairs[order], of_pair[order]
    starts = np.flatnonzero(np.append(True, of_pair[1:] != of_pair[:-1])).astype(np.uint32)
    offsets = np.append(starts, np.uint32(len(pairs)))
    sizes = np.diff(offsets)
    if sizes.max() > limit:
        place = np.arange(len(pairs), dtype=np.uint32) - np.repeat(starts, sizes)
        offsets = np.append(np.flatnonzero(place % limit == 0), len(pairs)).astype(np.uint32)
    return pairs, offsets
