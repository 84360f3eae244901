"""The order of pairs: everything once an epoch, in proportion, in whole groups, and resumable at any batch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from fuselip_core.data.tokens.store import PairColumns, TokenStore
from fuselip_core.data.tokens.writer import TokenStoreWriter, write_manifest
from fuselip_core.distributed import World
from fuselip_core.errors import FuselipError
from fuselip_core.training.mixture import Mixture

KINDS = ("caption", "vqa", "region")


def store_of(folder: Path, kinds: list[int], groups: list[int] | None = None) -> TokenStore:
    """A store whose pairs have these kinds and groups (by default each its own)."""
    count = len(kinds)
    writer = TokenStoreWriter(folder, "train", 1, 1, 2)
    writer.write_codes(0, np.zeros((1, 1, 2), int))
    zeros = np.zeros(count, int)
    pairs = PairColumns(
        query_image=zeros,
        query_text=zeros - 1,
        target_image=zeros - 1,
        target_text=zeros,
        kind=np.array(kinds),
        group=np.arange(count) if groups is None else np.array(groups),
        answer_type=zeros,
    )
    writer.finish(pairs, np.array([1]), np.array([0, 1]), ["a"], np.zeros(2))
    write_manifest(folder, {}, KINDS)
    return TokenStore(folder, "train")


def batches(mixture: Mixture, count: int) -> list[np.ndarray]:
    return list(islice(mixture, count))


@pytest.mark.parametrize("batch_size", [1, 7, 10, 29, 30])
def test_every_pair_once_an_epoch_and_never_twice_in_a_batch(tmp_path: Path, batch_size: int) -> None:
    mixture = Mixture(store_of(tmp_path, [0] * 30), {"caption": 1}, batch_size, seed=3)
    taken = batches(mixture, 30 * 7 // batch_size)
    assert all(len(set(batch.tolist())) == batch_size for batch in taken)
    seen: Counter[int] = Counter()
    for batch in taken:
        seen.update(batch.tolist())
        # At any time the pairs differ by at most one epoch, but for those put off over the end of one.
        assert max(seen.values()) - min(seen[row] for row in range(30)) <= 2
    assert set(seen.values()) <= {6, 7, 8}


def test_epochs_are_exact_and_differ(tmp_path: Path) -> None:
    mixture = Mixture(store_of(tmp_path, [0] * 24), {"caption": 1}, 8, seed=3)
    first, second = np.concatenate(batches(mixture, 3)), np.concatenate(batches(mixture, 3))
    np.testing.assert_array_equal(np.sort(first), np.arange(24))
    np.testing.assert_array_equal(np.sort(second), np.arange(24))
    assert not np.array_equal(first, second)
    assert mixture.state_dict()["streams"]["caption"]["dealt"] == 24 and mixture.step == 6


def test_pairs_of_the_epoch_before_come_first_in_the_next_batch(tmp_path: Path) -> None:
    """10 pairs in batches of 7: an epoch ends inside a batch, and after k epochs' worth each pair was dealt k times."""
    mixture = Mixture(store_of(tmp_path, [0] * 10), {"caption": 1}, 7, seed=0)
    dealt = np.concatenate(batches(mixture, 10))
    counts = np.bincount(dealt, minlength=10)
    np.testing.assert_array_equal(counts, 7)


def test_each_batch_holds_the_kinds_in_proportion(tmp_path: Path) -> None:
    kinds = [0] * 500 + [1] * 300 + [2] * 200
    store = store_of(tmp_path, kinds)
    weights = {"caption": 6.0, "vqa": 3.7, "region": 0.3}
    mixture = Mixture(store, weights, 32, seed=1)
    counts = np.array([np.bincount(np.array(kinds)[batch], minlength=3) for batch in batches(mixture, 1000)])
    exact = 32 * np.array([0.6, 0.37, 0.03])
    assert (counts.sum(axis=1) == 32).all()
    assert (np.abs(counts - exact) < 1).all()
    np.testing.assert_allclose(counts.mean(axis=0), exact, atol=0.02)


