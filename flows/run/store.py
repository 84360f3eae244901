"""Keeps runs in an object store, for machines that keep nothing, such as pods: ``FUSELIP_STORE=s3://BUCKET/FOLDER``.

Data and the outputs of finished stages go to ``dvc/`` there, as DVC's remote. What DVC does not keep of a run goes to
``runs/<name>/``: its settings and lock, metrics, and the checkpoints from which a stopped stage resumes.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.run.child import OnLine
from flows.run.dvc_stage import dvc_repo, transfer
from flows.run.folder import Run
from flows.run.runner import Outcome, Runner
from fuselip_core.errors import FuselipError, sentence_of

EVERY_SECONDS = 60.0  # between two looks for new checkpoints


def fetch_run(run: Run, on_line: OnLine) -> None:
    """Brings what an earlier machine kept of the run; what is here already stays as it is."""
    if not (store := os.environ.get("FUSELIP_STORE")):
        return
    with _named(store):
        files, folder = _folder(store, run)
        for place in files.find(folder):
            here = run.folder / str(Path(place).relative_to(folder))
            if not here.exists():
                here.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(place, str(here))
    if (run.folder / "dvc.lock").exists():
        transfer(run.repository, "pull", run.folder / "dvc.yaml", on_line, allow_missing=True)


class KeptRunner:
    """Runs stages by `runner`, and sends what they have made to the store: checkpoints soon, outputs at their end."""

    def __init__(self, runner: Runner, store: str) -> None:
        self.runner, self.store = runner, store

    def run(self, stage: str, run: Run, on_line: OnLine, force: bool = False) -> Outcome:
        start = time.monotonic()
        try:
            with self._mirrored(run, on_line):
                outcome = self.runner.run(stage, run, on_line, force)
                if outcome.status == "done":
                    transfer(run.repository, "push", run.folder / "dvc.yaml", on_line)
            return outcome
        except FuselipError as error:
            # What is here alone would go with the machine, so that the stage does not count as done.
            return Outcome(stage, "failed", time.monotonic() - start, str(error))

    @contextlib.contextmanager
    def _mirrored(self, run: Run, on_line: OnLine) -> Iterator[None]:
        over, sent = threading.Event(), _Sent(self.store, run)

        def look() -> None:
            while not over.wait(EVERY_SECONDS):
                try:
                    sent.send()
                except FuselipError as error:  # the next look may meet a store that answers
                    on_line(f"warning: {error}")

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            sent.send()


class _Sent:
    """The run's files that DVC does not keep, and those of them that the store has."""

    def __init__(self, store: str, run: Run) -> None:
        self.run, self.store = run, store
        with _named(store):
            self.files, self.folder = _folder(store, run)
        with dvc_repo(run.repository) as repo:
            stages = repo.stage.load_all(str(run.folder / "dvc.yaml"))
            self.outputs = [Path(out.fs_path) for stage in stages for out in stage.outs if out.use_cache]
        self.known: dict[Path, tuple[int, int]] = {}

    def send(self) -> None:
        """Sends what is new or has changed, and removes what is no longer here, such as an old checkpoint."""
        found = dict(self._mine())
        with _named(self.store):
            for path in sorted(path for path, seen in found.items() if self.known.get(path) != seen):
                # A checkpoint may just be replaced by the next; its digest tells a part from the whole.
                with contextlib.suppress(FileNotFoundError):
                    self.files.put_file(str(path), self._place(path))
            left = set(self.files.find(self.folder)) - {self._place(path) for path in found}
            if left:
                self.files.rm(sorted(left))
        self.known = found

    def _mine(self) -> Iterator[tuple[Path, tuple[int, int]]]:
        """Each file with its size and time; an old checkpoint may vanish meanwhile."""
        for path in self.run.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and not any(path.is_relative_to(output) for output in self.outputs):
                    yield path, (path.stat().st_size, path.stat().st_mtime_ns)

    def _place(self, path: Path) -> str:
        return f"{self.folder}/{path.relative_to(self.run.folder)}"


def _folder(store: str, run: Run) -> tuple[Any, str]:
    """The store's file system, and the run's folder there."""
    from fsspec.core import url_to_fs

    if run.folder == run.repository:
        raise FuselipError("a run that FUSELIP_STORE keeps needs a name: give it one (name)")
    # Without its memory of what it has listed, which other machines change.
    files, folder = url_to_fs(f"{store.rstrip('/')}/runs/{run.folder.name}", use_listings_cache=False)
    return files, str(folder)


@contextlib.contextmanager
def _named(store: str) -> Iterator[None]:
    """Turns what a store raises, each kind its own, into a FuselipError that names it."""
    try:
        yield
    except FuselipError:
        raise
    except Exception as error:
        raise FuselipError(f"FUSELIP_STORE={store}: {sentence_of(error)}") from error
