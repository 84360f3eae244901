"""A folder of DICOM files as a data set: 8-bit pictures with text, and nobody's identity.

Files are listed by their headers; `DicomPlace.read` converts one frame to PNG, in whichever process asks. Ids are
keyed hashes (`deidentify`), text comes from a table or from the header's own descriptions and is scrubbed, reasons and
notes quote no value of a file. Where a `dicom.yaml` lies in the folder, it holds fields of `DicomSettings`; a
`text.csv` there is the table.

None of this guarantees anonymity: burned-in text without a flag, faces in head scans and unusual wording stay.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
from fuselip_core.data.dicom.header_text import compose, identities
from fuselip_core.data.dicom.pixels import Window, render
from fuselip_core.data.dicom.text_table import KEY_COLUMNS, TextTable
from fuselip_core.data.images import UnreadableImage
from fuselip_core.data.pair import DataError, ImageEntry, Listing, SetAside, caption_pair, one_line, require_folder
from fuselip_core.data.places import Place
from fuselip_core.progress import track

SETTINGS_FILE, TEXT_FILE = "dicom.yaml", "text.csv"
SPLITS = ("train", "valid", "test")


class DicomSettings(config.DicomSettings):
    """The section `prepare.dicom`, its window checked, and the limit that all sources share."""

    max_megapixels: float = Field(default=120.0, gt=0, description="Larger frames are set aside, in megapixels.")

    @field_validator("window")
    @classmethod
    def _known_window(cls, name: str) -> str:
        if name != "file" and name not in terms()["windows"]:
            raise ValueError(f"no window '{name}'; there are: file, {', '.join(terms()['windows'])}")
        return name


@functools.cache
def terms() -> dict[str, Any]:
    """Words for DICOM's codes, and the window presets (centre, width in Hounsfield units)."""
    content: dict[str, Any] = json.loads(Path(__file__).with_name("terms.json").read_text(encoding="utf-8"))
    return content


@dataclass(frozen=True, slots=True)
class DicomPlace(Place):
    """One frame of a DICOM file; `read` converts it."""

    frame: int = 0
    window: str = "file"
    ocr: bool = False
    max_megapixels: float = 120.0

    def read(self) -> bytes:
        """The frame as PNG, 8 bits, grey or RGB; raises UnreadableImage with a reason that quotes nothing."""
        preset = None if self.window == "file" else Window(*terms()["windows"][self.window])
        with discreet():
            pixels = render(read_dataset(self.file), self.frame, preset, self.max_megapixels)
        if self.ocr:
            refuse_text(pixels)
        stream = io.BytesIO()
        # Fast compression: the pictures are read many times more often than they are written, but never shipped far.
        Image.fromarray(pixels).save(stream, "PNG", compress_level=3)
        return stream.getvalue()


# ---- listing -------------------------------------------------------------------------------------------------------


@dataclass
class _Scan:
    headers: list[DicomHeader] = field(default_factory=list)
    set_aside: list[tuple[Path, str, str]] = field(default_factory=list)


def list_dicom(root: Path, settings: DicomSettings | None = None) -> Listing:
    """Every picture below `root` that can be used, with its text, split by patient; raises DataError.

    Without `settings` they are read from ``dicom.yaml`` in `root`, if there is one. Files that cannot be used are set
    aside under a pseudonym of their path, which `find_files` turns back for whoever holds the key.
    """
    require_folder(root, "DICOM files")
    settings = settings or _settings_of(root)
    if settings.ocr:
        require_reader()
    pseudonyms = Pseudonyms(load_key(settings.key_file))
    table = TextTable.read(_table_path(root, settings))
    scan = _scan(root, settings)
    cases = group_cases(scan.headers, pseudonyms)
    splits = split_cases(set(cases.values()), pseudonyms, settings.test_share, settings.valid_share)
    listing = Listing(own_splits=True)
    for path, reason, detail in scan.set_aside:
        listing.set_aside.append(SetAside(_file_id(pseudonyms, root, path), "train", reason, detail))
    seen: set[str] = set()
    for header in scan.headers:
        case = cases[patient_key(header)]
        _list_file(header, case, splits[case], table, root, settings, pseudonyms, seen, listing)
    _note(listing, scan, table, len(splits), settings)
    return listing


def settings_for(root: Path, settings: config.PrepareSettings) -> DicomSettings:
    """What ``dicom.yaml`` in `root` says, corrected by what the section `prepare.dicom` states; raises DataError."""
    stated = settings.dicom.model_dump(exclude_unset=True) if settings.dicom else {}
    return _settings_of(root, {**stated, "max_megapixels": settings.max_megapixels})


def _settings_of(root: Path, stated: Mapping[str, Any] | None = None) -> DicomSettings:
    path = root / SETTINGS_FILE
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None
        settings = DicomSettings.model_validate({**(content or {}), **(stated or {})})
    except yaml.YAMLError:
        raise DataError(f"{path} is no valid YAML; write lines such as 'window: lung'") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise DataError(f"{path if path.exists() else 'prepare.dicom'}: {'; '.join(lines)}") from None
    return settings


def _table_path(root: Path, settings: DicomSettings) -> Path | None:
    if settings.text is not None:
        return settings.text if settings.text.is_absolute() or settings.text.exists() else root / settings.text
    return root / TEXT_FILE if (root / TEXT_FILE).exists() else None


