"""Who is on which side: faulty captions out, nothing shared between training and what is held out, cases kept whole."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fuselip_core.config import PrepareSettings
from fuselip_core.data.pair import SPLITS, DataError, ImageEntry, Listing, Pair, SetAside, fault_of_caption

HELD_OUT = ("test", "valid")
Entry = TypeVar("Entry", ImageEntry, Pair)


@dataclass
class Plan:
    """Images and pairs of every split in their final order, before any image was opened."""

    images: dict[str, list[ImageEntry]]
    pairs: dict[str, list[Pair]]
    set_aside: list[SetAside] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def splits(self) -> list[str]:
        return [split for split in SPLITS if self.images.get(split)]


def plan_splits(listing: Listing, settings: PrepareSettings) -> Plan:
    """Final splits of a listing; raises DataError if nothing would be left to train on."""
    plan = Plan(
        images=_by_split(listing.images),
        pairs=_by_split(_without_faults(listing.pairs, settings.min_caption_words, listing.set_aside)),
        set_aside=listing.set_aside,
        notes=list(listing.notes),
    )
    if plan.images and all(image.case == image.image_id for images in plan.images.values() for image in images):
        plan.notes.append("the data set names no patient, study or article: every image counts as a case of its own")
    _part_from_held_out(plan, keep=settings.shared_images == "keep")
    _carve_dev(plan, settings.dev_share, settings.seed)
    if settings.limit is not None:
        plan.images = {split: images[: settings.limit] for split, images in plan.images.items()}
        plan.notes.append(f"only the first {settings.limit} images of a split were taken (prepare.limit)")
    for split, pairs in plan.pairs.items():
        kept = {image.image_id for image in plan.images.get(split, ())}
        plan.pairs[split] = [pair for pair in pairs if kept.issuperset(pair.images)]
    return plan


def _by_split(items: Iterable[Entry]) -> dict[str, list[Entry]]:
    parts: dict[str, list[Entry]] = defaultdict(list)
    for item in items:
        parts[item.split].append(item)
    return dict(parts)


def _without_faults(pairs: Iterable[Pair], min_words: int, set_aside: list[SetAside]) -> list[Pair]:
    """Pairs without unusable captions; an image whose caption is unusable stays, as an image."""
    kept = []
    for pair in pairs:
        fault = fault_of_caption(pair.target.text or "", min_words) if pair.kind == "caption" else None
        if fault is None:
            kept.append(pair)
        else:
            set_aside.append(SetAside(pair.group, pair.split, fault, (pair.target.text or "")[:80]))
    return kept


def _part_from_held_out(plan: Plan, keep: bool) -> None:
    """Takes out of training what a held-out split has too: the same image, or another of the same case."""
    held = [image for split in HELD_OUT for image in plan.images.get(split, ())]
    train = plan.images.get("train", [])
    ids, cases = {image.image_id for image in held}, {image.case for image in held}
    shared = {
        image.image_id: "image_in_held_out" if image.image_id in ids else "case_in_held_out"
        for image in train
        if image.image_id in ids or image.case in cases
    }
    if not shared:
        return
    pairs = plan.pairs.get("train", [])
    touched = [pair for pair in pairs if not shared.keys().isdisjoint(pair.images)]
    counts = Counter(shared.values())
    said = (
        f"{counts['image_in_held_out']} of {len(train)} training images are in a held-out split too and "
        f"{counts['case_in_held_out']} more share a case with one; their {len(touched)} of {len(pairs)} training pairs"
    )
    plan.notes.append(f"{said} were {'kept (prepare.shared_images)' if keep else 'left out'}")
    if keep:
        return
    if len(shared) == len(train):
        raise DataError("every training image is also held out, so none is left; set prepare.shared_images=keep")
    plan.set_aside += [SetAside(name, "train", reason) for name, reason in shared.items()]
    plan.images["train"] = [image for image in train if image.image_id not in shared]
    gone = {pair.pair_id for pair in touched}
    plan.pairs["train"] = [pair for pair in pairs if pair.pair_id not in gone]


def _carve_dev(plan: Plan, share: float, seed: int) -> None:
    """Moves whole cases from train to dev until dev has about `share` of the images (one case at least, never all)."""
    train = plan.images.get("train", [])
    if not share or not train:
        return
    cases = choose_cases(train, share, seed)
    chosen = {image.image_id for image in train if image.case in cases}
    plan.images["dev"] = [replace(image, split="dev") for image in train if image.image_id in chosen]
    plan.images["train"] = [image for image in train if image.image_id not in chosen]
    pairs = plan.pairs.get("train", [])
    plan.pairs["dev"] = [replace(pair, split="dev") for pair in pairs if not chosen.isdisjoint(pair.images)]
    plan.pairs["train"] = [pair for pair in pairs if chosen.isdisjoint(pair.images)]
    if not plan.images["train"]:
        raise DataError("all training images are of one case, so none can be held out; set prepare.dev_share=0")
    plan.notes.append(
        f"{len(plan.images['dev'])} training images of {len(cases)} whole cases are held out as dev (prepare.dev_share)"
    )


def choose_cases(images: Sequence[ImageEntry], share: float, seed: int) -> Collection[str]:
    """Cases with together about `share` of the images, in an order that depends on nothing but seed and names."""
    sizes = Counter(image.case for image in images)
    order = sorted(sizes, key=lambda case: hashlib.sha256(f"{seed}:{case}".encode()).digest())
    chosen: set[str] = set()
    wanted = max(1, round(share * len(images)))
    for case in order:
        if wanted <= 0:
            break
        chosen.add(case)
        wanted -= sizes[case]
    return chosen
