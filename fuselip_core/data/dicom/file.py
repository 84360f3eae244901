"""Reads DICOM files, including old, damaged and hostile ones; no message quotes their content."""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pydicom
from pydicom import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from fuselip_core.images import UnreadableImage

LARGEST_INFLATED = 2 << 30


def read_dataset(path: Path, *, header_only: bool = False) -> Dataset:
    """A DICOM file, with or without preamble; raises UnreadableImage (not_dicom, damaged_header)."""
    try:
        with discreet():
            force = _looks_bare(path)
            _refuse_inflating(path, force)
            dataset = pydicom.dcmread(path, stop_before_pixels=header_only, force=force)
    except UnreadableImage:
        raise
    except InvalidDicomError:
        raise UnreadableImage("not_dicom", "no DICOM header") from None
    except FileNotFoundError:
        raise UnreadableImage("missing_image", "the file is gone") from None
    except Exception as error:
        # The parser may raise anything on damaged bytes.
        raise UnreadableImage("damaged_header", type(error).__name__) from None
    if not any(tag.group > 2 for tag in dataset.keys()):  # noqa: SIM118  iterating would decode values
        raise UnreadableImage("not_dicom", "no DICOM elements")
    return dataset


def _looks_bare(path: Path) -> bool:
    """Whether a file without preamble begins with an element of group 2 or 8, like DICOM files from before 1996."""
    with path.open("rb") as stream:
        start = stream.read(132)
    if start[128:] == b"DICM" or len(start) < 16:
        return False
    little = start[:2] in (b"\x02\x00", b"\x08\x00") and start[3:4] == b"\x00"
    big = start[:2] in (b"\x00\x02", b"\x00\x08") and start[2:3] == b"\x00"
    length = int.from_bytes(start[4:8], "little")
    return (little and (start[4:6].isalpha() or length < 1 << 16)) or (big and start[4:6].isalpha())


def _refuse_inflating(path: Path, bare: bool) -> None:
    """Refuses decompression bombs: pydicom inflates a deflated file as a whole, so its size is counted first."""
    if bare:
        return
    meta = read_file_meta_info(path)
    if meta.get("TransferSyntaxUID") != DeflatedExplicitVRLittleEndian:
        return
    with path.open("rb") as stream:
        stream.seek(144 + int(meta.get("FileMetaInformationGroupLength", 0)))
        inflater, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
        block = stream.read(1 << 20)
        while block:
            total += len(inflater.decompress(block, 1 << 24))
            if total > LARGEST_INFLATED:
                raise UnreadableImage("too_large", f"inflates to more than {LARGEST_INFLATED >> 30} GB")
            block = inflater.unconsumed_tail or stream.read(1 << 20)


@contextmanager
def discreet() -> Iterator[None]:
    """Silences pydicom, whose warnings and log lines quote values of the file."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def complete_syntax(dataset: Dataset) -> None:
    """Adds the transfer syntax that old files lack, as detected while reading."""
    if dataset.file_meta.get("TransferSyntaxUID") is None:
        implicit, little = dataset.original_encoding
        plain = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else plain
