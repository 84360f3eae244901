"""DICOM: pixels worked out by hand, pydicom's own files all accounted for, and nobody's identity in any output."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pydicom.data
import pytest
from make_dicom import SECRETS, DicomRecord, item, picture, records, save, shown, table, with_identities
from PIL import Image
from pydicom import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000, DeflatedExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, generate_uid
from stand_in_embedder import StandIn
from typer.testing import CliRunner

from fuselip_core.cli.main import app
from fuselip_core.config import check_settings
from fuselip_core.data.dicom import codec, deidentify
from fuselip_core.data.dicom import file as dicom_file
from fuselip_core.data.dicom.cases import split_cases
from fuselip_core.data.dicom.codec import coded_size
from fuselip_core.data.dicom.deidentify import PseudonymError, Pseudonyms, load_key, scrub
from fuselip_core.data.dicom.grey import Window
from fuselip_core.data.dicom.listing import (
    DicomPlace,
    DicomSettings,
    find_files,
    list_dicom,
    settings_for,
    terms,
)
from fuselip_core.data.pair import DataError, SetAside
from fuselip_core.data.shards.schemas import IMAGE_SCHEMA
from fuselip_core.images import UnreadableImage
from fuselip_core.search.embed import embed_archive

EXAMPLES = Path(pydicom.data.__file__).parent / "test_files"
# The bars of pydicom's SC_rgb files, from the top, ten rows each.
BARS = [
    (255, 0, 0),
    (255, 128, 128),
    (0, 255, 0),
    (128, 255, 128),
    (0, 0, 255),
    (128, 128, 255),
    (0, 0, 0),
    (64, 64, 64),
    (192, 192, 192),
    (255, 255, 255),
]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELIP_PSEUDONYM_KEY", "a key for tests, drawn at random")


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


# ---- pixels, by hand ---------------------------------------------------------------------------------------------


def test_grey_without_a_window_takes_its_whole_range() -> None:
    values = np.array([[10, 20], [30, 110]], np.uint8)
    assert shown(picture(values)).tolist() == [[0, 26], [51, 255]]  # 10 of 100 is 25.5, halves go up
    assert shown(picture(values, "MONOCHROME1")).tolist() == [[255, 230], [204, 0]]
    assert shown(picture(np.full((2, 2), 7, np.uint8))).tolist() == [[0, 0], [0, 0]]


def test_linear_window_in_hounsfield_units() -> None:
    """PS3.3 C.11.2.1.2: centre 40, width 400 goes from -160 to 239."""
    stored = np.array([[-1000, -160, 0, 40, 239, 1000]], np.int16) + 1024
    ct = picture(stored.astype(np.uint16), RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    assert shown(ct).tolist() == [[0, 0, 102, 128, 255, 255]]
    ct.PhotometricInterpretation = "MONOCHROME1"
    assert shown(ct).tolist() == [[255, 255, 153, 127, 0, 0]]


def test_presets_are_for_ct_and_the_first_of_several_windows_counts() -> None:
    stored = np.array([[-1350, -600, 0, 150, 700]], np.int16)
    ct = picture(stored, Modality="CT", RescaleSlope=1, RescaleIntercept=0, WindowCenter=[0, 9], WindowWidth=[100, 9])
    assert shown(ct).tolist() == [[0, 0, 129, 255, 255]]
    lung = Window(*terms()["windows"]["lung"])
    assert shown(ct, window=lung).tolist() == [[0, 128, 230, 255, 255]]
    ct.Modality = "MR"
    assert shown(ct, window=lung).tolist() == [[0, 0, 129, 255, 255]]


def test_exact_and_sigmoid_windows() -> None:
    values = np.array([[0, 50, 100, 125, 200]], np.uint8)
    exact = picture(values, WindowCenter=100, WindowWidth=200, VOILUTFunction="LINEAR_EXACT")
    assert shown(exact).tolist() == [[0, 64, 128, 159, 255]]
    sigmoid = picture(values, WindowCenter=100, WindowWidth=100, VOILUTFunction="SIGMOID")
    expected = [255 / (1 + np.exp(-4 * (v - 100) / 100)) for v in values[0].tolist()]
    assert shown(sigmoid)[0].tolist() == [int(e + 0.5) for e in expected]


@pytest.mark.parametrize(("center", "width"), [("", ""), (50, 0), (50, -3), (50, None)])
def test_windows_that_make_no_sense_are_left_out(center: Any, width: Any) -> None:
    values = np.array([[0, 100]], np.uint8)
    assert shown(picture(values, WindowCenter=center, WindowWidth=width)).tolist() == [[0, 255]]


def test_voi_lut_replaces_the_window() -> None:
    values = np.array([[0, 10, 11, 12, 13, 99]], np.uint8)
    lut = picture(values, WindowCenter=5, WindowWidth=2, VOILUTSequence=table([4, 10, 8], [0, 100, 200, 255]))
    assert shown(lut).tolist() == [[0, 0, 100, 200, 255, 255]]
    deep = picture(values, VOILUTSequence=table([4, 10, 12], [0, 1024, 2048, 4095]))
    assert shown(deep).tolist() == [[0, 0, 64, 128, 255, 255]]


def test_voi_lut_over_negative_values() -> None:
    values = np.array([[-2, -1, 0, 1]], np.int16)
    lut = picture(values, VOILUTSequence=table([3, 65535, 8], [10, 20, 30]))
    assert shown(lut).tolist() == [[10, 10, 20, 30]]


def test_modality_lut_comes_before_the_window() -> None:
    values = np.array([[0, 1, 2]], np.uint8)
    dataset = picture(values, WindowCenter=100, WindowWidth=200, VOILUTFunction="LINEAR_EXACT")
    dataset.ModalityLUTSequence = table([3, 0, 16], [0, 100, 200])
    dataset.ModalityLUTSequence[0].ModalityLUTType = "US"
    assert shown(dataset).tolist() == [[0, 128, 255]]


def test_padding_is_black_in_either_polarity_and_outside_the_range() -> None:
    values = np.array([[-2000, 0, 50, 100]], np.int16)
    for photometric, expected in (("MONOCHROME2", [0, 0, 128, 255]), ("MONOCHROME1", [0, 255, 128, 0])):
        dataset = picture(values, photometric)
        dataset.add_new("PixelPaddingValue", "SS", -2000)
        assert shown(dataset).tolist() == [expected]
        dataset.add_new("PixelPaddingRangeLimit", "SS", -1000)
        assert shown(dataset).tolist() == [expected]


def test_signed_twelve_bit_and_one_bit_and_wide_values() -> None:
    assert shown(picture(np.array([[-5, 0, 5]], np.int16))).tolist() == [[0, 128, 255]]
    assert shown(picture(np.array([[0, 2048, 4095]], np.uint16), BitsStored=12, HighBit=11)).tolist() == [[0, 128, 255]]
    assert shown(picture(np.array([[0, 2**31, 2**32 - 1]], np.uint32))).tolist() == [[0, 128, 255]]
    bits = picture(np.zeros((1, 8), np.uint8), BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=b"\x05\0")
    assert shown(bits).tolist() == [[255, 0, 255, 0, 0, 0, 0, 0]]


def test_floating_point_pixels() -> None:
    dataset = picture(np.zeros((1, 4), np.uint8), BitsAllocated=32, BitsStored=32, HighBit=31)
    del dataset.PixelData
    dataset.FloatPixelData = np.array([0.0, 0.5, 1.0, np.nan], "<f4").tobytes()
    assert shown(dataset).tolist() == [[0, 128, 255, 0]]


def test_palettes_of_8_and_16_bits() -> None:
    indices = np.array([[0, 1, 2, 9]], np.uint8)
    for bits, scale in ((8, 1), (16, 257)):
        dataset = picture(indices, "PALETTE COLOR")
        for name, entries in (("Red", [255, 0, 10]), ("Green", [0, 255, 20]), ("Blue", [0, 0, 30])):
            dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [3, 0, bits])
            data = np.array(entries, "<u2") * scale if bits == 16 else np.array([*entries, 0], np.uint8)
            dataset.add_new(f"{name}PaletteColorLookupTableData", "OW", data.tobytes())
        assert shown(dataset).tolist() == [[[255, 0, 0], [0, 255, 0], [10, 20, 30], [10, 20, 30]]]


def test_rgb_by_pixel_and_by_plane_and_of_16_bits() -> None:
    colours = np.array([[[255, 0, 0], [1, 2, 3]]], np.uint8)
    assert shown(picture(colours, "RGB")).tolist() == colours.tolist()
    planes = picture(colours, "RGB", PlanarConfiguration=1, PixelData=colours.transpose(2, 0, 1).tobytes())
    assert shown(planes).tolist() == colours.tolist()
    deep = np.array([[[65535, 32768, 0]]], np.uint16)
    assert shown(picture(deep, "RGB")).tolist() == [[[255, 128, 0]]]


def test_ybr_becomes_rgb() -> None:
    """PS3.3 C.7.6.3.1.2: R = Y + 1.402 (Cr - 128), and so on."""
    colours = np.array([[[76, 85, 255], [128, 128, 128]]], np.uint8)
    assert shown(picture(colours, "YBR_FULL")).tolist() == [[[254, 0, 0], [128, 128, 128]]]
    halved = picture(colours, "YBR_FULL_422", PixelData=bytes([76, 76, 85, 255]))
    assert shown(halved).tolist() == [[[254, 0, 0], [254, 0, 0]]]


def test_a_jpeg_inside_is_decoded_to_rgb() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (16, 8), (200, 30, 60)).save(stream, "JPEG", quality=100, subsampling=0)
    dataset = picture(np.zeros((8, 16, 3), np.uint8), "YBR_FULL")
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([stream.getvalue()])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    assert np.abs(shown(dataset).astype(int) - (200, 30, 60)).max() <= 2


@pytest.mark.parametrize(
    ("photometric", "syntax", "lossy"), [("YBR_RCT", JPEG2000Lossless, False), ("YBR_ICT", JPEG2000, True)]
)
def test_colour_transforms_of_jpeg_2000(photometric: str, syntax: str, lossy: bool) -> None:
    """The transform is part of the code stream: undone once, by its decoder, and not again for the header's word."""
    colours = np.zeros((32, 32, 3), np.uint8)
    colours[:16], colours[16:] = (200, 30, 60), (10, 240, 90)
    stream = io.BytesIO()
    Image.fromarray(colours).save(stream, "JPEG2000", irreversible=lossy, mct=1, no_jp2=True)
    dataset = picture(np.zeros((32, 32, 3), np.uint8), photometric)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([stream.getvalue()])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    assert np.abs(shown(dataset).astype(int) - colours).max() <= (4 if lossy else 0)


