"""SLAKE: English questions on radiographs (Liu et al. 2021, arXiv 2102.09542).

`{train,validate,test}.json` list questions (qid, img_name, question, answer, q_lang, modality, answer_type, ...);
`imgs/<img_name>` are the pictures, one folder for each study, which is a case. On the Hub (`BoKelvin/SLAKE`), the
validation split is `validation.json`, and the pictures are in `imgs.zip`, which need not be unpacked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fuselip_core.data.pair import (
    DataError,
    ImageEntry,
    Listing,
    SetAside,
    answer_text,
    fault_of_question,
    one_line,
    question_pair,
    require_folder,
)
from fuselip_core.data.places import Place
from fuselip_core.data.sources.archives import leaves_folder, open_archive, safe_members
from fuselip_core.data.table_reader import read_table

SPLITS = {"train": "train", "validate": "valid", "validation": "valid", "test": "test"}
ARCHIVE = "imgs.zip"
FIELDS = ("qid", "img_name", "question", "answer", "q_lang", "answer_type")
MODALITIES = {"CT": "CT", "MRI": "MR", "X-Ray": "X-ray"}


def list_slake(root: Path) -> Listing:
    """The English questions of all existing splits; raises DataError if there are none."""
    require_folder(root, "SLAKE")
    listing = Listing()
    files = {split: root / f"{name}.json" for name, split in SPLITS.items() if (root / f"{name}.json").exists()}
    members = _members(root, listing)
    if not files:
        raise DataError(
            f"{root} has none of train.json, validate.json, validation.json and test.json; "
            "download SLAKE there with `fuselip data download slake`"
        )
    others: Counter[str] = Counter()
    for split, path in files.items():
        seen: set[str] = set()
        for row in read_table(path, FIELDS, ("modality",), listing.bad_rows(path, split)):
            if row["q_lang"] == "en":
                _list_question(root, members, split, row, seen, listing)
            else:
                others[str(row["q_lang"])] += 1
    if others:
        listing.notes.append(
            f"{others.total()} questions in other languages ({', '.join(sorted(others))}) were ignored"
        )
    return listing


def _members(root: Path, listing: Listing) -> Collection[str]:
    """The safe members of the archive; none if it is unpacked."""
    if (root / "imgs").is_dir() or not (root / ARCHIVE).exists():
        return ()
    with open_archive(root / ARCHIVE) as archive:
        members = safe_members(archive)
    listing.set_aside.extend(SetAside(name, "train", "unsafe_member", why) for name, why in members.refused)
    return {info.filename for info in members.safe}


def _place(root: Path, members: Collection[str], name: str) -> Place | None:
    """A picture's place in the folder or in the archive; None if it is in neither."""
    if leaves_folder(name):
        return None
    if (path := root / "imgs" / name).is_file():
        return Place(path)
    return next((Place(root / ARCHIVE, member=member) for member in (f"imgs/{name}", name) if member in members), None)


def _list_question(
    root: Path, members: Collection[str], split: str, row: Mapping[str, Any], seen: set[str], listing: Listing
) -> None:
    name, qid = str(row["img_name"]), f"slake/{row['qid']}"
    question, answer = one_line(str(row["question"])), answer_text(row["answer"])
    place = _place(root, members, name)
    fault = fault_of_question(question, answer) or ("outside_folder" if leaves_folder(name) else None)
    fault = fault or (None if place else "missing_image")
    if fault or place is None:
        listing.set_aside.append(SetAside(qid, split, fault or "", f"question about {name}"))
        return
    case = name.split("/")[0]
    image_id = name.removesuffix("/source.jpg")
    modality = MODALITIES.get(str(row.get("modality")))
    image = ImageEntry(image_id, split, case, place, modality)
    if name not in seen:
        seen.add(name)
        listing.images.append(image)
    listing.pairs.append(question_pair(image, qid, question, answer, str(row["answer_type"]).strip().lower()))
