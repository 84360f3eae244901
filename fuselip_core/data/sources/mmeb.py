"""MMEB-eval (`TIGER-Lab/MMEB-eval`): the questions of all subsets with up to 1,000 candidates each, and `images.zip`.

Parquet files `<subset>/test-*.parquet`: qry_text, qry_img_path, and the lists tgt_text and tgt_img_path, whose first
entry is the right one. The placeholder "<|image_1|>" for other model families is removed from texts. Pictures are in
`images.zip`, or unpacked in one of FOLDERS.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuselip_core.data.pair import Candidates, DataError, ImageEntry, Listing, SetAside, Side, one_line, require_folder
from fuselip_core.data.places import Place
from fuselip_core.data.sources.archives import leaves_folder, open_archive, safe_members
from fuselip_core.data.table_reader import read_table

COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
MARKER = "<|image_1|>"
FOLDERS = ("", "images", "eval_images")


def list_mmeb(root: Path) -> Listing:
    """All subsets below `root`; raises DataError if there are none."""
    require_folder(root, "MMEB-eval")
    files = sorted(root.glob("*/*.parquet"))
    if not files:
        raise DataError(f"{root} has no <subset>/test-*.parquet; download it with `fuselip data download mmeb-eval`")
    listing = Listing()
    places = _Places(root, listing)
    for path in files:
        task = f"mmeb/{path.parent.name}"
        for number, values in enumerate(read_table(path, COLUMNS)):
            _list_row(f"{task}/{path.stem}/{number}", task, values, places, listing)
    if listing.candidates and not len(listing.images):
        listing.notes.append("no question of MMEB-eval names a picture")
    return listing


class _Places:
    """Finds pictures by their published path, in the archive or below the folder, and lists them when first needed."""

    def __init__(self, root: Path, listing: Listing) -> None:
        self._root, self._listing = root, listing
        self._archive = root / "images.zip"
        self._members: set[str] = set()
        self._known: set[str] = set()
        if self._archive.exists():
            with open_archive(self._archive) as archive:
                members = safe_members(archive)
            self._members = {info.filename for info in members.safe}
            listing.set_aside.extend(SetAside(name, "test", "unsafe_member", why) for name, why in members.refused)

    def add(self, path: str) -> bool:
        """Whether the picture exists."""
        if path in self._known:
            return True
        place = self._find(path)
        if place is None:
            return False
        self._known.add(path)
        self._listing.images.append(ImageEntry(path, "test", case=path, place=place))
        return True

    def _find(self, path: str) -> Place | None:
        if leaves_folder(path):
            return None
        for folder in FOLDERS:
            name = f"{folder}/{path}" if folder else path
            if name in self._members:
                return Place(self._archive, member=name)
            if (self._root / name).is_file():
                return Place(self._root / name)
        return None


def _list_row(name: str, task: str, values: Mapping[str, Any], places: _Places, listing: Listing) -> None:
    query = _side(values["qry_text"], values["qry_img_path"])
    texts, paths = _as_list(values["tgt_text"]), _as_list(values["tgt_img_path"])
    # One of the lists may be empty.
    count = max(len(texts), len(paths))
    texts, paths = texts or [""] * count, paths or [""] * count
    if len(texts) != len(paths) or count < 2:
        listing.set_aside.append(SetAside(name, "test", "bad_candidates", f"{len(texts)} texts, {len(paths)} pictures"))
        return
    options = tuple(map(_side, texts, paths))
    missing = [side.image for side in (query, *options) if side.image and not places.add(side.image)]
    if missing:
        listing.set_aside.append(SetAside(name, "test", "missing_image", f"no picture {missing[0]}"))
    else:
        listing.candidates.append(Candidates(name, "test", task, query, options, answer=0))


def _as_list(value: Any) -> list[str]:
    return list(value) if isinstance(value, list) else [value or ""]


def _side(text: str | None, path: str | None) -> Side:
    return Side(path or None, one_line((text or "").replace(MARKER, " ")) or None)
