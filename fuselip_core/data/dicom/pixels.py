"""One frame of a DICOM file → an 8-bit picture, following the rendering pipeline of PS3.4 N.2.

Stored values → modality LUT or rescale → VOI LUT or window → polarity → 8 bits; palette, RGB and YBR become RGB. The
grey scale depends on header and settings. Only if the header has neither window nor VOI LUT does it depend on the
values, namely those of the whole series. No identity is read here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.encaps import get_frame
from pydicom.pixels import apply_color_lut, get_decoder, pixel_array
from pydicom.uid import RLELossless

from fuselip_core.data.dicom import grey
from fuselip_core.data.dicom.codec import coded_size, helper
from fuselip_core.data.dicom.file import complete_syntax
from fuselip_core.data.dicom.grey import Values, Window
from fuselip_core.images import UnreadableImage

Pixels = NDArray[np.uint8]
ValueRange = tuple[float, float]  # lowest and highest value after the modality LUT

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
# In order of robustness against damaged data.
PLUGINS = ("pydicom", "pillow", "pylibjpeg", "pyjpegls", "gdcm")
MAY_CRASH = ("gdcm",)


def render(
    dataset: Dataset, frame: int, window: Window | None, max_megapixels: float, series: ValueRange | None = None
) -> Pixels:
    """Frame `frame` (from 0) as uint8 (H, W) for grey or (H, W, 3) for colour pictures.

    window: replaces the file's own for CT, but not for other modalities, whose values have no common unit. series:
    range of values that frames without window are scaled by; by default that of all frames of the file. Raises
    UnreadableImage with the reason no_pixels, too_large, truncated_pixels, damaged_pixels or unsupported_pixels, which
    quotes no value of the file.
    """
    try:
        _check(dataset, max_megapixels)
        raw = _decode(dataset, frame)
        if dataset.PhotometricInterpretation in GREY:
            return _grey(raw, dataset, frame, window, series)
        colours = _palette if dataset.PhotometricInterpretation == "PALETTE COLOR" else _colour
        return colours(_significant_bits(raw, dataset), dataset)
    except UnreadableImage:
        raise
    except Exception as error:
        # Decoders and tables may raise anything on damaged or hostile input.
        raise UnreadableImage("damaged_pixels", f"contradictory values ({type(error).__name__})") from None


def lacks_window(dataset: Dataset, frames: tuple[int, ...], window: Window | None) -> bool:
    """Whether the header defines no grey scale for one of `frames`; pixel data need not be loaded."""
    if dataset.get("PhotometricInterpretation") not in GREY:
        return False
    return any(grey.voi_of(dataset, frame, window) is None for frame in frames)


def value_range(dataset: Dataset, max_megapixels: float) -> ValueRange | None:
    """Lowest and highest value of all readable frames, in the modality's unit and without padding; None without any."""
    found: ValueRange | None = None
    try:
        _check(dataset, max_megapixels)
        for frame in range(int(dataset.get("NumberOfFrames") or 1)):
            raw = _decode(dataset, frame)
            stored = _significant_bits(raw, dataset)
            values = grey.modality_values(stored, dataset, frame)[~grey.padding(raw, stored, dataset)]
            values = values[np.isfinite(values)]
            if values.size:
                found = joint_range(found, (float(values.min()), float(values.max())))
    except Exception:
        # The error is reported when the frame is rendered. Stopping here, in case a header claims a billion frames.
        return found
    return found


def joint_range(one: ValueRange | None, other: ValueRange | None) -> ValueRange | None:
    """The union of two ranges."""
    if one is None or other is None:
        return one or other
    return min(one[0], other[0]), max(one[1], other[1])


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
    """Stored values of a frame, (H, W) or (H, W, 3); YBR converted to RGB."""
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
    native = _is_native(dataset)
    return pixel_array(dataset, index=frame, decoding_plugin=plugin, correct_unused_bits=not native)


def _is_native(dataset: Dataset) -> bool:
    """Whether the encoding keeps the whole cells; other codecs keep only the stored bits."""
    syntax = dataset.file_meta.TransferSyntaxUID
    return syntax == RLELossless or syntax.is_deflated or not syntax.is_compressed


