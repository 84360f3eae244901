"""Splits: drops faulty captions, keeps cases whole, and lets training and held-out splits share nothing.

Three passes over the images and one over the pairs, row by row. Memory use grows with the held-out images and those
removed from training, but not with the training set, except for counting cases for `dev_share`.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
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
ENDS = {"drop": "left out", "drop-copies": "kept except for the same images", "keep": "kept"}  # by shared_images
Entry = TypeVar("Entry", ImageEntry, Pair)


@dataclass
class Plan:
    """Images, pairs and candidates of every split in their final order, before any image is opened."""

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


@dataclass
class _Training:
    """The training images: their number, the reasons why some are shared with a held-out split, those removed."""

    count: int = 0
    shared: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    cases: Counter[str] = field(default_factory=Counter)


def plan_splits(listing: Listing, settings: PrepareSettings) -> Plan:
    """Final splits of a listing; raises DataError if nothing is left to train on."""
    plan = Plan(set_aside=listing.set_aside, notes=list(listing.notes), own_splits=listing.own_splits)
    training = _find_shared(listing, settings, plan)
    dev = _choose_dev(training, settings)
    _deal_images(listing, training.gone, dev, settings.limit, plan)
    pairs, touched = _deal_pairs(listing, training, dev, settings, plan)
    plan.set_aside.extend(
        SetAside(name, "train", why) for name, why in training.shared.items() if name in training.gone
    )
    _note(plan, training, dev, settings, pairs, touched)
    return plan


def _find_shared(listing: Listing, settings: PrepareSettings, plan: Plan) -> _Training:
    """Training images that are also in a held-out split, or share a case with one."""
    ids: set[str] = set()
    cases: set[str] = set()
    of_their_own = bool(len(listing.images))
    for image in listing.images:
        of_their_own = of_their_own and image.case == image.image_id
        if image.split in HELD_OUT:
            ids.add(image.image_id)
            cases.add(image.case)
    if of_their_own:
        plan.notes.append("the data set has no patients, studies or articles: every image is its own case")
    going = {"drop": ("image_in_held_out", "case_in_held_out"), "drop-copies": ("image_in_held_out",), "keep": ()}
    training = _Training()
    for image in (image for image in listing.images if image.split == "train"):
        training.count += 1
        if image.image_id in ids or image.case in cases:
            reason = "image_in_held_out" if image.image_id in ids else "case_in_held_out"
            training.shared[image.image_id] = reason
            if reason in going[settings.shared_images]:
                training.gone.add(image.image_id)
                continue
        if settings.dev_share:
            training.cases[image.case] += 1
    if training.count and len(training.gone) == training.count:
        raise DataError("all training images are also held out, so none is left; set prepare.shared_images=keep")
    return training


def _choose_dev(training: _Training, settings: PrepareSettings) -> Collection[str]:
    """Whole cases with about `dev_share` of the training images, at least one but not all."""
    if not training.cases:
        return ()
    dev = choose_cases(training.cases, settings.dev_share, settings.seed)
    if len(dev) == len(training.cases):
        raise DataError("all training images belong to one case, so none can be held out; set prepare.dev_share=0")
    return dev


def choose_cases(sizes: Mapping[str, int], share: float, seed: int) -> Collection[str]:
    """Cases with about `share` of the images together, chosen by a hash of seed and name. sizes: case → images."""
    chosen: set[str] = set()
    wanted = max(1, round(share * sum(sizes.values())))
    for case in sorted(sizes, key=lambda case: hashlib.sha256(f"{seed}:{case}".encode()).digest()):
        if wanted <= 0:
            break
        chosen.add(case)
        wanted -= sizes[case]
    return chosen


def _deal_images(listing: Listing, gone: Collection[str], dev: Collection[str], limit: int | None, plan: Plan) -> None:
    for image in listing.images:
        if image.split == "train" and image.image_id in gone:
            continue
        image = _moved(image, dev)
        if limit is None or len(plan.images[image.split]) < limit:
            plan.images[image.split].append(image)


def _deal_pairs(
    listing: Listing, training: _Training, dev: Collection[str], settings: PrepareSettings, plan: Plan
) -> tuple[int, int]:
    """Assigns pairs and candidates whose images are used; faulty captions are set aside, but not their images.

    Returns the number of training pairs, and of those with a shared image.
    """
    kept = None
    if settings.limit is not None:
        kept = {(split, image.image_id) for split in plan.splits for image in plan.images[split]}
    count = touched = 0
    for pair in listing.pairs:
        text = pair.target.text or ""
        if pair.kind == "caption" and (fault := fault_of_caption(text, settings.min_caption_words)):
            plan.set_aside.append(SetAside(pair.group, pair.split, fault, text[:80]))
            continue
        if pair.split == "train":
            count += 1
            touched += not training.shared.keys().isdisjoint(pair.images)
            if not training.gone.isdisjoint(pair.images):
                continue
        pair = _moved(pair, dev)
        if kept is None or all((pair.split, name) in kept for name in pair.images):
            plan.pairs[pair.split].append(pair)
    for item in listing.candidates:
        if kept is None or all((item.split, name) in kept for name in item.images):
            plan.candidates[item.split].append(item)
    return count, touched


def _moved(item: Entry, dev: Collection[str]) -> Entry:
    return replace(item, split="dev") if item.split == "train" and item.case in dev else item


def _note(
    plan: Plan, training: _Training, dev: Collection[str], settings: PrepareSettings, pairs: int, touched: int
) -> None:
    if training.shared:
        counts, choice = Counter(training.shared.values()), settings.shared_images
        plan.notes.append(
            f"{counts['image_in_held_out']} of {training.count} training images are also in a held-out split and "
            f"{counts['case_in_held_out']} more share a case with one; their {touched} of {pairs} training pairs"
            f" were {ENDS[choice]}{'' if choice == 'drop' else ' (prepare.shared_images)'}"
        )
    if dev:
        held = sum(training.cases[case] for case in dev)
        plan.notes.append(f"{held} training images of {len(dev)} whole cases are held out as dev (prepare.dev_share)")
    if settings.limit is not None:
        plan.notes.append(f"only the first {settings.limit} images of each split were used (prepare.limit)")
