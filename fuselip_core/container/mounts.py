"""Checks at the start whether a container has usable folders and enough memory."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Collection
from pathlib import Path

from fuselip_core.errors import FuselipError
from fuselip_core.preflight import GIGABYTE, WEIGHTS_GB

NUMBERED = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})(?P<rest>.*)\.parquet")
# Python with torch, MLflow and a batch of data; measured at size tiny (tests/test_container.py).
LIBRARIES_GB = 0.8


class MountError(FuselipError):
    """A folder is missing, empty, incomplete or not accessible; the message says what to add to the command line."""


def require_data(folder: Path, volume: str) -> None:
    """Raises MountError unless `folder` holds a complete data set; `volume` is the option that mounts it."""
    remedy = f"mount the data set with {volume}; bacor_fuselip_download fetches it"
    if not folder.is_dir():
        raise MountError(f"there is no {folder}; {remedy}")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise MountError(f"{folder} can't be read by {_user()}; change its owner or mode, or run with its owner's -u")
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    if not names:
        raise MountError(f"{folder} is empty; {remedy}")
    if unfinished := _unfinished(names):
        raise MountError(f"the data set in {folder} is incomplete ({unfinished}); run bacor_fuselip_download again")


def require_writable(folder: Path, volume: str, in_container: bool) -> None:
    """Raises MountError unless `folder` is writable and, in a container, mounted."""
    if in_container and not is_mounted(folder):
        raise MountError(f"nothing is mounted at {folder}, so the results would be lost; add {volume}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except PermissionError as error:
        raise MountError(
            f"{_user()} may not write to {folder}; create the folder before docker does (mkdir -p), and run as its "
            "owner with -u $(id -u):$(id -g)"
        ) from error
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        raise MountError(f"{folder} is mounted read-only; remove :ro from the option that mounts it") from error


def require_memory(size: str, stages: Collection[str]) -> None:
    """Raises MountError if the container's memory limit is below the minimum for training at `size`.

    Otherwise the kernel would kill the process halfway, without a message.
    """
    limit = memory_limit()
    weights = 0.0 if Path("/dev/nvidia0").exists() else WEIGHTS_GB[size]
    needed = LIBRARIES_GB + 4 * weights  # weights, gradients, and two moments of AdamW
    if limit is not None and limit < needed * GIGABYTE and {"codebook", "train"} & set(stages):
        raise MountError(
            f"this container may use {limit / GIGABYTE:.1f} GB of memory, but size {size} needs at least {needed:.1f}; "
            "raise --memory, or choose a smaller size"
        )


def memory_limit() -> int | None:
    """Memory limit of this process's control group in bytes; None if unlimited."""
    limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2; version 1
            root = Path("/sys/fs/cgroup", controllers)
            # Inside a container, its own group is the root.
            for folder in (root / group.lstrip("/"), root):
                for name in ("memory.max", "memory.limit_in_bytes"):
                    if (folder / name).is_file() and (text := (folder / name).read_text().strip()).isdigit():
                        limits.append(int(text))
    return min(limits, default=None)


def is_mounted(folder: Path) -> bool:
    """Whether `folder` is on another file system than the container's root."""
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev != Path("/").stat().st_dev


def _unfinished(names: list[str]) -> str | None:
    """What is missing: a file that is still being downloaded, or a gap in numbered Parquet files."""
    for name in names:
        last = Path(name).name
        if last.startswith(".") and last.endswith(".partial"):
            return f"{name} is not downloaded completely"
    shards = [match for name in names if (match := NUMBERED.fullmatch(name))]
    for shard in shards:
        there = {int(other["part"]) for other in shards if other["stem"] == shard["stem"]}
        missing = set(range(int(shard["parts"]))) - there
        if missing:
            return f"{shard['stem']}-{min(missing):05d}-of-{shard['parts']} is missing"
    return None


def _user() -> str:
    return f"user {os.geteuid()}:{os.getegid()}"