def _significant_bits(raw: NDArray[Any], dataset: Dataset) -> NDArray[Any]:
    """Values of BitsStored bits up to HighBit (PS3.5 8.1.1); pydicom ignores HighBit and takes the lowest bits."""
    allocated, bits = int(dataset.BitsAllocated), int(dataset.get("BitsStored") or dataset.BitsAllocated)
    if raw.dtype.kind not in "iu" or raw.dtype.itemsize * 8 != allocated or not _is_native(dataset):
        return raw
    high = int(dataset.get("HighBit") or bits - 1)
    if not bits - 1 <= high < allocated:
        high = bits - 1
    return (raw << (allocated - 1 - high)) >> (allocated - bits)


def _reason(failure: str) -> str:
    """The reason behind the decoders' messages, which may quote the file and so are not passed on."""
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
    """Compares the size in the code stream with the header, against decompression bombs and damaged files."""
    frames = int(dataset.get("NumberOfFrames") or 1)
    try:
        found = coded_size(get_frame(dataset.PixelData, frame, number_of_frames=frames))
    except Exception as error:
        raise UnreadableImage("damaged_pixels", f"no frame to decode ({type(error).__name__})") from None
    if found is not None and found != (dataset.Columns, dataset.Rows):
        raise UnreadableImage("damaged_pixels", "the coded picture has another size than the header says")


# ---- grey ----------------------------------------------------------------------------------------------------------


def _grey(raw: NDArray[Any], dataset: Dataset, frame: int, window: Window | None, series: ValueRange | None) -> Pixels:
    if raw.ndim != 2:
        raise ValueError("grey pixels in several samples")
    stored = _significant_bits(raw, dataset)
    values = grey.modality_values(stored, dataset, frame)
    voi = grey.voi_of(dataset, frame, window)
    if isinstance(voi, Window):
        shown = grey.windowed(values, voi)
    elif voi is not None:
        shown = grey.through_voi_lut(values, dataset, frame, voi)
    else:
        low, high = series or value_range(dataset, math.inf) or (0.0, 0.0)
        shown = (values - low) / (high - low) if high > low else np.zeros(values.shape)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = 1.0 - np.clip(shown, 0.0, 1.0)
    # Padding is black in either polarity.
    return _to_8_bits(np.where(grey.padding(raw, stored, dataset), 0.0, shown))


def _to_8_bits(shares: Values) -> Pixels:
    """Shares of full brightness, 0..1 → 0..255, halves rounded up; NaN becomes black."""
    return np.floor(np.clip(np.nan_to_num(shares), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


# ---- colour --------------------------------------------------------------------------------------------------------


def _palette(stored: NDArray[Any], dataset: Dataset) -> Pixels:
    """Indices → RGB (PS3.3 C.7.6.3.1.5); 16-bit tables are reduced to their upper 8 bits."""
    if "SegmentedRedPaletteColorLookupTableData" in dataset:
        coloured = apply_color_lut(stored, dataset)[..., :3]
        return (coloured >> 8 if coloured.dtype.itemsize > 1 else coloured).astype(np.uint8)
    # Not pydicom's apply_color_lut, which reads words in this machine's byte order.
    names = [f"{name}PaletteColorLookupTable" for name in ("Red", "Green", "Blue")]
    descriptors = [dataset[f"{name}Descriptor"].value for name in names]
    tables = [
        grey.entries(dataset[f"{name}Data"], descriptor, dataset)
        for name, descriptor in zip(names, descriptors, strict=True)
    ]
    # Some writers state 16 bits but use 8. All three tables are compared, since a single one may be dark.
    shift = 8 if max(table.max() for table in tables) > 255 else 0
    planes = [
        grey.look_up(stored, descriptor[1], table >> shift, signed=stored.dtype.kind == "i")
        for descriptor, table in zip(descriptors, tables, strict=True)
    ]
    return np.stack(planes, axis=-1).astype(np.uint8)


def _colour(stored: NDArray[Any], dataset: Dataset) -> Pixels:
    if stored.ndim != 3 or stored.shape[2] != 3:
        raise ValueError("colour pixels without three samples")
    bits = int(dataset.BitsStored)
    if bits == 8 and stored.dtype == np.uint8:
        return stored
    return _to_8_bits(stored.astype(np.float64) / float(2**bits - 1))
