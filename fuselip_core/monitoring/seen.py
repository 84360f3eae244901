"""Writes what a server embeds as observations into a folder: vectors and lengths, but no image and no text."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fuselip_core.errors import FuselipError
from fuselip_core.monitoring.observations import Observations, record, schema_of

OBSERVED = "seen-*.parquet"
FILE_ROWS, MOST_FILES = 500, 20  # the oldest files are deleted


class Seen:
    """Collects rows and writes them in files of about FILE_ROWS, one model each; safe to use from many threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: list[dict[str, Any]] = []
        self._unreadable, self._digest = 0, ""
        self._lock = threading.Lock()

    def add(self, rows: Sequence[tuple[bool, str | None]], vectors: NDArray[np.float32], digest: str) -> None:
        """Adds rows (whether there is an image, and the text) with their vectors (N, W) from the model of `digest`."""
        with self._lock:
            if digest != self._digest or len(self._rows) >= FILE_ROWS:
                self._write()
            self._digest = digest
            self._rows += [record(image, text, vector) for (image, text), vector in zip(rows, vectors, strict=True)]

    def add_unreadable(self) -> None:
        """Counts an image that could not be read."""
        with self._lock:
            self._unreadable += 1

    def close(self) -> None:
        """Writes the remaining rows."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        if not self._rows:  # unreadable images are written with the next rows
            return
        table = pa.Table.from_pylist(self._rows, schema_of(len(self._rows[0]["vector"])))
        Observations(table, self._unreadable, self._digest).write(self.folder / f"seen-{time.time_ns()}.parquet")
        self._rows, self._unreadable = [], 0
        for old in sorted(self.folder.glob(OBSERVED))[:-MOST_FILES]:
            old.unlink()


def read_seen(folder: Path, digest: str) -> Observations:
    """All observations by the model of `digest`; raises FuselipError if there are none."""
    parts = [Observations.read(path) for path in sorted(folder.glob(OBSERVED))]
    parts = [part for part in parts if part.digest == digest]
    if not parts:
        raise FuselipError(f"the observations in {folder} are by other models; name the served model with --model")
    return Observations(
        pa.concat_tables([part.table for part in parts]), sum(part.unreadable for part in parts), digest
    )
