"""One iterator over any archive: folders of pictures, tables, prepared data, DICOM trees, published data sets.

Each kind is read by the code that training uses: data sets by their adapter in `data/sources`, tables by
`table_reader`, prepared data by `PreparedData`. Unusable rows are set aside with a reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuselip_core.data.dicom.listing import DicomPlace
from fuselip_core.data.dicom.picture import is_dicom
from fuselip_core.data.download.manifest import provenance_of
from fuselip_core.data.pair import SPLIT_OF, DataError, ImageEntry, Listing, SetAside, one_line
from fuselip_core.data.places import Derived, Place
from fuselip_core.data.prepare.extra_pairs import names_in
from fuselip_core.data.shards.reader import MANIFEST, PreparedData
from fuselip_core.data.sources.catalogue import list_source, source_names
from fuselip_core.data.table_reader import SUFFIXES as TABLES
from fuselip_core.data.table_reader import columns_of, read_table
from fuselip_core.data.walk import files_below
from fuselip_core.images import SUFFIXES as PICTURES
from fuselip_core.search.dicomweb import study_address
from fuselip_core.search.originals import note_prepared

IMAGE_COLUMNS = ("image", "file_name")
TEXT_COLUMNS = ("text", "caption")
OTHER_COLUMNS = ("id", "concepts", "modality", "case", "split", "licence")

OnSetAside = Callable[[SetAside], None]


@dataclass(frozen=True, slots=True)
class Row:
    """One item of an archive.

    image: the bytes of an image file, their place, or None. text: embedded, together with the image if there is one.
    caption: shown and searched by words, but not embedded. place: where a person finds the picture; empty for DICOM,
    whose paths may contain names. origin: where a program finds a picture given as bytes (see `originals`).
    """

    id: str
    image: bytes | Place | Derived | None = None
    text: str | None = None
    caption: str = ""
    concepts: tuple[str, ...] = ()
    modality: str = ""
    case: str = ""
    split: str = ""
    source: str = ""
    licence: str = ""
    place: str = ""
    origin: str = ""

    def id_hash(self) -> int:
        """A 64-bit hash of the id: enough to find repeated ids among millions, and evenly distributed."""
        return int.from_bytes(hashlib.blake2b(self.id.encode(errors="surrogateescape"), digest_size=8).digest())

    def stamp(self) -> str:
        """A hash that changes with the row and, for a picture in a file, with the file's size and date."""
        image: Any = self.image
        if isinstance(image, bytes):
            image = hashlib.sha256(image).hexdigest()
        elif image is not None:
            try:
                status = image.file.stat()
            except OSError:
                image = "missing"  # set aside later, when it is read
            else:
                image = f"{image!r} {status.st_size} {status.st_mtime_ns}"
        stated = [getattr(self, name) for name in self.__slots__ if name not in ("image", "origin")]
        return hashlib.sha256(repr((image, stated)).encode(errors="surrogateescape")).hexdigest()


class Archive:
    """The rows of `source`, a folder or a table, in a stable order; can be iterated repeatedly.

    kind: a name from `fuselip data sources`, detected if None. name: prefix of generated ids, and the `source` of every
    row; by default the name of the folder or table. studies_at: the DICOMweb server that the files come from, for
    links. total: the number of rows, if known.
    """

    def __init__(
        self, source: Path, kind: str | None = None, name: str | None = None, studies_at: str | None = None
    ) -> None:
        """Raises DataError if `source` is missing or of no known kind."""
        self.source, self.total = source, None
        self.notes: list[str] = []
        self._set_aside: list[Iterable[SetAside]] = []
        if not source.exists():
            raise DataError(f"{source} does not exist; check the path, which in a container is that of the mount")
        self.kind = kind or kind_of(source)
        self._rows: Callable[[OnSetAside], Iterator[Row]]
        if self.kind == "table":
            names = columns_of(source)
            if not {*IMAGE_COLUMNS, "text"} & set(names):
                raise DataError(
                    f"{source} has no column image, file_name or text, but: {', '.join(names)}; rename one of them"
                )
            self._rows = lambda set_aside: _of_table(source, name or source.stem, set_aside)
        elif self.kind == "prepared":
            prepared = PreparedData(source)
            self.total = sum(prepared.image_count(split) for split in prepared.splits)
            self._rows = lambda set_aside: _of_prepared(prepared, name)
        else:
            listing = list_source(self.kind, source)
            self.total, self.notes = len(listing.images), listing.notes
            named = name or (source.resolve().name if self.kind == "folder" else self.kind)
            self._rows = lambda set_aside: _of_listing(self.kind, source, named, listing, set_aside, studies_at)

    def rows(self, set_aside: OnSetAside) -> Iterator[Row]:
        """Yields the rows; calls `set_aside` for those that cannot be used."""
        return self._rows(set_aside)


