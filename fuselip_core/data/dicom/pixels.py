"""One frame of a DICOM file → an 8-bit picture, in the order of the standard's rendering pipeline.

PS3.4 N.2: stored values → modality LUT or rescale → VOI LUT or window → polarity → 8 bits. Colour takes its own way:
palette, RGB and YBR become RGB. Nothing here reads or keeps who the patient is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, get_decoder, pixel_array

from fuselip_core.data.dicom.codec import coded_size, helper
from fuselip_core.data.dicom.file import complete_syntax
from fuselip_core.data.images import UnreadableImage

Pixels = NDArray[np.uint8]
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
# From the most to the least defensive towards damaged data.
PLUGINS = ("pydicom", "pillow", "pylibjpeg", "pyjpegls", "gdcm")
MAY_CRASH = ("gdcm",)


@dataclass(frozen=True)
class Window:
    """Centre and width in the units after the modality LUT (Hounsfield units for CT)."""

    center: float
    width: float
    function: str = "LINEAR"


def render(dataset: Dataset, frame: int, window: Window | None, max_megapixels: float) -> Pixels:
    """Frame `frame` (from 0) as uint8 (H, W) for grey or (H, W, 3) for colour pictures.

    `window` replaces the file's own for CT; other modalities keep theirs, as their values have no common unit. Raises
    UnreadableImage with the reason no_pixels, too_large, truncated_pixels, damaged_pixels or unsupported_pixels. Its
    text names formats only, never a value of the file.
    """
    try:
        _check(dataset, max_megapixels)
        stored = _decode(dataset, frame)
        if dataset.PhotometricInterpretation in GREY:
            return _grey(stored, dataset, frame, window)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            return _palette(stored, dataset)
        return _colour(stored, dataset)
    except UnreadableImage:
        raise
    except Exception as error:
        # Decoders and tables raise anything at all on damaged or hostile input.
        raise UnreadableImage("damaged_pixels", f"contradictory values ({type(error).__name__})") from None


# ---- from the file to stored values --------------------------------------------------------------------------------


def _check(dataset: Dataset, max_megapixels: float) -> None:
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise UnreadableImage("no_pixels", "a file without pixel data")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    interpretation = str(dataset.PhotometricInterpretation)
    if rows * columns > max_megapixels * 1e6:
        raise UnreadableImage("too_large", f"{columns} x {rows} pixels, more than {max_megapixels:g} million")
    if rows < 1 or columns < 1:
        raise UnreadableImage("damaged_pixels", f"{columns} x {rows} pixels")
    if interpretation not in (*GREY, "PALETTE COLOR", *COLOUR):
        known = interpretation if interpretation in ("HSV", "ARGB", "CMYK", "YBR_PARTIAL_420", "XYB") else "unknown"
        raise UnreadableImage("unsupported_pixels", f"photometric interpretation: {known}")
    complete_syntax(dataset)


def _decode(dataset: Dataset, frame: int) -> NDArray[Any]:
    """Stored values of a frame, (H, W) or (H, W, 3); YBR has become RGB."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed and not syntax.is_deflated:
        _check_coded_size(dataset, frame)
        plugins: tuple[str, ...] = tuple(_plugins(syntax))
        if not plugins:
            raise UnreadableImage("unsupported_pixels", f"no codec for {syntax.name}")
    else:
        plugins = ("",)
    failure = ""
    for plugin in plugins:
        try:
            array = _decode_by(plugin, dataset, frame)
        except Exception as error:
            failure += f"{type(error).__name__} {error}"
            continue
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    raise UnreadableImage(_reason(failure), syntax.name)


def _decode_by(plugin: str, dataset: Dataset, frame: int) -> NDArray[Any]:
    if plugin in MAY_CRASH and getattr(dataset, "filename", None):
        return helper().decode(Path(str(dataset.filename)), frame, plugin)
    return pixel_array(dataset, index=frame, decoding_plugin=plugin)


def _reason(failure: str) -> str:
    """What the decoders' errors come down to; their own words may quote the file."""
    if "less than expected" in failure:
        return "truncated_pixels"
    return "unsupported_pixels" if "does not support" in failure else "damaged_pixels"