def test_frames_of_a_series_in_one_file(tmp_path: Path) -> None:
    frames = np.stack([np.array([[0, 10 * i]], np.uint8) for i in range(5)])
    path = save(picture(frames, NumberOfFrames=5, WindowCenter=20.5, WindowWidth=41, Modality="XA"), tmp_path / "a")
    middle = [record for record in records(tmp_path) if isinstance(record, DicomRecord)]
    assert [opened(record.png).tolist() for record in middle] == [[[0, 128]]]
    three = [record for record in records(tmp_path, DicomSettings(frames=3)) if isinstance(record, DicomRecord)]
    assert [opened(record.png)[0, 1] for record in three] == [0, 128, 255]
    assert len({record.image_id for record in three}) == 3 and len({record.case for record in three}) == 1
    assert len(list_dicom(tmp_path, DicomSettings(frames=99)).images) == 5
    with pytest.raises(UnreadableImage):
        DicomPlace(path, frame=5).read()


def test_enhanced_files_have_a_window_and_slope_for_each_frame() -> None:
    frames = np.stack([np.array([[0, 5, 10]], np.uint8)] * 2)
    dataset = picture(frames, NumberOfFrames=2)
    dataset.SharedFunctionalGroupsSequence = item(
        PixelValueTransformationSequence=item(RescaleSlope=10, RescaleIntercept=-50)
    )
    windows = [item(WindowCenter=c, WindowWidth=100, VOILUTFunction="LINEAR_EXACT") for c in (0, 50)]
    groups = [Dataset() for _ in windows]
    for group, window in zip(groups, windows, strict=True):
        group.FrameVOILUTSequence = window
    dataset.PerFrameFunctionalGroupsSequence = groups
    assert shown(dataset, 0).tolist() == [[0, 128, 255]]
    assert shown(dataset, 1).tolist() == [[0, 0, 128]]


