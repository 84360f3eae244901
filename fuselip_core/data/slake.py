"""SLAKE: English questions on radiographs (Liu et al. 2021, arXiv 2102.09542).

`{train,validate,test}.json` list questions (qid, img_name, question, answer, q_lang, modality, answer_type, ...);
`imgs/<img_name>` are the pictures, one folder a study, which is a case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuselip_core.data.archives import leaves_folder
from fuselip_core.data.pair import (
    DataError,
    ImageEntry,
    Listing,
    Place,
    SetAside,
    one_line,
    question_pair,
    require_folder,
)
from fuselip_core.data.vqa import fault_of_question, normalise_answer, read_questions

SPLITS = {"train": "train", "validate": "valid", "test": "test"}
FIELDS = ("qid", "img_name", "question", "answer", "q_lang", "answer_type")
MODALITIES = {"CT": "CT", "MRI": "MR", "X-Ray": "X-ray"}


def list_slake(root: Path) -> Listing:
    """The English questions of every split that is there; raises DataError if none is."""
    require_folder(root, "SLAKE")
    listing = Listing()
    files = {split: root / f"{name}.json" for name, split in SPLITS.items() if (root / f"{name}.json").exists()}
    if not files:
        raise DataError(f"{root} has none of train.json, validate.json and test.json; download SLAKE there")
    others: Counter[str] = Counter()
    for split, path in files.items():
        seen: set[str] = set()
        for row in read_questions(path, FIELDS):
            if row["q_lang"] == "en":
                _list_question(root, split, row, seen, listing)
            else:
                others[str(row["q_lang"])] += 1
    if others:
        listing.notes.append(
            f"{others.total()} questions in other languages ({', '.join(sorted(others))}) were not read"
        )
    return listing


def _list_question(root: Path, split: str, row: Mapping[str, Any], seen: set[str], listing: Listing) -> None:
    name, qid = str(row["img_name"]), f"slake/{row['qid']}"
    question, answer = one_line(str(row["question"])), normalise_answer(row["answer"])
    fault = fault_of_question(question, answer) or ("outside_folder" if leaves_folder(name) else None)
    fault = fault or (None if (root / "imgs" / name).is_file() else "missing_image")
    if fault:
        listing.set_aside.append(SetAside(qid, split, fault, f"question about {name}"))
        return
    case = name.split("/")[0]
    image_id = name.removesuffix("/source.jpg")
    modality = MODALITIES.get(str(row.get("modality")))
    image = ImageEntry(image_id, split, case, Place(root / "imgs" / name), modality)
    if name not in seen:
        seen.add(name)
        listing.images.append(image)
    listing.pairs.append(question_pair(image, qid, question, answer, str(row["answer_type"]).strip().lower()))
