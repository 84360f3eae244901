"""Progress of long work: a bar on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LOG_EVERY_SECONDS = 10.0
logger = logging.getLogger("fuselip")

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str, total: int | None = None, start: int = 0) -> Iterator[Item]:
    """Yields `items` and shows the progress; an earlier run has done the first `start` of `total` items."""
    if total is None and isinstance(items, Sized):
        total = len(items) + start
    if sys.stderr.isatty():
        yield from _with_bar(items, description, total, start)
    else:
        yield from _with_log(items, description, total, start)


def _with_bar(items: Iterable[Item], description: str, total: int | None, start: int) -> Iterator[Item]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, completed=start)
        for item in items:
            yield item
            progress.advance(task)


def _with_log(items: Iterable[Item], description: str, total: int | None, start: int) -> Iterator[Item]:
    last = time.monotonic()
    for done, item in enumerate(items, start + 1):
        yield item
        if time.monotonic() - last >= LOG_EVERY_SECONDS:
            last = time.monotonic()
            logger.info("%s: %d of %s", description, done, "?" if total is None else total)


class ByteMeter:
    """Progress in bytes: a bar with the speed on a terminal, a line every ten seconds in a log."""

    def __init__(self, description: str, total: int | None) -> None:
        self.description, self.total, self.done = description, total, 0
        self._lock = threading.Lock()
        self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> ByteMeter:
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.description, total=self.total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Adds `count` bytes (negative if some must be fetched again); safe from any thread."""
        with self._lock:
            self.done += count
            if self._bar is not None:
                self._bar.update(self._task, completed=self.done)
            elif time.monotonic() - self._last >= LOG_EVERY_SECONDS:
                self._last = time.monotonic()
                known = f" of {self.total / 1e6:,.0f}" if self.total else ""
                logger.info("%s: %.0f%s MB", self.description, self.done / 1e6, known)
