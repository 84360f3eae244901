"""Makes questions and answers by rules, from an image's known modality, body part, plane and side.

These are taken from the names of the image's concepts and from its caption (question_words.json). There are questions
about an aspect only if both together name exactly one value. The answer is "no" only if one value excludes the other,
such as MR and ultrasound, because an image may well show concepts that its caption does not mention.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fuselip_core.files import read_json

OPEN_QUESTIONS = {
    "modality": "What imaging modality is this?",
    "plane": "In which plane is this image?",
    "body part": "Which body part is shown?",
    "side": "On which side is the finding?",
}
CLOSED_QUESTIONS = {
    "modality": "Is the modality of this image {value}?",
    "plane": "Is this image in the {value} plane?",
    "body part": "Does this image show the {value}?",
}
MOST_FINDINGS = 2


def questions_of(
    image_id: str, caption: str, concepts: Sequence[str], modality: str | None = None, seed: int = 0
) -> list[tuple[str, str]]:
    """Questions and lower-case answers about an image, reproducible for equal arguments. concepts: names."""
    rng = np.random.default_rng([seed, *hashlib.sha256(image_id.encode()).digest()[:8]])
    known = known_values(caption, concepts, modality)
    pairs = []
    for aspect, value in known.items():
        pairs.append((OPEN_QUESTIONS[aspect], value.lower()))
        if aspect in CLOSED_QUESTIONS:
            pairs.append(_closed(aspect, value, rng))
    findings = [name for name in concepts if not _named_aspects(name)]
    pairs += [(f"Does this image show {name.lower()}?", "yes") for name in sorted(findings)[:MOST_FINDINGS]]
    return pairs


def known_values(caption: str, concepts: Sequence[str], modality: str | None = None) -> dict[str, str]:
    """Aspect → value, for aspects of which caption and concepts name exactly one value."""
    known = {}
    for aspect in OPEN_QUESTIONS:
        values = {value for text in (caption, *concepts) for value in _values_in(aspect, text)}
        if aspect == "modality" and modality is not None:
            values = {modality}
        if len(values) == 1:
            known[aspect] = values.pop()
    return known


def _closed(aspect: str, value: str, rng: np.random.Generator) -> tuple[str, str]:
    """A question with the answer yes or no, with equal probability."""
    compatible = {value, *_words()["excluding"].get(aspect, {}).get(value, ())}
    others = [other for other in _words()[aspect] if other not in compatible]
    if rng.random() < 0.5 or not others:
        return CLOSED_QUESTIONS[aspect].format(value=value), "yes"
    return CLOSED_QUESTIONS[aspect].format(value=others[int(rng.integers(len(others)))]), "no"


def _values_in(aspect: str, text: str) -> set[str]:
    """The values of an aspect in a text; none if a word belongs to a name, such as left ventricle."""
    value_of, names, words = _patterns()[aspect]
    if names.search(text):
        return set()
    return {value_of[match[0].lower()] for match in words.finditer(text)}


def _named_aspects(name: str) -> list[str]:
    """Aspects that a concept's name mentions; none for a finding."""
    return [aspect for aspect in OPEN_QUESTIONS if _values_in(aspect, name)]


@functools.cache
def _patterns() -> dict[str, tuple[dict[str, str], re.Pattern[str], re.Pattern[str]]]:
    """Aspect → value of each word, pattern of names that contain such words, pattern of the words."""

    def whole_words(words: Iterable[str]) -> re.Pattern[str]:
        longest_first = sorted(words, key=len, reverse=True)  # "X-ray computed tomography" before "X-ray"
        return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})(?![\w-])", re.IGNORECASE)

    found = {}
    for aspect in OPEN_QUESTIONS:
        value_of = {word: value for value, words in _words()[aspect].items() for word in words}
        found[aspect] = value_of, whole_words(_words()["names"].get(aspect, ())), whole_words(value_of)
    return found


@functools.cache
def _words() -> dict[str, dict[str, Any]]:
    return read_json(Path(__file__).with_name("question_words.json"))
