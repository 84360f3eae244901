"""The grey scale of DICOM frames against values computed by hand from PS3.3 C.7.6.3 and C.11."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_dicom import DicomRecord, item, picture, records, save, shown, table
from PIL import Image
from pydicom import Dataset
from pydicom.pixels import compress
from pydicom.uid import ExplicitVRBigEndian, RLELossless, generate_uid

from fuselip_core.data.dicom.listing import DicomSettings, list_dicom


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELIP_PSEUDONYM_KEY", "a key for tests, drawn at random")


def bytes_table(descriptor: list[int], data: bytes, name: str = "OW") -> Any:
    """A lookup table whose entries are bytes, as most archives write them."""
    content = Dataset()
    content.add_new("LUTDescriptor", "US", descriptor)
    content.add_new("LUTData", name, data)
    return [content]


def big_endian(dataset: Dataset) -> Dataset:
    """The dataset as it is written in Explicit VR Big Endian; tables of bytes are the caller's to swap."""
    dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    if dataset.BitsAllocated == 16:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
    else:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").byteswap().tobytes()
    dataset["PixelData"].VR = "OW"
    return dataset


# ---- windows -----------------------------------------------------------------------------------------------------


def by_hand(value: float, center: float, width: float, function: str) -> int:
    """PS3.3 C.11.2.1.2.1, C.11.2.1.3.1 and C.11.2.1.3.2 word by word, with output from 0 to 255."""
    if function == "LINEAR":
        if value <= center - 0.5 - (width - 1) / 2:
            y = 0.0
        elif value > center - 0.5 + (width - 1) / 2:
            y = 255.0
        else:
            y = ((value - (center - 0.5)) / (width - 1) + 0.5) * 255
    elif function == "LINEAR_EXACT":
        if value <= center - width / 2:
            y = 0.0
        elif value > center + width / 2:
            y = 255.0
        else:
            y = ((value - center) / width + 0.5) * 255
    else:
        y = 255 / (1 + math.exp(min(-4 * (value - center) / width, 700)))
    return math.floor(y + 0.5)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("center", "width"), [(2048, 4096), (2048, 1), (0, 100), (0, 400), (60.5, 1.5), (100, 2)])
def test_every_function_is_the_standards(function: str, center: float, width: float) -> None:
    values = np.array(
        [[-2048, -200, -51, -50, -1, 0, 1, 49, 50, 60, 61, 99, 100, 101, 199, 2047, 2048, 4095]], np.int16
    )
    dataset = picture(values, WindowCenter=center, WindowWidth=width, VOILUTFunction=function)
    assert shown(dataset)[0].tolist() == [by_hand(value, center, width, function) for value in values[0].tolist()]


def test_two_slices_with_a_width_below_1_share_their_grey() -> None:
    """PET and rescaled MR have such widths; LINEAR is not defined for them and is read as LINEAR_EXACT."""
    header = {"WindowCenter": "0.4565323565", "WindowWidth": "0.9130647131"}
    header |= {"RescaleSlope": "0.0002442002587", "RescaleIntercept": "-0.0002442002587"}
    one = picture(np.array([[0, 500, 1000, 1871, 2500, 3742]], np.uint16), Modality="MR", **header)
    two = picture(np.array([[0, 100, 300, 500, 800, 1000]], np.uint16), Modality="MR", **header)
    assert shown(one).tolist() == [[0, 34, 68, 128, 170, 255]]
    assert shown(two).tolist() == [[0, 7, 20, 34, 54, 68]]


@pytest.mark.parametrize(
    ("centers", "widths"),
    [([7, 100], [0, 200]), ([7, 100], [-4, 200]), (["", 100], ["", 200]), ([7, 8, 100], [0, "", 200])],
)
def test_the_first_window_that_makes_sense_counts(centers: list[Any], widths: list[Any]) -> None:
    values = np.array([[0, 50, 100, 150]], np.uint8)
    dataset = picture(values, WindowCenter=centers, WindowWidth=widths, VOILUTFunction="LINEAR_EXACT")
    assert shown(dataset).tolist() == [[0, 64, 128, 191]]


@pytest.mark.parametrize("function", ["", "GAMMA"])
def test_a_function_that_is_none_is_linear(function: str) -> None:
    """The default of C.11.2.1.3."""
    values = np.array([[0, 40, 90]], np.uint8)
    assert shown(picture(values, WindowCenter=50.5, WindowWidth=101, VOILUTFunction=function))[0, 1] == 102


