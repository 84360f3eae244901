"""Adds every training image mirrored, with left and right exchanged in its texts.

Doubles a small data set while its texts stay true. Suitable for texts about sides of the picture or paired organs, but
not for a chest, whose heart would be on the wrong side. Mirrored images are not stored, but tokenized from their
originals. Held-out splits do not change.
"""

from __future__ import annotations

import re
from dataclasses import replace

from fuselip_core.data.pair import MadeImage, Side
from fuselip_core.data.places import Place
from fuselip_core.data.prepare.splits import Plan
from fuselip_core.data.transforms import Flip, edit_to_json

_SIDE = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left"}


def add_mirrored(plan: Plan) -> None:
    """Adds the mirrored training images and their pairs. Call it before edits are added."""
    edit = edit_to_json(Flip("horizontal"))
    # Only whole pictures, no crops.
    names = {
        image.image_id: f"{image.image_id}/mirrored" for image in plan.images["train"] if type(image.place) is Place
    }
    plan.made["train"].extend(MadeImage(name, source, edit) for source, name in names.items())
    pairs = [pair for pair in plan.pairs["train"] if pair.images and names.keys() >= set(pair.images)]
    plan.pairs["train"].extend(
        replace(
            pair,
            pair_id=f"{pair.pair_id}/mirrored",
            group=f"{pair.group}/mirrored",
            query=_mirrored(pair.query, names),
            target=_mirrored(pair.target, names),
        )
        for pair in pairs
    )
    plan.notes.append(f"{len(names):,} training images are also used mirrored, with left and right exchanged in texts")


def _mirrored(side: Side, names: dict[str, str]) -> Side:
    return Side(side.image and names[side.image], side.text and exchange_sides(side.text))


def exchange_sides(text: str) -> str:
    """Exchanges left and right and keeps capitals: "Left-sided" becomes "Right-sided"."""

    def other(found: re.Match[str]) -> str:
        word = found.group()
        return _OTHER[word.lower()].capitalize() if word[0].isupper() else _OTHER[word.lower()]

    return _SIDE.sub(other, text)
