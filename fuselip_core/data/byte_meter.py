"""Progress of a download in bytes: a bar with speed on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any

LOG_EVERY_SECONDS = 10.0

logger = logging.getLogger("fuselip")


class ByteMeter:
    """Shows bytes as they come: a bar with speed on a terminal, a log line every ten seconds elsewhere."""

    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total, self.done = description, total, 0
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ByteMeter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.progress import TransferSpeedColumn as Speed

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.description, total=self.total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Counts `count` bytes (negative when some have to come again); safe from any thread."""
        with self._lock:
            self.done += count
            if self._bar is not None:
                self._bar.update(self._task, completed=self.done)
            elif time.monotonic() - self._last >= LOG_EVERY_SECONDS:
                self._last = time.monotonic()
                known = f" of {self.total / 1e6:,.0f}" if self.total else ""
                logger.info("%s: %.0f%s MB", self.description, self.done / 1e6, known)
