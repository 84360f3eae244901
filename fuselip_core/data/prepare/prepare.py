"""Brings any data set into one schema: Parquet shards of checked images and pairs, a quarantine list, and a manifest.

    images-<split>-00000-of-00002.parquet   one row an image, bytes as published (schemas.IMAGE_SCHEMA)
    pairs-<split>-00000-of-00001.parquet    one row a pair (schemas.PAIR_SCHEMA)
    made-<split>-00000-of-00001.parquet     one row an image that is derived from another on reading (MADE_SCHEMA)
    candidates-<split>-..., options-...     questions of evaluation sets (tables.py), if there are any
    quarantine.jsonl                        {"id", "split", "reason", "detail"} of everything that is not used
    manifest.json                           counts, hashes, reasons, notes

The same data and settings give the same bytes, with any number of workers. Rows are kept in spools on disk, and results
in sidecars of the shards, so that memory use does not grow with the data set.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fuselip_core.config import PrepareSettings
from fuselip_core.data.download.manifest import provenance_of
from fuselip_core.data.pair import SPLITS, DataError, Listing, Pair, SetAside
from fuselip_core.data.prepare.edit_pairs import add_edits
from fuselip_core.data.prepare.extra_pairs import add_extra_pairs, names_in
from fuselip_core.data.prepare.image_rounds import Results, count_duplicates, shard_name, write_images
from fuselip_core.data.prepare.mirrored_pairs import add_mirrored
from fuselip_core.data.prepare.splits import Plan, plan_splits
from fuselip_core.data.prepare.tables import write_candidates, write_pair_shard, write_table
from fuselip_core.data.prepare.work_folder import MANIFEST, close_work, key_of, open_work, reserved
from fuselip_core.data.shards.schemas import MADE_SCHEMA
from fuselip_core.data.sources.catalogue import list_source, published_form
from fuselip_core.data.spool import Spool
from fuselip_core.files import atomic_write, replace_folder, sha256_of, write_json
from fuselip_core.progress import logger

QUARANTINE = "quarantine.jsonl"
PAIRS_A_SHARD = 1 << 20
# Reasons that do not count as losses: left out on purpose, or not an image.
NOT_LOST = frozenset(
    {"image_in_held_out", "case_in_held_out", "copy_in_held_out", "near_copy_in_held_out"}
    | {
        "short_caption",
        "placeholder_caption",
        "listed_for_another_split",
        "not_dicom",
        "no_pixels",
        "derived_object",
        "burned_in_text",
    }
)


def prepare_data(settings: PrepareSettings, target: Path, work: Path | None = None) -> dict[str, Any]:
    """Prepares the data set of `settings` into the folder `target` and returns its manifest.

    Finished shards are kept in `work` (by default beside `target`, on the same disk in any case), from which an
    interrupted run resumes. Bad samples are set aside with a reason. Raises FuselipError if the data set as a whole is
    unusable: no pair is left, a split has no image left, or losses exceed `prepare.most_set_aside`.
    """
    work = work or target.with_name(f"{target.name}.partial")
    with reserved(target, settings.root):
        listing = list_source(settings.source, settings.root, settings)
        archive = not listing.pairs and not listing.candidates
        names = _concept_names(settings.root, listing)
        with published_form(settings.source, settings.root):
            add_extra_pairs(settings.root, listing, settings.extra_pairs)
        plan = plan_splits(listing, settings)
        if "mirrored" in settings.extra_pairs:
            add_mirrored(plan)
        add_edits(plan, settings.extra_pairs, settings.edited_share, settings.seed)
        origin = provenance_of(settings.root)
        open_work(work, key_of(plan, settings, tool_version(), origin))
        images = write_images(plan, settings, work, origin)
        tables = _write_tables(plan, images, work)
        reasons = _write_quarantine(work / QUARANTINE, chain(plan.set_aside, _set_aside(images), tables.set_aside))
        _refuse_losses(tables, reasons, plan, settings, work, archive, len(listing.images))
        shards = [*_named(images), *tables.shards]
        manifest = {
            "tool_version": tool_version(),
            "source": settings.source,
            "origin": asdict(origin),
            "settings": _stated(settings),
            "data_version": _data_version(shards),
            "counts": tables.counts,
            "shards": shards,
            "quarantine": _by_reason(reasons),
            "duplicates": count_duplicates(work, images),
            "notes": plan.notes,
            "concept_names": names,
        }
        write_json(work / MANIFEST, manifest)
        close_work(work)
        replace_folder(work, target)
    _summarise(manifest, target)
    return manifest


def _concept_names(root: Path, listing: Listing) -> dict[str, str]:
    """Names of the images' concepts; empty, with a note, if the table cannot be read."""
    try:
        names = names_in(root, listing)
    except DataError as error:
        listing.notes.append(f"concepts have no names: {error}")
        return {}
    codes = {code for image in listing.images for code in image.concepts}
    return {code: names[code] for code in sorted(codes) if names.get(code)}


