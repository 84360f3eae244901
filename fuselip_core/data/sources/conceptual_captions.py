"""Image-text pairs from the web: CC3M and CC12M as WebDataset archives or as tables, and questions about them.

- WebDataset, like `pixparse/cc3m-wds` and `cc12m-wds`: `cc3m-train-0000.tar` with consecutive `{key}.jpg`, `{key}.txt`
  and `{key}.json`, in any folders; the name of the file or folder gives the split. An image's id is archive and key.
  Only headers and texts are read here.
- CSV (or TSV, JSON lines, Parquet): `train.csv`, `val.csv` with the columns path,caption (or path,question,answer),
  paths relative to the table.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
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
    require_folder,
    split_of_path,
)
from fuselip_core.data.places import Place
from fuselip_core.data.sources.archives import leaves_folder
from fuselip_core.data.table_reader import columns_of, read_table
from fuselip_core.data.walk import files_below
from fuselip_core.files import foreign_content
from fuselip_core.images import SUFFIXES

IMAGE_SUFFIXES = frozenset(SUFFIXES)
TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
TEXT_SUFFIXES = frozenset({".txt", ".json"})
MOST_TEXT_BYTES = 1 << 20  # of a caption or its metadata


def list_web_captions(root: Path) -> Listing:
    """CC3M or CC12M, from the archives below `root` or from its tables; raises DataError if it has neither."""
    require_folder(root, "CC3M or CC12M")
    listing = Listing()
    archives = files_below(root, (".tar",), listing.notes)
    for archive in archives:
        _list_archive(root, archive, listing)
    for table, split in () if archives else tables_of(root, ("path", "caption")):
        _list_captions(table, split, listing)
    if not archives and not len(listing.images):
        raise DataError(
            f"{root} has neither *.tar archives (WebDataset) nor a table with the columns path,caption; "
            "download them with `fuselip data download cc3m`"
        )
    return listing


def list_web_questions(root: Path) -> Listing:
    """CC3M-VQA or CC12M-VQA: tables of path,question,answer beside the images; raises DataError if there is none."""
    require_folder(root, "tables of questions")
    listing = Listing()
    for table, split in tables_of(root, ("path", "question", "answer")):
        _list_questions(table, split, listing)
    return listing


# ---- WebDataset ------------------------------------------------------------------------------------------------------


@dataclass
class _Sample:
    """The members of an archive with the same key. refused: (reason, detail) of unused members."""

    image: Place | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)


def _list_archive(root: Path, path: Path, listing: Listing) -> None:
    name = path.relative_to(root)
    split, prefix = split_of_path(name), name.with_suffix("").as_posix()
    others: Counter[str] = Counter()
    seen: set[str] = set()
    with path.open("rb") as stream:
        if fault := foreign_content(stream.read(200)):
            raise DataError(f"{path} {fault}")
    try:
        for key, sample in samples_of(path, others):
            sample_id = f"{prefix}/{key}"
            listing.set_aside.extend(SetAside(sample_id, split, *refused) for refused in sample.refused)
            if key in seen:
                listing.set_aside.append(SetAside(sample_id, split, "repeated_id", f"again in {name}"))
            elif sample.image or sample.texts:
                seen.add(key)
                _list_sample(sample_id, split, sample, f"in {name}", listing)
    except (tarfile.TarError, OSError, EOFError) as error:
        # Samples before the damage are used; those after it cannot be found.
        listing.set_aside.append(SetAside(prefix, split, "damaged_archive", f"{name}: {error}"))
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
        listing.notes.append(f"{name} has members that are neither images nor texts and were ignored: {kinds}")


def samples_of(path: Path, others: Counter[str]) -> Iterator[tuple[str, _Sample]]:
    """Yields key and members of each sample of a tar archive, in order; `others` counts other members by suffix.

    A key is a name without its last suffix. Members whose names agree up to the first dot (WebDataset's definition of a
    key) may come in any order, but must be consecutive.
    """
    size = path.stat().st_size
    group: dict[str, _Sample] = {}
    current = ""
    with tarfile.open(path, "r:") as archive:
        while (member := archive.next()) is not None:
            vars(archive)["members"].clear()  # tarfile keeps all of them, 1 KB each
            name = PurePosixPath(member.name)
            suffix = name.suffix.lower()
            if member.isdir():
                continue
            if name.name.startswith(".") or suffix not in IMAGE_SUFFIXES | TEXT_SUFFIXES:
                others[suffix or "without suffix"] += 1
                continue
            if member.offset_data + member.size > size:
                raise tarfile.ReadError("the archive ends inside a member")
            stem = str(name.parent / name.name.split(".")[0])
            if stem != current:
                yield from group.items()
                group, current = {}, stem
            sample = group.setdefault(member.name.removesuffix(name.suffix), _Sample())
            _take(archive, member, suffix, path, sample)
    yield from group.items()


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, path: Path, sample: _Sample) -> None:
    """Adds an image or a text to its sample, or the reason to refuse it."""
    if not member.isreg() or leaves_folder(member.name):
        sample.refused.append(("unsafe_member", f"{member.name} is a link or device, or leaves the folder"))
    elif (suffix in IMAGE_SUFFIXES and sample.image is not None) or suffix in sample.texts:
        sample.refused.append(("repeated_id", f"{member.name} is another file of this key"))
    elif suffix in IMAGE_SUFFIXES:
        sample.image = Place(path, span=(member.offset_data, member.size))
    elif member.size > MOST_TEXT_BYTES:
        sample.refused.append(("long_text", f"{member.name} has {member.size:,} bytes"))
    elif stream := archive.extractfile(member):
        sample.texts[suffix] = stream.read()


def _list_sample(name: str, split: str, sample: _Sample, place: str, listing: Listing) -> None:
    metadata = _metadata(sample.texts.get(".json", b""))
    caption = sample.texts[".txt"].decode("utf-8", "replace") if ".txt" in sample.texts else metadata.get("caption")
    if sample.image is None or caption is None:
        fault = "missing_image" if sample.image is None else "missing_caption"
        listing.set_aside.append(SetAside(name, split, fault, place))
        return
    url = metadata.get("url")
    image = ImageEntry(name, split, case=name, place=sample.image, attribution=str(url) if url else None)
    listing.images.append(image)
    listing.pairs.append(caption_pair(image, one_line(str(caption))))


def _metadata(data: bytes) -> dict[str, Any]:
    """The object in a sample's JSON member; empty if damaged, since only the URL is needed from it."""
    try:
        content = json.loads(data or b"{}")
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables_of(root: Path, columns: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Tables directly in `root` with `columns`, and their splits by name; raises DataError if there are none."""
    tables = (path for path in sorted(root.iterdir()) if path.suffix in TABLES)
    found = [(path, split_of_path(Path(path.name))) for path in tables if set(columns_of(path)) >= set(columns)]
    if not found:
        raise DataError(f"{root} has no table with the columns {','.join(columns)}; put one there")
    return found


def entry_of(table: Path, split: str, path: str) -> ImageEntry | None:
    """The image at a path relative to a table; None if the path is empty or leaves the table's folder."""
    if not path or leaves_folder(path):
        return None
    return ImageEntry(path, split, case=path, place=Place(table.parent / path))


def _fault_of_path(path: str) -> str:
    return "outside_folder" if path else "empty_path"


def _first_time(path: str, seen: set[int]) -> bool:
    """True for a new path; stores only hashes, since tables may have millions of long paths."""
    before = len(seen)
    seen.add(hash(path))
    return len(seen) > before


def _list_captions(table: Path, split: str, listing: Listing) -> None:
    seen: set[int] = set()
    for row in read_table(table, ("path", "caption"), bad_rows=listing.bad_rows(table, split)):
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
    rows = read_table(table, ("path", "question", "answer"), bad_rows=listing.bad_rows(table, split))
    for number, row in enumerate(rows):
        path = row["path"].strip()
        question, answer = one_line(row["question"]), answer_text(row["answer"])
        image = entry_of(table, split, path)
        fault = _fault_of_path(path) if image is None else fault_of_question(question, answer)
        if image is None or fault:
            listing.set_aside.append(SetAside(f"{path}/question-{number}", split, fault or "", f"in {table.name}"))
            continue
        if _first_time(path, seen):
            listing.images.append(image)
        listing.pairs.append(question_pair(image, f"{path}/question-{number}", question, answer))
