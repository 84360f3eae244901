"""One process at a time: a lock that goes with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fuselip_core.errors import FuselipError


@contextmanager
def sole_process(path: Path, refusal: FuselipError) -> Iterator[None]:
    """Holds the lock file at `path`, whose folder must be there; raises `refusal` while another process holds it."""
    descriptor = _held(path)
    if descriptor is None:
        raise refusal
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _held(path: Path) -> int | None:
    """A descriptor that holds the lock; None if another process does."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, the last holder may have taken the file away: then it locks nothing.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        os.close(descriptor)
