"""De-identification: keyed pseudonyms for ids, and free text without what identifies a person.

Neither is a guarantee. A pseudonym is as safe as its key, which stays in a file of the user's own (or a variable) and
enters no output; patterns find what looks like an identity, not every identity.
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

# Markers of side and position are part of nearly every radiograph and name nobody.
LONGEST_MARKER = 3
LEAST_SCORE = 0.5
Reader = Callable[[NDArray[np.uint8]], Sequence[tuple[str, float]]]

KEY_VARIABLE = "FUSELIP_PSEUDONYM_KEY"
KEY_BYTES = 32
SHORTEST_KEY = 16
# 80 bits: among a hundred million images, two with one pseudonym are a one in 200 million chance.
HEX_DIGITS = 20
GAP = "___"

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|mär|mai|okt|dez)[a-zäé]*"
_NAME = r"[A-ZÄÖÜÉ][\w'-]+"
# Capitals count where names are meant: MR is a modality and Mr a person, DR a detector and Dr. a doctor.
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
        # Words that announce an identity, with what follows them.
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
    """The key of the pseudonyms cannot be used; the message says where it was looked for."""


class Pseudonyms:
    """Keyed hashes: the same value gives the same pseudonym with the same key, and nobody can go back without it."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, kind: str, value: str) -> str:
        """``<kind>-<20 hex digits>`` for `value`; values of different kinds never meet."""
        digest = hmac.new(self._key, f"{kind}\0{value}".encode(errors="surrogateescape"), hashlib.sha256).hexdigest()
        return f"{kind}-{digest[:HEX_DIGITS]}"

    def share(self, value: str) -> float:
        """A number in [0, 1) that depends on `value` and the key alone."""
        digest = hmac.new(self._key, f"share\0{value}".encode(errors="surrogateescape"), hashlib.sha256).digest()
        return int.from_bytes(digest[:7], "big") / 2**56


def load_key(path: Path | None = None) -> bytes:
    """The key from FUSELIP_PSEUDONYM_KEY, else from the file at `path`, made at the first use.

    Without `path` the file is ``pseudonym.key`` in the user's configuration folder. Whoever wants the same ids on
    another machine takes it there; whoever wants ids that can never be traced deletes it.
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
            f"the key of the pseudonyms cannot be kept at {path} ({error.strerror}); "
            f"name another file, or set {KEY_VARIABLE}"
        ) from None


def _make(path: Path) -> None:
    """A new key, readable by its owner alone, unless there is one; never half of one."""
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
        # Fails if another process was faster; its key then counts.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _checked(key: bytes, where: str) -> bytes:
    if len(key) < SHORTEST_KEY:
        raise PseudonymError(
            f"the key in {where} has {len(key)} characters; use at least {SHORTEST_KEY}, drawn at random"
        )
    return key


def scrub(text: str, known: Iterable[str] = ()) -> str:
    """`text` on one line with ``___`` in place of `known` values and of what looks like an identity.

    Found are dates, times, telephone and record numbers, addresses of the net, UIDs, names after titles, and the
    words of every known value (a person's name is found in any order of its parts, in capitals or not).
    """
    for word in sorted(_words(known), key=len, reverse=True):
        before, after = "" if _runs_on(word[0]) else r"(?<!\w)", "" if _runs_on(word[-1]) else r"(?!\w)"
        text = re.sub(f"{before}{re.escape(word)}{after}", GAP, text, flags=re.IGNORECASE)
    for pattern in _PATTERNS:
        text = pattern.sub(GAP, text)
    text = re.sub(rf"{GAP}(?:[\s,^/-]*{GAP})+", GAP, text)
    return " ".join(text.split())


def _runs_on(letter: str) -> bool:
    """Whether a letter is of a script that puts no spaces between words: Chinese, Japanese, Thai and the like."""
    return unicodedata.east_asian_width(letter) in "WF" or unicodedata.name(letter, "").startswith(
        ("THAI", "LAO", "KHMER")
    )


def _words(known: Iterable[str]) -> set[str]:
    """Each value whole, and the parts of names; single letters and what scrubbing would leave empty stay out."""
    words: set[str] = set()
    for value in known:
        words.add(value.strip())
        words.update(re.split(r"[\^=\s,]+", value))
    return {word for word in words if len(word) > 1 and any(map(str.isalnum, word))}


def refuse_text(pixels: NDArray[np.uint8], reader: Reader | None = None) -> None:
    """Raises UnreadableImage (burned_in_text) if a picture, uint8 (H, W) or (H, W, 3), shows more than markers.

    Pieces of up to three letters or digits pass. The message never repeats what was read.
    """
    pieces = (reader or _reader())(pixels)
    found = sum(score >= LEAST_SCORE and sum(map(str.isalnum, text)) > LONGEST_MARKER for text, score in pieces)
    if found:
        raise UnreadableImage("burned_in_text", f"pieces of text found in the picture: {found}")


def require_reader() -> None:
    """Raises FuselipError where the extra `ocr` is not installed; costs nothing."""
    if importlib.util.find_spec("rapidocr") is None:
        raise FuselipError(
            "looking for burned-in text needs rapidocr; install fuselip-rocov2[ocr], or set prepare.dicom.ocr=false"
        )


@functools.cache
def _reader() -> Reader:
    """rapidocr with the models of its own wheel; one for the process, as loading takes seconds."""
    require_reader()
    rapidocr: Any = importlib.import_module("rapidocr")
    engine = rapidocr.RapidOCR(params={"Global.log_level": "error"})

    def read(pixels: NDArray[np.uint8]) -> list[tuple[str, float]]:
        colour = np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels[..., ::-1]
        result = engine(np.ascontiguousarray(colour))
        return list(zip(result.txts or (), result.scores or (), strict=True))

    return read
