"""Writes the image shards of all splits, held-out splits first, so that later ones can leave out their copies."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fuselip_core.config import PrepareSettings
from fuselip_core.data.download.manifest import Provenance
from fuselip_core.data.prepare.image_shards import (
    ShardResult,
    ShardTask,
    sidecar_digests,
    sidecar_fingerprints,
    write_image_shard,
)
from fuselip_core.data.prepare.near_duplicates import HeldOutIndex
from fuselip_core.data.prepare.splits import Plan
from fuselip_core.data.workers import process_pool
from fuselip_core.progress import track

ROUNDS = (("test", "valid"), ("dev",), ("train",))
OWN_ROUNDS = (("test",), ("valid",), ("dev",), ("train",))  # for splits of our own: published ones keep valid
TASKS_AHEAD = 2  # shards queued for each worker

Results = dict[str, list[ShardResult]]


def write_images(plan: Plan, settings: PrepareSettings, work: Path, origin: Provenance) -> Results:
    """Image shards of every split, without copies of held-out images in dev and train unless the settings keep them."""
    results: Results = {}
    for number, splits in enumerate(OWN_ROUNDS if plan.own_splits else ROUNDS):
        here = [split for split in splits if split in plan.splits]
        index = _index_held_out(work, number, results) if here and settings.shared_images != "keep" else None
        counts = {split: -(-len(plan.images[split]) // settings.rows_per_shard) for split in here}
        tasks = (
            ShardTask(
                path=work / shard_name("images", split, shard, counts[split]),
                source=settings.source,
                licence=origin.licence,
                attribution=origin.source,
                entries=part,
                held_out=index,
                near=settings.near_duplicates == "drop",
                fingerprints=split != "train",
            )
            for split in here
            for shard, part in enumerate(plan.images[split].parts(settings.rows_per_shard))
        )
        done = _run(tasks, sum(counts.values()), settings.workers)
        for split in here:
            results[split] = list(islice(done, counts[split]))
        assert next(done, None) is None, "more results than shards"
    return results


def shard_name(table: str, split: str, number: int, count: int) -> str:
    """File name of one shard of `count`."""
    return f"{table}-{split}-{number:05d}-of-{count:05d}.parquet"


def count_duplicates(work: Path, results: Results) -> dict[str, int]:
    """Numbers of images that equal another one: in the same split, or in another (left out, or kept)."""
    within, distinct = 0, []
    for parts in results.values():
        # 8 bytes of each SHA-256 are enough for millions of images.
        heads = np.concatenate([_digests(work / part.path)[:, 0] for part in parts])
        distinct.append(np.unique(heads))
        within += len(heads) - len(distinct[-1])
    everywhere = np.concatenate(distinct)
    reasons = Counter(item.reason for parts in results.values() for part in parts for item in part.set_aside)
    return {
        "within_splits": within,
        "across_splits_left_out": reasons["copy_in_held_out"],
        "across_splits_near_left_out": reasons["near_copy_in_held_out"],
        "across_splits_kept": len(everywhere) - len(np.unique(everywhere)),
    }


def _digests(shard: Path) -> NDArray[np.uint64]:
    """SHA-256 of each of the N images of a shard, uint64 (N, 4)."""
    return np.fromfile(sidecar_digests(shard), dtype=np.uint64).reshape(-1, 4)


def _index_held_out(work: Path, number: int, results: Results) -> Path | None:
    """Builds the index of all images written so far; None if there are none."""
    paths = [work / result.path for parts in results.values() for result in parts]
    digests = [row.tobytes().hex() for path in paths for row in _digests(path)]
    if not digests:
        return None
    prints = [np.load(sidecar_fingerprints(path)) for path in paths]
    bits, thumbnails = (np.concatenate([item[name] for item in prints]) for name in ("bits", "thumbnails"))
    folder = work / f"held_out-{number}"
    HeldOutIndex.build(folder, digests, bits, thumbnails)
    return folder


def _run(tasks: Iterator[ShardTask], count: int, workers: int) -> Iterator[ShardResult]:
    """Results in the order of the tasks, with only a few tasks in memory."""
    # Starting a process takes a second or two, which pays off only for at least two shards each.
    workers = min(workers, count // 2)
    if workers <= 1:
        yield from (write_image_shard(task, show=True) for task in tasks)
        return
    with process_pool(workers) as pool:
        assert pool is not None
        waiting: deque[Future[ShardResult]] = deque()
        for task in track(tasks, "image shards", total=count):
            waiting.append(pool.submit(write_image_shard, task))
            if len(waiting) > TASKS_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
