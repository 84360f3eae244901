"""Worker processes that end with the process that started them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from fuselip_core.errors import FuselipError

LOOK_EVERY_SECONDS = 2.0


@contextlib.contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of `workers` processes, or None for one: then the caller does the work itself.

    Raises FuselipError if a worker dies. Work that has not begun is dropped when the block ends with an error.
    """
    if workers == 1:
        yield None
        return
    # Spawned, not forked: the caller may hold threads.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise FuselipError(
            "a worker process died, most likely for lack of memory; free some, or set prepare.workers=1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with(parent: int) -> None:
    """Ends this process when `parent` is gone: a killed parent cannot tell, and its workers would wait for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
