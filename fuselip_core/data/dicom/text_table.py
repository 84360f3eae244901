"""The table of texts that comes with a DICOM folder: which row speaks of which file."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fuselip_core.data.pair import DataError

# Columns of the table that may name an image, from the closest to the widest.
KEY_COLUMNS = ("SOPInstanceUID", "file", "SeriesInstanceUID", "StudyInstanceUID", "AccessionNumber")


@dataclass
class TextTable:
    """Rows of the CSV by what they name: an instance, a file, a series, a study or an accession number."""

    rows: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    count: int = 0
    used: set[int] = field(default_factory=set)

    @classmethod
    def read(cls, path: Path | None) -> TextTable:
        """An empty table without `path`; raises DataError for a file that cannot be one."""
        table = cls()
        if path is None:
            return table
        try:
            with path.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.DictReader(stream, restval="")
                names = list(reader.fieldnames or ())
                text = next((name for name in names if name.lower() in ("text", "caption")), None)
                keys = [name for name in KEY_COLUMNS if name in names]
                if text is None or not keys:
                    raise DataError(
                        f"{path} needs a column text and one of {', '.join(KEY_COLUMNS)}; its header has neither "
                        "or only one of the two"
                    )
                for number, row in enumerate(reader):
                    table._add(number, row, text, keys)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"the table of texts {path} cannot be read ({type(error).__name__})") from None
        return table

    def _add(self, number: int, row: dict[str, str], text: str, keys: list[str]) -> None:
        self.count += 1
        entry = {"text": row[text] or "", "split": (row.get("split") or "").strip(), "number": str(number)}
        for key in keys:
            if value := (row[key] or "").strip():
                self.rows[key, value.replace(os.sep, "/")] = entry

    def row_of(self, path: Path, keys: Mapping[str, str]) -> dict[str, str] | None:
        """The row that names a file most closely, by its `path` below the root or one of its `keys`; None if none."""
        for key in KEY_COLUMNS:
            values = (path.as_posix(), path.name, path.stem) if key == "file" else (keys[key],)
            for value in values:
                row = self.rows.get((key, value)) if value else None
                if row is not None:
                    self.used.add(int(row["number"]))
                    return row
        return None
