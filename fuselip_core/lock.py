"""One process at a time: a lock that the kernel takes away with its process, however that ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fuselip_core.errors import FuselipError


@contextmanager
def sole_process(path: Path, refusal: FuselipError) -> Iterator[None]:
    """Holds the lock file at `path`, whose folder must be there; raises `refusal` while another process holds it."""
    try:
        with FileLock(path, timeout=0):
            yield
    except Timeout as error:
        raise refusal from error