def test_each_frame_has_the_window_of_its_functional_groups() -> None:
    frames = np.stack([np.array([[0, 50, 100]], np.uint8)] * 4)
    dataset = picture(frames, NumberOfFrames=4, WindowCenter=50, WindowWidth=50, VOILUTFunction="LINEAR_EXACT")

    def window(center: float, width: float) -> Any:
        return item(WindowCenter=center, WindowWidth=width, VOILUTFunction="LINEAR_EXACT")

    lut = item(VOILUTSequence=table([101, 0, 8], [*range(100), 200]))
    dataset.SharedFunctionalGroupsSequence = item(FrameVOILUTSequence=window(0, 200))
    groups = [Dataset() for _ in range(4)]
    # A window, one that makes no sense, a table, none.
    for group, own in zip(groups, (window(100, 100), window(9, 0), lut), strict=False):
        group.FrameVOILUTSequence = own
    dataset.PerFrameFunctionalGroupsSequence = groups
    assert [shown(dataset, frame).tolist()[0] for frame in range(4)] == [
        [0, 0, 128],
        [128, 191, 255],
        [0, 50, 200],
        [128, 191, 255],
    ]
    del dataset.SharedFunctionalGroupsSequence
    assert shown(dataset, 3).tolist() == [[0, 128, 255]]


# ---- lookup tables -----------------------------------------------------------------------------------------------


def test_tables_of_words_in_big_endian() -> None:
    values = np.array([[0, 1, 2, 3]], np.uint16)
    voi = big_endian(picture(values))
    voi.VOILUTSequence = bytes_table([4, 0, 16], np.array([0, 0x1234, 0x8000, 0xFFFF], ">u2").tobytes())
    assert shown(voi).tolist() == [[0, 18, 128, 255]]
    modality = big_endian(picture(values, WindowCenter=512, WindowWidth=1024, VOILUTFunction="LINEAR_EXACT"))
    modality.ModalityLUTSequence = bytes_table([4, 0, 16], np.array([0, 256, 512, 1024], ">u2").tobytes())
    modality.ModalityLUTSequence[0].ModalityLUTType = "US"
    assert shown(modality).tolist() == [[0, 64, 128, 255]]


def test_tables_of_bytes_within_words_in_big_endian() -> None:
    """PS3.5 7.3: OW is swapped by words, whatever they hold; the first entry is the lower byte."""
    voi = big_endian(picture(np.array([[0, 1, 2, 3]], np.uint16)))
    voi.VOILUTSequence = bytes_table([4, 0, 8], bytes([50, 0, 255, 100]))
    assert shown(voi).tolist() == [[0, 50, 100, 255]]
    voi.VOILUTSequence = bytes_table([4, 0, 8], bytes([0, 50, 100, 255]), "OB")
    assert shown(voi).tolist() == [[0, 50, 100, 255]]


def test_palettes_in_big_endian() -> None:
    palette = big_endian(picture(np.array([[0, 1, 2, 3]], np.uint8), "PALETTE COLOR"))
    planes = ("Red", [0, 0xFFFF, 0, 0x8000]), ("Green", [0, 0, 0xFFFF, 0x8000]), ("Blue", [0, 0x1234, 0, 0x8000])
    for name, entries in planes:
        palette.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [4, 0, 16])
        palette.add_new(f"{name}PaletteColorLookupTableData", "OW", np.array(entries, ">u2").tobytes())
    assert shown(palette).tolist() == [[[0, 0, 0], [255, 0, 18], [0, 255, 0], [128, 128, 128]]]


def test_a_dark_plane_of_a_16_bit_palette_stays_dark() -> None:
    palette = picture(np.array([[0, 1]], np.uint8), "PALETTE COLOR")
    for name, entries in (("Red", [0, 0xFFFF]), ("Green", [0, 0xFFFF]), ("Blue", [0, 200])):
        palette.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [2, 0, 16])
        palette.add_new(f"{name}PaletteColorLookupTableData", "OW", np.array(entries, "<u2").tobytes())
    assert shown(palette).tolist() == [[[0, 0, 0], [255, 255, 0]]]


