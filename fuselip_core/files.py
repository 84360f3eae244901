"""Atomic files and folders: written under a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from fuselip_core.errors import FuselipError

CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which is renamed to `path` when the block ends without an error.

    A killed process leaves at most a hidden ``.<name>.<pid>.partial`` file, never an incomplete `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with full_disk_named(path):
            yield partial
            _flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`, which replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        with full_disk_named(path):
            yield partial
            for file in partial.rglob("*"):
                if file.is_file():
                    _flush(file)
        replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sweep(path: Path) -> None:
    """Removes leftovers of killed processes beside `path`, which may be gigabytes."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        *_, process, kind = left.name.split(".")
        if kind not in ("partial", "old") or not process.isdigit():
            continue
        if kind == "old" and not path.exists():  # killed between the two renames: the only copy
            continue
        if int(process) == os.getpid() or not psutil.pid_exists(int(process)):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turns the various errors that libraries raise on a full disk into an OSError with ENOSPC.

    Safetensors and shutil quote the system's message. Torch does not, so a test file is written to find out.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # shutil.Error is an OSError without a number
            raise
        if os.strerror(errno.ENOSPC) in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        try:
            with tempfile.TemporaryFile(dir=path.parent) as file:
                file.write(bytes(CHUNK_BYTES))
                file.flush()
        except OSError as refused:
            raise OSError(refused.errno, refused.strerror, str(path)) from error
        raise


def take_space(path: Path) -> None:
    """Allocates the space of the sparse file `path`, or raises OSError.

    Otherwise, writing to the memory-mapped file on a full disk would kill the process by SIGBUS.
    """
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def replace_folder(source: Path, target: Path) -> None:
    """Moves folder `source` to `target`, and only then deletes what was there before."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.replace(old)
    source.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as indented UTF-8 JSON, atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, remedy: str = "install the package again") -> dict[str, Any]:
    """The JSON object in `path`; raises FuselipError, ending in `remedy`, if there is none or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FuselipError(f"{path} is missing; {remedy}") from error
    except ValueError as error:  # includes invalid UTF-8
        raise FuselipError(f"{path} is damaged ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise FuselipError(f"{path} is damaged (not a JSON object); {remedy}")
    return content


def read_numbers(path: Path) -> dict[str, float]:
    """Metrics that an earlier stage wrote to `path`; raises FuselipError if the file is missing or damaged."""
    remedy = "run the stage that writes it again"
    content = read_json(path, remedy)
    if not content or not all(isinstance(value, int | float) for value in content.values()):
        raise FuselipError(f"{path} is damaged (not all values are numbers); {remedy}")
    return content


def find_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, or an empty one if it is missing, damaged or not an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def foreign_content(head: bytes) -> str | None:
    """Recognises by its first bytes what a file contains instead of data, and says what to do; None if unknown.

    A clone without Git LFS has pointers, a download behind a login page HTML, and a full disk empty files.
    """
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t")[:100].lower()
    if not start:
        return "is empty; download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    if start.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page that a server sent instead of the file; download it again"
    return None


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
