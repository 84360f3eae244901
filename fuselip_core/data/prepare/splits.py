"""Who is on which side: faulty captions out, nothing shared between training and what is held out, cases kept whole.

A listing is gone through several times, row by row. What is remembered grows with what is held out and with what is
taken out of training, not with the size of the training set (but for `dev_share`, which counts the cases).
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fuselip_core.config import PrepareSettings
from fuselip_core.data.pair import (
    SPLITS,
    Candidates,
    DataError,
    ImageEntry,
    Listing,
    MadeImage,
    Pair,
    SetAside,
    fault_of_caption,
)
from fuselip_core.data.spool import Spool

HELD_OUT = ("test", "valid")
Entry = TypeVar("Entry", ImageEntry, Pair, Candidates)


@dataclass
class Plan:
    """Images, pairs and candidates of every split in their final order, before any image was opened."""

    images: dict[str, Spool[ImageEntry]] = field(default_factory=lambda: defaultdict(Spool))
    pairs: dict[str, Spool[Pair]] = field(default_factory=lambda: defaultdict(Spool))
    candidates: dict[str, Spool[Candidates]] = field(default_factory=lambda: defaultdict(Spool))
    made: dict[str, Spool[MadeImage]] = field(default_factory=lambda: defaultdict(Spool))
    set_aside: Spool[SetAside] = field(default_factory=Spool)
    notes: list[str] = field(default_factory=list)
    own_splits: bool = False

    @property
    def splits(self) -> list[str]:
        return [split for split in SPLITS if self.images.get(split)]


def plan_splits(listing: Listing, settings: PrepareSettings) -> Plan:
    """Final splits of a listing; raises DataError if nothing would be left to train on."""
    plan = Plan(set_aside=listing.set_aside, notes=list(listing.notes), own_splits=listing.own_splits)
    if len(listing.images) and all(image.case == image.image_id for image in listing.images):
        plan.notes.append("the data set names no patient, study or article: every image counts as a case of its own")
    pairs = Spool(_without_faults(listing.pairs, settings.min_caption_words, plan.set_aside))
    gone = _shared_with_held_out(listing.images, pairs, settings.shared_images, plan)
    train = Spool(image for image in listing.images if image.split == "train" and image.image_id not in gone)
    dev = _cases_of_dev(train, settings, plan)
    _deal_images(listing.images, gone, dev, settings.limit, plan)
    kept = None
    if settings.limit is not None:
        kept = {(split, image.image_id) for split in plan.splits for image in plan.images[split]}
        plan.notes.append(f"only the first {settings.limit} images of a split were taken (prepare.limit)")
    for pair in pairs:
        if pair.split != "train" or gone.isdisjoint(pair.images):
            _put(plan.pairs, _moved(pair, dev), kept)
    for candidates in listing.candidates:
        _put(plan.candidates, candidates, kept)
    return plan


def _put(parts: dict[str, Spool[Entry]], item: Entry, kept: set[tuple[str, str]] | None) -> None:
    """Puts a pair or candidates into their split, unless one of their images is beyond the limit."""
    assert not isinstance(item, ImageEntry)
    if kept is None or all((item.split, name) in kept for name in item.images):
        parts[item.split].append(item)


def _moved(item: Entry, dev: Collection[str]) -> Entry:
    assert not isinstance(item, Candidates)
    return replace(item, split="dev") if item.split == "train" and item.case in dev else item


def _deal_images(
    images: Iterable[ImageEntry], gone: Collection[str], dev: Collection[str], limit: int | None, plan: Plan
) -> None:
    for image in images:
        if image.split == "train" and image.image_id in gone:
            continue
        image = _moved(image, dev)
        if limit is None or len(plan.images[image.split]) < limit:
            plan.images[image.split].append(image)


def _without_faults(pairs: Iterable[Pair], min_words: int, set_aside: Spool[SetAside]) -> Iterator[Pair]:
    """Pairs without unusable captions; an image whose caption is unusable stays, as an image."""
    for pair in pairs:
        fault = fault_of_caption(pair.target.text or "", min_words) if pair.kind == "caption" else None
        if fault is None:
            yield pair
        else:
            set_aside.append(SetAside(pair.group, pair.split, fault, (pair.target.text or "")[:80]))


def _shared_with_held_out(images: Spool[ImageEntry], pairs: Spool[Pair], choice: str, plan: Plan) -> set[str]:
    """Ids of training images that go because a held-out split has them too, or another of their case; and a note."""
    held = [(image.image_id, image.case) for image in images if image.split in HELD_OUT]
    ids, cases = {name for name, _ in held}, {case for _, case in held}
    shared, train = {}, 0
    for image in images:
        if image.split == "train":
            train += 1
            if image.image_id in ids or image.case in cases:
                shared[image.image_id] = "image_in_held_out" if image.image_id in ids else "case_in_held_out"
    if not shared:
        return set()
    all_pairs = sum(pair.split == "train" for pair in pairs)
    touched = sum(pair.split == "train" and not shared.keys().isdisjoint(pair.images) for pair in pairs)
    counts = Counter(shared.values())
    leaves = {"drop": "left out", "drop-copies": "kept but for the same images", "keep": "kept"}[choice]
    plan.notes.append(
        f"{counts['image_in_held_out']} of {train} training images are in a held-out split too and "
        f"{counts['case_in_held_out']} more share a case with one; their {touched} of {all_pairs} training pairs"
        f" were {leaves}{'' if choice == 'drop' else ' (prepare.shared_images)'}"
    )
    going = {"drop": ("image_in_held_out", "case_in_held_out"), "drop-copies": ("image_in_held_out",), "keep": ()}
    gone = {name for name, reason in shared.items() if reason in going[choice]}
    if len(gone) == train:
        raise DataError("every training image is also held out, so none is left; set prepare.shared_images=keep")
    plan.set_aside.extend(SetAside(name, "train", shared[name]) for name in shared if name in gone)
    return gone


def _cases_of_dev(train: Spool[ImageEntry], settings: PrepareSettings, plan: Plan) -> Collection[str]:
    """Whole cases with about `dev_share` of the training images (one case at least, never all)."""
    if not settings.dev_share or not len(train):
        return ()
    cases = choose_cases(train, settings.dev_share, settings.seed)
    count = sum(image.case in cases for image in train)
    if count == len(train):
        raise DataError("all training images are of one case, so none can be held out; set prepare.dev_share=0")
    plan.notes.append(f"{count} training images of {len(cases)} whole cases are held out as dev (prepare.dev_share)")
    return cases


def choose_cases(images: Spool[ImageEntry], share: float, seed: int) -> Collection[str]:
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
