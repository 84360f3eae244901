"""Ranks, recall, chance and intervals, on matrices small enough to check by hand."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest

from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.metrics import (
    Relevance,
    chance,
    deranged,
    interval,
    paired_interval,
    rank_answers,
    ranks,
    ratio_interval,
    recall,
    recall_in_pools,
    top,
)


def unit(count: int, width: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, width))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def scores(matrix: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Query and target embeddings whose inner products are `matrix` (Q, T)."""
    values = np.array(matrix, np.float32)
    return values, np.eye(values.shape[1], dtype=np.float32)


def one_to_one(count: int) -> Relevance:
    return Relevance.from_groups(np.arange(count), np.arange(count))


def test_ranks_by_hand() -> None:
    query, target = scores([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.3, 0.2, 0.1]])
    rank = ranks(query, target, one_to_one(3))
    np.testing.assert_array_equal(rank, [1, 2, 3])
    assert recall(rank, (1, 2, 3)) == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})


def test_a_tie_is_wrong() -> None:
    query, target = scores([[0.5, 0.5, 0.1], [0.2, 0.7, 0.7], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(ranks(query, target, one_to_one(3)), [2, 2, 3])


def test_several_right_targets_count_by_the_best_and_do_not_stand_in_each_others_way() -> None:
    # Query 0: 0 and 2 are right, and 1 stands between them. Query 1: both right ones tie, which is fine.
    query, target = scores([[0.1, 0.5, 0.9, 0.2], [0.6, 0.1, 0.6, 0.2]])
    relevance = Relevance.from_edges(np.array([0, 0, 1, 1, 1]), np.array([0, 2, 2, 0, 0]), 2, 4)
    np.testing.assert_array_equal(relevance.counts, [2, 2])
    np.testing.assert_array_equal(ranks(query, target, relevance), [1, 1])
    query, target = scores([[0.1, 0.5, 0.4, 0.2], [0.3, 0.7, 0.1, 0.7]])
    np.testing.assert_array_equal(ranks(query, target, relevance), [2, 3])


@pytest.mark.parametrize("seed", [None, 0])
def test_a_collapsed_model_scores_nothing(seed: int | None) -> None:
    """The same embedding for everything, exactly or up to the rounding of float32."""
    same = np.repeat(unit(1, 64, 1), 500, axis=0)
    if seed is not None:
        same = same + np.random.default_rng(seed).uniform(-1e-8, 1e-8, same.shape).astype(np.float32)
    rank = ranks(same, same[::-1], one_to_one(500))
    assert recall(rank, (1, 5, 10)) == {1: 0.0, 5: 0.0, 10: 0.0}
    assert (rank_answers(same, same[:20], np.arange(500) % 20) == 20).all()


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 60 * 7, 1 << 20])
def test_chunks_equal_the_plain_reference(chunk_bytes: int) -> None:
    query, target = unit(50, 16, 0), unit(60, 16, 1)
    random = np.random.default_rng(2)
    query_groups = random.integers(0, 9, 50)
    target_groups = np.concatenate([np.arange(9), random.integers(0, 9, 51)])
    matrix = query @ target.T
    expected = []
    for row in range(50):
        right = target_groups == query_groups[row]
        expected.append(1 + int((matrix[row, ~right] >= matrix[row, right].max()).sum()))
    relevance = Relevance.from_groups(query_groups, target_groups)
    np.testing.assert_array_equal(ranks(query, target, relevance, chunk_bytes), expected)


def test_relevance_from_groups_and_from_edges_agree() -> None:
    random = np.random.default_rng(0)
    queries, targets = random.integers(0, 5, 30), np.concatenate([np.arange(5), random.integers(0, 5, 20)])
    groups = Relevance.from_groups(queries, targets)
    rows, columns = np.nonzero(queries[:, None] == targets)
    edges = Relevance.from_edges(rows, columns, 30, 25)
    for query in range(30):
        np.testing.assert_array_equal(groups.of(query), edges.of(query))
        np.testing.assert_array_equal(groups.of(query), np.flatnonzero(targets == queries[query]))


def test_ranks_do_not_depend_on_the_order_of_the_pool() -> None:
    query, target = unit(40, 8, 0), unit(40, 8, 1)
    order = np.random.default_rng(3).permutation(40)
    np.testing.assert_array_equal(
        ranks(query, target, one_to_one(40)), ranks(query, target[order], Relevance.from_groups(np.arange(40), order))
    )


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_chance_is_what_all_orders_of_the_pool_give_on_average(k: int) -> None:
    relevance = Relevance.from_edges(np.array([0, 0, 1]), np.array([1, 3, 2]), 2, 5)
    hits = [
        np.mean([min(order.index(item) for item in relevance.of(query)) < k for query in range(2)])
        for order in permutations(range(5))
    ]
    assert chance(relevance, k) == pytest.approx(np.mean(hits))


def test_chance_of_one_right_target_is_one_over_the_pool() -> None:
    assert chance(one_to_one(197)) == pytest.approx(1 / 197)
    assert chance(one_to_one(4), k=10) == pytest.approx(1.0)


def test_answers_are_ranked_by_hand() -> None:
    query, answers = scores([[0.1, 0.9, 0.3], [0.5, 0.2, 0.5], [0.1, 0.2, 0.3]])
    np.testing.assert_array_equal(rank_answers(query, answers, np.array([1, 0, 0])), [1, 2, 3])


