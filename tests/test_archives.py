"""Zip archives: what may be read from them, and what is refused."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest

from fuselip_core.data.sources.archives import ArchiveError, Limits, leaves_folder, open_archive, safe_members


def archive(*members: tuple[str | zipfile.ZipInfo, bytes]) -> zipfile.ZipFile:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as writer:
        for name, content in members:
            writer.writestr(name, content)
    return zipfile.ZipFile(stream)


def test_real_radiology_is_safe(shared: Path) -> None:
    with open_archive(shared / "data" / "medpix-rocov2" / "train_images.zip") as real:
        members = safe_members(real)
        assert not members.refused and len(members.safe) == sum(not info.is_dir() for info in real.infolist())


@pytest.mark.parametrize(
    "name", ["../x.jpg", "a/../../x", "/etc/passwd", "C:/x", "c:x", "\\\\host\\x", "a\\..\\x", "..", "a\0b", ""]
)
def test_names_that_leave_the_folder(name: str) -> None:
    assert leaves_folder(name)


@pytest.mark.parametrize("name", ["x.jpg", "train/x.jpg", "a..b/c", "...", "./x", "Köpfe/ü.png"])
def test_names_that_stay(name: str) -> None:
    assert not leaves_folder(name)


def test_members_that_leave_are_refused_and_the_others_read() -> None:
    members = safe_members(archive(("a/x.jpg", b"1"), ("../y.jpg", b"2"), ("/z.jpg", b"3"), ("folder/", b"")))
    assert [info.filename for info in members.safe] == ["a/x.jpg"]
    assert {name for name, _ in members.refused} == {"../y.jpg", "/z.jpg"}
    assert all(reason == "its path leaves the folder" for _, reason in members.refused)


def test_links_and_doubles_and_encrypted_members_are_refused() -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with pytest.warns(UserWarning, match="Duplicate name"):
        built = archive((link, b"/etc/passwd"), ("x", b"1"), ("x", b"2"), ("secret", b"3"))
    built.getinfo("secret").flag_bits |= 1
    assert dict(safe_members(built).refused) == {
        "link": "it is a link",
        "x": "an earlier member has the same name",
        "secret": "it is encrypted",
    }


def test_bombs_are_refused() -> None:
    bomb = archive(("bomb.png", bytes(32 << 20)), ("blank.csv", bytes(1 << 20)))
    members = safe_members(bomb)
    assert [info.filename for info in members.safe] == ["blank.csv"]
    assert members.refused[0][0] == "bomb.png" and "times its size" in members.refused[0][1]
    assert dict(safe_members(bomb, Limits(member_bytes=1 << 10)).refused).keys() == {"bomb.png", "blank.csv"}
    with pytest.raises(ArchiveError, match="would unpack to 34,603,008 bytes"):
        safe_members(bomb, Limits(total_bytes=1 << 20))
    with pytest.raises(ArchiveError, match="2 members"):
        safe_members(bomb, Limits(members=1))


def test_overlapping_members_are_refused() -> None:
    """Fifield's bomb: many entries of the directory point to the same bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as writer:
        writer.writestr("aa", bytes(100))
        writer.writestr("bb", bytes(100))
    content = bytearray(stream.getvalue())
    second = content.rindex(b"PK\x01\x02")
    struct.pack_into("<I", content, second + 42, 0)
    with pytest.raises(ArchiveError, match="overlapping members"):
        safe_members(zipfile.ZipFile(io.BytesIO(bytes(content))))


def test_what_is_no_archive_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"<html>")
    for name in ("a.zip", "missing.zip"):
        with pytest.raises(ArchiveError, match="is not a readable zip archive"):
            open_archive(tmp_path / name)
