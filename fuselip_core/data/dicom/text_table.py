"""Reads the table of texts beside a DICOM folder and matches its rows to files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fuselip_core.data.pair import DataError
from fuselip_core.data.table_reader import columns_of, read_table

# Columns that may name an image, from the closest to the widest.
IMAGE_COLUMNS = ("SOPInstanceUID", "file")
KEY_COLUMNS = (*IMAGE_COLUMNS, "SeriesInstanceUID", "StudyInstanceUID", "AccessionNumber")
SPLIT_OF = {"": "", "train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}


@dataclass(frozen=True)
class TextRow:
    """A row that can be used; split is "" where it states none."""

    number: int
    text: str
    split: str


@dataclass
class TextTable:
    """Rows of the table by what they name: an instance, a file, a series, a study or an accession number.

    set_aside: name of the row, reason and detail of each that cannot be used; none of it quotes the table.
    """

    rows: dict[tuple[str, str], TextRow] = field(default_factory=dict)
    set_aside: list[tuple[str, str, str]] = field(default_factory=list)
    count: int = 0
    used: set[int] = field(default_factory=set)
    shared_names: frozenset[str] = frozenset()

    @classmethod
    def read(cls, path: Path | None) -> TextTable:
        """An empty table without `path`; raises DataError for a file that cannot be one."""
        table = cls()
        if path is None:
            return table
        if not path.is_file():
            raise DataError(f"the table of texts {path} cannot be read; name a file with --text")
        names = columns_of(path)
        text = next((name for name in names if name.lower() in ("text", "caption")), None)
        if text is None or not set(KEY_COLUMNS) & set(names):
            raise DataError(
                f"{path} needs a column text and one of {', '.join(KEY_COLUMNS)}; its header has neither "
                "or only one of the two"
            )

        def bad_row(line: int, fault: str) -> None:
            table.count += 1
            table.set_aside.append((f"text table, line {line}", "bad_row", fault))

        for row in read_table(path, (text,), (*KEY_COLUMNS, "split"), bad_row):
            table._add({name: str(value if value is not None else "").strip() for name, value in row.items()}, text)
        return table

    def _add(self, row: Mapping[str, str], text: str) -> None:
        self.count += 1
        name = f"text table, row {self.count}"
        split = SPLIT_OF.get(row["split"].lower())
        if split is None:
            self.set_aside.append((name, "unknown_split", f"none of {', '.join(filter(None, SPLIT_OF))}"))
            return
        entry = TextRow(self.count, row[text], split)
        keys = [(key, row[key].replace("\\", "/") if key == "file" else row[key]) for key in KEY_COLUMNS if row[key]]
        # A row that names an image says nothing of the others of its study.
        keys = [key for key in keys if key[0] in IMAGE_COLUMNS] or keys[:1]
        if not keys:
            self.set_aside.append((name, "no_image_named", "every column that could name one is empty"))
        for key in keys:
            known = self.rows.setdefault(key, entry)
            if known is not entry and (known.text, known.split) != (entry.text, entry.split):
                detail = f"its {key[0]} is that of row {known.number}, whose text is another"
                self.set_aside.append((name, "repeated_row", detail))
                return

    def tell_apart(self, paths: Iterable[Path]) -> None:
        """Learns all `paths` below the root: a bare name that several of them have names none of them."""
        names = Counter(name for path in paths for name in {path.name, path.stem})
        self.shared_names = frozenset(name for name, count in names.items() if count > 1)

    def row_of(self, path: Path, keys: Mapping[str, str]) -> TextRow | None:
        """The row that names a file most closely, by its `path` below the root or one of its `keys`; None if none."""
        bare = [name for name in (path.name, path.stem) if name not in self.shared_names]
        for key in KEY_COLUMNS:
            for value in (path.as_posix(), *bare) if key == "file" else (keys[key],):
                row = self.rows.get((key, value)) if value else None
                if row is not None:
                    self.used.add(row.number)
                    return row
        return None
