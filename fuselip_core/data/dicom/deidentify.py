"""De-identification: keyed pseudonyms for ids, and removal of identities from free text.

Neither is a guarantee. A pseudonym is as safe as its key, which stays in a user's file (or an environment variable) and
enters no output. Patterns find what looks like an identity, not every identity.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import importlib.util
import os
import re
import secrets
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray

from fuselip_core.errors import FuselipError
from fuselip_core.images import UnreadableImage

# Letters of side and position markers, which nearly every radiograph has and which identify nobody.
LONGEST_MARKER = 3
LEAST_SCORE = 0.5
Reader = Callable[[NDArray[np.uint8]], Sequence[tuple[str, float]]]

KEY_VARIABLE = "FUSELIP_PSEUDONYM_KEY"
KEY_BYTES = 32
SHORTEST_KEY = 16
# 80 bits: among a hundred million images, the chance of a collision is one in 200 million.
HEX_DIGITS = 20
GAP = "___"

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|mär|mai|okt|dez)[a-zäé]*"
_NAME = r"[A-ZÄÖÜÉ][\w'-]+"
# Case matters: MR is a modality and Mr a person, DR a detector and Dr. a doctor.
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+",  # e-mail
        r"\b(?i:https?)://\S+",
        r"\b\d+(?:\.\d+){4,}\b",  # UIDs
        r"\b(?:19|20)\d\d[-./ ]\d{1,2}[-./ ]\d{1,2}\b",  # 2024-01-31
        r"\b\d{1,2}[-./]\d{1,2}[-./](?:\d{4}|\d{2})\b",  # 31.01.2024, 1/31/24
        rf"\b\d{{1,2}}(?:st|nd|rd|th)?\.?\s+(?i:{_MONTH})\.?,?\s+\d{{4}}\b",  # 31 January 2024
        rf"\b(?i:{_MONTH})\.?\s+\d{{1,2}}(?:st|nd|rd|th)?,?\s+\d{{4}}\b",  # January 31, 2024
        r"\b\d{1,2}:\d{2}(?::\d{2}(?:\.\d+)?)?\s*(?i:am\b|pm\b|h\b|uhr\b)?",  # times of day
        r"(?<![\w.])\+?\(?\d{2,4}\)?[-/ ]\d{3,4}[-/ ]\d{3,}\b",  # telephone
        # Words that introduce an identity, with what follows them.
        r"\b(?i:mrn|ssn|acc(?:ession)?(?:\s*(?:no|number))?|pat(?:ient)?\.?\s*id)\b\.?\s*[:#=]?\s*[\w-]*\d[\w/-]*",
        r"\b(?i:mrn|patient(?:\s*id|\s*name)?|pat\.?\s*id|acc(?:ession)?(?:\s*(?:no|number))?|ssn|dob|birth\s*date|geb)"
        rf"\.?\s*[:#=]\s*[\w./^-]+(?:(?:\s*[,^]\s*|\s+){_NAME})*",
        rf"\b(?:(?:Dr|Prof)\b\.?|DR\.|PROF\.|dr\.|prof\.|Mrs?\b\.?|Ms\.|Herr|Frau|Mme)"
        rf"(?:\s*(?:Dr|med|Prof)\b\.?)*\s+{_NAME}(?:\s+{_NAME})?",
        rf"\b{_NAME}\^[\w'^-]+",  # DICOM person names
        r"(?<![\w.])[A-Za-z]{0,3}\d{6,}\b",  # medical record and accession numbers
    )
)


class PseudonymError(FuselipError):
    """The pseudonyms' key cannot be used; the message says where it was expected."""


