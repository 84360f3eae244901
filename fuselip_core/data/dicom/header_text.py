"""Builds a description from a DICOM header, and lists the fields that identify a person."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydicom import Dataset
from pydicom.datadict import dictionary_has_tag, dictionary_VR, tag_for_keyword
from pydicom.multival import MultiValue

from fuselip_core.data.dicom.deidentify import GAP, scrub

# Values that name a person, a place or a visit; wherever they turn up in a text, they are taken out.
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
    """Every value of the header that could identify a person, as text."""
    found: list[str] = []
    for name in IDENTITY_NAMES:
        value = dataset.get(name)
        for part in value if isinstance(value, MultiValue) else (value,):
            text = str(part if part is not None else "").strip()
            if text:
                found.append(text)
    return tuple(dict.fromkeys([*found, *_persons(dataset)]))


def _persons(dataset: Dataset) -> Iterator[str]:
    """Names of people anywhere in the header, also in private elements and within sequences."""
    # Frames of one object repeat their references thousands of times and name nobody new.
    for tag in dataset.keys() - {tag_for_keyword("PerFrameFunctionalGroupsSequence")}:
        raw = dataset.get_item(tag)
        kind = raw.VR or (dictionary_VR(tag) if dictionary_has_tag(tag) else None)
        if kind not in ("PN", "SQ"):
            continue  # other values are left as bytes: decoding them all would take longer than the pictures
        with contextlib.suppress(Exception):  # a value that cannot be decoded cannot be quoted either
            value = dataset[tag].value
            if kind == "SQ":
                for item in value:
                    yield from _persons(item)
            else:
                yield from (str(part) for part in (value if isinstance(value, MultiValue) else (value,)) if part)


def compose(dataset: Dataset, terms: Mapping[str, Any], known: Sequence[str]) -> str:
    """A sentence from modality, body part, view and the descriptions of study and series; "" if they say nothing.

    The modality alone says nothing that the picture does not, so it makes no text of its own.
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
    """One value of the header as text on one line, without what only a machine reads."""
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
    """A description without identities; "" where nothing else is left."""
    return _without_gaps(scrub(_value(dataset, name), known))


def _without_gaps(text: str) -> str:
    """A short text without the places where an identity stood; "" if no word of two letters is left."""
    text = re.sub(r"\s+([,.;:])", r"\1", " ".join(text.replace(GAP, " ").split())).strip(" .,;:-/")
    return text if re.search(r"[^\W\d_]{2,}", text) else ""
