"""Groups DICOM files by patient and assigns each patient to one split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fuselip_core.data.dicom.deidentify import Pseudonyms


@dataclass(frozen=True)
class DicomHeader:
    """The header fields kept from one file until all are read; `path` and `keys` never leave this process."""

    path: Path
    keys: Mapping[str, str]
    patient: str
    frames: tuple[int, ...]
    lacks_window: bool
    modality: str | None
    caption: str
    known: tuple[str, ...]

    @property
    def series(self) -> str:
        """Files of a series without window share a grey scale; a file without a series has its own."""
        return self.keys["SeriesInstanceUID"] or str(self.path)


def patient_key(header: DicomHeader) -> str:
    """The patient of a file or, if unknown, its study or the file itself."""
    if header.patient:
        return f"patient {header.patient}"
    study = header.keys["StudyInstanceUID"]
    return f"study {study}" if study else f"file {header.keys['SOPInstanceUID'] or header.path.name}"


def group_cases(headers: Sequence[DicomHeader], pseudonyms: Pseudonyms) -> dict[str, str]:
    """Key of every file → pseudonym of its case. Patients that share a study are one case."""
    parent: dict[str, str] = {}

    def root_of(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for header in headers:
        own = root_of(patient_key(header))
        if header.keys["StudyInstanceUID"]:
            study = root_of(f"study {header.keys['StudyInstanceUID']}")
            # The smaller name becomes the root, so that a case's name does not depend on the order of its files.
            parent[max(own, study)] = min(own, study)
    return {key: pseudonyms.of("case", root_of(key)) for key in list(parent)}


def split_cases(cases: set[str], pseudonyms: Pseudonyms, test_share: float, valid_share: float) -> dict[str, str]:
    """Case → split, by hash, so that a patient stays in a split when others are added.

    If a split is empty by chance, it gets one case, unless train would lose its last one.
    """
    order = sorted(cases, key=pseudonyms.share)
    bounds = {"test": test_share, "valid": test_share + valid_share}
    splits = {
        case: next((name for name, bound in bounds.items() if pseudonyms.share(case) < bound), "train")
        for case in order
    }
    for name, share in (("test", test_share), ("valid", valid_share)):
        free = [case for case in order if splits[case] == "train"]
        if share and name not in splits.values() and len(free) > 1:
            splits[free[0]] = name
    if splits and "train" not in splits.values():
        splits[order[-1]] = "train"
    return splits
