"""One DVC command at a time in a repository, and one flow at a time on a run's folder."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from flows.run.child import OnLine

REMIND_EVERY_SECONDS = 30.0
LOOK_EVERY_SECONDS = 0.5


@contextlib.contextmanager
def dvc_lock(repository: Path, owner: str, on_wait: OnLine) -> Iterator[int]:
    """Holds the right to run DVC in `repository`; yields a descriptor that a child may inherit to hold it longer.

    DVC refuses a second command while one is at work. Here the second waits, and says for whom.
    """
    with _locked(repository / ".dvc" / "tmp" / "flow.lock", owner, on_wait) as descriptor:
        yield descriptor


@contextlib.contextmanager
def run_lock(repository: Path, folder: Path, owner: str, on_wait: OnLine) -> Iterator[None]:
    """Holds the run in `folder` from first stage to last: another flow would change its params.yaml meanwhile."""
    name = "root" if folder == repository else folder.name
    with _locked(repository / ".dvc" / "tmp" / f"run-{name}.lock", owner, on_wait):
        yield


@contextlib.contextmanager
def only_one(folder: Path, what: str) -> Iterator[None]:
    """Lets one process at a time do `what`; the others wait."""
    with _locked(folder / f"{what}.lock", what, lambda line: None):
        yield


@contextlib.contextmanager
def _locked(path: Path, owner: str, on_wait: OnLine) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".queue").open("a") as queue:
        with path.open("a+", encoding="utf-8") as file:
            _wait_for(file.fileno(), queue.fileno(), path, on_wait)
            file.truncate(0)
            file.write(owner)
            file.flush()
            yield file.fileno()
        # Whoever takes the lock again at once would never let go of it: those who wait only look now and then.
        if not try_lock(queue.fileno()):
            time.sleep(2 * LOOK_EVERY_SECONDS)


def _wait_for(descriptor: int, queue: int, path: Path, on_wait: OnLine) -> None:
    """Until `descriptor` holds its lock; meanwhile `queue` is held, together with all others who wait."""
    told = float("-inf")
    while not try_lock(descriptor):
        if told == float("-inf"):
            fcntl.flock(queue, fcntl.LOCK_SH)
        if time.monotonic() - told >= REMIND_EVERY_SECONDS:
            told = time.monotonic()
            on_wait(f"waiting for another run that is at work here: {path.read_text(encoding='utf-8')}")
        time.sleep(LOOK_EVERY_SECONDS)
    fcntl.flock(queue, fcntl.LOCK_UN)


def try_lock(descriptor: int) -> bool:
    """Whether `descriptor` has its file's lock now; it lasts until the file is closed or its process ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