def kind_of(source: Path) -> str:
    """table, prepared, or the name of the adapter that reads a folder; raises DataError if nothing fits."""
    if source.is_file():
        if source.suffix in TABLES:
            return "table"
        raise DataError(f"{source} is neither a folder nor a table ({', '.join(TABLES)}); name one of these")
    if (source / MANIFEST).is_file():
        return "prepared"
    if next(source.glob("*_captions.csv"), None):
        return "rocov2"
    pictures = False
    for path in files_below(source):
        if path.suffix.lower() in PICTURES:
            pictures = True
        else:
            with path.open("rb") as stream:
                if is_dicom(stream.read(132)):
                    return "dicom"
    if pictures:
        return "folder"
    raise DataError(
        f"{source} holds no pictures ({', '.join(PICTURES)} or DICOM); name another folder, or its kind with --kind "
        f"({', '.join(source_names())})"
    )


# ---- tables ----------------------------------------------------------------------------------------------------------


def _of_table(path: Path, name: str, set_aside: OnSetAside) -> Iterator[Row]:
    """Paths in a table are relative to it. Parquet files of the Hub may hold the image itself as bytes."""

    def bad_row(line: int, fault: str) -> None:
        set_aside(SetAside(f"{name}:{line}", "", "bad_row", f"line {line}: {fault}"))

    columns = (*IMAGE_COLUMNS, *TEXT_COLUMNS, *OTHER_COLUMNS)
    for number, values in enumerate(read_table(path, (), columns, bad_row), 1):
        image = next((values[column] for column in IMAGE_COLUMNS if values[column]), None)
        text, caption = (one_line(str(values[column] or "")) for column in TEXT_COLUMNS)
        stated = str(values["split"] or "").strip().lower()
        yield Row(
            id=str(values["id"] or f"{name}/{number}"),
            image=_image_of(image, path.parent),
            text=text or None,
            caption=caption or text,
            concepts=_concepts_of(values["concepts"]),
            modality=str(values["modality"] or "").strip(),
            case=str(values["case"] or "").strip(),
            split=SPLIT_OF.get(stated, stated),
            source=name,
            licence=str(values["licence"] or "").strip(),
            place=str((path.parent / image).absolute()) if isinstance(image, str) else "",
        )


def _image_of(value: Any, folder: Path) -> bytes | Place | None:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    return Place(folder / str(value).strip()) if value and str(value).strip() else None


def _concepts_of(value: Any) -> tuple[str, ...]:
    parts = str(value or "").split(";") if not isinstance(value, list) else map(str, value)
    return tuple(part.strip() for part in parts if part.strip())


# ---- prepared data, and folders with an adapter ----------------------------------------------------------------------


class _Captions:
    """Captions by image. Pairs come in nearly the order of the images, so only a few are kept at a time."""

    def __init__(self, pairs: Iterable[tuple[str | None, str | None]]) -> None:
        self._pairs, self._waiting = iter(pairs), dict[str, str]()

    def of(self, image: str) -> str:
        while image not in self._waiting and (pair := next(self._pairs, None)):
            if pair[0] is not None and pair[1]:
                self._waiting.setdefault(pair[0], pair[1])
        return self._waiting.pop(image, "")


def _of_prepared(prepared: PreparedData, name: str | None) -> Iterator[Row]:
    columns = ["image_id", "bytes", "modality", "concepts", "case", "source", "licence", "attribution"]
    names = prepared.manifest.get("concept_names", {})
    for split in prepared.splits:
        table = prepared.pairs(split).select(["kind", "query_image", "target_text"])
        captions = _Captions(
            (row["query_image"], row["target_text"])
            for batch in table.to_batches(1024)
            for row in batch.to_pylist()
            if row["kind"] == "caption"
        )
        rows = (row for batch in prepared.iter_images(split, columns, batch_rows=64) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield Row(
                id=row["image_id"],
                image=row["bytes"],
                caption=captions.of(row["image_id"]),
                concepts=tuple(names.get(code, code) for code in row["concepts"] or ()),
                modality=row["modality"] or "",
                case=row["case"] or "",
                split=split,
                source=name or row["source"] or "",
                licence=row["licence"] or "",
                place=row["attribution"] or "",
                origin=note_prepared(prepared.folder, split, number),
            )


def _of_listing(
    kind: str, root: Path, name: str, listing: Listing, set_aside: OnSetAside, studies_at: str | None
) -> Iterator[Row]:
    for item in listing.set_aside:
        set_aside(item)
    captions = _Captions((pair.query.image, pair.target.text) for pair in listing.pairs if pair.kind == "caption")
    origin, names = provenance_of(root), names_in(root, listing)
    for entry in listing.images:
        yield Row(
            id=f"{name}/{entry.image_id}" if kind == "folder" else entry.image_id,
            image=entry.place,
            caption=captions.of(entry.image_id),
            concepts=tuple(names.get(code, code) for code in entry.concepts),
            modality=entry.modality or "",
            case=entry.case,
            split=entry.split,
            source=name,
            licence=entry.licence or origin.licence or "",
            place=study_address(studies_at, entry.place.file) if studies_at else _shown_place(entry),
        )


def _shown_place(entry: ImageEntry) -> str:
    if isinstance(entry.place, DicomPlace):
        return ""
    if entry.attribution:
        return entry.attribution
    place = entry.place.source if isinstance(entry.place, Derived) else entry.place
    return f"{place.file.absolute()}" + (f":{place.member}" if place.member else "")
