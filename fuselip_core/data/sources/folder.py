"""Your own pictures in any folders, with their descriptions:

- `metadata.csv`, `.tsv`, `.jsonl` or `.parquet` in any folder (Hugging Face's imagefolder): file_name, relative to the
  table; text (or caption); question and answer; split and case, both optional. Several rows may have the same picture;
- or folders named by class, whose names become captions, and candidates for held-out pictures;
- or pictures alone, which can be embedded and searched.

The split is taken from the column, or from a word such as train, val or test in the path; the default is train.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path, PurePosixPath

from fuselip_core.data.pair import (
    SPLIT_OF,
    Candidates,
    DataError,
    ImageEntry,
    Listing,
    SetAside,
    Side,
    answer_text,
    caption_pair,
    fault_of_question,
    one_line,
    question_pair,
    require_folder,
    split_of_path,
)
from fuselip_core.data.places import Place
from fuselip_core.data.sources.archives import leaves_folder
from fuselip_core.data.table_reader import Row, columns_of, read_table
from fuselip_core.data.walk import files_below
from fuselip_core.images import SUFFIXES

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
TEXTS = ("text", "caption")
OPTIONAL = (*TEXTS, "question", "answer", "split", "case")


def list_folder(root: Path) -> Listing:
    """The pictures below `root` and their texts; raises DataError if there are none."""
    require_folder(root, "pictures")
    listing = Listing()
    pictures = {path.relative_to(root).as_posix(): path for path in files_below(root, SUFFIXES, listing.notes)}
    if not pictures:
        raise DataError(f"{root} holds no pictures ({', '.join(SUFFIXES)}); name another folder")
    tables = [path for path in files_below(root, TABLES) if path.stem == "metadata"]
    if tables:
        _list_tables(root, tables, pictures, listing)
    elif classes := _classes_of(pictures):
        _list_classes(pictures, classes, listing)
    else:
        listing.images.extend(_entry(name, path) for name, path in pictures.items())
        listing.notes.append("there is no metadata and no class folder, so these pictures have no texts")
    return listing


def _entry(name: str, path: Path, split: str | None = None, case: str = "") -> ImageEntry:
    return ImageEntry(name, split or split_of_path(PurePosixPath(name)), case or name, Place(path))


# ---- tables ----------------------------------------------------------------------------------------------------------


def _list_tables(root: Path, tables: list[Path], pictures: dict[str, Path], listing: Listing) -> None:
    images: dict[str, ImageEntry] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for table in tables:
        columns = columns_of(table)
        if not set(columns) & {*TEXTS, "question"}:
            raise DataError(f"{table} has no column text, caption or question (it has {', '.join(columns)}); add one")
        folder = PurePosixPath(table.parent.relative_to(root).as_posix())
        for number, row in enumerate(read_table(table, ("file_name",), OPTIONAL, listing.bad_rows(table)), 1):
            name = str(row["file_name"] or "").strip().replace("\\", "/")
            split = str(row["split"] or "").strip().lower()
            place = f"row {number} of {table.relative_to(root)}"
            fault = _fault_of_row(name, split) or (None if str(folder / name) in pictures else "missing_image")
            if fault:
                listing.set_aside.append(SetAside(name or place, SPLIT_OF.get(split, "train"), fault, place))
                continue
            name = str(folder / name)
            entry = _entry(name, pictures[name], SPLIT_OF.get(split), str(row["case"] or "").strip())
            image = images.setdefault(name, entry)
            if image == entry:
                _list_row(row, image, place, counts, listing)
            else:
                detail = f"{place} gives another split or case than an earlier row"
                listing.set_aside.append(SetAside(name, image.split, "contradiction", detail))
    listing.images.extend(images.values())
    for name in sorted(pictures.keys() - images.keys()):
        split = split_of_path(PurePosixPath(name))
        listing.set_aside.append(SetAside(name, split, "missing_caption", "in no table of metadata"))


def _fault_of_row(name: str, split: str) -> str | None:
    if not name:
        return "empty_path"
    return "outside_folder" if leaves_folder(name) else "unknown_split" if split and split not in SPLIT_OF else None


def _list_row(row: Row, image: ImageEntry, place: str, counts: Counter[tuple[str, str]], listing: Listing) -> None:
    """Adds the pairs of a row: one for its text, one for its question."""
    text = next((one_line(str(row[name])) for name in TEXTS if row[name]), "")
    question, answer = one_line(str(row["question"] or "")), answer_text(row["answer"])
    if text:
        counts[image.image_id, "caption"] += 1
        number = counts[image.image_id, "caption"]
        pair = caption_pair(image, text)
        listing.pairs.append(pair if number == 1 else replace(pair, pair_id=f"{pair.pair_id}-{number}"))
    if question or answer:
        counts[image.image_id, "question"] += 1
        name = f"{image.image_id}/question-{counts[image.image_id, 'question']}"
        if fault := fault_of_question(question, answer):
            listing.set_aside.append(SetAside(name, image.split, fault, place))
        else:
            listing.pairs.append(question_pair(image, name, question, answer))
    elif not text:
        listing.set_aside.append(SetAside(image.image_id, image.split, "empty_caption", place))


# ---- classes ---------------------------------------------------------------------------------------------------------


def _classes_of(pictures: dict[str, Path]) -> dict[str, str]:
    """Picture → class, if every picture is in one folder, not counting a split's, and every class has several."""
    found = {}
    for name in pictures:
        folders = [part for part in PurePosixPath(name).parts[:-1] if part.lower() not in SPLIT_OF]
        if len(folders) != 1:
            return {}
        found[name] = folders[0]
    counts = Counter(found.values())
    return found if len(counts) > 1 and min(counts.values()) > 1 else {}


def _list_classes(pictures: dict[str, Path], classes: dict[str, str], listing: Listing) -> None:
    names = sorted(set(classes.values()))
    texts = {name: one_line(name.replace("_", " ").replace("-", " ")) for name in names}
    options = tuple(Side(text=texts[name]) for name in names)
    for name, path in pictures.items():
        image = _entry(name, path)
        listing.images.append(image)
        listing.pairs.append(caption_pair(image, texts[classes[name]]))
        if image.split != "train":
            answer = names.index(classes[name])
            listing.candidates.append(
                Candidates(f"classes/{name}", image.split, "classes", Side(name), options, answer)
            )
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    listing.notes.append(f"{len(names)} folders are used as classes ({shown}); a metadata.csv would override them")