def _plugins(syntax: Any) -> Iterator[str]:
    try:
        available = get_decoder(syntax).available_plugins
    except NotImplementedError:
        return
    yield from (name for name in PLUGINS if name in available)


def _check_coded_size(dataset: Dataset, frame: int) -> None:
    """A code stream says itself how large it unpacks; it must say what the header says, or it is a bomb or a fault."""
    from pydicom.encaps import get_frame

    frames = int(dataset.get("NumberOfFrames") or 1)
    try:
        found = coded_size(get_frame(dataset.PixelData, frame, number_of_frames=frames))
    except Exception as error:
        raise UnreadableImage("damaged_pixels", f"no frame to decode ({type(error).__name__})") from None
    if found is not None and found != (dataset.Columns, dataset.Rows):
        raise UnreadableImage("damaged_pixels", "the coded picture has another size than the header says")


# ---- grey ----------------------------------------------------------------------------------------------------------


def _grey(stored: NDArray[Any], dataset: Dataset, frame: int, window: Window | None) -> Pixels:
    if stored.ndim != 2:
        raise ValueError("grey pixels in several samples")
    padding = _padding(stored, dataset)
    values = _modality(stored, dataset, frame)
    shown = _shown(values, dataset, frame, window, padding)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = 1.0 - shown
    # Padding is what the scanner did not see; it is black in whatever polarity.
    shown = np.where(padding, 0.0, shown)
    return _to_8_bits(shown)


def _to_8_bits(shares: NDArray[np.float64]) -> Pixels:
    """Shares of full brightness, 0..1 → 0..255, halves upwards."""
    return np.floor(np.clip(shares, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _padding(stored: NDArray[Any], dataset: Dataset) -> NDArray[np.bool_]:
    """Where stored values mean "no picture here" (PS3.3 C.7.5.1.1.2)."""
    value = dataset.get("PixelPaddingValue")
    if value is None or not np.issubdtype(stored.dtype, np.integer):
        return np.zeros(stored.shape, dtype=bool)
    first, last = sorted((_signed(value, stored), _signed(dataset.get("PixelPaddingRangeLimit", value), stored)))
    return (stored >= first) & (stored <= last)


def _signed(value: Any, stored: NDArray[Any]) -> int:
    """A value that files without explicit types give as unsigned although the pixels are signed."""
    number = int(value)
    if np.issubdtype(stored.dtype, np.signedinteger) and number >= 1 << 15 and stored.dtype.itemsize <= 2:
        number -= 1 << 16
    return number


def _modality(stored: NDArray[Any], dataset: Dataset, frame: int) -> NDArray[np.float64]:
    """Values in the modality's unit: through the modality LUT, else slope and intercept (also of enhanced files)."""
    if dataset.get("ModalityLUTSequence"):
        return apply_modality_lut(stored, dataset).astype(np.float64)
    groups = _functional(dataset, frame, "PixelValueTransformationSequence") or dataset
    slope = groups.get("RescaleSlope")
    intercept = groups.get("RescaleIntercept")
    values = stored.astype(np.float64)
    return values * (1.0 if slope is None else float(slope)) + (0.0 if intercept is None else float(intercept))


def _functional(dataset: Dataset, frame: int, name: str) -> Dataset | None:
    """An item of the functional groups of enhanced multi-frame files: the frame's own, else the one shared by all."""
    own = dataset.get("PerFrameFunctionalGroupsSequence")
    shared = dataset.get("SharedFunctionalGroupsSequence")
    for groups in (own[frame] if own and frame < len(own) else None, shared[0] if shared else None):
        if groups is not None and groups.get(name):
            return groups[name][0]
    return None


def _shown(
    values: NDArray[np.float64], dataset: Dataset, frame: int, window: Window | None, padding: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Brightness 0..1: by the window asked for, the file's VOI LUT, its window, or the range of its values."""
    if window is not None and dataset.get("Modality") == "CT":
        return _windowed(values, window)
    source = _functional(dataset, frame, "FrameVOILUTSequence") or dataset
    if source.get("VOILUTSequence"):
        return _through_lut(values, source.VOILUTSequence[0])
    own = _own_window(source)
    return _full_range(values, padding) if own is None else _windowed(values, own)


def _own_window(source: Dataset) -> Window | None:
    """The first of the file's windows, or None if it has none that makes sense."""
    try:
        center, width = _first(source.WindowCenter), _first(source.WindowWidth)
    except (AttributeError, TypeError, ValueError, IndexError):
        return None
    function = str(source.get("VOILUTFunction") or "LINEAR").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID") or width < (1.0 if function == "LINEAR" else 1e-9):
        return None
    return Window(center, width, function)


def _first(value: Any) -> float:
    return float(value if isinstance(value, int | float | str) else value[0])


def _windowed(values: NDArray[np.float64], window: Window) -> NDArray[np.float64]:
    """PS3.3 C.11.2.1.2 (LINEAR) and C.11.2.1.3 (SIGMOID, LINEAR_EXACT), onto 0..1."""
    center, width = window.center, window.width
    if window.function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -700.0, 700.0)))
    if window.function == "LINEAR":
        center, width = center - 0.5, width - 1.0
    if width <= 0.0:
        return (values > center).astype(np.float64)
    return np.clip((values - center) / width + 0.5, 0.0, 1.0)


