"""Safe reading of zip archives: no path traversal, zip bombs, links or repeated members."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from fuselip_core.errors import FuselipError
from fuselip_core.files import foreign_content

GIGABYTE = 1 << 30
# A local file header is at least 30 bytes, so members closer together overlap.
LOCAL_HEADER = 30
# Below this size no ratio is suspicious, since small tables or blank pictures may be compressed a hundredfold.
SMALL_MEMBER = 16 << 20


class ArchiveError(FuselipError):
    """An archive that is refused as a whole; the message says why."""


@dataclass(frozen=True)
class Limits:
    """Limits of an archive: uncompressed bytes in total and per member, number of members, compression ratio."""

    total_bytes: int = 400 * GIGABYTE
    member_bytes: int = 2 * GIGABYTE
    members: int = 5_000_000
    ratio: float = 200.0


@dataclass(frozen=True)
class Members:
    """safe: files to read, in the order of the archive. refused: (name, reason)."""

    safe: tuple[zipfile.ZipInfo, ...]
    refused: tuple[tuple[str, str], ...]


def open_archive(path: Path) -> zipfile.ZipFile:
    """The archive at `path`; raises ArchiveError if it cannot be read."""
    try:
        with path.open("rb") as stream:
            if fault := foreign_content(stream.read(200)):
                raise ArchiveError(f"{path} is not a readable zip archive: it {fault}")
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ArchiveError(f"{path} is not a readable zip archive ({error}); download it again") from None


def safe_members(archive: zipfile.ZipFile, limits: Limits | None = None) -> Members:
    """Divides the files of `archive` into safe and refused ones.

    Reads only the directory of the archive. Raises ArchiveError if the whole archive is malicious: overlapping members,
    or more than `limits` allow.
    """
    limits = limits or Limits()
    members = [info for info in archive.infolist() if not info.is_dir()]
    _check_whole(archive, members, limits)
    safe, refused, seen = [], [], set()
    for info in members:
        reason = _reason(info, limits)
        if reason is None and info.filename in seen:
            reason = "an earlier member has the same name"
        if reason is None:
            seen.add(info.filename)
            safe.append(info)
        else:
            refused.append((info.filename, reason))
    return Members(tuple(safe), tuple(refused))


def _check_whole(archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], limits: Limits) -> None:
    name = archive.filename or "the archive"
    if len(members) > limits.members:
        raise ArchiveError(
            f"{name} has {len(members):,} members, more than the {limits.members:,} allowed; download it again"
        )
    total = sum(info.file_size for info in members)
    if total > limits.total_bytes:
        raise ArchiveError(
            f"{name} would unpack to {total:,} bytes, more than the {limits.total_bytes:,} allowed; download it again"
        )
    end = 0
    for info in sorted(members, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise ArchiveError(f"{name} has overlapping members, as in a zip bomb; download it again")
        end = info.header_offset + LOCAL_HEADER + info.compress_size


def _reason(info: zipfile.ZipInfo, limits: Limits) -> str | None:
    """The reason to refuse a member; None if it is safe."""
    name = info.orig_filename
    checks: list[tuple[Callable[[], bool], str]] = [
        (lambda: leaves_folder(name), "its path leaves the folder"),
        (lambda: stat.S_ISLNK(info.external_attr >> 16), "it is a link"),
        (lambda: bool(info.flag_bits & 0x1), "it is encrypted"),
        (lambda: info.file_size > limits.member_bytes, f"it would unpack to {info.file_size:,} bytes"),
        (
            lambda: info.file_size > SMALL_MEMBER and info.file_size > limits.ratio * max(1, info.compress_size),
            f"it would unpack to {info.file_size / max(1, info.compress_size):,.0f} times its size",
        ),
    ]
    return next((reason for check, reason in checks if check()), None)


def leaves_folder(name: str) -> bool:
    """Whether `name`, as a path below a folder, leads outside of it on any operating system."""
    windows = PureWindowsPath(name)
    parts = PurePosixPath(name.replace("\\", "/")).parts
    return "\0" in name or name.startswith(("/", "\\")) or bool(windows.drive) or ".." in parts or not parts
