"""Does what the sentence of an instruction says, read from its words alone: a second opinion on `Edit.apply`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from PIL import Image

from fuselip_core.data.transforms import Adjust, Crop, Flip, Grayscale, Rotate


def obey(pixels: np.ndarray, instruction: str) -> np.ndarray:
    """What `instruction` makes of uint8 (H, W, 3); "colorize" asks for the image itself."""
    picture = Image.fromarray(pixels)
    values: Any
    if match := re.fullmatch(r"crop to (.+)", instruction):
        picture = Crop(match[1]).apply(picture)  # type: ignore[arg-type]
    elif match := re.fullmatch(r"rotate (\d+) degrees (clockwise|counter-clockwise)", instruction):
        picture = Rotate(int(match[1]), match[2]).apply(picture)  # type: ignore[arg-type]
    elif match := re.fullmatch(r"(horizontal|vertical) flip", instruction):
        picture = Flip(match[1]).apply(picture)  # type: ignore[arg-type]
    elif values := re.findall(r"(?:increase|decrease) (\w+) by factor ([\d.]+)", instruction):
        picture = Adjust(tuple((what, float(factor)) for what, factor in values)).apply(picture)
    elif instruction == "grayscale":
        picture = Grayscale().apply(picture)
    else:
        assert instruction == "colorize", instruction
    return np.array(picture)
