"""The grey scale of a DICOM frame (PS3.3 C.11): padding, modality LUT or rescale, VOI LUT or window, lookup tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import DataElement, Dataset
from pydicom.multival import MultiValue
from pydicom.pixels import apply_windowing

Values = NDArray[np.float64]

FUNCTIONS = ("LINEAR", "LINEAR_EXACT", "SIGMOID")


@dataclass(frozen=True)
class Window:
    """Centre and width in the units after the modality LUT (Hounsfield units for CT)."""

    center: float
    width: float
    function: str = "LINEAR"


def padding(raw: NDArray[Any], stored: NDArray[Any], dataset: Dataset) -> NDArray[np.bool_]:
    """Mask of padding pixels (PS3.3 C.7.5.1.1.2).

    Some scanners pad with a value beyond BitsStored, so both the whole cells (`raw`) and the stored bits are compared.
    """
    kind = next((kind for kind in ("Float", "DoubleFloat") if f"{kind}PixelData" in dataset), "")
    value = dataset.get(f"{kind}PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limits = [value, dataset.get(f"{kind}PixelPaddingRangeLimit", value)]
    if stored.dtype.kind == "i":  # files without explicit types give negative values as unsigned
        limits = list(map(_as_signed, limits))
    first, last = sorted(limits)
    return np.logical_or.reduce([(array >= first) & (array <= last) for array in (raw, stored)])


def _as_signed(value: int) -> int:
    """Reads an unsigned 16-bit value as signed."""
    return int(value) - (1 << 16) if value >= 1 << 15 else int(value)


def modality_values(stored: NDArray[Any], dataset: Dataset, frame: int) -> Values:
    """Values in the modality's unit, by the modality LUT or by slope and intercept (PS3.3 C.11.1)."""
    if dataset.get("ModalityLUTSequence"):
        # Not pydicom's apply_modality_lut: it fails on tables of 10 to 15 bits and on negative first values with
        # unsigned pixels, and reads a negative first value written as US as a large one.
        item = dataset.ModalityLUTSequence[0]
        table = entries(item["LUTData"], item.LUTDescriptor, dataset)
        return look_up(stored, item.LUTDescriptor[1], table, signed=stored.dtype.kind == "i").astype(np.float64)
    slope, intercept = _rescale(dataset, frame)
    return stored.astype(np.float64) * slope + intercept


def _rescale(dataset: Dataset, frame: int) -> tuple[float, float]:
    source = next(_functional(dataset, frame, "PixelValueTransformationSequence"), dataset)
    slope, intercept = source.get("RescaleSlope"), source.get("RescaleIntercept")
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def _functional(dataset: Dataset, frame: int, name: str) -> Iterator[Dataset]:
    """Items in the functional groups of enhanced multi-frame files: first the frame's own, then the shared one."""
    own = dataset.get("PerFrameFunctionalGroupsSequence")
    shared = dataset.get("SharedFunctionalGroupsSequence")
    for groups in (own[frame] if own and frame < len(own) else None, shared[0] if shared else None):
        if groups is not None and groups.get(name):
            yield groups[name][0]


def voi_of(dataset: Dataset, frame: int, preset: Window | None) -> Window | Dataset | None:
    """The preset for CT, or else the file's VOI LUT or window; None if it has neither."""
    if preset is not None and dataset.get("Modality") == "CT":
        return preset
    for source in (*_functional(dataset, frame, "FrameVOILUTSequence"), dataset):
        tables = source.get("VOILUTSequence")
        if tables and "LUTData" in tables[0]:
            item: Dataset = tables[0]
            return item
        window = _first_window(source)
        if window is not None:
            return window
    return None


