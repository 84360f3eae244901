"""Any data set → one schema: Parquet shards of checked images and pairs, what was set aside, and a manifest.

    images-<split>-00000-of-00002.parquet   one row an image, bytes as published (schemas.IMAGE_SCHEMA)
    pairs-<split>-00000-of-00001.parquet    one row a pair (schemas.PAIR_SCHEMA)
    made-<split>-00000-of-00001.parquet     one row an image that is made of another when it is read (MADE_SCHEMA)
    candidates-<split>-..., options-...     questions of evaluation sets (candidates.py), where there are any
    quarantine.jsonl                        {"id", "split", "reason", "detail"} of everything that is not used
    manifest.json                           counts, hashes, reasons, notes

The same data and settings give the same bytes, with any number of workers. Rows wait in spools on disk and results in
the shards' sidecars, so that memory does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fuselip_core.config import PrepareSettings
from fuselip_core.data.download.manifest import Provenance, provenance_of
from fuselip_core.data.pair import DataError, Pair, SetAside
from fuselip_core.data.prepare.counts import Tally
from fuselip_core.data.prepare.edit_pairs import add_edits
from fuselip_core.data.prepare.extra_pairs import add_extra_pairs
from fuselip_core.data.prepare.image_shards import (
    ShardResult,
    ShardTask,
    sidecar_digests,
    sidecar_fingerprints,
    write_image_shard,
)
from fuselip_core.data.prepare.near_duplicates import HeldOutIndex
from fuselip_core.data.prepare.splits import Plan, plan_splits
from fuselip_core.data.prepare.tables import write_candidates, write_pair_shard, write_table
from fuselip_core.data.prepare.work_folder import MANIFEST, close_work, key_of, open_work, reserved
from fuselip_core.data.shards.schemas import MADE_SCHEMA
from fuselip_core.data.sources.catalogue import list_source, published_form
from fuselip_core.data.spool import Spool
from fuselip_core.data.workers import process_pool
from fuselip_core.files import atomic_write, replace_folder, sha256_of, write_json
from fuselip_core.progress import track

QUARANTINE = "quarantine.jsonl"
PAIRS_A_SHARD = 1 << 20
# Held-out splits first: their hashes keep copies out of the splits behind them.
ROUNDS = (("test", "valid"), ("dev",), ("train",))
OWN_ROUNDS = (("test",), ("valid",), ("dev",), ("train",))  # of published splits only train is touched
TASKS_AHEAD = 2  # shards that wait for each worker

Results = dict[str, list[ShardResult]]


def prepare_data(settings: PrepareSettings, target: Path, work: Path | None = None) -> dict[str, Any]:
    """Prepares the data set that `settings` name into the folder `target` and returns its manifest.

    Finished shards wait in `work` (beside `target` by default, on the same disk in any case) until all are there; a
    run that was killed goes on with the first unfinished one. Raises FuselipError if the data set as a whole cannot
    be used; single bad samples are set aside with their reason.
    """
    work = work or target.with_name(f"{target.name}.partial")
    with reserved(target, settings.root):
        listing = list_source(settings.source, settings.root, settings)
        archive = not listing.pairs and not listing.candidates
        with published_form(settings.source, settings.root):
            add_extra_pairs(settings.root, listing, settings.extra_pairs)
        plan = plan_splits(listing, settings)
        add_edits(plan, settings.extra_pairs, settings.edited_share, settings.seed)
        origin = provenance_of(settings.root)
        open_work(work, key_of(plan, settings, tool_version(), origin))
        results = _write_images(plan, settings, work, origin)
        manifest = _finish(plan, results, settings, work, origin, archive)
        replace_folder(work, target)
    return manifest


def tool_version() -> str:
    """Version of this package, or "unknown" where it is not installed."""
    try:
        return importlib.metadata.version("fuselip-rocov2")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _write_images(plan: Plan, settings: PrepareSettings, work: Path, origin: Provenance) -> Results:
    """Image shards of every split; copies of held-out images stay out of dev and train unless they are to be kept."""
    results: Results = {}
    for number, splits in enumerate(OWN_ROUNDS if plan.own_splits else ROUNDS):
        here = [split for split in splits if split in plan.splits]
        index = _index_held_out(work, number, results) if here and settings.shared_images != "keep" else None
        count = sum(_shard_count(plan, split, settings) for split in here)
        tasks = (task for split in here for task in _tasks(plan, split, settings, work, origin, index))
        done = _run(tasks, count, settings.workers)
        for split in here:
            results[split] = list(islice(done, _shard_count(plan, split, settings)))
        assert next(done, None) is None, "more results than shards"
    return results


def _index_held_out(work: Path, number: int, results: Results) -> Path | None:
    """The index of all images written so far, none of which may come again; None if there are none."""
    paths = [work / result.path for parts in results.values() for result in parts]
    if not paths:
        return None
    digests = [digest.hex() for path in paths for digest in Tally.digests_in(sidecar_digests(path))]
    prints = [np.load(sidecar_fingerprints(path)) for path in paths]
    bits = np.concatenate([item["bits"] for item in prints])
    thumbnails = np.concatenate([item["thumbnails"] for item in prints])
    folder = work / f"held_out-{number}"
    HeldOutIndex.build(folder, digests, bits, thumbnails)
    return folder if digests else None


def _shard_count(plan: Plan, split: str, settings: PrepareSettings) -> int:
    return -(-len(plan.images[split]) // settings.rows_per_shard)


def _tasks(
    plan: Plan, split: str, settings: PrepareSettings, work: Path, origin: Provenance, index: Path | None
) -> Iterator[ShardTask]:
    count = _shard_count(plan, split, settings)
    for number, part in enumerate(plan.images[split].parts(settings.rows_per_shard)):
        yield ShardTask(
            path=work / shard_name("images", split, number, count),
            source=settings.source,
            licence=origin.licence,
            attribution=origin.source,
            entries=part,
            held_out=index,
            near=settings.near_duplicates == "drop",
            fingerprints=split != "train",
        )


def shard_name(table: str, split: str, number: int, count: int) -> str:
    """File name of one shard of `count`."""
    return f"{table}-{split}-{number:05d}-of-{count:05d}.parquet"


def _run(tasks: Iterator[ShardTask], count: int, workers: int) -> Iterator[ShardResult]:
    """Results in the order of the tasks, of which only a few exist at a time."""
    # A process takes a second or two to start; fewer than two shards each would not pay for it.
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


def _finish(
    plan: Plan, results: Results, settings: PrepareSettings, work: Path, origin: Provenance, archive: bool
) -> dict[str, Any]:
    """Writes pairs, quarantine and manifest beside the image shards, and takes away what only a resumed run needs.

    archive: the data set has no texts at all, so that its images alone are enough.
    """
    tally = Tally(work, plan, results)
    shards = [_named(result) for split in plan.splits for result in results[split]]
    late: list[SetAside] = []
    for split in plan.splits:
        shards += _write_made(split, plan, tally, work)
        shards += _write_pairs(split, plan, tally, work)
        shards += _write_candidates(split, plan, tally, work, late)
    from_shards = (item for split in plan.splits for part in results[split] for item in part.set_aside)
    reasons = _write_quarantine(work / QUARANTINE, chain(plan.set_aside, from_shards, late))
    if not tally.usable and not (archive and any(part["images"] for part in tally.counts.values())):
        said = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "it has no texts"
        raise DataError(f"no usable pair is left of {settings.root} ({said}); {work / QUARANTINE} names each")
    manifest = {
        "tool_version": tool_version(),
        "source": settings.source,
        "origin": asdict(origin),
        "settings": _stated(settings),
        "data_version": _data_version(shards),
        "counts": tally.counts,
        "shards": shards,
        "quarantine": reasons,
        "duplicates": tally.duplicates(),
        "notes": plan.notes,
    }
    write_json(work / MANIFEST, manifest)
    close_work(work)
    return manifest


def _stated(settings: PrepareSettings) -> dict[str, Any]:
    """The settings as the manifest states them; paths to DICOM files, which may name people, stay out of it."""
    stated = settings.model_dump(mode="json")
    if settings.source == "dicom":
        stated["root"] = "withheld"
        stated["dicom"] = {**(stated["dicom"] or {}), "text": None, "key_file": None} if stated["dicom"] else None
    return stated


def _named(result: ShardResult) -> dict[str, Any]:
    """A shard as the manifest names it."""
    return {"path": result.path, "rows": result.rows, "sha256": result.sha256}


def _write_pairs(split: str, plan: Plan, tally: Tally, work: Path) -> list[dict[str, Any]]:
    """Shards of the pairs of a split whose images are all there."""
    shards = []
    usable = Spool(tally.counted(plan.pairs.get(split, ()), split))
    count = -(-len(usable) // PAIRS_A_SHARD)
    rest: Iterator[Pair] = iter(usable)
    for number in range(count):
        path = work / shard_name("pairs", split, number, count)
        rows = write_pair_shard(path, islice(rest, PAIRS_A_SHARD))
        shards.append({"path": path.name, "rows": rows, "sha256": sha256_of(path)})
    return shards


def _write_made(split: str, plan: Plan, tally: Tally, work: Path) -> list[dict[str, Any]]:
    """The table of the images that are made of others of a split, where those are all there."""
    missing = tally.missing[split]
    rows = (asdict(made) for made in plan.made.get(split, ()) if made.source not in missing)
    path = work / shard_name("made", split, 0, 1)
    count = write_table(path, rows, MADE_SCHEMA)
    if not count:
        path.unlink()
        return []
    tally.counts[split]["made_images"] = count
    return [{"path": path.name, "rows": count, "sha256": sha256_of(path)}]


def _write_candidates(
    split: str, plan: Plan, tally: Tally, work: Path, set_aside: list[SetAside]
) -> list[dict[str, Any]]:
    candidates = plan.candidates.get(split)
    if not candidates:
        return []
    paths = [work / shard_name(table, split, 0, 1) for table in ("candidates", "options")]
    rows, tasks, missing = write_candidates(paths[0], paths[1], candidates, tally.missing[split])
    tally.counts[split]["candidates"] = dict(sorted(tasks.items()))
    set_aside += missing
    return [{"path": path.name, "rows": rows[path.name], "sha256": sha256_of(path)} for path in paths]


def _write_quarantine(path: Path, set_aside: Iterable[SetAside]) -> dict[str, int]:
    """Writes the quarantine; returns counts by reason."""
    reasons: Counter[str] = Counter()
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for item in set_aside:
            reasons[item.reason] += 1
            stream.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
    return dict(sorted(reasons.items()))


def _data_version(shards: Sequence[dict[str, Any]]) -> str:
    """One hash for the content of all shards."""
    lines = sorted(f"{shard['path']} {shard['sha256']}" for shard in shards)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
