"""Image-text pairs from the web: CC3M and CC12M as WebDataset archives or as tables, and questions about them.

- WebDataset, as `pixparse/cc3m-wds` and `cc12m-wds`: `cc3m-train-0000.tar` with `{key}.jpg`, `{key}.txt` and
  `{key}.json` one after the other. Only the headers and texts are read here; images are read where they lie.
- CSV: `train.csv`, `val.csv` with the columns path,caption (or path,question,answer), paths relative to the table.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fuselip_core.data.pair import (
    CLOSED_ANSWERS,
    DataError,
    ImageEntry,
    Listing,
    SetAside,
    caption_pair,
    fault_of_question,
    normalise_answer,
    one_line,
    question_pair,
    require_folder,
)
from fuselip_core.data.places import Place
from fuselip_core.data.sources.archives import leaves_folder
from fuselip_core.data.sources.tables import read_table, split_of_name
from fuselip_core.images import SUFFIXES

IMAGE_SUFFIXES = frozenset(SUFFIXES)
TEXT_SUFFIXES = frozenset({".txt", ".json"})
MOST_TEXT_BYTES = 1 << 20  # a caption or its metadata; what is longer is no caption


def list_web_captions(root: Path) -> Listing:
    """CC3M or CC12M, from the archives below `root` or from its tables; raises DataError if it has neither."""
    require_folder(root, "CC3M or CC12M")
    listing = Listing()
    archives = sorted(root.rglob("*.tar"))
    for archive in archives:
        _list_archive(archive, listing)
    for table, split in () if archives else tables_of(root, ("path", "caption")):
        _list_captions(table, split, listing)
    if not archives and not len(listing.images):
        raise DataError(
            f"{root} has neither *.tar archives (WebDataset) nor a table with the columns path,caption; "
            "download them with `fuselip data download cc3m`"
        )
    return listing


def list_web_questions(root: Path) -> Listing:
    """CC3M-VQA or CC12M-VQA: tables of path,question,answer beside the images; raises DataError without one."""
    require_folder(root, "tables of questions")
    listing = Listing()
    for table, split in tables_of(root, ("path", "question", "answer")):
        _list_questions(table, split, listing)
    return listing


# ---- WebDataset ------------------------------------------------------------------------------------------------------


@dataclass
class _Sample:
    """The members of an archive that share a key."""

    key: str
    image: Place | None = None
    texts: dict[str, bytes] = field(default_factory=dict)


def _list_archive(path: Path, listing: Listing) -> None:
    split = split_of_name(path.stem)
    try:
        for sample in samples_of(path):
            _list_sample(path, split, sample, listing)
    except (tarfile.TarError, OSError, EOFError) as error:
        # What came before the damage is good; images beyond it cannot be found.
        listing.set_aside.append(SetAside(path.stem, split, "damaged_archive", f"{path.name}: {error}"))


def samples_of(path: Path) -> Iterator[_Sample]:
    """The samples of a tar archive in their order; members that follow each other with one key are one sample."""
    size = path.stat().st_size
    sample: _Sample | None = None
    with tarfile.open(path, "r:") as archive:
        while (member := archive.next()) is not None:
            vars(archive)["members"].clear()  # the library keeps them all, 1 KB each
            suffix = PurePosixPath(member.name).suffix.lower()
            # Links, devices and paths that leave the folder have no business among images and texts.
            if not member.isreg() or leaves_folder(member.name) or suffix not in IMAGE_SUFFIXES | TEXT_SUFFIXES:
                continue
            if member.offset_data + member.size > size:
                raise tarfile.ReadError("the archive ends inside a member")
            key = member.name.removesuffix(PurePosixPath(member.name).suffix)
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key)
            if suffix in IMAGE_SUFFIXES:
                sample.image = Place(path, span=(member.offset_data, member.size))
            elif member.size <= MOST_TEXT_BYTES and (stream := archive.extractfile(member)):
                sample.texts[suffix] = stream.read()
    if sample is not None:
        yield sample


def _list_sample(path: Path, split: str, sample: _Sample, listing: Listing) -> None:
    name = f"{path.stem}/{sample.key}"
    metadata = _metadata(sample.texts.get(".json", b""))
    caption = sample.texts[".txt"].decode("utf-8", "replace") if ".txt" in sample.texts else metadata.get("caption")
    fault = "missing_image" if sample.image is None else "missing_caption" if caption is None else None
    if fault or sample.image is None:
        listing.set_aside.append(SetAside(name, split, fault or "missing_image", f"in {path.name}"))
        return
    url = metadata.get("url")
    image = ImageEntry(name, split, case=name, place=sample.image, attribution=str(url) if url else None)
    listing.images.append(image)
    listing.pairs.append(caption_pair(image, one_line(str(caption))))


def _metadata(data: bytes) -> dict[str, Any]:
    """The object in a sample's JSON member; nothing if it is damaged, since only the address is taken from it."""
    try:
        content = json.loads(data or b"{}")
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables_of(root: Path, columns: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Tables directly in `root` that have `columns`, with the split that their name tells; raises DataError."""
    found = []
    for path in sorted(root.glob("*.csv")):
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header = stream.readline(4096).strip().split(",")
        if {name.strip('"') for name in header} >= set(columns):
            found.append((path, split_of_name(path.stem)))
    if not found:
        raise DataError(f"{root} has no CSV table with the columns {','.join(columns)}; put it there")
    return found


def entry_of(table: Path, split: str, path: str) -> ImageEntry | None:
    """The image at a table's relative path; None if the path would leave the table's folder."""
    if not path or leaves_folder(path):
        return None
    return ImageEntry(path, split, case=path, place=Place(table.parent / path))


def _fault_of_path(path: str) -> str:
    return "outside_folder" if path else "empty_path"


def _first_time(path: str, seen: set[int]) -> bool:
    """True unless the path came before; remembers a hash, since tables have millions of long paths."""
    before = len(seen)
    seen.add(hash(path))
    return len(seen) > before


def _list_captions(table: Path, split: str, listing: Listing) -> None:
    seen: set[int] = set()
    for row in read_table(table, ("path", "caption")):
        path = row["path"].strip()
        image = entry_of(table, split, path)
        fault = _fault_of_path(path) if image is None else None if _first_time(path, seen) else "repeated_id"
        if image is None or fault:
            listing.set_aside.append(SetAside(path, split, fault or "", f"in {table.name}"))
            continue
        listing.images.append(image)
        listing.pairs.append(caption_pair(image, one_line(row["caption"])))


def _list_questions(table: Path, split: str, listing: Listing) -> None:
    seen: set[int] = set()
    for number, row in enumerate(read_table(table, ("path", "question", "answer"))):
        path = row["path"].strip()
        question, answer = one_line(row["question"]), normalise_answer(row["answer"])
        image = entry_of(table, split, path)
        fault = _fault_of_path(path) if image is None else fault_of_question(question, answer)
        if image is None or fault:
            listing.set_aside.append(SetAside(f"{path}/question-{number}", split, fault or "", f"in {table.name}"))
            continue
        if _first_time(path, seen):
            listing.images.append(image)
        kind = "closed" if answer in CLOSED_ANSWERS else "open"
        listing.pairs.append(question_pair(image, f"{path}/question-{number}", question, answer, kind))
