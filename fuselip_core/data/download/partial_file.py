"""A partly downloaded file: its bytes and digests so far.

Bytes are collected in ``.<name>.partial`` beside the final path and renamed when complete. ``.<name>.partial.json``
records the version of the file, so that a later process can resume.
"""

from __future__ import annotations

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
    """A file in a host's list. checksum: ``<sha256|md5|gitsha1>:<hex>``. path: relative, with slashes."""

    path: str
    url: str
    size: int | None = None
    checksum: str | None = None


class Digests:
    """Hashes a stream of bytes: SHA-256, and the kind of the host's checksum."""

    def __init__(self, checksum: str | None, size: int | None) -> None:
        self.expected = checksum
        self._sha256 = hashlib.sha256()
        self._other: Any = None
        kind = checksum.partition(":")[0] if checksum else "sha256"
        if kind == "md5":
            self._other = hashlib.md5(usedforsecurity=False)
        elif kind == "gitsha1" and size is not None:
            # Git's blob id: SHA-1 of a header with the size, then the content.
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
        """The computed checksum of the expected kind; None if the host gave none."""
        if self.expected is None:
            return None
        kind = self.expected.partition(":")[0]
        return f"{kind}:{(self._other or self._sha256).hexdigest()}"

    @property
    def match(self) -> bool:
        return self.expected is None or self.found == self.expected.lower()


def digests_of(path: Path, file: RemoteFile) -> Digests:
    """Digests of the whole file at `path`."""
    digests = Digests(file.checksum, file.size if file.size is not None else path.stat().st_size)
    with path.open("rb") as stream:
        while block := stream.read(CHUNK_BYTES):
            digests.update(block)
    return digests


class Partial:
    """The incomplete file for `final`, with its size and digests so far."""

    def __init__(self, final: Path, file: RemoteFile) -> None:
        self.final, self.file = final, file
        self.path = partial_path(final)
        self.note = self.path.with_name(self.path.name + ".json")
        self.etag: str | None = None
        self.size = 0
        self.digests = Digests(file.checksum, file.size)
        self._take_up()

    def _take_up(self) -> None:
        """Continues an earlier run's file if it is certain to be the same version."""
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
        """A descriptor for appending, after cutting off any bytes beyond the known size."""
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
        # At once, so that the note that `remember` writes next never refers to bytes of another version.
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
    """The temporary path of `final`."""
    return final.with_name(f".{final.name}.partial")


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raises DownloadError unless `needed` bytes are free on the disk of `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{what} needs {_readable(needed)} more in {folder}, where {_readable(free)} are free; free some space, or "
            "choose another folder"
        )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Adds the file to errors of the disk, which a failing write does not name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _readable(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
