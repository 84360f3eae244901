"""Makes questions and answers by rules, from an image's known modality, body part, plane and side.

What is known comes from the names of the image's concepts and from the words of its caption (question_words.json). An
aspect is asked about only where both together name one value of it. "No" is answered only where one value rules the
other out (an MR image is no ultrasound): a concept that a caption does not mention may be in the image all the same.
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
    """Questions and lower-case answers about one image; `concepts` are names. Equal arguments give equal questions."""
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
    """Aspect → the one value that caption and concepts name; aspects with none or several are left out."""
    known = {}
    for aspect in OPEN_QUESTIONS:
        values = {value for text in (caption, *concepts) for value in _values_in(aspect, text)}
        if aspect == "modality" and modality is not None:
            values = {modality}
        if len(values) == 1:
            known[aspect] = values.pop()
    return known


def _closed(aspect: str, value: str, rng: np.random.Generator) -> tuple[str, str]:
    """A question with the answer yes or, as often, no."""
    compatible = {value, *_words()["excluding"].get(aspect, {}).get(value, ())}
    others = [other for other in _words()[aspect] if other not in compatible]
    if rng.random() < 0.5 or not others:
        return CLOSED_QUESTIONS[aspect].format(value=value), "yes"
    return CLOSED_QUESTIONS[aspect].format(value=others[int(rng.integers(len(others)))]), "no"


def _values_in(aspect: str, text: str) -> set[str]:
    """The values of an aspect that a text names; none where one of its words belongs to a name (left ventricle)."""
    value_of, names, words = _patterns()[aspect]
    if names.search(text):
        return set()
    return {value_of[match[0].lower()] for match in words.finditer(text)}


def _named_aspects(name: str) -> list[str]:
    """Aspects that the name of a concept belongs to; a finding belongs to none."""
    return [aspect for aspect in OPEN_QUESTIONS if _values_in(aspect, name)]


@functools.cache
def _patterns() -> dict[str, tuple[dict[str, str], re.Pattern[str], re.Pattern[str]]]:
    """Aspect → value of each word, pattern of the words that forbid it, pattern of its words."""

    def whole_words(words: Iterable[str]) -> re.Pattern[str]:
        longest_first = sorted(words, key=len, reverse=True)  # an X-ray computed tomography is no X-ray
        return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})(?![\w-])", re.IGNORECASE)

    found = {}
    for aspect in OPEN_QUESTIONS:
        value_of = {word: value for value, words in _words()[aspect].items() for word in words}
        found[aspect] = value_of, whole_words(_words()["names"].get(aspect, ())), whole_words(value_of)
    return found


@functools.cache
def _words() -> dict[str, dict[str, Any]]:
    path = Path(__file__).with_name("question_words.json")
    return read_json(path)
