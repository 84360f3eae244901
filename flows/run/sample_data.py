"""The embedded sample in data/: drawn where it is missing, and compared with the committed data.dvc."""

from __future__ import annotations

import sys
from pathlib import Path

from flows.run.child import OnLine, stream
from flows.run.dvc_stage import dvc_problem, dvc_repo
from flows.run.lock import dvc_lock
from flows.run.runner import LastLines, stage_environment
from fuselip_core.errors import FuselipError


def ensure_sample(repository: Path, on_line: OnLine) -> bool:
    """Draws data/ if it is missing and adds it to DVC's cache; returns whether it was drawn.

    Raises FuselipError if the bytes differ from data.dvc.
    """
    # Another flow may be drawing it at this very moment: one draws, and the others find it.
    with dvc_lock(repository, "data.dvc", on_line) as lock:
        missing = not (repository / "data").exists()
        if missing:
            lines = LastLines(on_line)
            command = [sys.executable, "-m", "fuselip_core", "sample", "--out", "data"]
            if code := stream(command, repository, stage_environment(repository), lines, keep_open=(lock,)):
                raise FuselipError(lines.message(code))
        _compare(repository)
    return missing


def _compare(repository: Path) -> None:
    if not (repository / "data.dvc").read_bytes().strip():  # DVC finds nothing to compare in an empty file
        raise FuselipError("data.dvc is empty; restore data.dvc with git")
    target = str(repository / "data.dvc")  # a whole path, since DVC takes targets from the current folder
    try:
        with dvc_repo(repository) as repo:
            found = [each for parts in repo.status(targets=[target]).values() for each in parts]
            outputs = {state for each in found for state in each.get("changed outs", {}).values()}
            if outputs <= {"not in cache"}:
                # Drawn here: the bytes are right, only the cache lacks them.
                if outputs:
                    repo.commit(target, force=True)
                return
    except OSError:  # the disk's, with a sentence of its own
        raise
    except Exception as error:  # what DVC raises on a damaged data.dvc is not always its own
        raise dvc_problem(error) from error
    raise FuselipError(
        "data/ differs from data.dvc: this machine's Pillow draws other bytes, or files were changed; "
        "remove data/ to draw it again, or accept it with `.venv/bin/dvc add data`"
    )