# ---- pydicom's own files -----------------------------------------------------------------------------------------

FAULTS = {
    "JPEG-lossy.dcm": "unsupported_pixels",
    "JPGExtended.dcm": "unsupported_pixels",
    "JPEG2000-embedded-sequence-delimiter.dcm": "damaged_pixels",
    "MR_truncated.dcm": "truncated_pixels",
    "badVR.dcm": "damaged_header",
}


def test_every_example_is_listed_or_set_aside() -> None:
    settings = DicomSettings()
    listing = list_dicom(EXAMPLES, settings)
    files = {path for path in EXAMPLES.rglob("*") if path.is_file()}
    aside = {entry.id for entry in listing.set_aside if entry.id.startswith("file-")}
    found = find_files(EXAMPLES, aside, settings)
    assert {image.place.file for image in listing.images} | set(found.values()) == files
    reasons = {found[entry.id].name: entry.reason for entry in listing.set_aside if entry.id in found}
    assert reasons["rtplan.dcm"] == reasons["DICOMDIR"] == reasons["waveform_ecg.dcm"] == "no_pixels"
    assert reasons["README.txt"] == reasons["zipMR.gz"] == reasons["test1.json"] == "not_dicom"
    assert reasons["liver_1frame.dcm"] == reasons["rtdose.dcm"] == "derived_object"
    assert reasons["MR_small_RLE.dcm"] == "repeated_id"  # the same instance in several encodings


def test_every_example_with_pixels_is_converted_or_says_why_not() -> None:
    converted = 0
    for path in sorted(EXAMPLES.rglob("*")):
        if not path.is_file() or "TINY_ALPHA" in path.parts:
            continue
        try:
            pixels = opened(DicomPlace(path, max_megapixels=10).read())
        except UnreadableImage as error:
            expected = FAULTS.get(path.name)
            if expected and not (expected == "unsupported_pixels" and error.reason == "damaged_pixels"):
                assert error.reason in (expected, "damaged_pixels"), path.name
            else:
                assert error.reason in ("no_pixels", "not_dicom", "damaged_pixels", "unsupported_pixels"), path.name
            continue
        converted += pixels.max() > pixels.min()  # tiny cut-outs may be all of one grey
        assert path.name not in FAULTS or path.name == "JPGExtended.dcm", path.name
        assert pixels.dtype == np.uint8 and pixels.ndim in (2, 3), path.name
    assert converted >= 80


def test_one_picture_in_every_encoding() -> None:
    plain = DicomPlace(EXAMPLES / "MR_small.dcm").read()
    for kind in ("RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"):
        assert DicomPlace(EXAMPLES / f"MR_small_{kind}.dcm").read() == plain, kind


def test_colour_bars_in_every_encoding() -> None:
    bars = np.repeat(np.array(BARS, np.uint8), 10, axis=0)[:, None].repeat(100, axis=1)
    exact = ["SC_rgb_rle", "SC_rgb_rle_2frame", "SC_rgb_rle_16bit", "SC_rgb_rle_32bit", "SC_rgb_jpeg_gdcm"]
    lossy = ["gdcm_KY", "dcmtk_+eb+cr", "dcmtk_+eb+cy+n1", "dcmtk_+eb+cy+n2", "dcmtk_+eb+cy+np", "dcmtk_+eb+cy+s2"]
    lossy += ["dcmtk_+eb+cy+s4", "jls_lossy_line", "jls_lossy_sample", "jpeg_lossy_gdcm"]
    for name in [*exact, "SC_ybr_full_422_uncompressed", *(f"SC_rgb_{kind}" for kind in lossy)]:
        pixels = opened(DicomPlace(EXAMPLES / f"{name}.dcm").read()).astype(int)
        # Away from the edges, where halved colours and block borders blur.
        middle = np.abs(pixels - bars).reshape(10, 10, 100, 3)[:, 4:6]
        assert middle.max() <= (1 if name in exact else 6), name


def test_old_files_without_preamble_are_read(tmp_path: Path) -> None:
    whole = save(picture(np.array([[0, 255]], np.uint8)), tmp_path / "whole")
    bare = tmp_path / "bare"
    bare.write_bytes(whole.read_bytes()[132:])
    assert DicomPlace(bare).read() == DicomPlace(whole).read()


# ---- hostile and broken files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"x", b"\x08\x00\x05\x00", b"DICM" * 100, bytes(128) + b"DICM", b"\xff" * 9999]
)
def test_what_is_no_dicom_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UnreadableImage) as caught:
        DicomPlace(tmp_path / "a").read()
    assert caught.value.reason in ("not_dicom", "damaged_header", "no_pixels")


def test_any_truncation_is_a_reason_and_nothing_else(tmp_path: Path) -> None:
    for name in ("MR_small.dcm", "SC_rgb_rle.dcm", "SC_rgb_jpeg_gdcm.dcm", "JPEG2000.dcm", "examples_palette.dcm"):
        content = (EXAMPLES / name).read_bytes()
        for cut in np.random.default_rng(3).integers(1, len(content), 12):
            (tmp_path / "a").write_bytes(content[:cut])
            with contextlib.suppress(UnreadableImage):
                assert DicomPlace(tmp_path / "a").read()


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    dataset = picture(np.zeros((2, 2), np.uint8), Rows=60000, Columns=60000)
    with pytest.raises(UnreadableImage, match="too large"):
        DicomPlace(save(dataset, tmp_path / "a")).read()


def test_a_stream_larger_than_its_header_is_refused(tmp_path: Path) -> None:
    """A bomb: the header says 2 x 2, the JPEG inside is far larger."""
    stream = io.BytesIO()
    Image.new("L", (3000, 3000)).save(stream, "JPEG")
    dataset = picture(np.zeros((2, 2), np.uint8))
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.PixelData = encapsulate([stream.getvalue()])
    dataset["PixelData"].is_undefined_length = True
    with pytest.raises(UnreadableImage, match="another size than the header says"):
        DicomPlace(save(dataset, tmp_path / "a")).read()


