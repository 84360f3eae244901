"""DICOM files whose pixels can be worked out by hand, and one that is full of identities."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from fuselip_core.data.dicom.grey import Window
from fuselip_core.data.dicom.listing import DicomPlace, DicomSettings, list_dicom
from fuselip_core.data.dicom.pixels import render
from fuselip_core.data.pair import SetAside
from fuselip_core.images import UnreadableImage

SECRETS = {
    "PatientName": "Mustermann^Erika^Dr.",
    "PatientID": "MRN-4711-XYZ",
    "PatientBirthDate": "19570302",
    "PatientAddress": "Hauptstrasse 7 Musterstadt",
    "AccessionNumber": "ACC20240131",
    "ReferringPhysicianName": "Quacksalber^Theodor",
    "OperatorsName": "Knipser^Ida",
    "InstitutionName": "Klinikum Musterstadt",
    "StationName": "CTSTATION9",
    "StudyDate": "20240131",
    "StudyTime": "121314",
    "DeviceSerialNumber": "SN0815",
    "StudyID": "STUDY77",
}


def picture(values: Any, photometric: str = "MONOCHROME2", **changes: Any) -> Dataset:
    """A dataset with `values` as pixels: (H, W) or (H, W, 3), one frame unless NumberOfFrames says otherwise."""
    array = np.asarray(values)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.Modality = "OT"
    dataset.PhotometricInterpretation = photometric
    dataset.SamplesPerPixel = 1 if photometric in ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR") else 3
    frames = int(changes.get("NumberOfFrames", 1))
    shape = array.shape[1:] if frames > 1 else array.shape
    dataset.Rows, dataset.Columns = shape[:2]
    if dataset.SamplesPerPixel == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = dataset.BitsStored = array.dtype.itemsize * 8
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(np.issubdtype(array.dtype, np.signedinteger))
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    for name, value in changes.items():
        setattr(dataset, name, value)
    return dataset


def item(**values: Any) -> Sequence:
    """A sequence of one item."""
    content = Dataset()
    for name, value in values.items():
        setattr(content, name, value)
    return Sequence([content])


def table(descriptor: list[int], data: list[int]) -> Sequence:
    """A lookup table: entries, first value, bits; and its entries."""
    content = Dataset()
    content.add_new("LUTDescriptor", "US", descriptor)
    content.add_new("LUTData", "US", data)
    return Sequence([content])


def save(dataset: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def shown(dataset: Dataset, frame: int = 0, window: Window | None = None) -> np.ndarray:
    """The dataset as a file would be shown: written, read and rendered."""
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return render(pydicom.dcmread(io.BytesIO(stream.getvalue())), frame, window, max_megapixels=10)


def with_identities(values: Any, **changes: Any) -> Dataset:
    """A CT whose every field names somebody, in its descriptions too."""
    return picture(
        values,
        Modality="CT",
        BodyPartExamined="CHEST",
        StudyDescription="CT Thorax Mustermann Erika 31.01.2024",
        SeriesDescription="Lung 1.0 Dr. Quacksalber, tel 0123-456-7890",
        **{**SECRETS, **changes},
    )


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
