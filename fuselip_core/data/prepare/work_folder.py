"""The working folder of `prepare`: lets an interrupted run resume, and protects files that are not prepared data."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fuselip_core.config import PrepareSettings
from fuselip_core.data.pair import DataError
from fuselip_core.data.prepare.splits import Plan
from fuselip_core.files import find_json, write_json
from fuselip_core.lock import sole_process

MANIFEST, KEY = "manifest.json", "key.json"


@contextmanager
def reserved(target: Path, root: Path) -> Iterator[None]:
    """Locks `target` for one run; raises DataError if another run has it, or if other files would be replaced."""
    _refuse_to_replace(target, root)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{target.parent} cannot be created ({error.strerror}); name another folder") from None
    busy = DataError(f"another process is preparing data into {target}; wait for it or end it")
    with sole_process(target.with_name(f".{target.name}.lock"), busy):
        yield


def _refuse_to_replace(target: Path, root: Path) -> None:
    """Raises DataError unless `target` is free or holds earlier prepared data."""
    if root.resolve().is_relative_to(target.resolve()):
        raise DataError(f"{target} holds the raw data, which the prepared data would replace; name another folder")
    if (target.exists() and not target.is_dir()) or _holds_something_else(target):
        raise DataError(f"{target} exists and holds no prepared data, so it is not replaced; name another folder")


def _holds_something_else(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in (MANIFEST, KEY))


def open_work(work: Path, key: str) -> None:
    """Keeps files in `work` from an earlier run with the same `key`, and deletes others; raises DataError."""
    path, content = work / KEY, {"key": key}
    if find_json(path) == content:
        return
    if _holds_something_else(work):
        raise DataError(f"{work} is needed for unfinished shards but contains other files; move them away")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_json(path, content)


def close_work(work: Path) -> None:
    """Deletes files that only a resumed run needs."""
    for pattern in ("*.parquet.*", ".*.partial", "held_out-*"):
        for path in work.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (work / KEY).unlink()


def key_of(plan: Plan, settings: PrepareSettings, *more: object) -> str:
    """A hash of the settings, the tables, size and time of all files with images, and `more`."""
    digest = hashlib.sha256(f"{more!r} {settings.model_dump_json(exclude={'workers', 'most_set_aside'})}".encode())
    last: Path | None = None
    for split in plan.splits:
        for image in plan.images[split]:
            digest.update(repr(image).encode())
            if image.place.file != last:
                last = image.place.file
                digest.update(_state_of(last).encode())
        for table in (plan.pairs, plan.candidates):
            for item in table.get(split, ()):
                digest.update(repr(item).encode())
    return digest.hexdigest()


def _state_of(file: Path) -> str:
    try:
        state = file.stat()
    except OSError:
        return "missing"
    return f"{state.st_size} {state.st_mtime_ns}"
