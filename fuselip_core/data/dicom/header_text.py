"""Composes a description from a DICOM header, and lists the values that identify a person."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydicom import Dataset
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.multival import MultiValue

from fuselip_core.data.dicom.deidentify import GAP, scrub

# Fields that identify a person, a place or a visit; their values are removed from all texts.
IDENTITY_NAMES = (
    "PatientName",
    "PatientID",
    "OtherPatientIDs",
    "OtherPatientNames",
    "PatientBirthName",
    "PatientMotherBirthName",
    "PatientAddress",
    "PatientTelephoneNumbers",
    "MilitaryRank",
    "AccessionNumber",
    "StudyID",
    "AdmissionID",
    "IssuerOfPatientID",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "PhysiciansOfRecord",
    "NameOfPhysiciansReadingStudy",
    "RequestingPhysician",
    "OperatorsName",
    "ResponsiblePerson",
    "InstitutionName",
    "InstitutionAddress",
    "InstitutionalDepartmentName",
    "StationName",
    "DeviceSerialNumber",
    "PatientBirthDate",
    "StudyDate",
    "SeriesDate",
    "AcquisitionDate",
    "ContentDate",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
)


def identities(dataset: Dataset) -> tuple[str, ...]:
    """All values in the header that could identify a person, as text."""
    found: list[str] = []
    for name in IDENTITY_NAMES:
        value = dataset.get(name)
        for part in value if isinstance(value, MultiValue) else (value,):
            text = str(part if part is not None else "").strip()
            if text:
                found.append(text)
    return tuple(dict.fromkeys([*found, *_persons(dataset)]))


def _persons(dataset: Dataset) -> Iterator[str]:
    """Names of people anywhere in the header, including private elements and sequences."""
    # Not in the items of single frames, which repeat the same references thousands of times.
    for tag in dataset.keys() - {tag_for_keyword("PerFrameFunctionalGroupsSequence")}:
        raw = dataset.get_item(tag)
        kind = raw.VR or (dictionary_VR(tag) if dictionary_has_tag(tag) else None)
        if kind not in ("PN", "SQ"):
            continue  # without decoding: decoding all values would take longer than the pictures
        with contextlib.suppress(Exception):  # a value that cannot be decoded cannot appear in a text either
            value = dataset[tag].value
            if kind == "SQ":
                for item in value:
                    yield from _persons(item)
            else:
                yield from (str(part) for part in (value if isinstance(value, MultiValue) else (value,)) if part)


def compose(dataset: Dataset, terms: Mapping[str, Any], known: Sequence[str]) -> str:
    """A sentence from modality, body part, view and the descriptions of study and series.

    Empty if only the modality is known, since that is visible in the picture.
    """
    modality = terms["modalities"].get(_value(dataset, "Modality").upper(), "")
    view = _value(dataset, "ViewPosition").upper()
    parts = {
        "body": _body(dataset, terms, known),
        "view": terms["views"].get(view) or _without_gaps(scrub(view.lower(), known)),
        "study": _description(dataset, "StudyDescription", known),
        "series": _description(dataset, "SeriesDescription", known),
    }
    if not any(parts.values()):
        return ""
    head = modality or "Image"
    if parts["body"]:
        head += f" of the {parts['body']}"
    if parts["view"]:
        head += f", {parts['view']} view"
    sentences = [head]
    for text in (parts["study"], parts["series"]):
        if text and not any(text.lower() in said.lower() for said in sentences):
            sentences.append(text)
    return ". ".join(sentences) + "."


def _value(dataset: Dataset, name: str) -> str:
    """A header value as text on one line, without control characters, underscores and carets."""
    value = dataset.get(name)
    if isinstance(value, MultiValue):
        value = value[0] if value else ""
    return " ".join(re.sub(r"[\x00-\x1f_^]+", " ", str(value if value is not None else "")).split())


def _body(dataset: Dataset, terms: Mapping[str, Any], known: Sequence[str]) -> str:
    named = _value(dataset, "BodyPartExamined")
    body = terms["bodies"].get(named.upper().replace(" ", "")) or _without_gaps(scrub(named.lower(), known))
    side = terms["sides"].get((_value(dataset, "ImageLaterality") or _value(dataset, "Laterality")).upper(), "")
    return f"{side} {body}".strip() if body else ""


def _description(dataset: Dataset, name: str, known: Sequence[str]) -> str:
    """A description without identities; empty if nothing else is left."""
    return _without_gaps(scrub(_value(dataset, name), known))


def _without_gaps(text: str) -> str:
    """A short text without the gaps of removed identities; empty if no word of two letters is left."""
    text = re.sub(r"\s+([,.;:])", r"\1", " ".join(text.replace(GAP, " ").split())).strip(" .,;:-/")
    return text if re.search(r"[^\W\d_]{2,}", text) else ""
