"""Reads the table of texts beside a DICOM folder and matches its rows to files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fuselip_core.data.pair import SPLIT_OF, DataError
from fuselip_core.data.table_reader import columns_of, read_table

# Columns that may identify images, from the most to the least specific.
IMAGE_COLUMNS = ("SOPInstanceUID", "file")
KEY_COLUMNS = (*IMAGE_COLUMNS, "SeriesInstanceUID", "StudyInstanceUID", "AccessionNumber")


@dataclass(frozen=True)
class TextRow:
    """A usable row; split: "" if it states none."""

    number: int
    text: str
    split: str


@dataclass
class TextTable:
    """Rows by the instance, file, series, study or accession number that they belong to.

    set_aside: (row, reason, detail) of unusable rows, without quoting the table.
    """

    rows: dict[tuple[str, str], TextRow] = field(default_factory=dict)
    set_aside: list[tuple[str, str, str]] = field(default_factory=list)
    count: int = 0
    used: set[int] = field(default_factory=set)
    shared_names: frozenset[str] = frozenset()

    @classmethod
    def read(cls, path: Path | None) -> TextTable:
        """Reads a table; without `path` an empty one. Raises DataError for a file that is not such a table."""
        table = cls()
        if path is None:
            return table
        if not path.is_file():
            raise DataError(f"the table of texts {path} cannot be read; name a file with --text")
        names = columns_of(path)
        text = next((name for name in names if name.lower() in ("text", "caption")), None)
        if text is None or not set(KEY_COLUMNS) & set(names):
            raise DataError(f"{path} lacks a column text, or one of {', '.join(KEY_COLUMNS)}; add it")

        def bad_row(line: int, fault: str) -> None:
            table.count += 1
            table.set_aside.append((f"text table, line {line}", "bad_row", fault))

        for row in read_table(path, (text,), (*KEY_COLUMNS, "split"), bad_row):
            table._add({name: str(value if value is not None else "").strip() for name, value in row.items()}, text)
        return table

    def _add(self, row: Mapping[str, str], text: str) -> None:
        self.count += 1
        name = f"text table, row {self.count}"
        split = SPLIT_OF.get(row["split"].lower()) if row["split"] else ""
        if split is None:
            self.set_aside.append((name, "unknown_split", f"none of {', '.join(SPLIT_OF)}"))
            return
        entry = TextRow(self.count, row[text], split)
        keys = [(key, row[key].replace("\\", "/") if key == "file" else row[key]) for key in KEY_COLUMNS if row[key]]
        # A row for an image does not apply to the rest of its series or study.
        keys = [key for key in keys if key[0] in IMAGE_COLUMNS] or keys[:1]
        if not keys:
            self.set_aside.append((name, "no_image_named", "all columns that identify images are empty"))
        for key in keys:
            known = self.rows.setdefault(key, entry)
            if known is not entry and (known.text, known.split) != (entry.text, entry.split):
                detail = f"same {key[0]} as row {known.number}, but another text or split"
                self.set_aside.append((name, "repeated_row", detail))
                return

    def tell_apart(self, paths: Iterable[Path]) -> None:
        """Notes file names that occur several times among `paths`, so that a bare name never matches several files."""
        names = Counter(name for path in paths for name in {path.name, path.stem})
        self.shared_names = frozenset(name for name, count in names.items() if count > 1)

    def row_of(self, path: Path, keys: Mapping[str, str]) -> TextRow | None:
        """The most specific row for a file, by its `path` below the root or its `keys`; None if there is none."""
        bare = [name for name in (path.name, path.stem) if name not in self.shared_names]
        for key in KEY_COLUMNS:
            for value in (path.as_posix(), *bare) if key == "file" else (keys[key],):
                row = self.rows.get((key, value)) if value else None
                if row is not None:
                    self.used.add(row.number)
                    return row
        return None
