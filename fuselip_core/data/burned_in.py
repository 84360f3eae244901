"""Text that is part of a picture, found by optical character recognition (the extra `ocr`)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuselip_core.data.images import UnreadableImage
from fuselip_core.errors import FuselipError

# Markers of side and position are part of nearly every radiograph and name nobody.
LONGEST_MARKER = 3
LEAST_SCORE = 0.5

Reader = Callable[[NDArray[np.uint8]], Sequence[tuple[str, float]]]


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
