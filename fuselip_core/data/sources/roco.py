"""ROCO version 1 (Pelka et al. 2018): `{train,validation,test}/radiology/` with tables that join ids to pictures.

`captions.txt`, `dlinks.txt` (last column: the picture's file name), `licences.txt` (article) and `cuis.txt` contain
`ROCO_00001<TAB>...` without a header. Pictures are in `images/`, named as in `dlinks.txt` or `<id>.jpg`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fuselip_core.data.pair import DataError, ImageEntry, Listing, SetAside, caption_pair, one_line, split_of_path
from fuselip_core.data.places import Place
from fuselip_core.data.walk import files_below
from fuselip_core.images import SUFFIXES


def roco_tables(root: Path) -> list[Path]:
    """The `captions.txt` of all splits below `root`, radiology only."""
    return [path for path in files_below(root, (".txt",)) if path.parts[-2:] == ("radiology", "captions.txt")]


def list_roco(root: Path, tables: list[Path]) -> Listing:
    """The images of `tables` with their captions; raises DataError for a table that is not UTF-8."""
    listing = Listing()
    listing.notes.append("this is ROCO version 1, with other images and splits than ROCOv2; only radiology is used")
    for table in tables:
        _list_split(table, split_of_path(table.relative_to(root)), listing)
    return listing


def _list_split(table: Path, split: str, listing: Listing) -> None:
    folder = table.parent
    if not (folder / "images").is_dir():
        raise DataError(f"{folder} has tables of ROCO version 1 but no folder images; download its pictures there")
    pictures = {path.name: path for path in files_below(folder / "images", SUFFIXES, listing.notes)}
    files = {name: fields[-1].strip() for name, fields in _rows(folder / "dlinks.txt", split, listing)}
    licences = dict(_rows(folder / "licences.txt", split, listing))
    concepts = {name: tuple(fields) for name, fields in _rows(folder / "cuis.txt", split, listing)}
    seen: set[str] = set()
    used: set[str] = set()
    for name, fields in _rows(table, split, listing):
        file = next((file for file in (files.get(name, ""), f"{name}.jpg") if file in pictures), None)
        if name in seen or file is None:
            fault = "repeated_id" if name in seen else "missing_image"
            listing.set_aside.append(SetAside(name, split, fault, f"in {folder.relative_to(folder.parents[1])}"))
            continue
        seen.add(name)
        used.add(file)
        article, licence = (*licences.get(name, ()), "", "")[:2]
        case = article or (file.split("_")[0] if file.startswith("PMC") else name)
        image = ImageEntry(
            name, split, case, Place(pictures[file]), concepts=concepts.get(name, ()), licence=licence or None
        )
        listing.images.append(image)
        listing.pairs.append(caption_pair(image, one_line(" ".join(fields))))
    for file in sorted(pictures.keys() - used):
        listing.set_aside.append(SetAside(file, split, "missing_caption", f"no row of {table.name} names it"))


def _rows(path: Path, split: str, listing: Listing) -> Iterator[tuple[str, list[str]]]:
    """Id and further columns of each line; none if the file is missing."""
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                name, *fields = (field.strip() for field in line.split("\t"))
                if name and fields:
                    yield name, fields
                elif line.strip():
                    listing.bad_rows(path, split)(number, "no tab after the id")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); save it as UTF-8") from error