class Pseudonyms:
    """Keyed hashes: a value always gets the same pseudonym with the same key, and cannot be recovered without it."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, kind: str, value: str) -> str:
        """``<kind>-<20 hex digits>`` for `value`; different for every kind."""
        digest = hmac.new(self._key, f"{kind}\0{value}".encode(errors="surrogateescape"), hashlib.sha256).hexdigest()
        return f"{kind}-{digest[:HEX_DIGITS]}"

    def share(self, value: str) -> float:
        """A number in [0, 1) that depends only on `value` and the key."""
        digest = hmac.new(self._key, f"share\0{value}".encode(errors="surrogateescape"), hashlib.sha256).digest()
        return int.from_bytes(digest[:7], "big") / 2**56


def load_key(path: Path | None = None) -> bytes:
    """The key from FUSELIP_PSEUDONYM_KEY, or else from the file at `path`, which is created on first use.

    The default `path` is ``pseudonym.key`` in the user's configuration folder. Copy the file to get the same ids on
    another machine; delete it to make ids untraceable for good.
    """
    given = os.environ.get(KEY_VARIABLE)
    if given:
        return _checked(given.encode(), f"the variable {KEY_VARIABLE}")
    path = path or platformdirs.user_config_path("fuselip") / "pseudonym.key"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make(path)
        return _checked(path.read_bytes().strip(), str(path))
    except OSError as error:
        raise PseudonymError(
            f"the pseudonyms' key cannot be stored at {path} ({error.strerror}); name another file, or set "
            f"{KEY_VARIABLE}"
        ) from None


def _make(path: Path) -> None:
    """Creates a key atomically, readable only by its owner, unless there is one."""
    if path.exists():
        return
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, secrets.token_hex(KEY_BYTES).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        # Fails if another process was faster; then its key is used.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _checked(key: bytes, where: str) -> bytes:
    if len(key) < SHORTEST_KEY:
        raise PseudonymError(f"the key in {where} has {len(key)} characters; use at least {SHORTEST_KEY} random ones")
    return key


def scrub(text: str, known: Iterable[str] = ()) -> str:
    """`text` on one line, with `known` values and anything that looks like an identity replaced by ``___``.

    Replaces dates, times, telephone and record numbers, web and e-mail addresses, UIDs, names after titles, and every
    word of a known value, in any case and order.
    """
    for word in sorted(_words(known), key=len, reverse=True):
        before, after = "" if _runs_on(word[0]) else r"(?<!\w)", "" if _runs_on(word[-1]) else r"(?!\w)"
        text = re.sub(f"{before}{re.escape(word)}{after}", GAP, text, flags=re.IGNORECASE)
    for pattern in _PATTERNS:
        text = pattern.sub(GAP, text)
    text = re.sub(rf"{GAP}(?:[\s,^/-]*{GAP})+", GAP, text)
    return " ".join(text.split())


def _runs_on(letter: str) -> bool:
    """Whether a letter's script has no spaces between words, such as Chinese, Japanese or Thai."""
    return unicodedata.east_asian_width(letter) in "WF" or unicodedata.name(letter, "").startswith(
        ("THAI", "LAO", "KHMER")
    )


def _words(known: Iterable[str]) -> set[str]:
    """Whole values and the parts of names, except single letters and words without any letter or digit."""
    words: set[str] = set()
    for value in known:
        words.add(value.strip())
        words.update(re.split(r"[\^=\s,]+", value))
    return {word for word in words if len(word) > 1 and any(map(str.isalnum, word))}


def refuse_text(pixels: NDArray[np.uint8], reader: Reader | None = None) -> None:
    """Raises UnreadableImage (burned_in_text) if a picture, uint8 (H, W) or (H, W, 3), shows more than side markers.

    Up to three letters or digits are allowed. The message never quotes the text.
    """
    pieces = (reader or _reader())(pixels)
    found = sum(score >= LEAST_SCORE and sum(map(str.isalnum, text)) > LONGEST_MARKER for text, score in pieces)
    if found:
        raise UnreadableImage("burned_in_text", f"pieces of text found in the picture: {found}")


def require_reader() -> None:
    """Raises FuselipError if the extra `ocr` is not installed, without importing it."""
    if importlib.util.find_spec("rapidocr") is None:
        raise FuselipError(
            "looking for burned-in text needs rapidocr; install fuselip-rocov2[ocr], or set prepare.dicom.ocr=false"
        )


@functools.cache
def _reader() -> Reader:
    """rapidocr with the models of its wheel; cached, since loading takes seconds."""
    require_reader()
    rapidocr: Any = importlib.import_module("rapidocr")
    engine = rapidocr.RapidOCR(params={"Global.log_level": "error"})

    def read(pixels: NDArray[np.uint8]) -> list[tuple[str, float]]:
        colour = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels[..., ::-1]
        result = engine(np.ascontiguousarray(colour))
        return list(zip(result.txts or (), result.scores or (), strict=True))

    return read
