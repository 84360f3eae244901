"""Training pairs of an image with an instruction and the edited image (transforms.py).

"edits" are suitable for medicine: nothing is flipped, since a mirrored patient has the heart on the wrong side.
"general-edits" are the published ones, with the published shares of families and numbers of variants.

Edited images are not stored: the pairs refer to made images, which are tokenized directly from their originals. Only
training images are edited, because edited copies in an evaluation split would be additional wrong candidates. The pairs
of an original form a group and are hard negatives of each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from fuselip_core.data.pair import ImageEntry, MadeImage, Pair, Side
from fuselip_core.data.places import Place
from fuselip_core.data.prepare.splits import Plan
from fuselip_core.data.transforms import (
    FAMILIES,
    GENERAL,
    MEDICAL,
    Edit,
    EditPair,
    draw_edits,
    edit_to_json,
    random_family,
)


@dataclass(frozen=True)
class Edits:
    """Families with their share of pairs (or of groups if `grouped`), and variants an image (None: as published)."""

    weights: Mapping[str, float]
    grouped: bool
    variants: int | None = None


KINDS = {"edits": Edits(MEDICAL, grouped=False, variants=3), "general-edits": Edits(GENERAL, grouped=True)}


def add_edits(plan: Plan, kinds: Collection[str], share: float, seed: int) -> None:
    """For each of `kinds` that is in KINDS, adds edits of one family to `share` of the training images."""
    for name in sorted(KINDS.keys() & set(kinds)):
        edited = 0
        for image in plan.images["train"]:
            # Only whole pictures, no crops.
            if type(image.place) is Place and _drawn(image.image_id, seed) < share:
                _add_edits_of(image, KINDS[name], seed, plan)
                edited += 1
        made = len(plan.made["train"])
        plan.notes.append(f"{edited:,} training images have edits ({name}), which make {made:,} images")


def _drawn(image_id: str, seed: int) -> float:
    """A reproducible pseudo-random number in 0..1."""
    return int.from_bytes(hashlib.sha256(f"{seed} edited {image_id}".encode()).digest()[:8], "big") / 2**64


def pairs_of(image_id: str, kind: Edits, seed: int) -> list[EditPair]:
    """Distinct edits of one image, reproducible for equal arguments."""
    rng = np.random.default_rng([seed, *hashlib.sha256(image_id.encode()).digest()[:8]])
    family = random_family(rng, kind.weights, grouped=kind.grouped)
    return list(dict.fromkeys(draw_edits(rng, family, kind.variants or FAMILIES[family].training)))


def _add_edits_of(image: ImageEntry, kind: Edits, seed: int, plan: Plan) -> None:
    made: dict[Edit | None, str] = {None: image.image_id}
    for number, pair in enumerate(pairs_of(image.image_id, kind, seed)):
        for edit in (pair.before, pair.after):
            if edit is not None and edit not in made:
                made[edit] = f"{image.image_id}/made-{len(made) - 1}"
                plan.made["train"].append(MadeImage(made[edit], image.image_id, edit_to_json(edit)))
        sides = Side(made[pair.before], pair.instruction), Side(made[pair.after])
        name = f"{image.image_id}/edit-{number}"
        plan.pairs["train"].append(Pair(name, image.split, "edit", f"{image.image_id}/edits", image.case, *sides))
