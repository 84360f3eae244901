"""Worker processes that end with their parent."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context

from fuselip_core.errors import FuselipError

LOOK_EVERY_SECONDS = 2.0


@contextlib.contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of `workers` processes, or None for one, in which case the caller does the work itself.

    Raises FuselipError if a worker dies. After an error, pending tasks are cancelled; after Ctrl-C, running ones too.
    """
    if workers == 1:
        yield None
        return
    others = active_children()
    # Spawned, not forked, since the caller may have threads.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise FuselipError(
            "a worker process died, probably for lack of memory; free some memory, or set prepare.workers=1"
        ) from error
    except KeyboardInterrupt:
        for process in active_children():
            if process not in others:
                process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with(parent: int) -> None:
    """Ends this process when `parent` is gone, since a killed parent cannot stop its workers.

    Ignores Ctrl-C, which reaches all processes, so that only the parent handles it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
