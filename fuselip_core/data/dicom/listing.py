"""Lists a folder of DICOM files as a data set of 8-bit pictures with de-identified text.

Files are listed by their headers; `DicomPlace.read` converts a frame to PNG, in any process. Ids are keyed hashes
(`deidentify`). Text comes from a table or from descriptions in the header, and identities are removed from it. Reasons
and notes quote no value of a file. A `dicom.yaml` in the folder sets fields of `DicomSettings`; a `text.csv` is the
table.

None of this guarantees anonymity: burned-in text without a flag, faces in head scans and unusual wording remain.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from pydantic import Field, ValidationError, field_validator
from pydicom import Dataset

from fuselip_core import config
from fuselip_core.data.dicom.cases import DicomHeader, group_cases, patient_key, split_cases
from fuselip_core.data.dicom.deidentify import Pseudonyms, load_key, refuse_text, require_reader, scrub
from fuselip_core.data.dicom.file import discreet, read_dataset
from fuselip_core.data.dicom.grey import Window
from fuselip_core.data.dicom.header_text import compose, identities
from fuselip_core.data.dicom.pixels import ValueRange, joint_range, lacks_window, render, value_range
from fuselip_core.data.dicom.text_table import KEY_COLUMNS, TextTable
from fuselip_core.data.pair import DataError, ImageEntry, Listing, SetAside, caption_pair, one_line, require_folder
from fuselip_core.data.places import Place
from fuselip_core.data.walk import files_below
from fuselip_core.data.workers import process_pool
from fuselip_core.files import read_json
from fuselip_core.images import UnreadableImage
from fuselip_core.progress import track

SETTINGS_FILE, TEXT_FILE = "dicom.yaml", "text.csv"
FILES_A_WORKER = 64  # starting a process takes as long as reading this many files


class DicomSettings(config.DicomSettings):
    """The section `prepare.dicom` with a checked window, and settings that all sources share."""

    max_megapixels: float = Field(default=120.0, gt=0, description="Larger frames are set aside, in megapixels.")
    workers: int = Field(default=1, ge=1, description="Processes that read pixels.")

    @field_validator("window")
    @classmethod
    def _known_window(cls, name: str) -> str:
        if name != "file" and name not in terms()["windows"]:
            raise ValueError(f"unknown window '{name}'; use one of file, {', '.join(terms()['windows'])}")
        return name


@functools.cache
def terms() -> dict[str, Any]:
    """Words for DICOM codes, and window presets (centre, width in Hounsfield units)."""
    return read_json(Path(__file__).with_name("terms.json"))


def preset(window: str) -> Window | None:
    """A window preset by name; None for "file", which means each file's own window."""
    return None if window == "file" else Window(*terms()["windows"][window])


@dataclass(frozen=True, slots=True)
class DicomPlace(Place):
    """One frame of a DICOM file. series: range of values for frames without window, see `render`."""

    frame: int = 0
    window: str = "file"
    series: ValueRange | None = None
    ocr: bool = False
    max_megapixels: float = 120.0

    def read(self) -> bytes:
        """The frame as PNG, 8 bits, grey or RGB; raises UnreadableImage, which quotes nothing of the file."""
        with discreet():
            dataset = read_dataset(self.file)
            pixels = render(dataset, self.frame, preset(self.window), self.max_megapixels, self.series)
        if self.ocr:
            refuse_text(pixels)
        stream = io.BytesIO()
        # Fast compression: size matters little, since the pictures stay on this machine.
        Image.fromarray(pixels).save(stream, "PNG", compress_level=3)
        return stream.getvalue()


# ---- listing -------------------------------------------------------------------------------------------------------