def test_embeddings_that_are_not_finite_are_an_error() -> None:
    query = unit(4, 8, 0)
    broken = query.copy()
    broken[2, 3] = np.nan
    with pytest.raises(FuselipError, match=r"1 of 4 embeddings of the queries are not finite \(first: row 2\)"):
        ranks(broken, query, one_to_one(4))
    broken[0, 0] = np.inf
    with pytest.raises(FuselipError, match="2 of 4 embeddings of the targets"):
        ranks(query, broken, one_to_one(4))


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(FuselipError, match="do not fit"):
        ranks(unit(4, 8, 0), unit(5, 8, 0), one_to_one(4))
    with pytest.raises(FuselipError, match="query 1 has no right target"):
        ranks(unit(2, 8, 0), unit(2, 8, 0), Relevance.from_edges(np.array([0]), np.array([1]), 2, 2))


def test_top_lists_the_best_first() -> None:
    query, target = scores([[0.1, 0.9, 0.3], [0.5, 0.2, 0.4]])
    items, values = top(query, target, 2)
    np.testing.assert_array_equal(items, [[1, 2], [0, 2]])
    np.testing.assert_allclose(values, [[0.9, 0.3], [0.5, 0.4]])


def test_intervals_hold_the_mean_and_narrow_with_more_data() -> None:
    few, many = np.arange(20) % 4 == 0, np.arange(2000) % 4 == 0
    wide, narrow = interval(few, seed=0), interval(many, seed=0)
    assert wide[0] < 0.25 < wide[1] and narrow[0] < 0.25 < narrow[1]
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 3
    # The normal approximation of a share of 0.25 among 2,000.
    assert narrow == pytest.approx((0.25 - 0.019, 0.25 + 0.019), abs=0.004)
    assert interval(few, seed=0) == wide


def test_intervals_of_clusters_are_wider() -> None:
    images = np.repeat(np.arange(50), 10)
    hits = images % 2 == 0
    alone, together = interval(hits, 0), interval(hits, 0, clusters=images)
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])


def test_no_hit_at_all_is_no_certainty() -> None:
    low, high = interval(np.zeros(100, bool), 0)
    assert low == 0 and high == pytest.approx(1 - 0.025**0.01)
    assert interval(np.ones(100, bool), 0) == pytest.approx((0.025**0.01, 1.0))


@pytest.mark.parametrize("count", [2, 3, 10, 1000])
def test_a_derangement_leaves_nothing_in_place(count: int) -> None:
    exchanged = deranged(count, seed=1)
    np.testing.assert_array_equal(np.sort(exchanged), np.arange(count))
    assert (exchanged != np.arange(count)).all()


def test_a_paired_difference_is_known_better_than_its_parts() -> None:
    """Two ways of asking that agree on all but a few questions: the interval is that of the few."""
    generator = np.random.default_rng(0)
    control = generator.random(400) < 0.5
    fused = control.copy()
    fused[np.flatnonzero(~control)[:16]] = True  # 4 points ahead, never behind
    low, high = paired_interval(fused, control, seed=0)
    assert 0.015 < low < 0.04 < high < 0.07
    assert interval(fused, 0)[0] < control.mean()  # alone, its share could be the control's
    swapped = paired_interval(control, fused, seed=0)
    assert swapped == pytest.approx((-high, -low), abs=0.005)
    alone = paired_interval(fused, control, seed=0, clusters=np.arange(400) // 40)
    assert alone != (low, high)


def test_what_never_differs_is_not_known_to_be_equal() -> None:
    hits = np.arange(10) % 2 == 0
    low, high = paired_interval(hits, hits, seed=0)
    assert low == -high and 0.2 < high < 0.4  # 1 - 0.025 ** (1 / 10)


def test_recall_in_pools_is_what_all_pools_give_on_average() -> None:
    """Three queries over six targets, one with two right ones; every pool of three is drawn."""
    relevance = Relevance.from_edges(np.array([0, 1, 2, 2]), np.array([0, 1, 2, 3]), 3, 6)
    matrix = [[0.4, 0.9, 0.8, 0.1, 0.2, 0.3], [0.9, 0.1, 0.8, 0.7, 0.6, 0.5], [0.5, 0.1, 0.3, 0.4, 0.2, 0.0]]
    query, target = scores(matrix)
    rank = ranks(query, target, relevance)
    np.testing.assert_array_equal(rank, [3, 6, 2])
    for k in (1, 2):
        expected = []
        for row in range(3):
            right = relevance.of(row)
            best = max(matrix[row][item] for item in right)
            wrong = [matrix[row][item] for item in range(6) if item not in right]
            pools = list(combinations(wrong, 2))
            expected.append(np.mean([sum(value >= best for value in pool) < k for pool in pools]))
        np.testing.assert_allclose(recall_in_pools(rank, relevance, 3, k), expected)


def test_scores_are_float32_whatever_the_precision_of_the_embeddings() -> None:
    """In float16 these two scores round to one number; what is stored in float16 still tells them apart."""
    query = np.array([[1, 2**-6]], np.float16)
    target = np.array([[1, 0], [1, 2**-6], [0, 1]], np.float16)
    assert (query @ target.T)[0, 0] == (query @ target.T)[0, 1]
    right = Relevance.from_edges(np.array([0]), np.array([1]), 1, 3)
    np.testing.assert_array_equal(ranks(query, target, right), [1])
    assert top(query, target, 1)[0].tolist() == [[1]]


def test_a_ratio_is_over_the_strongest_control() -> None:
    generator = np.random.default_rng(0)
    first, weak, strong = (generator.random(900) < share for share in (0.6, 0.1, 0.3))
    low, high = ratio_interval(first, [weak, strong], 0.05, 0, np.arange(900))
    assert low < first.mean() / strong.mean() < high and low > 1.6 and high < 2.5
    low, high = ratio_interval(first, [weak * 0], 0.5, 0, np.arange(900))
    assert low == pytest.approx(interval(first, 0)[0] / 0.5, abs=0.02)