def test_weights_of_zero_are_left_out_and_order_is_no_matter(tmp_path: Path) -> None:
    store = store_of(tmp_path, [0, 1] * 20)
    one = Mixture(store, {"vqa": 1, "caption": 2, "absent": 0.0}, 6, seed=1)
    other = Mixture(store, {"caption": 2, "vqa": 1}, 6, seed=1)
    np.testing.assert_array_equal(batches(one, 20), batches(other, 20))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 5, 13, 14, 40])
def test_resume_continues_with_the_very_next_batches(tmp_path: Path, grouped: bool, stop: int) -> None:
    random = np.random.default_rng(0)
    store = store_of(tmp_path, random.integers(0, 2, 90).tolist(), random.integers(0, 30, 90).tolist())
    weights = {"caption": 0.7, "vqa": 0.3}
    whole = batches(Mixture(store, weights, 16, seed=5, grouped=grouped), stop + 30)
    mixture = Mixture(store, weights, 16, seed=5, grouped=grouped)
    batches(mixture, stop)
    state = json.loads(json.dumps(mixture.state_dict()))
    resumed = Mixture(store, weights, 16, seed=5, grouped=grouped)
    batches(resumed, 3)
    resumed.load_state_dict(state)
    for expected, got in zip(whole[stop:], batches(resumed, 30), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_resume_with_another_batch_size_finishes_the_epoch(tmp_path: Path) -> None:
    store = store_of(tmp_path, [0] * 40)
    mixture = Mixture(store, {"caption": 1}, 8, seed=5)
    first = batches(mixture, 2)
    larger = Mixture(store, {"caption": 1}, 12, seed=5)
    larger.load_state_dict(mixture.state_dict())
    np.testing.assert_array_equal(np.sort(np.concatenate(first + batches(larger, 2))), np.arange(40))


@pytest.mark.parametrize("change", ["seed", "weights", "data", "grouped", "group size"])
def test_the_state_of_another_run_is_refused(tmp_path: Path, change: str) -> None:
    store = store_of(tmp_path / "one", [0, 1] * 20)
    arguments = {"weights": {"caption": 1.0, "vqa": 1.0}, "batch_size": 8, "seed": 0, "grouped": change == "group size"}
    state = Mixture(store, **arguments).state_dict()
    if change == "data":
        store = store_of(tmp_path / "two", [0, 1] * 21)
    changes = {"seed": {"seed": 1}, "weights": {"weights": {"caption": 2.0, "vqa": 1.0}}, "grouped": {"grouped": True}}
    changes["group size"] = {"batch_size": 4}
    other = Mixture(store, **(arguments | changes.get(change, {})))
    with pytest.raises(FuselipError, match="of another run") as caught:
        other.load_state_dict(state)
    assert "\n" not in str(caught.value)


def group_sizes_whole(batch: np.ndarray, groups: np.ndarray, sizes: Mapping[int, int]) -> bool:
    return all(count == sizes[group] for group, count in Counter(groups[batch].tolist()).items())


def test_groups_stay_whole_and_every_pair_comes_once(tmp_path: Path) -> None:
    random = np.random.default_rng(2)
    groups = random.permutation(np.repeat(np.arange(60), random.integers(1, 9, 60)))
    mixture = Mixture(store_of(tmp_path, [0] * len(groups), groups.tolist()), {"caption": 1}, 16, 0, grouped=True)
    sizes = Counter(groups.tolist())
    seen: list[int] = []
    while len(seen) < len(groups):
        batch = next(mixture)
        assert len(batch) <= 16 and len(set(batch.tolist())) == len(batch)
        assert group_sizes_whole(batch, groups, sizes)
        seen += batch.tolist()
    first_epoch = Counter(seen)
    assert set(first_epoch) == set(range(len(groups)))
    # The last batch may already hold pairs of the next epoch.
    assert sum(first_epoch.values()) - len(groups) < 16
    fill = [len(batch) for batch in batches(mixture, 200)]
    assert np.mean(fill) > 15


def test_groups_of_a_rare_kind_that_exceed_its_share_of_a_batch_still_come(tmp_path: Path) -> None:
    kinds = [0] * 300 + [1] * 40
    groups = list(range(300)) + [1000 + row // 8 for row in range(40)]
    mixture = Mixture(store_of(tmp_path, kinds, groups), {"caption": 0.9, "vqa": 0.1}, 32, 0, grouped=True)
    taken = batches(mixture, 100)
    rare = np.array([np.sum(batch >= 300) for batch in taken])
    assert set(rare.tolist()) == {0, 8}
    assert abs(rare.mean() - 3.2) < 0.2
    assert all(len(batch) == 32 for batch in taken)


def test_larger_groups_than_a_batch_are_cut_and_pairs_without_group_stand_alone(tmp_path: Path) -> None:
    groups = [0] * 20 + [-1] * 12
    mixture = Mixture(store_of(tmp_path, [0] * 32, groups), {"caption": 1}, 8, 0, grouped=True)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches(mixture, 4))), np.arange(32))