def list_dicom(root: Path, settings: DicomSettings | None = None) -> Listing:
    """All usable pictures below `root`, with their texts if any, split by patient; raises DataError.

    Without `settings`, uses ``dicom.yaml`` in `root`, if there is one. Unusable files are set aside under a pseudonym
    of their path, which `find_files` resolves with the key.
    """
    require_folder(root, "DICOM files")
    settings = settings or _settings_of(root)
    if settings.ocr:
        require_reader()
    pseudonyms = Pseudonyms(load_key(settings.key_file))
    table = TextTable.read(_table_path(root, settings))
    listing = Listing(own_splits=True)

    def set_aside(path: Path, split: str, reason: str, detail: str) -> None:
        listing.set_aside.append(SetAside(_file_id(pseudonyms, root, path), split, reason, detail))

    for name, reason, detail in table.set_aside:
        listing.set_aside.append(SetAside(name, "train", reason, detail))
    headers: list[DicomHeader] = []
    broken_links: list[str] = []
    for path in track(_files(root, settings, broken_links), "read DICOM headers"):
        try:
            headers.append(_header(path, settings))
        except UnreadableImage as error:
            set_aside(path, "train", error.reason, error.detail)
    flagged = sum(item.reason == "burned_in_text" for item in listing.set_aside)
    cases = group_cases(headers, pseudonyms)
    splits = split_cases(set(cases.values()), pseudonyms, settings.test_share, settings.valid_share)
    ranges = _series_ranges(headers, settings)
    table.tell_apart(header.path.relative_to(root) for header in headers)
    seen: set[str] = set()
    for header in headers:
        case = cases[patient_key(header)]
        path = header.path.relative_to(root)
        row = table.row_of(path, header.keys)
        split = (row.split if row is not None else "") or splits[case]
        identity = header.keys["SOPInstanceUID"] or str(path)
        if identity in seen:
            set_aside(header.path, split, "repeated_id", "an instance listed before")
            continue
        seen.add(identity)
        text = one_line(scrub(row.text, header.known) if row is not None else header.caption)
        for place in _places(header, ranges.get(header.series), settings):
            image_id = pseudonyms.of("image", f"{identity}#{place.frame}")
            image = ImageEntry(image_id, split, case=case, place=place, modality=header.modality)
            listing.images.append(image)
            if text:
                listing.pairs.append(caption_pair(image, text))
    _note(listing, flagged, table, len(splits), settings)
    if broken_links:  # not quoted, since file names may contain people's names
        listing.notes.append("the DICOM folder has broken links; `find -L FOLDER -type l` lists them")
    return listing


def _places(header: DicomHeader, series: ValueRange | None, settings: DicomSettings) -> Iterator[DicomPlace]:
    for frame in header.frames:
        yield DicomPlace(
            header.path,
            frame=frame,
            window=settings.window,
            series=series,
            ocr=settings.ocr,
            max_megapixels=settings.max_megapixels,
        )


