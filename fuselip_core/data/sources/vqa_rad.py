"""VQA-RAD: questions about radiographs, as published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from fuselip_core.data.table_reader import Row, read_table
from fuselip_core.data.walk import files_below

VQA_RAD_FIELDS = ("qid", "phrase_type", "image_name", "image_case_url", "question", "answer", "answer_type")
# Values of `image_organ` as UMLS concepts, and the names of those.
ORGANS = {"HEAD": "C0018670", "CHEST": "C0817096", "ABD": "C0000726"}
ORGAN_NAMES = {"C0018670": "head", "C0817096": "chest", "C0000726": "abdomen"}


def list_vqa_rad(root: Path) -> Listing:
    """VQA-RAD (Lau et al. 2018, doi:10.1038/sdata.2018.251): one JSON file and a folder of radiographs.

    Questions whose phrase_type begins with "test" are the published test split, all others train. An image has an entry
    in each split with questions about it. A case is a MedPix case, or several if they share an image.
    """
    require_folder(root, "VQA-RAD")
    listing = Listing(concept_names=dict(ORGAN_NAMES))
    rows = _read_rows(root, listing)
    places = {path.name: Place(path) for path in files_below(root, (".jpg", ".png"), listing.notes)}
    cases = _cases(rows)
    images: dict[tuple[str, str], ImageEntry] = {}
    seen: set[str] = set()
    for row in rows:
        name, qid = str(row["image_name"]), str(row["qid"])
        split = "test" if str(row["phrase_type"]).startswith("test") else "train"
        question, answer = one_line(str(row["question"])), answer_text(row["answer"])
        fault = fault_of_question(question, answer) or ("repeated_id" if qid in seen else None)
        fault = fault or (None if name in places else "missing_image")
        seen.add(qid)
        if fault:
            listing.set_aside.append(SetAside(qid, split, fault, f"question {qid} about {name}"))
            continue
        organ = ORGANS.get(str(row.get("image_organ")))
        entry = ImageEntry(
            Path(name).stem,
            split,
            cases[name],
            places[name],
            concepts=(organ,) if organ else (),
            licence="CC0-1.0",
            attribution="VQA-RAD, Lau et al. 2018",
        )
        image = images.setdefault((split, name), entry)
        kind = str(row["answer_type"]).strip().lower()
        listing.pairs.append(question_pair(image, f"vqa-rad/{qid}", question, answer, kind))
    listing.images.extend(sorted(images.values(), key=lambda image: (image.split, image.image_id)))
    unused = len(set(places) - {str(row["image_name"]) for row in rows})
    if unused:
        listing.notes.append(f"{unused} of {len(places)} image files have no question and were ignored")
    return listing


def _read_rows(root: Path, listing: Listing) -> list[Row]:
    files = sorted(root.glob("*.json"))
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none"
        raise DataError(
            f"{root} must contain exactly one JSON file, VQA-RAD's questions (found: {found}); put it there"
        )
    return list(read_table(files[0], VQA_RAD_FIELDS, ("image_organ",), listing.bad_rows(files[0])))


def _cases(rows: Sequence[Row]) -> dict[str, str]:
    """Image name → case; cases that share an image are merged."""
    parent: dict[str, str] = {}

    def root_of(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    for row in rows:
        image, case = f"image {row['image_name']}", str(row["image_case_url"]).strip()
        roots = sorted((root_of(image), root_of(case)), reverse=True)
        parent[roots[0]] = roots[1]
    return {str(row["image_name"]): root_of(f"image {row['image_name']}") for row in rows}
