"""One DVC command at a time in a repository, and one flow at a time in a run's folder."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from flows.run.child import OnLine

REMIND_EVERY_SECONDS = 30.0
LOOK_EVERY_SECONDS = 0.5


@contextlib.contextmanager
def dvc_lock(repository: Path, owner: str, on_wait: OnLine) -> Iterator[int]:
    """Holds the right to run DVC in `repository`; yields a descriptor that a child may inherit to hold it longer.

    DVC refuses a second command while one runs. Here the second waits and says for whom. It is a plain `flock`, not
    one of filelock's: a stage may outlive its killed flow, and only a descriptor can be handed down to it.
    """
    path = _path(repository, "flow")
    with path.with_suffix(".queue").open("a") as queue:
        with path.open("a+", encoding="utf-8") as file:
            if not _try_lock(file.fileno()):
                # Shared by all who wait, so that the holder can see that somebody does.
                fcntl.flock(queue, fcntl.LOCK_SH)
                _wait(lambda: _try_lock(file.fileno()), path, on_wait)
                fcntl.flock(queue, fcntl.LOCK_UN)
            file.truncate(0)
            file.write(owner)
            file.flush()
            yield file.fileno()
        # A flow takes the lock again for its next stage at once; this pause lets those who wait have a turn.
        if not _try_lock(queue.fileno()):
            time.sleep(2 * LOOK_EVERY_SECONDS)


@contextlib.contextmanager
def run_lock(repository: Path, folder: Path, owner: str, on_wait: OnLine) -> Iterator[None]:
    """Holds the run in `folder` from first to last stage: another flow would change its params.yaml meanwhile."""
    path = _path(repository, f"run-{'root' if folder == repository else folder.name}")
    lock, named = FileLock(path), path.with_suffix(".owner")

    def taken() -> bool:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    _wait(taken, named, on_wait)
    try:
        named.write_text(owner, encoding="utf-8")
        yield
    finally:
        lock.release()


def _path(repository: Path, name: str) -> Path:
    folder = repository / ".dvc" / "tmp"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.lock"


def _wait(taken: Callable[[], bool], named: Path, on_wait: OnLine) -> None:
    """Returns once `taken` is true; meanwhile says now and then whom it waits for, as the file `named` tells."""
    told = float("-inf")
    while not taken():
        if time.monotonic() - told >= REMIND_EVERY_SECONDS:
            told = time.monotonic()
            owner = named.read_text(encoding="utf-8") if named.exists() else "another process"
            on_wait(f"waiting for another run that is at work here: {owner}")
        time.sleep(LOOK_EVERY_SECONDS)


def _try_lock(descriptor: int) -> bool:
    """Whether `descriptor` has its file's lock now; it lasts until the file is closed or its process ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
