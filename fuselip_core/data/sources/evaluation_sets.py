"""Evaluation sets with published lists: crops of Open Images, SugarCrepe, ImageNet, and transformations of CC3M.

Each lists its pictures once and its questions as Candidates, all in the split "test".

- `open-images`: `oi-crop.json`, `oi-crop-positional-v3.json` beside the test pictures (in any folder below)
- `sugarcrepe`: its seven JSON lists (here or in `sugarcrepe/`) beside COCO's `val2017/`
- `imagenet`: `val/<synset>/*.JPEG` and `LOC_synset_mapping.txt` (lines "n01440764 tench, Tinca tinca")
- `tgit`: `tgit-indices.txt` (rows of CC3M's validation split) beside its archives or `val.csv`
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from fuselip_core.data.pair import Candidates, DataError, ImageEntry, Listing, SetAside, Side, require_folder
from fuselip_core.data.places import Box, Derived, Place
from fuselip_core.data.sources.conceptual_captions import list_web_captions
from fuselip_core.data.table_reader import json_array
from fuselip_core.data.transforms import FAMILIES, Edit, draw_edits
from fuselip_core.data.walk import files_below
from fuselip_core.files import read_json

PICTURES = frozenset({".jpg", ".jpeg", ".png"})
DOWNLOAD_AGAIN = "download the published file again"
OI_LISTS = {"oi-crop": "oi-crop.json", "oi-pos": "oi-crop-positional-v3.json"}
TGIT_INDICES = "tgit-indices.txt"
TGIT_QUESTIONS = 1000  # published: the first 1,000 of the list
TGIT_FAMILIES = ("crop", "rotate", "colour", "flip", "colorize")
SYNSETS = "LOC_synset_mapping.txt"


class _Pictures:
    """Adds each picture to the listing when it is first needed."""

    def __init__(self, listing: Listing) -> None:
        self._listing, self._known = listing, set[str]()

    def add(self, name: str, place: Place | Derived, case: str | None = None) -> str:
        if name not in self._known:
            self._known.add(name)
            self._listing.images.append(ImageEntry(name, "test", case=case or name, place=place))
        return name


def _pictures_below(root: Path) -> dict[str, Path]:
    """File name → path of every picture below `root`."""
    return {path.name: path for path in files_below(root, PICTURES)}


# ---- Open Images -----------------------------------------------------------------------------------------------------


def list_open_images(root: Path) -> Listing:
    """(picture, label) → the right one of several crops. Raises DataError if there is no list."""
    require_folder(root, "Open Images")
    lists = {task: root / name for task, name in OI_LISTS.items() if (root / name).exists()}
    if not lists:
        raise DataError(f"{root} has none of {', '.join(OI_LISTS.values())}; copy FuseLIP's published lists there")
    listing = Listing()
    files, pictures = _pictures_below(root), _Pictures(listing)
    for task, path in lists.items():
        data = read_json(path, DOWNLOAD_AGAIN)["data"]
        # One list is grouped by label, the other is flat.
        entries = chain.from_iterable(data.values()) if isinstance(data, dict) else data
        for number, entry in enumerate(entries):
            _list_crops(f"{task}/{number}", task, entry, files, pictures, listing)
    return listing


def _list_crops(
    name: str, task: str, entry: Mapping[str, Any], files: Mapping[str, Path], pictures: _Pictures, listing: Listing
) -> None:
    samples = entry["retrieval_samples"]
    missing = {entry["query_img"], *(sample["ImageID"] for sample in samples)} - files.keys()
    if missing:
        listing.set_aside.append(SetAside(name, "test", "missing_image", f"no picture {min(missing)}"))
        return
    query = pictures.add(entry["query_img"], Place(files[entry["query_img"]]))
    options = []
    for sample in samples:
        box = tuple(float(sample["bbox"][side]) for side in ("XMin", "YMin", "XMax", "YMax"))
        crop_id = f"{sample['ImageID']}@{','.join(f'{round(edge)}' for edge in box)}"
        place = Derived(Place(files[sample["ImageID"]]), Box(*box))
        options.append(Side(pictures.add(crop_id, place, case=sample["ImageID"])))
    listing.candidates.append(
        Candidates(name, "test", task, Side(query, entry["query_target"]), tuple(options), answer=0)
    )


# ---- SugarCrepe ------------------------------------------------------------------------------------------------------


def list_sugarcrepe(root: Path) -> Listing:
    """picture → the true caption instead of the manipulated one. Raises DataError if there is no list."""
    require_folder(root, "SugarCrepe")
    lists = sorted(path for folder in (root, root / "sugarcrepe") for path in folder.glob("*_*.json"))
    if not lists:
        raise DataError(f"{root} has no SugarCrepe list such as add_att.json; copy them there, beside val2017/")
    listing = Listing()
    files, pictures = _pictures_below(root), _Pictures(listing)
    for path in lists:
        task = f"sugarcrepe/{path.stem}"
        for key, entry in read_json(path, DOWNLOAD_AGAIN).items():
            name = f"{task}/{key}"
            if entry["filename"] not in files:
                listing.set_aside.append(SetAside(name, "test", "missing_image", f"no picture {entry['filename']}"))
                continue
            query = Side(pictures.add(entry["filename"], Place(files[entry["filename"]])))
            options = Side(text=entry["caption"]), Side(text=entry["negative_caption"])
            listing.candidates.append(Candidates(name, "test", task, query, options, answer=0))
    return listing


# ---- ImageNet --------------------------------------------------------------------------------------------------------


def list_imagenet(root: Path) -> Listing:
    """picture → its class name (the first of a synset). Raises DataError if the names are missing."""
    require_folder(root, "ImageNet")
    mapping = root / SYNSETS
    if not mapping.exists():
        raise DataError(f"{root} lacks {SYNSETS} with the class names; copy it there from ImageNet's archive")
    lines = (line.split(" ", 1) for line in mapping.read_text(encoding="utf-8").splitlines() if line.strip())
    names = {synset: text.split(",")[0].strip() for synset, text in lines}
    order = list(names)
    options = tuple(Side(text=names[synset]) for synset in order)
    listing = Listing()
    folder = root / "val" if (root / "val").is_dir() else root
    for answer, synset in enumerate(order):
        for path in sorted((folder / synset).glob("*")):
            image = ImageEntry(path.stem, "test", case=path.stem, place=Place(path), concepts=(synset,))
            listing.images.append(image)
            name = f"imagenet/{path.stem}"
            listing.candidates.append(Candidates(name, "test", "imagenet", Side(path.stem), options, answer))
    if len(set(names.values())) < len(names):
        repeated = len(names) - len(set(names.values()))
        listing.notes.append(
            f"{repeated} of {len(names)} classes have the same name as another and count as one option"
        )
    return listing


# ---- text-guided image transformations -------------------------------------------------------------------------------


def list_tgit(root: Path) -> Listing:
    """(picture, instruction) → the transformed picture. One question for each picture and family of instructions.

    Row numbers refer to CC3M's validation rows in the order of `val.csv` or of the archives. Each picture's
    instructions have their own seed, so they do not depend on the other pictures.
    """
    listing = Listing()
    path = root / TGIT_INDICES
    if not path.exists():
        raise DataError(f"{root} lacks {TGIT_INDICES}; copy FuseLIP's published list there, beside CC3M's validation")
    rows = list(islice(json_array(path), TGIT_QUESTIONS))
    wanted = set(rows)
    captions = list_web_captions(root)
    valid = (image for image in captions.images if image.split == "valid")
    found = {row: image for row, image in enumerate(valid) if row in wanted}
    pictures = _Pictures(listing)
    for row in rows:
        if row in found:
            _list_edits(row, found[row], pictures, listing)
        else:
            listing.set_aside.append(SetAside(f"tgit/{row}", "test", "missing_image", f"no validation row {row}"))
    return listing


def _list_edits(row: int, image: ImageEntry, pictures: _Pictures, listing: Listing) -> None:
    pictures.add(image.image_id, image.place)
    for number, family in enumerate(TGIT_FAMILIES):
        pairs = draw_edits(np.random.default_rng([row, number]), family, FAMILIES[family].evaluation)
        query = Side(_edited(image, pairs[0].before, pictures), pairs[0].instruction)
        options = tuple(Side(_edited(image, pair.after, pictures)) for pair in pairs)
        listing.candidates.append(
            Candidates(f"tgit/{family}/{row}", "test", f"tgit/{family}", query, options, answer=0)
        )


def _edited(image: ImageEntry, edit: Edit | None, pictures: _Pictures) -> str:
    """The id of the edited image, or of the image itself if `edit` is None."""
    if edit is None:
        return image.image_id
    assert isinstance(image.place, Place)
    return pictures.add(f"{image.image_id}#{edit.instruction}", Derived(image.place, edit), case=image.case)
