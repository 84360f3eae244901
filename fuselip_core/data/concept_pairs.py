"""Pairs of an image and the names of its concepts (modality, plane, body part, finding) beside its caption.

Few images teach little of how captions are worded; the same few words for many images teach what is seen. Images of the
same concepts are no wrong answers for each other, since the training's loss passes over equal targets.
"""

from __future__ import annotations

from pathlib import Path

from fuselip_core.data.pair import DataError, ImageEntry, Listing, Pair, Side, one_line
from fuselip_core.data.sources.tables import read_table

NAMES = "cui_mapping.csv"


def add_concept_pairs(root: Path, listing: Listing) -> None:
    """Adds to each image with concepts the pair image → names, in an order that does not depend on the table's.

    Raises DataError if `root` holds no table of names. Codes without a name are passed over and counted in a note.
    """
    if not listing.concept_names and not (root / NAMES).is_file():
        raise DataError(f"{root} has no {NAMES} with the names of concepts; put it there, or take it from extra_pairs")
    names = listing.concept_names or names_of_concepts(root)
    nameless = 0
    for image in listing.images:
        codes = set(image.concepts)
        named = {code for code in codes if names.get(code)}
        nameless += len(codes - named)
        if known := sorted({names[code] for code in named}):
            listing.pairs.append(_pair(image, "; ".join(known)))
    if nameless:
        listing.notes.append(f"{nameless} concepts of images have no name in {NAMES} and are in no pair")


def names_of_concepts(root: Path) -> dict[str, str]:
    """Concept code → name; raises DataError without a readable table."""
    rows = read_table(root / NAMES, ("CUI", "Canonical name"))
    return {row["CUI"].strip(): one_line(row["Canonical name"]) for row in rows}


def _pair(image: ImageEntry, text: str) -> Pair:
    sides = Side(image=image.image_id), Side(text=text)
    return Pair(f"{image.image_id}/concepts", image.split, "concepts", image.image_id, image.case, *sides)