def test_a_palette_of_signed_indices() -> None:
    palette = picture(np.array([[-2, -1, 0, 1]], np.int16), "PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        palette.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [3, 65535, 8])
        palette.add_new(f"{name}PaletteColorLookupTableData", "OW", bytes([10, 20, 30, 0]))
    assert shown(palette)[..., 0].tolist() == [[10, 10, 20, 30]]


@pytest.mark.parametrize("first", [-1, 65535])
def test_a_modality_table_of_signed_values(first: int) -> None:
    """The first value is signed where pixels are, although many files write it as US (C.11.1.1)."""
    values = np.array([[-2, -1, 0, 1, 9]], np.int16)
    dataset = picture(values, WindowCenter=500, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT")
    content = Dataset()
    content.add_new("LUTDescriptor", "SS" if first < 0 else "US", [3, first, 16])
    content.add_new("LUTData", "US", [120, 500, 1000])
    content.ModalityLUTType = "HU"
    dataset.ModalityLUTSequence = [content]
    assert shown(dataset).tolist() == [[31, 31, 128, 255, 255]]


def test_a_table_after_rescaling_begins_at_a_negative_value() -> None:
    """64512 as US is -1024, where the header allows negative values: also in a slice that has none."""
    lut = table([2048, 64512, 8], [min(value // 4, 255) for value in range(2048)])
    for stored, expected in (([0, 400, 1024], [0, 100, 255]), ([400, 800, 1024], [100, 200, 255])):
        values = np.array([stored], np.uint16)
        ct = picture(values, BitsStored=12, HighBit=11, RescaleSlope=1, RescaleIntercept=-1024, VOILUTSequence=lut)
        assert shown(ct).tolist() == [expected]
    high = table([4, 64512, 8], [0, 100, 200, 255])
    assert shown(picture(np.array([[64511, 64513, 65535]], np.uint16), VOILUTSequence=high)).tolist() == [[0, 100, 255]]


@pytest.mark.parametrize(("bits", "count"), [(8, 4096), (9, 512), (10, 1024), (12, 4096), (16, 65536)])
def test_tables_of_any_depth_and_length(bits: int, count: int) -> None:
    places = [0, 1, count // 3, count - 1]
    entries = np.linspace(0, 2**bits - 1, count).round().astype("<u2")
    expected = [math.floor(entries[place] / (2**bits - 1) * 255 + 0.5) for place in places]
    for data in (entries.tobytes(), *([entries.astype(np.uint8).tobytes()] if bits == 8 else [])):
        dataset = picture(np.array([places], np.uint16), VOILUTSequence=bytes_table([count % 65536, 0, bits], data))
        assert shown(dataset).tolist() == [expected]


# ---- stored values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rle", [False, True])
def test_bits_that_do_not_end_at_the_first(rle: bool) -> None:
    """12 bits below HighBit 15, with an overlay in the lowest four (PS3.5 8.1.1), unsigned and signed."""
    stored = np.array([[0, 1024, 2048, 4095]], np.uint16)
    header = {"BitsStored": 12, "HighBit": 15, "WindowWidth": 4096, "VOILUTFunction": "LINEAR_EXACT"}
    unsigned = picture((stored << 4) | 0b1010, WindowCenter=2048, **header)
    signed = picture((((stored - 2048).astype(np.uint16) << 4) | 0b0101).view(np.int16), WindowCenter=0, **header)
    for dataset in (unsigned, signed):
        if rle:
            compress(dataset, RLELossless)
        assert shown(dataset).tolist() == [[0, 64, 128, 255]]


@pytest.mark.parametrize("high", [11, 3, 99])
def test_bits_above_the_highest_do_not_count(high: int) -> None:
    """An overlay in the upper four of 16 bits; a HighBit that cannot be is left out of account."""
    values = np.array([[0, 1024, 2048, 4095]], np.uint16) | 0x5000
    dataset = picture(values, BitsStored=12, HighBit=high, WindowCenter=2048, WindowWidth=4096)
    dataset.VOILUTFunction = "LINEAR_EXACT"
    assert shown(dataset).tolist() == [[0, 64, 128, 255]]


def test_padding_beyond_the_stored_bits_and_written_as_unsigned() -> None:
    header = {"WindowCenter": 2048, "WindowWidth": 4096, "VOILUTFunction": "LINEAR_EXACT"}
    beyond = picture(np.array([[63536, 2096, 4095]], np.uint16), BitsStored=12, HighBit=11, **header)
    beyond.add_new("PixelPaddingValue", "US", 63536)  # -2000 as US; its lower 12 bits are 2096
    assert shown(beyond).tolist() == [[0, 130, 255]]
    signed = picture(np.array([[-2000, -1999, 0, 2048]], np.int16), "MONOCHROME1", **header)
    signed.add_new("PixelPaddingValue", "US", 63536)
    assert shown(signed).tolist() == [[0, 255, 255, 128]]


def test_padding_of_floating_point_pixels() -> None:
    dataset = picture(np.zeros((1, 4), np.uint8), BitsAllocated=32, BitsStored=32, HighBit=31)
    del dataset.PixelData
    dataset.FloatPixelData = np.array([-1e30, 0.0, 0.5, 1.0], "<f4").tobytes()
    dataset.FloatPixelPaddingValue = float(np.float32(-1e30))
    assert shown(dataset).tolist() == [[0, 0, 128, 255]]


# ---- without a window --------------------------------------------------------------------------------------------


def pictures_of(root: Path, **settings: Any) -> dict[str, list[int]]:
    """File name and frame → the first row of its picture."""
    found = {}
    for image in list_dicom(root, DicomSettings(**settings)).images:
        png = image.place.read()
        (root.parent / "a.png").write_bytes(png)
        found[f"{image.place.file.name}{image.place.frame}"] = np.asarray(Image.open(root.parent / "a.png"))[0].tolist()
    return found


def test_slices_without_a_window_are_scaled_by_their_series(tmp_path: Path) -> None:
    series, root = generate_uid(), tmp_path / "in"
    for name, values in (("a", [0, 500, 1000]), ("b", [0, 100, 200]), ("c", [-1000, 50, 100])):
        dataset = picture(np.array([values], np.int16), Modality="MR", SeriesInstanceUID=series)
        dataset.add_new("PixelPaddingValue", "SS", -1000)
        save(dataset, root / name)
    other = picture(np.array([[0, 100, 200]], np.int16), Modality="MR")
    save(other, root / "other")
    windowed = picture(np.array([[0, 500, 9000]], np.int16), SeriesInstanceUID=series)
    windowed.WindowCenter, windowed.WindowWidth, windowed.VOILUTFunction = 500, 1000, "LINEAR_EXACT"
    save(windowed, root / "windowed")
    assert pictures_of(root) == {
        "a0": [0, 128, 255],
        "b0": [0, 26, 51],
        "c0": [0, 13, 26],
        "other0": [0, 128, 255],
        "windowed0": [0, 128, 255],
    }


def test_frames_without_a_window_are_scaled_by_all_of_their_file(tmp_path: Path) -> None:
    frames = np.array([[[0, 100]], [[0, 10]], [[0, 50]]], np.uint8)
    dataset = picture(frames, NumberOfFrames=3)
    assert [shown(dataset, frame).tolist() for frame in range(3)] == [[[0, 255]], [[0, 26]], [[0, 128]]]
    save(dataset, tmp_path / "in" / "a")
    assert pictures_of(tmp_path / "in") == {"a1": [0, 26]}
    assert pictures_of(tmp_path / "in", frames=3) == {"a0": [0, 255], "a1": [0, 26], "a2": [0, 128]}


def test_a_preset_needs_no_range_and_a_damaged_neighbour_costs_none(tmp_path: Path) -> None:
    series, root = generate_uid(), tmp_path / "in"
    for name, values in (("a", [-1350, -600, 150]), ("b", [0, 100, 3000])):
        save(picture(np.array([values], np.int16), Modality="CT", SeriesInstanceUID=series), root / name)
    assert all(image.place.series is None for image in list_dicom(root, DicomSettings(window="lung")).images)
    assert pictures_of(root, window="lung") == {"a0": [0, 128, 255], "b0": [230, 247, 255]}
    assert {image.place.series for image in list_dicom(root).images} == {(-1350.0, 3000.0)}
    damaged = picture(np.array([[0, 9000]], np.int16), SeriesInstanceUID=series, Rows=400)
    save(damaged, root / "c")
    assert [image.place.series for image in list_dicom(root).images] == [(-1350.0, 3000.0)] * 3
    reasons = [entry.reason for entry in records(root) if not isinstance(entry, DicomRecord)]
    assert reasons == ["truncated_pixels"]


def test_prepared_pictures_of_a_series_share_their_scale(tmp_path: Path) -> None:
    """Through `fuselip data prepare`'s function, with ranges read by several processes."""
    from fuselip_core.config import PrepareSettings
    from fuselip_core.data.prepare.prepare import prepare_data
    from fuselip_core.data.shards.reader import PreparedData

    series, rng = generate_uid(), np.random.default_rng(5)
    for number in range(130):
        values = rng.integers(0, 100 + 30 * number, (16, 16)).astype(np.uint16)
        values[0, :2] = 1000, 0
        save(picture(values, SeriesInstanceUID=series, BodyPartExamined="HEAD"), tmp_path / "in" / f"{number:03d}")
    largest = max(image.place.series[1] for image in list_dicom(tmp_path / "in").images)
    prepare_data(PrepareSettings(source="dicom", root=tmp_path / "in", workers=2), tmp_path / "out")
    prepared = PreparedData(tmp_path / "out")
    found = []
    for split in prepared.splits:
        for batch in prepared.iter_images(split, ["bytes"]):
            for row in batch.to_pylist():
                (tmp_path / "a.png").write_bytes(row["bytes"])
                found.append(np.asarray(Image.open(tmp_path / "a.png"))[0, 0])
    assert len(found) > 100 and set(found) == {math.floor(1000 / largest * 255 + 0.5)}
