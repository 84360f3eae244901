"""Renders a DICOM file in memory, such as an upload, without writing to disk."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from fuselip_core.data.dicom.file import discreet, read_dataset
from fuselip_core.data.dicom.pixels import render

PREAMBLE = 128


def is_dicom(data: bytes) -> bool:
    """Whether `data` starts like a DICOM file."""
    return data[PREAMBLE : PREAMBLE + 4] == b"DICM"


def decode_dicom(data: bytes, max_megapixels: float) -> Image.Image:
    """The middle frame of a DICOM file, 8 bits, by the rules of `render`; raises UnreadableImage."""
    # In a memory file, because a codec in another process needs a path.
    memory = os.memfd_create("dicom")
    try:
        with os.fdopen(memory, "wb", closefd=False) as stream:
            stream.write(data)
        with discreet():
            dataset = read_dataset(Path(f"/proc/{os.getpid()}/fd/{memory}"))
            try:
                frame = max(0, int(dataset.get("NumberOfFrames") or 1)) // 2
            except (TypeError, ValueError):
                frame = 0
            return Image.fromarray(render(dataset, frame, None, max_megapixels))
    finally:
        os.close(memory)