def _first_window(source: Dataset) -> Window | None:
    """The file's first valid window.

    LINEAR is not defined for widths below 1, which occur with small rescaled values (PET, MR); like other viewers, this
    uses LINEAR_EXACT for them.
    """
    function = str(source.get("VOILUTFunction") or "LINEAR").upper()
    function = function if function in FUNCTIONS else "LINEAR"
    try:
        for center, width in zip(_numbers(source, "WindowCenter"), _numbers(source, "WindowWidth"), strict=False):
            if math.isfinite(center) and 0.0 < width < math.inf:
                return Window(center, width, "LINEAR_EXACT" if function == "LINEAR" and width < 1.0 else function)
    except (TypeError, ValueError):  # not a number
        pass
    return None


def _numbers(source: Dataset, name: str) -> list[float]:
    value = source.get(name)
    values = value if isinstance(value, MultiValue) else [value]
    return [math.nan if part in (None, "") else float(part) for part in values]


def windowed(values: Values, window: Window) -> Values:
    """PS3.3 C.11.2.1.2 (LINEAR) and C.11.2.1.3 (SIGMOID, LINEAR_EXACT), onto 0..1."""
    scale = Dataset()
    # One unsigned bit, so that pydicom's output range is 0..1.
    scale.PhotometricInterpretation, scale.PixelRepresentation, scale.BitsStored = "MONOCHROME2", 0, 1
    # As FD, since DS is limited to 16 characters.
    scale.add_new("WindowCenter", "FD", window.center)
    scale.add_new("WindowWidth", "FD", window.width)
    scale.VOILUTFunction = window.function
    with np.errstate(over="ignore"):  # far below a narrow sigmoid
        return apply_windowing(values, scale)


def through_voi_lut(values: Values, dataset: Dataset, frame: int, item: Dataset) -> Values:
    """PS3.3 C.11.2.1.1, onto 0..1.

    Not pydicom's apply_voi: it wraps around for 8-bit tables with more than 256 entries, fails on 9 and 12 bits in
    bytes, and reads a negative first value written as US as a large one.
    """
    _, first, bits = item.LUTDescriptor
    table = entries(item["LUTData"], item.LUTDescriptor, dataset)
    # Tables of 12 bits in 16-bit fields are common; the stated bits count.
    return look_up(values, first, table, signed=_may_be_negative(dataset, frame)) / float(2 ** max(1, bits) - 1)


def _may_be_negative(dataset: Dataset, frame: int) -> bool:
    """Whether values may be negative after the modality LUT, in which case the first value of a VOI LUT is signed."""
    if dataset.get("ModalityLUTSequence"):
        return False
    if "PixelData" not in dataset:
        return True
    bits, signed = int(dataset.BitsStored), dataset.PixelRepresentation == 1
    lowest, highest = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    slope, intercept = _rescale(dataset, frame)
    return min(lowest * slope, highest * slope) + intercept < 0


# ---- lookup tables -------------------------------------------------------------------------------------------------


def entries(data: DataElement, descriptor: Any, dataset: Dataset) -> NDArray[np.uint16]:
    """The entries of a lookup table, given as numbers (US) or as bytes in the file's byte order (OW)."""
    count, _, bits = (int(part) for part in descriptor)
    count = count or 1 << 16
    content = data.value
    if not isinstance(content, bytes):
        content = np.atleast_1d(np.asarray(content, dtype=np.int64)).astype("<u2").tobytes()
    elif data.VR != "OB" and not dataset.file_meta.TransferSyntaxUID.is_little_endian:
        # Words are swapped even if they contain two 8-bit entries.
        content = np.frombuffer(content[: len(content) // 2 * 2], ">u2").astype("<u2").tobytes()
    # Bytes may be padded to an even number, and 8-bit entries may be stored in words.
    words = len(content) >= 2 * count or (bits > 8 and len(content) not in (count, count + 1))
    table = np.frombuffer(content[: len(content) // 2 * 2] if words else content, "<u2" if words else np.uint8)
    if not len(table):
        raise ValueError("an empty table")
    return table[:count].astype(np.uint16)


def look_up(values: NDArray[Any], first: int, table: NDArray[Any], *, signed: bool) -> NDArray[Any]:
    """Entries of the table, whose first entry is for the value `first`; values outside are clipped to its ends."""
    first = _as_signed(first) if signed else int(first)
    return table[np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)]