def test_group_that_fits_nowhere_ends_the_batch_short_not_the_run(tmp_path: Path) -> None:
    mixture = Mixture(
        store_of(tmp_path, [0] * 12, np.repeat([0, 1, 2, 3], 3).tolist()), {"caption": 1}, 4, 0, grouped=True
    )
    assert [len(batch) for batch in batches(mixture, 8)] == [3] * 8


def test_processes_share_the_same_global_batches(tmp_path: Path) -> None:
    mixture = Mixture(store_of(tmp_path, [0] * 50 + [1] * 50), {"caption": 1.0, "vqa": 1.0}, 12, 9)
    for batch in batches(mixture, 30):
        shares = [World(rank, 3).share(batch) for rank in range(3)]
        assert [len(share) for share in shares] == [4, 4, 4]
        np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.sort(batch))


def test_what_cannot_be_dealt_is_refused_with_the_remedy(tmp_path: Path) -> None:
    store = store_of(tmp_path, [0] * 10 + [1] * 3)
    with pytest.raises(FuselipError, match=r"kind 'region'.*caption \(10\), vqa \(3\)"):
        Mixture(store, {"caption": 1, "region": 1}, 4, 0)
    with pytest.raises(FuselipError, match="at most 10"):
        Mixture(store, {"caption": 1}, 11, 0)
    with pytest.raises(FuselipError, match="at most 6"):
        Mixture(store, {"caption": 1, "vqa": 1}, 7, 0)
    with pytest.raises(FuselipError, match="positive weight"):
        Mixture(store, {"caption": 0}, 4, 0)
    assert len(next(Mixture(store, {"caption": 1, "vqa": 1}, 6, 0))) == 6


@pytest.mark.parametrize("pairs", [100, 128, 130, 1000])
def test_orders_beyond_one_window_deal_everything_once_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    monkeypatch.setattr("fuselip_core.training.mixture.WINDOW", 64)
    monkeypatch.setattr("fuselip_core.training.mixture.BLOCK", 8)
    mixture = Mixture(store_of(tmp_path, [0] * pairs), {"caption": 1}, 10, seed=1)
    epochs = [np.concatenate(batches(mixture, pairs // 10)) for _ in range(10)]
    if pairs % 10 == 0:
        for epoch in epochs:
            np.testing.assert_array_equal(np.sort(epoch), np.arange(pairs))
    last = batches(mixture, 20)[10:]
    resumed = Mixture(store_of(tmp_path / "again", [0] * pairs), {"caption": 1}, 10, seed=1)
    batches(resumed, pairs // 10 * 10 + 7)
    state = resumed.state_dict()
    resumed.load_state_dict(state)
    np.testing.assert_array_equal(batches(resumed, 13)[3:], last)
    # Neighbours in the store are no neighbours in the order, also far into it.
    assert np.mean(np.abs(np.diff(epochs[0])) == 1) < 0.15