def tool_version() -> str:
    """Version of this package, or "unknown" if it is not installed."""
    try:
        return importlib.metadata.version("fuselip-rocov2")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# ---- tables ----------------------------------------------------------------------------------------------------------


@dataclass
class _Tables:
    """The tables beside the images: their manifest entries, counts by split, and rows that lack an image."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    set_aside: list[SetAside] = field(default_factory=list)

    def add(self, path: Path, rows: int) -> None:
        self.shards.append({"path": path.name, "rows": rows, "sha256": sha256_of(path)})


def _write_tables(plan: Plan, images: Results, work: Path) -> _Tables:
    """Writes pairs, made images and candidates of every split, without those that lack an image."""
    tables = _Tables()
    for split in plan.splits:
        missing = {item.id for part in images[split] for item in part.set_aside}
        missing |= {made.image_id for made in plan.made.get(split, ()) if made.source in missing}
        # 8 bytes of memory an image.
        cases = array("Q", (_short(image.case) for image in plan.images[split] if image.image_id not in missing))
        counts = {"images": len(cases), "cases": len(np.unique(np.asarray(cases))), "pairs": {}}
        tables.counts[split] = counts
        _write_made(split, plan, missing, work, tables)
        _write_pairs(split, plan, missing, work, tables)
        if candidates := plan.candidates.get(split):
            paths = [work / shard_name(table, split, 0, 1) for table in ("candidates", "options")]
            rows, tasks, without = write_candidates(paths[0], paths[1], candidates, missing)
            counts["candidates"] = dict(sorted(tasks.items()))
            tables.set_aside += without
            for path in paths:
                tables.add(path, rows[path.name])
    return tables


def _short(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _write_made(split: str, plan: Plan, missing: set[str], work: Path, tables: _Tables) -> None:
    path = work / shard_name("made", split, 0, 1)
    rows = (asdict(made) for made in plan.made.get(split, ()) if made.source not in missing)
    if count := write_table(path, rows, MADE_SCHEMA):
        tables.counts[split]["made_images"] = count
        tables.add(path, count)
    else:
        path.unlink()


def _write_pairs(split: str, plan: Plan, missing: set[str], work: Path, tables: _Tables) -> None:
    kinds: Counter[str] = Counter()

    def counted() -> Iterator[Pair]:
        for pair in plan.pairs.get(split, ()):
            if missing.isdisjoint(pair.images):
                kinds[pair.kind] += 1
                yield pair

    usable = Spool(counted())
    tables.counts[split]["pairs"] = dict(sorted(kinds.items()))
    count, rest = -(-len(usable) // PAIRS_A_SHARD), iter(usable)
    for number in range(count):
        path = work / shard_name("pairs", split, number, count)
        tables.add(path, write_pair_shard(path, islice(rest, PAIRS_A_SHARD)))


# ---- what was set aside ----------------------------------------------------------------------------------------------


def _set_aside(images: Results) -> Iterator[SetAside]:
    return (item for parts in images.values() for part in parts for item in part.set_aside)


def _write_quarantine(path: Path, set_aside: Iterable[SetAside]) -> Counter[tuple[str, str]]:
    """Writes the quarantine; returns counts by split and reason."""
    reasons: Counter[tuple[str, str]] = Counter()
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for item in set_aside:
            reasons[item.split, item.reason] += 1
            stream.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
    return reasons


def _by_reason(reasons: Mapping[tuple[str, str], int]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for (_, reason), count in reasons.items():
        counts[reason] += count
    return dict(sorted(counts.items()))


def _said(reasons: Mapping[str, int]) -> str:
    """Counts and reasons, most frequent first."""
    order = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {reason}" for reason, count in order)


def _refuse_losses(
    tables: _Tables,
    reasons: Counter[tuple[str, str]],
    plan: Plan,
    settings: PrepareSettings,
    work: Path,
    archive: bool,
    image_count: int,
) -> None:
    """Raises DataError if nothing is left, a split lost all its images, or more was lost than the settings allow.

    archive: the data set has no texts, so its images are enough. image_count: its images including those beyond
    `prepare.limit`, since the listing's losses refer to all of them.
    """
    names_each = f"see {work / QUARANTINE}"
    needed = ("images",) if archive else ("pairs", "candidates")
    if not any(part.get(what) for part in tables.counts.values() for what in needed):
        said = _said(_by_reason(reasons)) or "it has no texts"
        raise DataError(f"{settings.root} has no usable pair ({said}); {names_each}")
    for split in SPLITS:
        why = {reason: count for (of, reason), count in reasons.items() if of == split}
        listed = split in plan.splits or not plan.own_splits  # own splits are drawn from what can be read
        if why and listed and not tables.counts.get(split, {}).get("images"):
            raise DataError(f"split '{split}' of {settings.root} has no usable image ({_said(why)}); {names_each}")
    lost = Counter({reason: count for reason, count in _by_reason(reasons).items() if reason not in NOT_LOST})
    total = sum(part["images"] for part in tables.counts.values()) + lost.total()
    if settings.limit is not None:
        total = max(total, image_count)
    if lost.total() > settings.most_set_aside * total:
        raise DataError(
            f"{lost.total():,} of {total:,} samples of {settings.root} are unusable ({_said(lost)}), more than the "
            f"{settings.most_set_aside:.0%} that prepare.most_set_aside allows; {names_each}, then repair or raise it"
        )


def _summarise(manifest: Mapping[str, Any], target: Path) -> None:
    for split, part in manifest["counts"].items():
        logger.info("%s: %s images, %s pairs", split, f"{part['images']:,}", f"{sum(part['pairs'].values()):,}")
    if manifest["quarantine"]:
        said = _said(manifest["quarantine"]).replace("_", " ")
        logger.info("set aside: %s; see %s", said, target / QUARANTINE)


# ---- manifest --------------------------------------------------------------------------------------------------------


def _named(images: Results) -> list[dict[str, Any]]:
    return [
        {"path": part.path, "rows": part.rows, "sha256": part.sha256}
        for split in SPLITS
        for part in images.get(split, ())
    ]


def _stated(settings: PrepareSettings) -> dict[str, Any]:
    """The settings for the manifest, without paths to DICOM files, which may contain names."""
    stated = settings.model_dump(mode="json")
    if settings.source == "dicom":
        stated["root"] = "withheld"
        if stated["dicom"]:
            stated["dicom"] |= {"text": None, "key_file": None}
    return stated


def _data_version(shards: Sequence[dict[str, Any]]) -> str:
    """Hash of the content of all shards."""
    lines = sorted(f"{shard['path']} {shard['sha256']}" for shard in shards)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
