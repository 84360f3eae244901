"""Any data set → one schema: Parquet shards of checked images and pairs, what was set aside, and a manifest.

    images-<split>-00000-of-00002.parquet   one row an image, bytes as published (shards.IMAGE_SCHEMA)
    pairs-<split>-00000-of-00001.parquet    one row a pair (shards.PAIR_SCHEMA)
    quarantine.jsonl                        {"id", "split", "reason", "detail"} of everything that is not used
    manifest.json                           counts, hashes, reasons, notes

The same data and settings give the same bytes, with any number of workers.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fuselip_core.config import PrepareSettings
from fuselip_core.data.pair import DataError, ImageEntry, Pair, SetAside
from fuselip_core.data.shards import ShardResult, ShardTask, write_image_shard, write_pair_shard
from fuselip_core.data.sources import list_source
from fuselip_core.data.splits import Plan, plan_splits
from fuselip_core.data.workers import process_pool
from fuselip_core.files import atomic_write, replace_folder, sha256_of, write_json
from fuselip_core.progress import track

MANIFEST, QUARANTINE, KEY = "manifest.json", "quarantine.jsonl", "key.json"
PAIRS_A_SHARD = 1 << 16
# Held-out splits first: their hashes keep copies out of the splits behind them.
ROUNDS = (("test", "valid"), ("dev",), ("train",))

Results = dict[str, list[ShardResult]]


def prepare_data(settings: PrepareSettings, target: Path, work: Path | None = None) -> dict[str, Any]:
    """Prepares the data set that `settings` name into the folder `target` and returns its manifest.

    Finished shards wait in `work` (beside `target` by default, on the same disk in any case) until all are there; a
    run that was killed goes on with the first unfinished one. Raises FuselipError if the data set as a whole cannot
    be used; single bad samples are set aside with their reason.
    """
    work = work or target.with_name(f"{target.name}.partial")
    try:
        plan = plan_splits(list_source(settings.source, settings.root), settings)
        _open_work(work, plan, settings)
        results = _write_images(plan, settings, work)
        manifest = _finish(plan, results, settings, work)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_folder(work, target)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(f"no space left for {work}; free some and run again, finished shards are kept") from error
        raise
    return manifest


def _open_work(work: Path, plan: Plan, settings: PrepareSettings) -> None:
    """Keeps what an earlier run with the same data and settings left in `work`, and nothing else."""
    key = {"key": _key(plan, settings)}
    path = work / KEY
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) == key:
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(path, key)


def _key(plan: Plan, settings: PrepareSettings) -> str:
    """Changes with the tool, the settings, the tables, and the size or time of any file that holds images."""
    digest = hashlib.sha256(f"{tool_version()} {settings.model_dump_json(exclude={'workers'})}".encode())
    files: set[Path] = set()
    for split in plan.splits:
        for image in plan.images[split]:
            digest.update(repr(image).encode())
            files.add(image.place.file)
        for pair in plan.pairs.get(split, ()):
            digest.update(repr(pair).encode())
    for path in sorted(files):
        if path.exists():
            digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()


def tool_version() -> str:
    """Version of this package, or "unknown" where it is not installed."""
    try:
        return importlib.metadata.version("fuselip-rocov2")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _write_images(plan: Plan, settings: PrepareSettings, work: Path) -> Results:
    """Image shards of every split; copies of held-out images stay out of dev and train unless they are to be kept."""
    results: Results = {}
    held_out: set[str] = set()
    for number, splits in enumerate(ROUNDS):
        listed = None
        if held_out and settings.shared_images == "drop":
            listed = work / f"held_out-{number}.txt"
            with atomic_write(listed) as partial:
                partial.write_text("\n".join(sorted(held_out)))
        tasks = {split: _tasks(plan, split, settings, work, listed) for split in splits if split in plan.splits}
        done = iter(_run([task for part in tasks.values() for task in part], settings.workers))
        for split, part in tasks.items():
            results[split] = [next(done) for _ in part]
            held_out.update(digest for result in results[split] for _, digest in result.images)
    return results


def _tasks(plan: Plan, split: str, settings: PrepareSettings, work: Path, held_out: Path | None) -> list[ShardTask]:
    parts = _cut(plan.images[split], settings.rows_per_shard)
    return [
        ShardTask(
            path=work / shard_name("images", split, number, len(parts)),
            source=settings.source,
            entries=tuple(part),
            max_megapixels=settings.max_megapixels,
            held_out=held_out,
        )
        for number, part in enumerate(parts)
    ]


def shard_name(table: str, split: str, number: int, count: int) -> str:
    """File name of one shard of `count`."""
    return f"{table}-{split}-{number:05d}-of-{count:05d}.parquet"


def _cut(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _run(tasks: Sequence[ShardTask], workers: int) -> list[ShardResult]:
    """Results in the order of the tasks."""
    # A process takes a second or two to start; fewer than two shards each would not pay for it.
    workers = min(workers, len(tasks) // 2)
    if workers <= 1:
        return [write_image_shard(task, show=True) for task in tasks]
    with process_pool(workers) as pool:
        assert pool is not None
        futures = [pool.submit(write_image_shard, task) for task in tasks]
        for future in track(as_completed(futures), "image shards", total=len(futures)):
            future.result()
        return [future.result() for future in futures]


def _finish(plan: Plan, results: Results, settings: PrepareSettings, work: Path) -> dict[str, Any]:
    """Writes pairs, quarantine and manifest beside the image shards, and takes away what only a resumed run needs."""
    shards = [
        {"path": result.path, "rows": len(result.images), "sha256": result.sha256}
        for split in plan.splits
        for result in results[split]
    ]
    counts = {}
    for split in plan.splits:
        kept = {name for result in results[split] for name, _ in result.images}
        pairs = [pair for pair in plan.pairs.get(split, ()) if kept.issuperset(pair.images)]
        shards += _write_pairs(split, pairs, work)
        counts[split] = _counts([image for image in plan.images[split] if image.image_id in kept], pairs)
    if not any(part["pairs"] for part in counts.values()):
        raise DataError(f"no usable pair is left of {settings.root}; {work / QUARANTINE} would hold all of it")
    set_aside = plan.set_aside + [item for split in plan.splits for part in results[split] for item in part.set_aside]
    _write_quarantine(work / QUARANTINE, set_aside)
    manifest = {
        "tool_version": tool_version(),
        "source": settings.source,
        "settings": settings.model_dump(mode="json"),
        "data_version": _data_version(shards),
        "counts": counts,
        "shards": shards,
        "quarantine": dict(sorted(Counter(item.reason for item in set_aside).items())),
        "duplicates": _duplicates(results),
        "notes": plan.notes,
    }
    for path in [*work.glob("*.parquet.json"), *work.glob("held_out-*.txt"), *work.glob(".*.partial")]:
        path.unlink()
    (work / KEY).unlink()
    write_json(work / MANIFEST, manifest)
    return manifest


def _write_pairs(split: str, pairs: Sequence[Pair], work: Path) -> list[dict[str, Any]]:
    parts = _cut(pairs, PAIRS_A_SHARD)
    shards = []
    for number, part in enumerate(parts):
        path = work / shard_name("pairs", split, number, len(parts))
        write_pair_shard(path, part)
        shards.append({"path": path.name, "rows": len(part), "sha256": sha256_of(path)})
    return shards


def _counts(images: Sequence[ImageEntry], pairs: Sequence[Pair]) -> dict[str, Any]:
    return {
        "images": len(images),
        "cases": len({image.case for image in images}),
        "pairs": dict(sorted(Counter(pair.kind for pair in pairs).items())),
    }


def _write_quarantine(path: Path, set_aside: Iterable[SetAside]) -> None:
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for item in set_aside:
            stream.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")


def _data_version(shards: Sequence[dict[str, Any]]) -> str:
    """One hash for the content of all shards."""
    lines = sorted(f"{shard['path']} {shard['sha256']}" for shard in shards)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _duplicates(results: Results) -> dict[str, int]:
    """Images with the same bytes as an earlier one: of the same split, or of another (left out, or kept on demand)."""
    within, splits = 0, defaultdict(set)
    for split, parts in results.items():
        digests = [digest for part in parts for _, digest in part.images]
        within += len(digests) - len(set(digests))
        for digest in digests:
            splits[digest].add(split)
    left_out = sum(
        item.reason == "copy_in_held_out" for parts in results.values() for p in parts for item in p.set_aside
    )
    kept = sum(len(names) - 1 for names in splits.values())
    return {"within_splits": within, "across_splits_left_out": left_out, "across_splits_kept": kept}
