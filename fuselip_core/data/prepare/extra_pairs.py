"""Additional pairs from the same captioned images, by their names in `prepare.extra_pairs` and kinds in train.mixture:

sentences   image → one sentence of its caption                            kind "sentence"
concepts    image → the names of its concepts                              kind "concepts"
questions   image + question → answer, by rules (rule_questions.py)        kind "vqa"
statements  image → a question about it with its answer                    kind "statement"
edits       image + instruction → edited image (edit_pairs.py)             kind "edit"
general-edits  the same, with flips and colours, as published              kind "edit"
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from fuselip_core.data.pair import (
    CLOSED_ANSWERS,
    DataError,
    Listing,
    Pair,
    Side,
    fault_of_caption,
    one_line,
    question_pair,
)
from fuselip_core.data.prepare.rule_questions import questions_of
from fuselip_core.data.spool import Spool
from fuselip_core.data.table_reader import read_table

NAMES = "cui_mapping.csv"

FEWEST_WORDS = 3  # of a sentence
# A full stop before a new sentence, but not after an initial or an abbreviation.
_END = re.compile(r"[.!?]\)?\s+(?=[A-Z(])")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:[A-Za-z]|figs?|vs|cf|no|al|dr|st|approx|e\.g|i\.e)\.$", re.IGNORECASE)


def add_extra_pairs(root: Path, listing: Listing, kinds: Collection[str]) -> None:
    """Adds the pairs of `kinds` to a listing, except edits, which need the final splits; raises DataError."""
    made: Spool[Pair] = Spool()
    if "sentences" in kinds:
        made.extend(_sentence_pairs(listing))
    if "questions" in kinds:
        made.extend(_question_pairs(root, listing))
    if "statements" in kinds:
        made.extend(_statement_pairs(listing))
    if "concepts" in kinds:
        add_concept_pairs(root, listing)
    listing.pairs.extend(made)


def sentences_of(caption: str) -> list[str]:
    """The sentences of a caption with at least FEWEST_WORDS words."""
    ends = (match for match in _END.finditer(caption) if not _ABBREVIATION.search(caption[: match.start() + 1]))
    starts = [0, *(match.end() for match in ends), len(caption)]
    parts = (caption[start:stop].strip() for start, stop in itertools.pairwise(starts))
    return [part for part in parts if len(part.split()) >= FEWEST_WORDS]


def _sentence_pairs(listing: Listing) -> Iterator[Pair]:
    """A reproducible pseudo-random sentence of every caption that has several."""
    for pair in listing.pairs:
        caption = pair.target.text or ""
        if pair.kind != "caption" or fault_of_caption(caption, FEWEST_WORDS):
            continue
        sentences = sentences_of(caption)
        if len(sentences) > 1:
            digest = hashlib.sha256(pair.pair_id.encode()).digest()
            target = Side(text=sentences[int.from_bytes(digest[:4], "big") % len(sentences)])
            yield Pair(f"{pair.group}/sentence", pair.split, "sentence", pair.group, pair.case, pair.query, target)


def _statement_pairs(listing: Listing) -> Iterator[Pair]:
    """Questions joined with their answers as texts that describe an image."""
    for pair in listing.pairs:
        if pair.kind == "vqa" and pair.query.text and pair.target.text:
            sides = Side(image=pair.query.image), Side(text=f"{pair.query.text} {pair.target.text}")
            yield Pair(f"{pair.pair_id}/statement", pair.split, "statement", pair.group, pair.case, *sides)


def _question_pairs(root: Path, listing: Listing) -> Iterator[Pair]:
    names = names_of_concepts(root / NAMES) if (root / NAMES).is_file() else {}
    captions = {
        (pair.split, pair.query.image): pair.target.text or "" for pair in listing.pairs if pair.kind == "caption"
    }
    for image in listing.images:
        concepts = sorted({names[code] for code in image.concepts if names.get(code)})
        caption = captions.get((image.split, image.image_id), "")
        for number, (question, answer) in enumerate(questions_of(image.image_id, caption, concepts, image.modality)):
            kind = "closed" if answer in CLOSED_ANSWERS else "open"
            yield question_pair(image, f"{image.image_id}/rule-{number}", question, answer, kind)


def add_concept_pairs(root: Path, listing: Listing) -> None:
    """Adds a pair image → sorted concept names for each image with concepts.

    Raises DataError if there is no table of names. Codes without a name are skipped and counted in a note.
    """
    names = names_in(root, listing)
    if not names:
        raise DataError(f"{root} has no {NAMES} with concept names; put it there, or remove concepts from extra_pairs")
    nameless = 0
    for image in listing.images:
        codes = set(image.concepts)
        named = {code for code in codes if names.get(code)}
        nameless += len(codes - named)
        if known := sorted({names[code] for code in named}):
            sides = Side(image=image.image_id), Side(text="; ".join(known))
            name = f"{image.image_id}/concepts"
            listing.pairs.append(Pair(name, image.split, "concepts", image.image_id, image.case, *sides))
    if nameless:
        listing.notes.append(f"{nameless} concepts of images have no name in {NAMES} and are in no pair")


def names_in(root: Path, listing: Listing) -> dict[str, str]:
    """Concept code → name, from the data set itself or from its table; empty without either."""
    return listing.concept_names or (names_of_concepts(root / NAMES) if (root / NAMES).is_file() else {})


def names_of_concepts(table: Path) -> dict[str, str]:
    """Concept code → name, from ROCOv2's cui_mapping.csv; raises DataError if the table cannot be read."""
    rows = read_table(table, ("CUI", "Canonical name"))
    return {row["CUI"].strip(): one_line(row["Canonical name"]) for row in rows}
