"""A partly downloaded file: its bytes and digests so far; it gets its name when it is complete.

Bytes gather in ``.<name>.partial`` beside the final path; ``.<name>.partial.json`` remembers which version of the file
they belong to, so that a later process can resume.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuselip_core.data.download.retries import DownloadError
from fuselip_core.files import CHUNK_BYTES, find_json, write_json


@dataclass(frozen=True)
class RemoteFile:
    """A file as its host lists it. `checksum` is ``<sha256|md5|gitsha1>:<hex>``; `path` is relative, with slashes."""

    path: str
    url: str
    size: int | None = None
    checksum: str | None = None


class Digests:
    """Hashes bytes as they pass: always SHA-256, and what the host's checksum needs."""

    def __init__(self, checksum: str | None, size: int | None) -> None:
        self.expected = checksum
        self._sha256 = hashlib.sha256()
        self._other: Any = None
        kind = checksum.partition(":")[0] if checksum else "sha256"
        if kind == "md5":
            self._other = hashlib.md5(usedforsecurity=False)
        elif kind == "gitsha1" and size is not None:
            # Git's name of a file: SHA-1 over a header with its size, then its bytes.
            self._other = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        elif kind != "sha256":
            self.expected = None

    def update(self, block: bytes | memoryview) -> None:
        self._sha256.update(block)
        if self._other is not None:
            self._other.update(block)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def found(self) -> str | None:
        """The checksum in the form of the expected one; None where the host gave none."""
        if self.expected is None:
            return None
        kind = self.expected.partition(":")[0]
        return f"{kind}:{(self._other or self._sha256).hexdigest()}"

    @property
    def match(self) -> bool:
        return self.expected is None or self.found == self.expected.lower()


def digests_of(path: Path, file: RemoteFile) -> Digests:
    """Digests of the file at `path`, read whole."""
    digests = Digests(file.checksum, file.size if file.size is not None else path.stat().st_size)
    with path.open("rb") as stream:
        while block := stream.read(CHUNK_BYTES):
            digests.update(block)
    return digests


class Partial:
    """Bytes of a file on their way to `final`; knows how many there are and their digests so far."""

    def __init__(self, final: Path, file: RemoteFile) -> None:
        self.final, self.file = final, file
        self.path = partial_path(final)
        self.note = self.path.with_name(self.path.name + ".json")
        self.etag: str | None = None
        self.size = 0
        self.digests = Digests(file.checksum, file.size)
        self._take_up()

    def _take_up(self) -> None:
        """Goes on with what an earlier run left, where that provably belongs to the same version of the file."""
        try:
            note = find_json(self.note)
            same = (note["size"], note["checksum"]) == (self.file.size, self.file.checksum)
            if not same or not (note["etag"] or self.file.checksum):
                return
            digests = digests_of(self.path, self.file)
            self.etag, self.size, self.digests = note["etag"], self.path.stat().st_size, digests
        except (OSError, ValueError, KeyError, TypeError):
            return

    @contextmanager
    def opened(self) -> Iterator[int]:
        """A file descriptor that appends; whatever lies beyond the bytes known here is cut off first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if os.fstat(descriptor).st_size > self.size:
                os.ftruncate(descriptor, self.size)
            yield descriptor
        finally:
            os.close(descriptor)

    def append(self, descriptor: int, block: bytes) -> None:
        rest = memoryview(block)
        while rest:
            written = os.write(descriptor, rest)
            self.digests.update(rest[:written])
            self.size += written
            rest = rest[written:]

    def restart(self) -> None:
        self.size, self.etag = 0, None
        self.digests = Digests(self.file.checksum, self.file.size)
        # At once, not at the next byte: what `remember` writes next must never vouch for bytes of another version.
        if self.path.exists() and self.path.stat().st_size:
            os.truncate(self.path, 0)

    def remember(self, etag: str | None) -> None:
        self.etag = etag
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.note, {"etag": etag, "size": self.file.size, "checksum": self.file.checksum})

    def keep(self) -> None:
        """Flushes to disk and gives the file its final name."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self.path.replace(self.final)
        folder = os.open(self.final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.note.unlink(missing_ok=True)


def partial_path(final: Path) -> Path:
    """Where the bytes of `final` gather until it is whole."""
    return final.with_name(f".{final.name}.partial")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises DownloadError unless `needed` bytes are free where `folder` is (or will be)."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{what} needs {_readable(needed)} more in {folder}, where {_readable(free)} are free; "
            "make room or choose another folder"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into one sentence."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"the disk of {path.parent} is full; make room and run it again, and it resumes where it stopped"
            ) from None
        raise DownloadError(f"{path} cannot be written ({os.strerror(error.errno or 0)})") from None


def _readable(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