def _series_ranges(headers: Sequence[DicomHeader], settings: DicomSettings) -> dict[str, ValueRange]:
    """Series → range of values of its files without window, which share a grey scale."""
    lacking = [header for header in headers if header.lacks_window]
    if not lacking:
        return {}
    found: dict[str, ValueRange] = {}
    read = functools.partial(_range_of_file, max_megapixels=settings.max_megapixels)
    with process_pool(max(1, min(settings.workers, len(lacking) // FILES_A_WORKER))) as pool:
        paths = [header.path for header in lacking]
        each = map(read, paths) if pool is None else pool.map(read, paths, chunksize=16)
        for header, values in zip(lacking, track(each, "read series without window", total=len(lacking)), strict=True):
            joint = joint_range(found.get(header.series), values)
            if joint is not None:
                found[header.series] = joint
    return found


def _range_of_file(path: Path, max_megapixels: float) -> ValueRange | None:
    try:
        with discreet():
            return value_range(read_dataset(path), max_megapixels)
    except UnreadableImage:
        return None  # set aside later, when its picture is read


def settings_for(root: Path, settings: config.PrepareSettings) -> DicomSettings:
    """The settings in ``dicom.yaml`` in `root`, overridden by the section `prepare.dicom`; raises DataError."""
    stated = settings.dicom.model_dump(exclude_unset=True) if settings.dicom else {}
    return _settings_of(root, {**stated, "workers": settings.workers})


def _settings_of(root: Path, stated: Mapping[str, Any] | None = None) -> DicomSettings:
    path = root / SETTINGS_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
        return DicomSettings.model_validate({**(content or {}), **(stated or {})})
    except (yaml.YAMLError, UnicodeDecodeError, TypeError):
        raise DataError(f"{path} is not valid YAML; write lines such as 'window: lung'") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise DataError(f"{path if path.exists() else 'prepare.dicom'}: {'; '.join(lines)}") from None


def _table_path(root: Path, settings: DicomSettings) -> Path | None:
    if settings.text is not None:
        return settings.text if settings.text.is_absolute() or settings.text.exists() else root / settings.text
    return root / TEXT_FILE if (root / TEXT_FILE).exists() else None


def _files(root: Path, settings: DicomSettings, broken_links: list[str] | None = None) -> list[Path]:
    others = {root / SETTINGS_FILE, root / TEXT_FILE, root / "download.json"}
    text = settings.text.resolve() if settings.text is not None else None
    return [path for path in files_below(root, notes=broken_links) if path not in others and path.resolve() != text]


def _header(path: Path, settings: DicomSettings) -> DicomHeader:
    """Raises UnreadableImage for a file that is not a usable picture."""
    dataset = read_dataset(path, header_only=True)
    try:
        with discreet():
            return _take(path, dataset, settings)
    except UnreadableImage:
        raise
    except Exception as error:
        # pydicom decodes values only when they are accessed, and fails on invalid ones.
        raise UnreadableImage("damaged_header", type(error).__name__) from None


def _take(path: Path, dataset: Dataset, settings: DicomSettings) -> DicomHeader:
    if "DirectoryRecordSequence" in dataset:
        raise UnreadableImage("no_pixels", "a directory of other files")
    if "Rows" not in dataset or "Columns" not in dataset:
        raise UnreadableImage("no_pixels", "a file without a picture")
    code = str(dataset.get("Modality") or "").upper()
    if code in terms()["derived"] and not settings.keep_derived:
        raise UnreadableImage("derived_object", f"modality {code}")
    if str(dataset.get("BurnedInAnnotation") or "").upper() == "YES" and not settings.keep_burned_in:
        raise UnreadableImage("burned_in_text", "the header says so")
    patient = " ".join(str(dataset.get(name) or "").strip() for name in ("IssuerOfPatientID", "PatientID")).strip()
    known, frames = identities(dataset), _middle(int(dataset.get("NumberOfFrames") or 1), settings.frames)
    return DicomHeader(
        path=path,
        keys={name: str(dataset.get(name) or "").strip() for name in KEY_COLUMNS if name != "file"},
        patient=patient,
        frames=frames,
        lacks_window=lacks_window(dataset, frames, preset(settings.window)),
        modality=terms()["modalities"].get(code),
        caption=compose(dataset, terms(), known),
        known=known,
    )


def _middle(count: int, wanted: int) -> tuple[int, ...]:
    """`wanted` evenly spaced frames of `count`; for one, the middle frame."""
    if count < 1:
        raise ValueError("no frames")
    wanted = min(wanted, count)
    return tuple(int((place + 0.5) * count / wanted) for place in range(wanted))


def _file_id(pseudonyms: Pseudonyms, root: Path, path: Path) -> str:
    return pseudonyms.of("file", str(path.relative_to(root)))


def find_files(root: Path, ids: set[str], settings: DicomSettings | None = None) -> dict[str, Path]:
    """Resolves pseudonyms ``file-…`` from the quarantine to files below `root`; needs the same key."""
    settings = settings or _settings_of(root)
    pseudonyms = Pseudonyms(load_key(settings.key_file))
    found = {_file_id(pseudonyms, root, path): path for path in _files(root, settings)}
    return {name: found[name] for name in ids & set(found)}


def _note(listing: Listing, flagged: int, table: TextTable, cases: int, settings: DicomSettings) -> None:
    searched = "all other pictures were" if settings.ocr else "no other picture was"
    listing.notes.append(
        f"{flagged} DICOM files were set aside because their headers declare burned-in text; {searched} searched for "
        "text (prepare.dicom.ocr). This and the cleaned descriptions do not guarantee anonymity: have a person check "
        "the pictures before you pass them on"
    )
    if table.count:
        listing.notes.append(f"{len(table.used)} of {table.count} rows of the table of texts belong to a used file")
    silent = len(listing.images) - len(listing.pairs)
    if silent:
        listing.notes.append(f"{silent} of {len(listing.images)} DICOM pictures have no text in the table or header")
    if cases == 1 and len(listing.images) > 1:
        listing.notes.append("all DICOM files belong to one patient, so nothing is held out")
