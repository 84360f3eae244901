"""ROCOv2 in all its layouts: images with captions.

- Zenodo's: `{train,valid,test}_captions.csv`, `_concepts.csv`, `_concepts_manual.csv`, `license_information.csv`, and
  images in `<split>_images.zip` or in folders `<split>/` or `<split>_images/`;
- ROCO version 1: `data/{train,validation,test}/radiology/` with tables (roco.py);
- older tools': `{train,validation,test}/ID.jpg` with the caption in `ID.jpg.txt`;
- Hugging Face's: Parquet files `train-*.parquet` with image {bytes, path}, image_id, caption, cui.

Questions about the images may be in any folder: `{train,valid,test}_questions.csv` with ID, Question, Answer.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from fuselip_core.data.pair import (
    DataError,
    ImageEntry,
    Listing,
    SetAside,
    answer_text,
    caption_pair,
    fault_of_question,
    one_line,
    question_pair,
    require_columns,
    require_folder,
    split_of_path,
)
from fuselip_core.data.places import Place
from fuselip_core.data.sources.archives import open_archive, safe_members
from fuselip_core.data.sources.roco import list_roco, roco_tables
from fuselip_core.data.table_reader import columns_of, read_table
from fuselip_core.data.walk import files_below
from fuselip_core.files import read_json
from fuselip_core.images import SUFFIXES

PUBLISHED_SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "test": "test"}
# Rückert et al. 2024, doi:10.1038/s41597-024-03496-6. The Hub's train split has four more.
PUBLISHED_COUNTS = {"train": 59_958, "valid": 9_904, "test": 9_927}
MOST_DIFFERENCE = 0.1  # beyond that it is a part of ROCOv2, or another data set in its layout
LICENCES = "license_information.csv"
HUB_COLUMNS = ("image", "image_id", "caption")


def list_rocov2(root: Path) -> Listing:
    """ROCOv2 in any of its layouts; raises DataError if `root` has none of them."""
    require_folder(root, "ROCOv2")
    listing = _list_layout(root)
    _compare_counts(listing)
    add_questions(root, listing)
    return listing


def _list_layout(root: Path) -> Listing:
    if list(root.glob("*_captions.csv")):
        return list_zenodo(root)
    if parquet := _parquet_files(root):
        return _list_parquet(root, parquet)
    if any(next((root / folder).glob("*.txt"), None) for folder in PUBLISHED_SPLITS if (root / folder).is_dir()):
        return _list_sidecars(root)
    if tables := roco_tables(root):
        return list_roco(root, tables)
    raise DataError(
        f"{root} has no known layout of ROCOv2: neither *_captions.csv (Zenodo), nor train-*.parquet (Hugging Face), "
        "nor train/ID.jpg with ID.jpg.txt, nor train/radiology/captions.txt (ROCO version 1); compare it with the "
        "published file list"
    )


def _compare_counts(listing: Listing) -> None:
    """Notes the number of images of each split compared with the published one, if they are similar."""
    counts = Counter(image.split for image in listing.images)
    counts.update(item.split for item in listing.set_aside if item.reason == "repeated_id")
    for split, published in PUBLISHED_COUNTS.items():
        if abs(counts[split] - published) <= published * MOST_DIFFERENCE:
            difference = counts[split] - published
            said = "as published" if not difference else f"{difference:+,} compared with the published {published:,}"
            listing.notes.append(f"{split} has {counts[split]:,} images, {said}")


def list_zenodo(root: Path) -> Listing:
    """The published layout, with images zipped or extracted; any split may be missing."""
    listing = Listing()
    licences = _read_licences(root / LICENCES, listing)
    for name, split in PUBLISHED_SPLITS.items():
        if (root / f"{name}_captions.csv").exists():
            _list_zenodo_split(root, name, split, licences, listing)
    return listing


def _list_zenodo_split(
    root: Path, name: str, split: str, licences: Mapping[str, Mapping[str, str]], listing: Listing
) -> None:
    places, refused = _places(root, name, listing.notes)
    listing.set_aside.extend(SetAside(item, split, *reason) for item, *reason in refused)
    concepts = _read_concepts(root / f"{name}_concepts.csv", split, listing)
    manual = _read_concepts(root / f"{name}_concepts_manual.csv", split, listing)
    seen: set[str] = set()
    captions = root / f"{name}_captions.csv"
    for row in read_table(captions, ("ID", "Caption"), bad_rows=listing.bad_rows(captions, split)):
        identifier = row["ID"].strip()
        if identifier in seen:
            listing.set_aside.append(SetAside(identifier, split, "repeated_id", f"again in {name}_captions.csv"))
            continue
        seen.add(identifier)
        place = places.get(identifier)
        if place is None:
            listing.set_aside.append(SetAside(identifier, split, "missing_image", f"in no {name} archive or folder"))
            continue
        licence = licences.get(identifier, {})
        codes = concepts.get(identifier, ())
        image = ImageEntry(
            identifier,
            split,
            case=licence.get("PMCID") or identifier,
            place=place,
            modality=modality_of(manual.get(identifier, ()) or codes),
            concepts=codes or manual.get(identifier, ()),
            licence=licence.get("Link"),
            attribution=licence.get("Attribution"),
        )
        listing.images.append(image)
        listing.pairs.append(caption_pair(image, one_line(row["Caption"])))
    for identifier in sorted(set(places) - seen):
        listing.set_aside.append(SetAside(identifier, split, "missing_caption", f"not in {name}_captions.csv"))


def _places(root: Path, name: str, notes: list[str]) -> tuple[dict[str, Place], list[tuple[str, str, str]]]:
    """Image id → place, from the extracted folder or else the archive; and (name, reason, detail) of refused files."""
    refused: list[tuple[str, str, str]] = []
    for folder in (root / name, root / f"{name}_images"):
        if folder.is_dir():
            return _by_id([(path, Place(path)) for path in files_below(folder, SUFFIXES, notes)], refused), refused
    archive = root / f"{name}_images.zip"
    if not archive.exists():
        raise DataError(
            f"{root} has {name}_captions.csv but neither {name}_images.zip nor a folder {name}; download it"
        )
    with open_archive(archive) as opened:
        members = safe_members(opened)
    # Members are read by name and never extracted to disk.
    paths = [PurePosixPath(info.filename) for info in members.safe]
    pictures = [path for path in paths if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    refused += [(member, "unsafe_member", reason) for member, reason in members.refused]
    return _by_id([(path, Place(archive, member=str(path))) for path in pictures], refused), refused


def _by_id(places: Sequence[tuple[PurePath, Place]], refused: list[tuple[str, str, str]]) -> dict[str, Place]:
    """The first picture of each id; others are added to `refused`."""
    first: dict[str, Place] = {}
    for path, place in places:
        if path.stem in first:
            refused.append((path.stem, "repeated_id", f"{path.name} has the same name as another picture"))
        else:
            first[path.stem] = place
    return first


def _read_concepts(path: Path, split: str, listing: Listing) -> dict[str, tuple[str, ...]]:
    """Image id → concept codes; empty if the file is missing."""
    if not path.exists():
        return {}
    return {
        row["ID"].strip(): tuple(code.strip() for code in row["CUIs"].split(";") if code.strip())
        for row in read_table(path, ("ID", "CUIs"), bad_rows=listing.bad_rows(path, split))
    }


def _read_licences(path: Path, listing: Listing) -> dict[str, dict[str, str]]:
    """Image id → row; empty if the file is missing, in which case every image is its own case."""
    if not path.exists():
        return {}
    rows = read_table(path, ("ID", "PMCID", "Attribution", "Link"), bad_rows=listing.bad_rows(path))
    return {row["ID"].strip(): row for row in rows}


def add_questions(root: Path, listing: Listing) -> None:
    """Adds pairs from the tables `<split>_questions.csv` in any folder."""
    tables = [path for path in files_below(root, (".csv",)) if path.name.endswith("_questions.csv")]
    if not tables:
        return
    images = {(image.split, image.image_id): image for image in listing.images}
    counts: Counter[tuple[str, str]] = Counter()
    for path in tables:
        split = split_of_path(PurePath(path.name))
        for row in read_table(path, ("ID", "Question", "Answer"), bad_rows=listing.bad_rows(path, split)):
            key = (split, row["ID"].strip())
            counts[key] += 1
            name = f"{key[1]}/question-{counts[key]}"
            question, answer = one_line(row["Question"]), answer_text(row["Answer"])
            if fault := fault_of_question(question, answer) or (None if key in images else "missing_image"):
                listing.set_aside.append(SetAside(name, split, fault, f"in {path.name}"))
            else:
                listing.pairs.append(question_pair(images[key], name, question, answer))


def modality_of(codes: Sequence[str]) -> str | None:
    """The name of the first concept that is a modality."""
    names = _modalities()
    return next((names[code] for code in codes if code in names), None)


@functools.cache
def _modalities() -> dict[str, str]:
    return read_json(Path(__file__).with_name("modalities.json"))


def _list_sidecars(root: Path) -> Listing:
    """Folders of images with the caption of `ID.jpg` in `ID.jpg.txt`; there are no cases."""
    listing = Listing()
    for name, split in PUBLISHED_SPLITS.items():
        seen: set[str] = set()
        for path in sorted((root / name).glob("*")):
            if path.suffix.lower() in SUFFIXES:
                _list_sidecar(path, split, seen, listing)
            elif path.suffix == ".txt" and not path.with_suffix("").exists():
                listing.set_aside.append(SetAside(path.stem, split, "missing_image", f"no picture beside {path.name}"))
    return listing


def _list_sidecar(path: Path, split: str, seen: set[str], listing: Listing) -> None:
    text = path.with_name(f"{path.name}.txt")
    fault = None if text.exists() else ("missing_caption", f"no {text.name}")
    # Within a split; copies in two splits are found later.
    if path.stem in seen:
        fault = "repeated_id", f"{path.name} has the same name as another picture"
    if fault:
        listing.set_aside.append(SetAside(path.stem, split, *fault))
        return
    seen.add(path.stem)
    image = ImageEntry(path.stem, split, case=path.stem, place=Place(path))
    listing.images.append(image)
    # Tolerates a bad byte in one of 80,000 texts.
    caption = text.read_bytes().decode("utf-8", errors="replace")
    listing.pairs.append(caption_pair(image, one_line(caption)))


def _parquet_files(root: Path) -> dict[str, list[Path]]:
    """Published split name → its Parquet files, anywhere below `root`."""
    files: dict[str, list[Path]] = {}
    for path in files_below(root, (".parquet",)):
        name = path.name.split("-")[0].split(".")[0]
        if name in PUBLISHED_SPLITS:
            files.setdefault(name, []).append(path)
    return files


def _list_parquet(root: Path, files: Mapping[str, Sequence[Path]]) -> Listing:
    """The Hub's files. They have no articles, which LICENCES beside them can add."""
    listing = Listing()
    licences = _read_licences(root / LICENCES, listing)
    if not licences:
        listing.notes.append(
            f"these files have no articles; put {LICENCES} from the Zenodo record beside them, so that images of an "
            "article count as one case"
        )
    for name, paths in files.items():
        seen: set[str] = set()
        for path in paths:
            require_columns(columns_of(path), HUB_COLUMNS, path)
            for row, values in enumerate(read_table(path, ("image_id", "caption"), ("cui",))):
                _list_parquet_row(path, row, PUBLISHED_SPLITS[name], values, licences, seen, listing)
    return listing


def _list_parquet_row(
    path: Path,
    row: int,
    split: str,
    values: Mapping[str, Any],
    licences: Mapping[str, Mapping[str, str]],
    seen: set[str],
    listing: Listing,
) -> None:
    identifier = str(values["image_id"])
    if identifier in seen:
        listing.set_aside.append(SetAside(identifier, split, "repeated_id", f"again in {path.name}, row {row}"))
        return
    seen.add(identifier)
    licence = licences.get(identifier, {})
    codes = tuple(values.get("cui") or ())
    image = ImageEntry(
        identifier,
        split,
        case=licence.get("PMCID") or identifier,
        place=Place(path, row=row),
        modality=modality_of(codes),
        concepts=codes,
        licence=licence.get("Link"),
        attribution=licence.get("Attribution"),
    )
    listing.images.append(image)
    listing.pairs.append(caption_pair(image, one_line(values["caption"] or "")))
