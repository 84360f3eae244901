"""Training pairs of an image, an instruction and the image edited by it, from edits that medicine allows.

A mirrored patient has the heart on the wrong side, so nothing is flipped (transforms.MEDICAL). An edited image is a row
of its own behind its original (places.Edited); its codes are then made like any other's, and the pairs of one original
are a group, hard negatives of each other. Only training images are edited: in a split that is measured an edited copy
would be one more wrong answer to every caption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from fuselip_core.data.pair import ImageEntry, Pair, Place, Side
from fuselip_core.data.places import Edited
from fuselip_core.data.splits import Plan
from fuselip_core.data.spool import Spool
from fuselip_core.data.transforms import MEDICAL, edits, random_family

EDITS_AN_IMAGE = 3
_ANY_PICTURE = np.zeros((4, 4, 3), np.uint8)  # which edits are drawn does not depend on the picture


def add_edits(plan: Plan, seed: int) -> None:
    """Adds EDITS_AN_IMAGE edits of one family for each training image that is a picture of its own, and their pairs."""
    images: Spool[ImageEntry] = Spool()
    pairs: Spool[Pair] = Spool()
    for image in plan.images["train"]:
        images.append(image)
        if type(image.place) is Place:
            for edited, pair in _edits_of(image, seed):
                images.append(edited)
                pairs.append(pair)
    plan.images["train"] = images
    plan.pairs["train"].extend(pairs)
    plan.notes.append(f"{len(pairs):,} edited images of training images were made, {EDITS_AN_IMAGE} an image at most")


def instructions_of(image_id: str, seed: int) -> list[str]:
    """Instructions for one image; equal arguments give equal instructions, each once."""
    rng = np.random.default_rng([seed, *hashlib.sha256(image_id.encode()).digest()[:8]])
    family = random_family(rng, MEDICAL)
    return list(dict.fromkeys(edit.instruction for edit in edits(_ANY_PICTURE, rng, family, EDITS_AN_IMAGE)))


def _edits_of(image: ImageEntry, seed: int) -> Iterator[tuple[ImageEntry, Pair]]:
    place = image.place
    for number, instruction in enumerate(instructions_of(image.image_id, seed)):
        name = f"{image.image_id}/edit-{number}"
        edited = Edited(place.file, place.member, place.row, place.span, place.column, instruction)
        entry = ImageEntry(name, image.split, image.case, edited, image.modality, (), image.licence, image.attribution)
        sides = Side(image.image_id, instruction), Side(name)
        yield entry, Pair(name, image.split, "edit", f"{image.image_id}/edits", image.case, *sides)
