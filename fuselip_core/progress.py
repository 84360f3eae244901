"""Progress of long work: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
LOG_EVERY_SECONDS = 10.0

logger = logging.getLogger("fuselip")


def track(items: Iterable[Item], description: str, total: int | None = None, start: int = 0) -> Iterator[Item]:
    """Yields `items` and shows how far they are; `start` items of `total` were done by an earlier run."""
    if total is None and isinstance(items, Sized):
        total = len(items) + start
    if sys.stderr.isatty():
        yield from _with_bar(items, description, total, start)
    else:
        yield from _with_log(items, description, total, start)


def _with_bar(items: Iterable[Item], description: str, total: int | None, start: int) -> Iterator[Item]:
    from rich.console import Console

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
