"""Metrics of embeddings as plain array code: ranks, recall, chance and intervals.

Legend: Q queries, T targets (the pool), D width.

A tie is wrong: the rank of a query is 1 + the number of irrelevant targets that score at least as high as its best
relevant one. A collapsed model, with the same embedding for everything, therefore scores zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fuselip_core.errors import FuselipError

# Scores closer than this are ties: the rounding error of float32 products of unit vectors of width 512.
TIE = 2e-6
CHUNK_BYTES = 16 << 20  # of scores at a time
RESAMPLES = 2000
DRAWS_AT_ONCE = 1 << 24  # counts at a time, 8 bytes each
CONFIDENCE = 0.95
_TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Relevance:
    """The right targets of each query: those of query q are items[offsets[q]:offsets[q + 1]], ascending and distinct.

    offsets (Q + 1) int64, items (sum) int64; `pool` = T.
    """

    offsets: Array
    items: Array
    pool: int

    @classmethod
    def from_groups(cls, queries: Array, targets: Array) -> Relevance:
        """Every target in the query's group is right: group numbers of queries (Q) and targets (T), any integers."""
        order = np.argsort(targets, kind="stable")
        ordered = targets[order]
        starts, stops = np.searchsorted(ordered, queries, "left"), np.searchsorted(ordered, queries, "right")
        offsets = np.append(0, np.cumsum(stops - starts))
        places = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - starts, stops - starts)
        return cls(offsets, order[places], len(targets))

    @classmethod
    def from_edges(cls, queries: Array, targets: Array, query_count: int, pool: int) -> Relevance:
        """A target is right if an edge joins it to the query: queries (E), targets (E); repeated edges count once."""
        edges = np.unique(queries.astype(np.int64) * max(pool, 1) + targets)
        counts = np.bincount(edges // max(pool, 1), minlength=query_count)
        return cls(np.append(0, np.cumsum(counts)), edges % max(pool, 1), pool)

    @property
    def counts(self) -> Array:
        """(Q) int64: number of right targets of each query."""
        return np.diff(self.offsets)

    def of(self, query: int) -> Array:
        """Right targets of one query."""
        return self.items[self.offsets[query] : self.offsets[query + 1]]


def ranks(query: Array, target: Array, relevance: Relevance, chunk_bytes: int = CHUNK_BYTES) -> Array:
    """Rank (Q) int64 of the best right target of each query, 1 is best, ties wrong, by inner product.

    query (Q, D), target (T, D) of any precision, scored in float32 over the whole pool, in chunks of at most
    `chunk_bytes`. Raises FuselipError for embeddings that are not finite, shapes that do not fit, or a query without a
    right target.
    """
    query, target = query.astype(np.float32, copy=False), target.astype(np.float32, copy=False)
    _check(query, target, relevance)
    result, tie = np.empty(len(query), np.int64), _tie(query, target)
    for start, stop, scores in _score_chunks(query, target, chunk_bytes):
        counts = relevance.counts[start:stop]
        rows = np.repeat(np.arange(stop - start), counts)
        columns = relevance.items[relevance.offsets[start] : relevance.offsets[stop]]
        best = np.maximum.reduceat(scores[rows, columns], np.cumsum(counts) - counts)
        scores[rows, columns] = -np.inf
        result[start:stop] = np.count_nonzero(scores >= (best - tie)[:, None], axis=1)
    return result + 1


def recall(rank: Array, ks: Sequence[int]) -> dict[int, float]:
    """Recall for each k: share of queries whose best right target is among the first k."""
    return {k: float(np.mean(rank <= k)) for k in ks}


def chance(relevance: Relevance, k: int = 1) -> float:
    """Exact expected recall at k for a random order of the pool: mean over the queries of 1 - C(T - r, k) / C(T, k)."""
    wrong = relevance.pool - relevance.counts.astype(np.float64)
    missed = np.ones(len(wrong))
    for drawn in range(min(k, relevance.pool)):
        missed *= np.maximum(wrong - drawn, 0) / (relevance.pool - drawn)
    return float(np.mean(1 - missed))


def recall_in_pools(rank: Array, relevance: Relevance, pool: int, k: int) -> Array:
    """Expected recall at k (Q) in random pools of `pool` targets: a query's best right one and `pool` - 1 wrong ones.

    Exact, from ranks over the whole pool: rank - 1 of W wrong targets are ahead, of which at most k - 1 may be among
    the pool - 1 drawn ones (hypergeometric). Papers draw such pools at random, which adds noise.
    """
    wrong, ahead = relevance.pool - relevance.counts, rank - 1
    logarithms = np.append(0.0, np.cumsum(np.log(np.arange(1, relevance.pool + 1))))  # of factorials

    def ways(items: Array, drawn: Array) -> Array:
        possible = (drawn >= 0) & (drawn <= items)
        drawn = np.where(possible, drawn, 0)
        return np.where(possible, logarithms[items] - logarithms[drawn] - logarithms[items - drawn], -np.inf)

    drawn = np.minimum(pool - 1, wrong)
    shares = [
        np.exp(ways(ahead, ahead * 0 + j) + ways(wrong - ahead, drawn - j) - ways(wrong, drawn)) for j in range(k)
    ]
    return np.minimum(np.sum(shares, axis=0), 1.0)


def rank_answers(query: Array, answers: Array, correct: Array) -> Array:
    """Rank (Q) int64 of each query's only right answer: query (Q, D), answers (T, D), correct (Q) indices."""
    return ranks(query, answers, Relevance(np.arange(len(query) + 1), np.asarray(correct), len(answers)))


def top(query: Array, target: Array, k: int) -> tuple[Array, Array]:
    """The k best targets of a few queries: indices (Q, k) int64 and scores (Q, k) float32, best first."""
    scores = query.astype(np.float32) @ target.T.astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def interval(hits: Array, seed: int, clusters: Array | None = None) -> tuple[float, float]:
    """95 % interval of the mean of `hits` (N) by a seeded bootstrap, over whole `clusters` (N) if given.

    Clusters, because questions about the same image are not independent. If all hits are equal, a bootstrap would have
    no spread; the exact one-sided binomial bound over the clusters is used instead.
    """
    hits = np.asarray(hits, np.float64)
    owner = _owners(len(hits), clusters)
    if hits.min() == hits.max():
        slack = _slack(owner)
        return (1 - slack, 1.0) if hits[0] else (0.0, slack)
    return _bootstrap(hits, owner, seed)


def paired_interval(first: Array, second: Array, seed: int, clusters: Array | None = None) -> tuple[float, float]:
    """95 % interval of the mean of `first` - `second` (N), two scores in 0..1 of the same items, as in `interval`.

    Paired, because both are mostly right or wrong on the same items, so that the difference has less variance than
    either mean. If they never differ, the exact binomial bound is used on both sides.
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    owner = _owners(len(difference), clusters)
    if difference.min() == difference.max():
        slack, mean = _slack(owner), float(difference[0])
        return max(-1.0, mean - slack), min(1.0, mean + slack)
    return _bootstrap(difference, owner, seed)


def ratio_interval(
    first: Array, others: Sequence[Array], floor: float, seed: int, clusters: Array
) -> tuple[float, float]:
    """95 % interval of the mean of `first` over the largest of `floor` and the means of `others`, all (N) of 0..1.

    The maximum is taken anew in every resample, so that the interval includes the uncertainty of that choice.
    """
    means = _resampled_means(np.stack([first, *others]).astype(np.float64), _owners(len(first), clusters), seed)
    low, high = np.quantile(means[0] / means[1:].max(axis=0, initial=floor), _TAILS)
    return float(low), float(high)


def _owners(count: int, clusters: Array | None) -> Array:
    """Cluster number of each item (N), from 0; without clusters each item is its own."""
    return np.arange(count) if clusters is None else np.unique(clusters, return_inverse=True)[1].ravel()


def _slack(owner: Array) -> float:
    """Exact one-sided binomial bound over clusters: how far the true share may be from an observed 0 or 1."""
    return float(1 - ((1 - CONFIDENCE) / 2) ** (1 / (owner.max() + 1)))


def _bootstrap(values: Array, owner: Array, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of `values` (N) over RESAMPLES draws of whole clusters."""
    low, high = np.quantile(_resampled_means(values[None], owner, seed), _TAILS)
    return float(low), float(high)


def _resampled_means(scores: Array, owner: Array, seed: int) -> Array:
    """Means (S, RESAMPLES) of S scores (S, N) over draws of whole clusters; `owner` (N): the cluster of each item."""
    clusters = int(owner.max()) + 1
    parts = np.stack([np.bincount(owner, minlength=clusters), *(np.bincount(owner, each) for each in scores)], axis=1)
    sums = np.concatenate([draws @ parts for draws in _draws(clusters, seed)]).T
    means: Array = sums[1:] / sums[0]
    return means


def _draws(clusters: int, seed: int) -> Iterator[Array]:
    """Multiplicities of clusters in the resamples: float64 (draws, C), in parts of at most DRAWS_AT_ONCE."""
    generator = np.random.default_rng(seed)
    at_once = max(1, DRAWS_AT_ONCE // clusters)
    if at_once >= RESAMPLES:
        yield _all_draws(clusters, seed)
        return
    for start in range(0, RESAMPLES, at_once):
        yield _counts(generator, min(at_once, RESAMPLES - start), clusters)


@lru_cache(maxsize=2)
def _all_draws(clusters: int, seed: int) -> Array:
    """Cached, since all metrics of a split have the same clusters."""
    return _counts(np.random.default_rng(seed), RESAMPLES, clusters)


def _counts(generator: np.random.Generator, draws: int, clusters: int) -> Array:
    drawn = generator.integers(0, clusters, (draws, clusters)) + clusters * np.arange(draws)[:, None]
    return np.bincount(drawn.ravel(), minlength=draws * clusters).reshape(draws, clusters).astype(np.float64)


def deranged(count: int, seed: int) -> Array:
    """A random derangement: indices (count) int64 in which no item keeps its place, unless there is only one."""
    order = np.random.default_rng(seed).permutation(count)
    exchanged = np.empty(count, np.int64)
    exchanged[order] = np.roll(order, 1)
    return exchanged


def _score_chunks(query: Array, target: Array, chunk_bytes: int) -> Iterator[tuple[int, int, Array]]:
    rows = max(1, chunk_bytes // max(4 * len(target), 1))
    columns = np.ascontiguousarray(target.T, np.float32)
    buffer = np.empty((min(rows, len(query)), len(target)), np.float32)
    for start in range(0, len(query), rows):
        stop = min(start + rows, len(query))
        yield start, stop, np.matmul(query[start:stop], columns, out=buffer[: stop - start])


def _tie(query: Array, target: Array) -> float:
    """TIE, scaled by the largest norms."""
    return TIE * float(np.linalg.norm(query, axis=1).max(initial=0) * np.linalg.norm(target, axis=1).max(initial=0))


def _check(query: Array, target: Array, relevance: Relevance) -> None:
    for name, embeddings in (("queries", query), ("targets", target)):
        finite = np.isfinite(embeddings).all(axis=1)
        if not finite.all():
            raise FuselipError(
                f"{int((~finite).sum())} of {len(embeddings)} embeddings of the {name} are not finite (first: row "
                f"{int(np.argmin(finite))}); the model is broken, train it again with a lower learning rate"
            )
    if query.shape[1:] != target.shape[1:] or (len(query), len(target)) != (len(relevance.counts), relevance.pool):
        raise FuselipError(
            f"queries {query.shape} and targets {target.shape} do not fit a relevance of "
            f"{len(relevance.counts)} x {relevance.pool}"
        )
    if len(query) and not relevance.counts.all():
        raise FuselipError(f"query {int(np.argmin(relevance.counts))} has no right target in the pool")