def test_sizes_of_coded_streams() -> None:
    picture_of = Image.effect_noise((37, 21), 90)
    for kind in ("JPEG", "JPEG2000"):
        stream = io.BytesIO()
        picture_of.save(stream, kind, **({"no_jp2": True} if kind == "JPEG2000" else {}))
        assert coded_size(stream.getvalue()) == (37, 21)
    stream = io.BytesIO()
    picture_of.save(stream, "JPEG2000")
    assert coded_size(stream.getvalue()) == (37, 21)
    assert coded_size(b"") is None and coded_size(b"\xff\xd8\xff") is None and coded_size(b"RIFF1234WEBP") is None


def test_a_deflated_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = picture(np.array([[0, 255]], np.uint8))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = save(dataset, tmp_path / "a")
    assert opened(DicomPlace(path).read()).tolist() == [[0, 255]]
    compressor = zlib.compressobj(wbits=-15)
    bomb = compressor.compress(bytes(50 << 20)) + compressor.flush()
    content = path.read_bytes()
    group = int.from_bytes(content[140:144], "little")
    path.write_bytes(content[: 144 + group] + bomb)
    monkeypatch.setattr(dicom_file, "LARGEST_INFLATED", 20 << 20)
    with pytest.raises(UnreadableImage, match="too large: inflates"):
        DicomPlace(path).read()


def test_photometric_interpretations_that_no_one_shows(tmp_path: Path) -> None:
    for name in ("HSV", "CMYK", "MUSTERMANN"):
        dataset = picture(np.zeros((2, 2, 3), np.uint8), name)
        with pytest.raises(UnreadableImage, match="unsupported") as caught:
            DicomPlace(save(dataset, tmp_path / "a")).read()
        assert "MUSTERMANN" not in str(caught.value)


# ---- the codec that may crash ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def helper() -> Iterator[codec.Helper]:
    pytest.importorskip("gdcm")
    own = codec.Helper()
    yield own
    own.close()


def test_a_codec_that_dies_costs_one_picture(helper: codec.Helper) -> None:
    path = EXAMPLES / "SC_rgb_jpeg_gdcm.dcm"
    first = helper.decode(path, 0, "gdcm")
    assert first.shape == (100, 100, 3)
    process = helper._process
    assert process is not None
    process.send_signal(19)  # stopped, so that it is killed while it is asked
    threading.Timer(0.3, process.kill).start()
    with pytest.raises(codec.CodecError, match="died"):
        helper.decode(path, 0, "gdcm")
    assert np.array_equal(helper.decode(path, 0, "gdcm"), first)


