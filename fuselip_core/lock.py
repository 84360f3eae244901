"""One process at a time: a lock that the kernel releases when its process ends, however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fuselip_core.errors import FuselipError

# Long enough for a second try, in case the first one opened the file just before its holder deleted it.
WAIT_SECONDS = 0.2


@contextmanager
def sole_process(path: Path, refusal: FuselipError) -> Iterator[None]:
    """Holds the lock file at `path`, whose folder must exist; raises `refusal` while another process holds it.

    The file is deleted before the lock is released, and filelock never counts a deleted file as locked: nothing stays
    behind, and no two processes hold the lock at once.
    """
    lock = FileLock(path, timeout=WAIT_SECONDS)
    try:
        lock.acquire()
    except Timeout as error:
        raise refusal from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
