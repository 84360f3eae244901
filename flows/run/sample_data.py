"""The embedded sample in data/: drawn where it is missing, and compared with the committed data.dvc."""

from __future__ import annotations

import sys
from pathlib import Path

from flows.run.child import OnLine, stream
from flows.run.dvc_stage import dvc_sentence
from flows.run.lock import dvc_lock
from flows.run.runner import LastLines, stage_environment
from fuselip_core.errors import FuselipError


def ensure_sample(repository: Path, on_line: OnLine) -> bool:
    """Draws data/ if it is missing and makes sure that DVC knows it; returns whether it was drawn.

    Raises FuselipError if the bytes are not those that data.dvc names.
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
    from dvc.repo import Repo

    if not (repository / "data.dvc").read_bytes().strip():  # which DVC takes for nothing to compare
        raise FuselipError("data.dvc is empty; bring data.dvc back with git")
    target = str(repository / "data.dvc")  # whole, since DVC takes targets from the current folder
    try:
        with Repo(str(repository)) as repo:
            status = repo.status(targets=[target])
            if not status:
                return
            if "modified" not in str(status):
                # Drawn here, so its bytes are right but not in the cache yet.
                repo.commit(target, force=True)
                return
    except OSError:  # of the disk, and told as such
        raise
    except Exception as error:  # what DVC raises on a damaged data.dvc is not always its own
        damaged = ".dvc/config" if "config file" in str(error) else "data.dvc"
        raise FuselipError(f"{dvc_sentence(error)}; bring {damaged} back with git") from error
    raise FuselipError(
        "data/ is not what data.dvc names: this machine's Pillow draws other bytes, or files were changed; "
        "remove data/ to draw it again, or accept it with `dvc add data`"
    )