def test_a_codec_that_hangs_is_ended(helper: codec.Helper, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / "SC_rgb_jpeg_gdcm.dcm"
    helper.decode(path, 0, "gdcm")
    assert helper._process is not None
    helper._process.send_signal(19)
    monkeypatch.setattr(codec, "LONGEST_SECONDS", 0.2)
    with pytest.raises(codec.CodecError, match="too long"):
        helper.decode(path, 0, "gdcm")


def test_what_the_codec_refuses_is_told(helper: codec.Helper) -> None:
    with pytest.raises(codec.CodecError, match="does not support"):
        helper.decode(EXAMPLES / "JPGExtended.dcm", 0, "gdcm")


def test_the_helper_ends_with_its_parent(tmp_path: Path) -> None:
    pytest.importorskip("gdcm")
    code = (
        "import sys; from pathlib import Path; from fuselip_core.data.dicom.codec import helper\n"
        f"helper().decode(Path({str(EXAMPLES / 'SC_rgb_jpeg_gdcm.dcm')!r}), 0, 'gdcm')\n"
        "print(helper()._process.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _alive(child):
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


# ---- identities --------------------------------------------------------------------------------------------------

REVEALING = (
    "Mustermann",
    "Erika",
    "4711",
    "1957",
    "Hauptstrasse",
    "ACC2024",
    "Quacksalber",
    "Theodor",
    "Knipser",
    "Klinikum",
    "CTSTATION9",
    "20240131",
    "31.01",
    "0815",
    "STUDY77",
    "456-7890",
)


def revealed(text: str) -> list[str]:
    """Words of REVEALING in a text, but for hashes: any four digits turn up in those by chance."""
    text = re.sub(r"[0-9a-f]{16,}", "", text.lower())
    return [word for word in REVEALING if word.lower() in text]


def test_no_identity_leaves_the_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    good = with_identities(np.array([[0, 9]], np.uint8))
    save(good, tmp_path / "Mustermann^Erika" / "20240131.dcm")
    save(good, tmp_path / "Mustermann^Erika" / "copy.dcm")  # the same instance again
    save(with_identities(np.array([[0, 9]], np.uint8), BurnedInAnnotation="YES"), tmp_path / "Mustermann burned.dcm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a value that its type forbids, about which pydicom warns with the value
        save(with_identities(np.array([[0, 9]], np.uint8), PatientAge="Mustermann4711"), tmp_path / "odd")
    broken = (tmp_path / "odd").read_bytes()
    (tmp_path / "Mustermann broken.dcm").write_bytes(broken[: len(broken) - 1] if len(broken) % 2 else broken[:-4])
    (tmp_path / "Mustermann.txt").write_text("Mustermann")
    (tmp_path / "text.csv").write_text(
        f"StudyInstanceUID,text\n{good.StudyInstanceUID},"
        '"Mustermann, Erika (MRN 4711): nodule in the left upper lobe, 8 mm. Seen 31.01.2024, Dr. Quacksalber."\n'
    )
    caplog.clear()
    capfd.readouterr()
    listing = list_dicom(tmp_path)
    output = [repr(entry) for entry in listing.set_aside] + listing.notes + [repr(pair) for pair in listing.pairs]
    output += [f"{image.image_id} {image.case} {image.split} {image.modality}" for image in listing.images]
    output += [str(record) for record in records(tmp_path)]
    captured = capfd.readouterr()
    everything = "\n".join([*output, caplog.text, captured.out, captured.err])
    assert not revealed(everything)
    assert good.SOPInstanceUID not in everything and good.StudyInstanceUID not in everything
    assert "nodule in the left upper lobe, 8 mm" in everything
    assert "CT of the chest. CT Thorax. Lung 1.0" in everything
    reasons = sorted(entry.reason for entry in listing.set_aside)
    assert reasons == ["burned_in_text", "damaged_header", "not_dicom", "repeated_id"]


def test_prepared_shards_and_manifest_name_nobody(tmp_path: Path) -> None:
    from fuselip_core.config import PrepareSettings
    from fuselip_core.data.prepare.prepare import prepare_data
    from fuselip_core.data.shards.reader import PreparedData

    root = tmp_path / "Mustermann"
    rng = np.random.default_rng(8)
    values = rng.integers(0, 256, (4, 64, 64), dtype=np.uint8)
    files = [with_identities(part, PatientID=f"MRN-4711-{number}") for number, part in enumerate(values)]
    for number, file in enumerate(files):
        save(file, root / "Mustermann^Erika" / f"20240131-{number}")
    (root / "Knipser.txt").write_text("Ida")
    prepare_data(PrepareSettings(source="dicom", root=root, workers=1, most_set_aside=1), tmp_path / "out")
    prepared = PreparedData(tmp_path / "out")
    raw, content = b"", ""
    for path in (tmp_path / "out").iterdir():
        raw += path.name.encode() + path.read_bytes()
        content += path.read_text(encoding="utf-8") if path.suffix in (".json", ".jsonl") else ""
    for split in prepared.splits:
        content += repr(prepared.pairs(split).to_pylist())
        columns = [name for name in IMAGE_SCHEMA.names if name != "bytes"]
        content += repr([batch.to_pylist() for batch in prepared.iter_images(split, columns)])
    assert sum(prepared.image_count(split) for split in prepared.splits) == 4
    assert "CT of the chest. CT Thorax" in content
    assert not revealed(content)
    for word in (*REVEALING, *(file.SOPInstanceUID for file in files)):
        assert len(word) < 6 or word.lower().encode() not in raw.lower(), word


IDENTIFYING = {"PN", "UI", "DA", "DT", "TM"}


def identifying_values(dataset: Dataset) -> set[str]:
    """Names, ids, dates and UIDs anywhere in a header, of six characters and more: shorter ones are words too."""
    found: set[str] = set()
    for tag in dataset.keys():  # noqa: SIM118  iterating decodes values, some of which are damaged
        with contextlib.suppress(Exception):
            element = dataset[tag]
            if element.VR == "SQ":
                found = found.union(*map(identifying_values, element.value))
            elif element.VR in IDENTIFYING or element.keyword in SECRETS:
                values = element.value if isinstance(element.value, pydicom.multival.MultiValue) else [element.value]
                found |= {str(value).strip() for value in values}
    return {value for value in found if len(value) >= 6 and not value.startswith("1.2.840.10008.")}


def test_nobody_in_pydicoms_files_is_in_what_is_prepared(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from fuselip_core.config import PrepareSettings
    from fuselip_core.data.inspect.page import inspect_data
    from fuselip_core.data.prepare.prepare import prepare_data
    from fuselip_core.data.shards.reader import PreparedData

    caplog.set_level(logging.DEBUG)
    secrets: set[str] = set()
    for path in (path for path in EXAMPLES.rglob("*") if path.is_file()):
        with contextlib.suppress(Exception), dicom_file.discreet():
            secrets |= identifying_values(pydicom.dcmread(path, stop_before_pixels=True))
    assert len(secrets) > 300
    manifest = prepare_data(
        PrepareSettings(source="dicom", root=EXAMPLES, workers=1, most_set_aside=1), tmp_path / "out"
    )
    inspect_data(tmp_path / "out", tmp_path / "look")
    prepared, captured = PreparedData(tmp_path / "out"), capfd.readouterr()
    texts = [(tmp_path / "out" / name).read_text() for name in ("manifest.json", "quarantine.jsonl")]
    texts += [(tmp_path / "look" / "index.html").read_text(), caplog.text, captured.out, captured.err]
    columns = [name for name in IMAGE_SCHEMA.names if name != "bytes"]
    for split in prepared.splits:
        texts.append(repr(prepared.pairs(split).to_pylist()))
        texts += [repr(batch.to_pylist()) for batch in prepared.iter_images(split, columns)]
    everything = re.sub(r"[0-9a-f]{16,}|base64,[\w+/=]+", "", "\n".join(texts).lower())
    assert not [value for value in secrets if value.lower() in everything]
    # Every file is accounted for: it is a picture, or set aside under a pseudonym.
    files = sum(path.is_file() for path in EXAMPLES.rglob("*"))
    reasons = manifest["quarantine"]
    pictures = sum(part["images"] for part in manifest["counts"].values())
    assert pictures + sum(reasons.values()) == files


def test_every_secret_of_the_fixture_is_covered() -> None:
    covered = " ".join(REVEALING).lower()
    for value in SECRETS.values():
        assert any(word.lower() in value.lower() for word in REVEALING) or value in ("121314",), (value, covered)


def test_pictures_carry_no_metadata(tmp_path: Path) -> None:
    png = DicomPlace(save(with_identities(np.array([[0, 9]], np.uint8)), tmp_path / "a")).read()
    assert Image.open(io.BytesIO(png)).info == {}


def test_burned_in_text_is_set_aside_unless_the_user_insists(tmp_path: Path) -> None:
    save(picture(np.array([[0, 9]], np.uint8), BurnedInAnnotation="YES"), tmp_path / "a")
    listing = list_dicom(tmp_path)
    assert [entry.reason for entry in listing.set_aside] == ["burned_in_text"] and not listing.images
    assert listing.notes[0].startswith("1 DICOM files were set aside") and "guarantee" in listing.notes[0]
    assert list_dicom(tmp_path, DicomSettings(keep_burned_in=True)).images


def test_ids_follow_the_key_and_not_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = with_identities(np.array([[0, 9]], np.uint8))
    save(dataset, tmp_path / "one" / "a.dcm")
    save(dataset, tmp_path / "two" / "deep" / "b")
    one, two = (list_dicom(tmp_path / name).images[0] for name in ("one", "two"))
    assert (one.image_id, one.case) == (two.image_id, two.case)
    monkeypatch.setenv("FUSELIP_PSEUDONYM_KEY", "another key, drawn at random too")
    other = list_dicom(tmp_path / "one").images[0]
    assert other.image_id != one.image_id and other.case != one.case


def test_the_key_is_made_once_and_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSELIP_PSEUDONYM_KEY")
    path = tmp_path / "config" / "pseudonym.key"
    threads = [threading.Thread(target=load_key, args=(path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    key = load_key(path)
    assert len(key) == 64 and load_key(path) == key and path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]
    monkeypatch.setattr(deidentify.platformdirs, "user_config_path", lambda _: tmp_path / "home")
    assert load_key() != key and (tmp_path / "home" / "pseudonym.key").exists()
    path.write_text("short")
    with pytest.raises(PseudonymError, match="has 5 characters; use at least 16"):
        load_key(path)
    with pytest.raises(PseudonymError, match="cannot be stored"):
        load_key(path / "below a file")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CT of the chest, 5 mm, T2-weighted, L4/L5, 120 kV", "CT of the chest, 5 mm, T2-weighted, L4/L5, 120 kV"),
        ("MR Brain with 3.0 T", "MR Brain with 3.0 T"),
        ("DR CHEST PA", "DR CHEST PA"),
        ("seen by Dr. Smith on 31.01.2024 at 12:34", "seen by ___ on ___ at ___"),
        ("Mr. John Doe, MRN: 123456, tel. 030 1234 5678", "___, tel. ___"),
        ("prior of January 5, 2023 and 2 March 2021", "prior of ___ and ___"),
        ("DOE^JANE 1957-03-02", "___"),
        ("mail jane@doe.example or https://doe.example/x?y=1", "mail ___ or ___"),
        ("uid 1.2.840.113619.2.5.1762583153 acc A1234567", "uid ___"),
        ("Patient: Jane Doe shows a cyst of 12 x 9 mm", "___ shows a cyst of 12 x 9 mm"),
        ("line\nbreaks\tand  spaces", "line breaks and spaces"),
        ("", ""),
    ],
)
def test_scrubbing_finds_identities_and_leaves_medicine(text: str, expected: str) -> None:
    assert scrub(text) == expected


def test_names_deep_in_the_header_are_scrubbed_too(tmp_path: Path) -> None:
    """People whom only a nested or a private element names, such as a reader or another patient."""
    dataset = picture(np.array([[0, 9]], np.uint8), StudyDescription="Chest read by Quacksalber for Knipser and Huber")
    observer, content = Dataset(), Dataset()
    observer.PersonName = "Quacksalber^Theodor"
    content.ContentSequence = [observer]
    dataset.RequestAttributesSequence = [content]
    dataset.private_block(0x0011, "ACME", create=True).add_new(1, "PN", ["Knipser^Ida", "Huber^Max"])
    save(dataset, tmp_path / "a")
    (pair,) = list_dicom(tmp_path).pairs
    assert pair.target.text == "Image. Chest read by for and."


def test_scrubbing_knows_the_names_of_the_header() -> None:
    assert scrub("Nodule, LI WEI, wei", ["Li^Wei"]) == "Nodule, ___"
    assert scrub("A liver lesion", ["A^B"]) == "A liver lesion"
    assert scrub("C++ (x", ["(x", "C++"]) == "___"
    # Chinese and Japanese put no spaces around a name.
    assert scrub("山田太郎の胸部CT", ["Yamada^Tarou=山田^太郎=やまだ^たろう"]) == "___の胸部CT"
    assert scrub("김희중 chest", ["Hong^Gildong=洪^吉洞=홍^길동"]) == "김희중 chest"


# ---- text, cases and splits --------------------------------------------------------------------------------------


def test_text_from_the_header(tmp_path: Path) -> None:
    values = np.array([[0, 9]], np.uint8)
    save(
        picture(
            values,
            Modality="DX",
            BodyPartExamined="KNEE",
            ViewPosition="AP",
            ImageLaterality="L",
            StudyDescription="Knee",
        ),
        tmp_path / "a",
    )
    save(picture(values, Modality="CT"), tmp_path / "b")
    save(picture(values, Modality="MR", BodyPartExamined="CSPINE"), tmp_path / "c")
    listing = list_dicom(tmp_path)
    assert [pair.target.text for pair in listing.pairs] == [
        "X-ray of the left knee, anteroposterior view.",
        "MR of the cervical spine.",
    ]
    assert [image.modality for image in listing.images] == ["X-ray", "CT", "MR"]
    assert not listing.set_aside and "1 of 3 DICOM pictures have no text in the table or header" in listing.notes


def test_text_from_a_table_by_what_is_closest(tmp_path: Path) -> None:
    files = [picture(np.array([[0, 9]], np.uint8), BodyPartExamined="HEAD") for _ in range(6)]
    for file in files[1:4]:
        file.StudyInstanceUID = files[1].StudyInstanceUID
    for number, file in enumerate(files):
        save(file, tmp_path / "deep" / f"f{number}.dcm")
    rows = [
        ("", "", files[1].StudyInstanceUID, "of the study", ""),
        (files[2].SOPInstanceUID, "", "", "of the instance", "test"),
        ("", "deep/f3.dcm", "", "of the path", ""),
        ("", "f4.dcm", "", "of the name", "valid"),
        ("1.2.3", "", "", "of nothing", ""),
    ]
    lines = ["SOPInstanceUID,file,StudyInstanceUID,Caption,split", *(",".join(row) for row in rows)]
    path = tmp_path.parent / f"{tmp_path.name}.csv"
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    listing = list_dicom(tmp_path, DicomSettings(text=path))
    texts = {pair.query.image: pair.target.text for pair in listing.pairs}
    by_file = {image.place.file.name: (texts[image.image_id], image.split) for image in listing.images}
    assert [by_file[f"f{n}.dcm"][0] for n in range(6)] == [
        "Image of the head.",
        "of the study",
        "of the instance",
        "of the path",
        "of the name",
        "Image of the head.",
    ]
    assert by_file["f2.dcm"][1] == "test" and by_file["f4.dcm"][1] == "valid"
    assert "4 of 5 rows of the table of texts belong to a used file" in listing.notes


def test_rows_that_cannot_be_trusted_are_set_aside_by_their_number(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b", "one/same", "two/same", "c")):
        study = "1.2.3" if name in "ac" else generate_uid()
        save(picture(np.array([[0, number]], np.uint8), StudyInstanceUID=study), tmp_path / f"{name}.dcm")
    (tmp_path / "text.csv").write_text(
        "file, StudyInstanceUID, text, split\n"
        "a.dcm, 1.2.3, text of a, test\n"
        "b.dcm,, first text of b, val\n"
        "b.dcm,, second text of b,\n"  # row 3: which of the two is right?
        "same.dcm,, text of one of two,\n"
        "c.dcm,, an unquoted, comma, train\n"  # line 6
        "one\\same.dcm,, the first of two, train\n"
        "b.dcm,, first text of b, validation\n"  # says the same again
        "a.dcm,, text of a, hold-out\n"
        ",, of nobody,\n"
    )
    listing = list_dicom(tmp_path)
    texts = {pair.query.image: pair.target.text for pair in listing.pairs}
    found = {
        image.place.file.relative_to(tmp_path).as_posix(): (texts.get(image.image_id), image.split)
        for image in listing.images
    }
    assert found["a.dcm"] == ("text of a", "test") and found["b.dcm"] == ("first text of b", "valid")
    assert found["one/same.dcm"] == ("the first of two", "train")
    # Neither a text of another image of the study, nor one of a file of the same name.
    assert found["c.dcm"][0] is None and found["two/same.dcm"][0] is None
    assert sorted((entry.id, entry.reason) for entry in listing.set_aside) == [
        ("text table, line 6", "bad_row"),
        ("text table, row 3", "repeated_row"),
        ("text table, row 8", "unknown_split"),
        ("text table, row 9", "no_image_named"),
    ]
    assert "3 of 9 rows of the table of texts belong to a used file" in listing.notes


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "in", tmp_path / "Mustermann"
    for number in range(6):
        save(picture(np.array([[0, 9]], np.uint8)), (root if number < 3 else elsewhere / "deep") / f"{number}.dcm")
    (root / "linked").symlink_to(elsewhere)
    (root / "again").symlink_to(elsewhere)
    (elsewhere / "deep" / "up").symlink_to(root)
    (root / "lost").symlink_to(tmp_path / "Huber")
    listing = list_dicom(root)
    assert sorted(image.place.file.name for image in listing.images) == [f"{number}.dcm" for number in range(6)]
    assert any("broken links" in note for note in listing.notes) and not listing.set_aside
    assert not [note for note in listing.notes if "lost" in note or "Huber" in note]


def test_settings_in_the_folder(tmp_path: Path) -> None:
    save(picture(np.array([[0, 9]], np.uint8), Modality="CT"), tmp_path / "a")
    (tmp_path / "dicom.yaml").write_text("window: bone\nframes: 2\n")
    place = list_dicom(tmp_path).images[0].place
    assert isinstance(place, DicomPlace) and place.window == "bone"
    assert pickle.loads(pickle.dumps(place)) == place
    for content, message in (
        ("window: ear", "unknown window 'ear'"),
        ("wndow: lung", "Extra inputs"),
        ("a: [", "not valid YAML"),
    ):
        (tmp_path / "dicom.yaml").write_text(content)
        with pytest.raises(DataError, match=message):
            list_dicom(tmp_path)
    (tmp_path / "dicom.yaml").unlink()
    asked = check_settings({"prepare": {"source": "dicom", "dicom": {"window": "ear"}}}, origin="test").prepare
    with pytest.raises(DataError, match=r"prepare\.dicom: window: .*unknown window 'ear'"):
        settings_for(tmp_path, asked)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a,b\n", "lacks a column text"), ("file,b\n", "lacks a column text"), (None, "cannot be read")],
)
def test_a_table_that_is_none_says_what_it_needs(tmp_path: Path, content: str | None, message: str) -> None:
    save(picture(np.array([[0, 9]], np.uint8)), tmp_path / "dicom" / "a")
    path = tmp_path / "t.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        list_dicom(tmp_path / "dicom", DicomSettings(text=path))


def test_an_empty_or_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="DICOM files"):
            list_dicom(path)


def test_what_belongs_together_stays_together(tmp_path: Path) -> None:
    values = np.array([[0, 9]], np.uint8)
    study = generate_uid()
    files = {
        "a": picture(values, PatientID="P1", StudyInstanceUID=study),
        "b": picture(values, PatientID="P1"),
        "c": picture(values, StudyInstanceUID=study),  # without a patient, but of a study that names one
        "d": picture(values, PatientID="P2"),
        "e": picture(values),
        "f": picture(values),
    }
    for name, file in files.items():
        save(file, tmp_path / name)
    cases = {image.place.file.name: image.case for image in list_dicom(tmp_path).images}
    assert cases["a"] == cases["b"] == cases["c"]
    assert len({cases[name] for name in "adef"}) == 4
    splits: dict[str, set[str]] = {}
    for image in list_dicom(tmp_path).images:
        splits.setdefault(image.case, set()).add(image.split)
    assert all(len(sides) == 1 for sides in splits.values())


def test_one_picture_of_three_patients_is_in_one_split(tmp_path: Path) -> None:
    """Exports name a patient anew; where the splits are drawn here, no copy stays on another side."""
    from fuselip_core.config import PrepareSettings
    from fuselip_core.data.prepare.prepare import prepare_data

    rng = np.random.default_rng(3)
    shared, *others = rng.integers(0, 256, (31, 64, 64), dtype=np.uint8)
    for number, own in enumerate(others):
        for name, values in (("own", own), ("shared", shared)):
            save(picture(values, PatientID=f"P{number}", BodyPartExamined="CHEST"), tmp_path / "in" / f"{name}{number}")
    settings = PrepareSettings(source="dicom", root=tmp_path / "in", workers=1, most_set_aside=1)
    counts = prepare_data(settings, tmp_path / "out")["counts"]
    assert set(counts) == {"train", "valid", "test"}
    # Each case still has its own picture; of the shared one only test has copies.
    assert all(counts[split]["images"] == counts[split]["cases"] for split in ("train", "valid"))
    assert counts["test"]["images"] == 2 * counts["test"]["cases"]


def test_file_names_that_are_no_utf_8(tmp_path: Path) -> None:
    save(picture(np.array([[0, 9]], np.uint8), BodyPartExamined="CHEST"), tmp_path / "a")
    (tmp_path / "a").rename(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller.dcm"))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller.txt")).write_text("Huber")
    listing = list_dicom(tmp_path)
    assert len(listing.images) == 1 and [entry.reason for entry in listing.set_aside] == ["not_dicom"]
    assert set(find_files(tmp_path, {listing.set_aside[0].id}, DicomSettings())) == {listing.set_aside[0].id}


def test_the_command_line_names_files_that_were_set_aside(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fuselip_core.cli.data import app
    from fuselip_core.errors import FuselipError

    save(picture(np.array([[0, 9]], np.uint8)), tmp_path / "a")
    (tmp_path / "notes.txt").write_text("Huber")
    (aside,) = list_dicom(tmp_path).set_aside
    found = CliRunner().invoke(app, ["find-files", str(tmp_path), aside.id])
    assert json.loads(found.output) == {aside.id: str(tmp_path / "notes.txt")}
    lost = CliRunner().invoke(app, ["find-files", str(tmp_path), "file-0"])
    assert isinstance(lost.exception, FuselipError) and "has the pseudonym file-0 with this key" in str(lost.exception)


def test_patients_stay_on_their_side_when_more_come() -> None:
    pseudonyms = Pseudonyms(b"a key of sixteen")
    cases = [pseudonyms.of("case", str(number)) for number in range(2000)]
    few, many = (split_cases(set(part), pseudonyms, 0.1, 0.2) for part in (cases[:500], cases))
    assert all(many[case] == side for case, side in few.items())
    shares = {side: sum(other == side for other in many.values()) / 2000 for side in ("train", "valid", "test")}
    assert abs(shares["test"] - 0.1) < 0.03 and abs(shares["valid"] - 0.2) < 0.03


@pytest.mark.parametrize(("count", "sides"), [(1, {"train"}), (2, {"train", "test"}), (3, {"train", "valid", "test"})])
def test_few_patients_fill_train_first(count: int, sides: set[str]) -> None:
    for seed in range(20):
        pseudonyms = Pseudonyms(b"%16d" % seed)
        cases = {pseudonyms.of("case", str(number)) for number in range(count)}
        got = set(split_cases(cases, pseudonyms, 0.1, 0.1).values())
        assert "train" in got and (got == sides or count == 2)
    assert set(split_cases({"a", "b"}, Pseudonyms(b"x" * 16), 0.0, 0.0).values()) == {"train"}


# ---- burned-in text ----------------------------------------------------------------------------------------------


def test_text_in_the_picture_sets_it_aside_and_markers_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.zeros((4, 4), np.uint8)
    deidentify.refuse_text(pixels, lambda _: [("L", 0.99), ("R.", 0.9), ("AP", 0.9), ("DOE^JANE", 0.2)])
    with pytest.raises(UnreadableImage, match="pieces of text found in the picture: 2") as caught:
        deidentify.refuse_text(pixels, lambda _: [("DOE^JANE", 0.9), ("1957-03-02", 0.8), ("L", 0.9)])
    assert "DOE" not in str(caught.value) and caught.value.reason == "burned_in_text"
    monkeypatch.setattr(deidentify, "_reader", lambda: lambda _: [("DOE^JANE", 0.9)])
    monkeypatch.setattr("fuselip_core.data.dicom.listing.require_reader", lambda: None)
    save(picture(np.array([[0, 9]], np.uint8)), tmp_path / "a")
    found = list(records(tmp_path, DicomSettings(ocr=True)))
    assert [entry.reason for entry in found if isinstance(entry, SetAside)] == ["burned_in_text"]


def test_without_the_extra_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    save(picture(np.array([[0, 9]], np.uint8)), tmp_path / "a")
    with pytest.raises(ValueError, match=r"install fuselip-rocov2\[ocr\]"):
        list_dicom(tmp_path, DicomSettings(ocr=True))  # before a single picture is converted
    deidentify._reader.cache_clear()
    with pytest.raises(ValueError, match=r"install fuselip-rocov2\[ocr\]"):
        deidentify.refuse_text(np.zeros((4, 4), np.uint8))
    deidentify._reader.cache_clear()


def test_the_real_reader_finds_a_name() -> None:
    pytest.importorskip("rapidocr")
    from PIL import ImageDraw, ImageFont

    image = Image.new("L", (400, 120), 20)
    ImageDraw.Draw(image).text((20, 40), "DOE^JANE 1957-03-02", fill=250, font=ImageFont.load_default(28))
    with pytest.raises(UnreadableImage, match="burned in text"):
        deidentify.refuse_text(np.asarray(image))


def test_an_archive_without_any_text_is_prepared_and_embedded(tmp_path: Path) -> None:
    """Headers that describe nothing: pictures alone are what many archives hold."""
    for number in range(4):
        values = np.random.default_rng(number).integers(0, 255, (24, 24), dtype=np.uint8)
        scan = picture(values, PatientID=f"p{number}")
        del scan.Modality
        save(scan, tmp_path / "scans" / f"{number}.dcm")
    words = ["data", "prepare", "--source", "dicom", "--root", str(tmp_path / "scans"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.exception
    counts = json.loads(done.stdout)["counts"]
    assert sum(part["images"] for part in counts.values()) == 4
    assert not any(part["pairs"] for part in counts.values())
    for source in ("out", "scans"):
        table = tmp_path / f"{source}.parquet"
        assert embed_archive(tmp_path / source, table, StandIn()).rows == 4  # type: ignore[arg-type]
        rows = pq.read_table(table).to_pylist()
        assert np.allclose([np.linalg.norm(row["embedding"]) for row in rows], 1)
        assert not any(row["text"] for row in rows)