def _files(root: Path) -> list[Path]:
    hidden_or_ours = {root / SETTINGS_FILE, root / TEXT_FILE, root / "download.json"}
    return sorted(
        path
        for path in root.rglob("*")
        if path.is_file()
        and path not in hidden_or_ours
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )


def _scan(root: Path, settings: DicomSettings) -> _Scan:
    scan = _Scan()
    for path in track(_files(root), "read DICOM headers"):
        if settings.text is not None and path.resolve() == settings.text.resolve():
            continue
        try:
            scan.headers.append(_header(path, settings))
        except UnreadableImage as error:
            scan.set_aside.append((path, error.reason, error.detail))
    return scan


def _header(path: Path, settings: DicomSettings) -> DicomHeader:
    """Raises UnreadableImage for a file that is no picture to learn from."""
    dataset = read_dataset(path, header_only=True)
    try:
        with discreet():
            return _take(path, dataset, settings)
    except UnreadableImage:
        raise
    except Exception as error:
        # Values that contradict their types surface only when they are looked at.
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
    known = identities(dataset)
    return DicomHeader(
        path=path,
        keys={name: str(dataset.get(name) or "").strip() for name in KEY_COLUMNS if name != "file"},
        patient=patient,
        frames=_middle(int(dataset.get("NumberOfFrames") or 1), settings.frames),
        modality=terms()["modalities"].get(code),
        caption=compose(dataset, terms(), known),
        known=known,
    )


def _middle(count: int, wanted: int) -> tuple[int, ...]:
    """`wanted` frames of `count`, evenly spread about the middle; one is the middle itself."""
    if count < 1:
        raise ValueError("no frames")
    wanted = min(wanted, count)
    return tuple(int((place + 0.5) * count / wanted) for place in range(wanted))


def _list_file(
    header: DicomHeader,
    case: str,
    split: str,
    table: TextTable,
    root: Path,
    settings: DicomSettings,
    pseudonyms: Pseudonyms,
    seen: set[str],
    listing: Listing,
) -> None:
    row = table.row_of(header.path.relative_to(root), header.keys)
    if row is not None and row.get("split") in SPLITS:
        split = row["split"]
    identity = header.keys["SOPInstanceUID"] or str(header.path.relative_to(root))
    if identity in seen:
        reason = SetAside(_file_id(pseudonyms, root, header.path), split, "repeated_id", "an instance listed before")
        listing.set_aside.append(reason)
        return
    seen.add(identity)
    text = scrub(row["text"], header.known) if row is not None else header.caption
    for frame in header.frames:
        image = ImageEntry(
            pseudonyms.of("image", f"{identity}#{frame}"),
            split,
            case=case,
            place=DicomPlace(
                header.path,
                frame=frame,
                window=settings.window,
                ocr=settings.ocr,
                max_megapixels=settings.max_megapixels,
            ),
            modality=header.modality,
        )
        listing.images.append(image)
        if text:
            listing.pairs.append(caption_pair(image, one_line(text)))
        else:
            listing.set_aside.append(SetAside(image.image_id, split, "missing_caption", "no text in table or header"))


def _file_id(pseudonyms: Pseudonyms, root: Path, path: Path) -> str:
    return pseudonyms.of("file", str(path.relative_to(root)))


def find_files(root: Path, ids: set[str], settings: DicomSettings | None = None) -> dict[str, Path]:
    """Which files of `root` the pseudonyms ``file-…`` of the quarantine stand for; only the holder of the key can."""
    pseudonyms = Pseudonyms(load_key((settings or _settings_of(root)).key_file))
    return {name: path for path in _files(root) if (name := _file_id(pseudonyms, root, path)) in ids}


def _note(listing: Listing, scan: _Scan, table: TextTable, cases: int, settings: DicomSettings) -> None:
    flagged = sum(reason == "burned_in_text" for _, reason, _ in scan.set_aside)
    listing.notes.append(
        f"{flagged} DICOM files were set aside because their headers say that text is burned in; "
        + ("all other pictures were" if settings.ocr else "no other picture was")
        + " searched for text (prepare.dicom.ocr). Neither this nor scrubbed descriptions guarantee that no identity "
        "is left: look at the pictures before they leave your hands"
    )
    if table.count:
        listing.notes.append(f"{len(table.used)} of {table.count} rows of the table of texts name a file that is used")
    if cases == 1 and len(listing.images) > 1:
        listing.notes.append("all DICOM files are of one patient, so that nothing can be held out")


# ---- one by one ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DicomRecord:
    """One picture, ready: PNG bytes, pseudonyms, and its text ("" if it has none)."""

    image_id: str
    case: str
    split: str
    modality: str | None
    caption: str
    png: bytes


def records(root: Path, settings: DicomSettings | None = None) -> Iterator[DicomRecord | SetAside]:
    """Every picture below `root`, converted one at a time, and everything that is set aside with its reason."""
    listing = list_dicom(root, settings)
    captions = {pair.group: pair.target.text or "" for pair in listing.pairs}
    yield from listing.set_aside
    for image in listing.images:
        assert isinstance(image.place, DicomPlace)
        try:
            png = image.place.read()
        except UnreadableImage as error:
            yield SetAside(image.image_id, image.split, error.reason, error.detail)
            continue
        caption = captions.get(image.image_id, "")
        yield DicomRecord(image.image_id, image.case, image.split, image.modality, caption, png)
