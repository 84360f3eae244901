"""Visual Genome: regions with phrases, and questions, in groups of four from the same picture.

Files: `region_descriptions.json`, or the lists `region_descriptions_train.json` and `_test.json` that FuseLIP's authors
publish; `question_answers.json`; the pictures as `<image id>.jpg` in any folder (`images`, `VG_100K`, `VG_100K_2`).

    kind "region"   (picture, phrase) → the crop that the phrase describes
    kind "vqa"      (picture, question) → answer, without its full stop, as published

Pictures of the test list are in the split test for both kinds. Without the lists, everything is train, and only the
first MOST_REGIONS large enough regions of a picture are used, since all 5.4 million crops would take 200 GB.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from fuselip_core.data.pair import (
    CLOSED_ANSWERS,
    DataError,
    ImageEntry,
    Listing,
    Pair,
    SetAside,
    Side,
    answer_text,
    fault_of_question,
    one_line,
    require_folder,
)
from fuselip_core.data.places import Box, Derived, Place
from fuselip_core.data.table_reader import json_array
from fuselip_core.data.walk import files_below

GROUP = 4
LEAST_PIXELS = 32  # of the shorter side of a region; published as an option
MOST_REGIONS = 16
LISTS = (("test", "region_descriptions_test.json"), ("train", "region_descriptions_train.json"))
ALL_REGIONS, QUESTIONS = "region_descriptions.json", "question_answers.json"


def list_visual_genome(root: Path) -> Listing:
    """Regions and questions, whichever exist; raises DataError if there are neither."""
    require_folder(root, "Visual Genome")
    listing = Listing()
    places = {path.stem: path for path in files_below(root, (".jpg",), listing.notes)}
    splits: dict[str, str] = {}
    found: list[tuple[str, Path, int | None]] = [
        (split, root / name, None) for split, name in LISTS if (root / name).exists()
    ]
    if not found and (root / ALL_REGIONS).exists():
        found = [("train", root / ALL_REGIONS, MOST_REGIONS)]
        listing.notes.append(f"there are no published train and test lists, so all of {ALL_REGIONS} is train")
    left_out: Counter[str] = Counter()
    for split, path, most in found:
        for entry in json_array(path):
            _list_regions(entry, split, most, places, splits, listing, left_out)
    if (root / QUESTIONS).exists():
        for entry in json_array(root / QUESTIONS):
            _list_questions(entry, places, splits, listing)
    elif not found:
        raise DataError(f"{root} has neither {ALL_REGIONS} (or its lists) nor {QUESTIONS}; download them there")
    for reason, count in sorted(left_out.items()):
        listing.notes.append(f"{count} regions were left out: {reason}")
    return listing


def _groups(items: list[Any]) -> list[list[Any]]:
    """Consecutive groups of four; the last may be smaller."""
    return [items[start : start + GROUP] for start in range(0, len(items), GROUP)]


def _picture(name: str, split: str, places: dict[str, Path], splits: dict[str, str], listing: Listing) -> str | None:
    """The split of a picture, which is listed when first needed; None if it is missing."""
    if name not in places:
        return None
    if name not in splits:
        splits[name] = split
        listing.images.append(ImageEntry(name, split, case=name, place=Place(places[name])))
    return splits[name]


def _list_regions(
    entry: dict[str, Any],
    split: str,
    most: int | None,
    places: dict[str, Path],
    splits: dict[str, str],
    listing: Listing,
    left_out: Counter[str],
) -> None:
    regions = entry["regions"]
    name = str(entry.get("id") or (regions[0]["image_id"] if regions else "")) or "none"
    if _picture(name, split, places, splits, listing) != split:
        fault = "missing_image" if name not in places else "listed_for_another_split"
        listing.set_aside.append(SetAside(name, split, fault, f"{len(regions)} regions"))
        return
    usable = [region for region in regions if min(region["width"], region["height"]) > LEAST_PIXELS]
    usable = [region for region in usable if one_line(region["phrase"])]
    left_out[f"no phrase, or at most {LEAST_PIXELS} pixels wide or high"] += len(regions) - len(usable)
    if most is not None and len(usable) > most:
        left_out[f"more than {most} of one picture"] += len(usable) - most
        usable = usable[:most]
    for number, group in enumerate(_groups(usable)):
        for region in group:
            _list_region(name, split, places[name], region, f"{name}/regions-{number}", listing)


def _list_region(name: str, split: str, path: Path, region: dict[str, Any], group: str, listing: Listing) -> None:
    crop_id = f"{name}/region-{region['region_id']}"
    left, top = region["x"], region["y"]
    box = left, top, left + region["width"], top + region["height"]
    listing.images.append(ImageEntry(crop_id, split, case=name, place=Derived(Place(path), Box(*box))))
    query = Side(name, one_line(region["phrase"]))
    listing.pairs.append(Pair(crop_id, split, "region", group, name, query, Side(crop_id)))


def _list_questions(entry: dict[str, Any], places: dict[str, Path], splits: dict[str, str], listing: Listing) -> None:
    for number, group in enumerate(_groups(entry["qas"])):
        for item in group:
            name, qid = str(item["image_id"]), f"question-{item['qa_id']}"
            question, answer = one_line(item["question"]), answer_text(item["answer"]).rstrip(".")
            split = _picture(name, "train", places, splits, listing)
            fault = fault_of_question(question, answer) or (None if split else "missing_image")
            if fault or split is None:
                listing.set_aside.append(SetAside(f"{name}/{qid}", split or "train", fault or "", f"picture {name}"))
                continue
            kind = "closed" if answer in CLOSED_ANSWERS else "open"
            sides = Side(name, question), Side(text=answer)
            group_id = f"{name}/questions-{number}"
            listing.pairs.append(Pair(f"{name}/{qid}", split, "vqa", group_id, name, *sides, answer_type=kind))