def _through_lut(values: NDArray[np.float64], item: Dataset) -> NDArray[np.float64]:
    """PS3.3 C.11.2.1.1: a table from the first mapped value on; values beyond it take its ends."""
    count, first, bits = (int(part) for part in item.LUTDescriptor)
    data = item.LUTData
    if isinstance(data, bytes):
        data = np.frombuffer(data, dtype=np.uint8 if len(data) == (count or 1 << 16) else "<u2")
    table = np.asarray(data, dtype=np.float64)[: count or 1 << 16]
    if not len(table):
        raise ValueError("an empty table")
    if values.min() < 0 and first >= 1 << 15:
        first -= 1 << 16
    places = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
    # Tables of 12 bits in fields of 16 are common; the bits that are stated decide.
    return table[places] / float(2 ** max(1, bits) - 1)


def _full_range(values: NDArray[np.float64], padding: NDArray[np.bool_]) -> NDArray[np.float64]:
    seen = values[~padding & np.isfinite(values)]
    if not seen.size or seen.min() == seen.max():
        return np.zeros(values.shape)
    low, high = seen.min(), seen.max()
    return (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / (high - low)


# ---- colour --------------------------------------------------------------------------------------------------------


def _palette(stored: NDArray[Any], dataset: Dataset) -> Pixels:
    """Indices → RGB (PS3.3 C.7.6.3.1.5); tables of 16 bits keep their upper eight."""
    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        coloured = apply_color_lut(stored, dataset)
        return (coloured >> 8).astype(np.uint8) if coloured.dtype.itemsize > 1 else coloured.astype(np.uint8)
    return np.stack([_through_palette(stored, dataset, name) for name in ("Red", "Green", "Blue")], axis=-1)


def _through_palette(stored: NDArray[Any], dataset: Dataset, name: str) -> Pixels:
    count, first, bits = (int(part) for part in dataset[f"{name}PaletteColorLookupTableDescriptor"].value)
    data = bytes(dataset[f"{name}PaletteColorLookupTableData"].value)
    count = count or 1 << 16
    # Tables of 8 bits come in bytes, with one more if they are odd, or in words.
    table = (
        np.frombuffer(data[: len(data) // 2 * 2], "<u2") if len(data) >= 2 * count else np.frombuffer(data, np.uint8)
    )
    table = table[:count]
    # Some writers state 16 bits and fill eight.
    entries = table >> 8 if bits > 8 and table.max() > 255 else table
    return entries[np.clip(stored.astype(np.int64) - first, 0, len(table) - 1)].astype(np.uint8)


def _colour(stored: NDArray[Any], dataset: Dataset) -> Pixels:
    if stored.ndim != 3 or stored.shape[2] != 3:
        raise ValueError("colour pixels without three samples")
    bits = int(dataset.BitsStored)
    if bits == 8 and stored.dtype == np.uint8:
        return stored
    return _to_8_bits(stored.astype(np.float64) / float(2**bits - 1))
