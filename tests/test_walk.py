"""Files below a folder: links are followed once each, what is no data is left out, what cannot be read is an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fuselip_core.data.walk import files_below


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def names_below(root: Path, *suffixes: str) -> list[str]:
    return [path.relative_to(root).as_posix() for path in files_below(root, suffixes)]


def test_links_are_followed_once_each(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write(root, "a/1.jpg", "z/2.jpg", "z/deep/3.JPG", "z/note.txt")
    write(tmp_path / "far", "4.jpg", "in/5.jpg")
    write(tmp_path, "6.jpg")
    (root / "far").symlink_to("../far")
    (root / "again").symlink_to(tmp_path / "far" / "in")
    (root / "a" / "loop").symlink_to("..")
    (root / "a" / "within").symlink_to("../z")
    (root / "a" / "itself").symlink_to("itself")
    (tmp_path / "far" / "back").symlink_to(root)
    (root / "a" / "6.jpg").symlink_to(tmp_path / "6.jpg")
    (root / "gone.jpg").symlink_to("nowhere.jpg")
    expected = ["a/1.jpg", "a/6.jpg", "again/5.jpg", "far/4.jpg", "z/2.jpg", "z/deep/3.JPG"]
    assert names_below(root, ".jpg") == expected
    assert names_below(root) == [*expected, "z/note.txt"]
    (tmp_path / "link").symlink_to(root)
    assert names_below(tmp_path / "link", ".jpg") == expected
    notes: list[str] = []
    files_below(root, notes=notes)
    assert notes == [f"2 links below {root} are broken, such as a/itself"]


def test_what_is_no_data_is_left_out(tmp_path: Path) -> None:
    write(
        tmp_path, "x.jpg", ".hidden.jpg", "._x.jpg", ".git/y.jpg", "__MACOSX/._x.jpg", "__MACOSX/z.jpg", "a.b/.c/d.jpg"
    )
    os.mkfifo(tmp_path / "pipe.jpg")
    assert names_below(tmp_path) == ["x.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "open/x.jpg", "closed/y.jpg")
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises(PermissionError, match="closed"):
            files_below(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)
    with pytest.raises(FileNotFoundError):
        files_below(tmp_path / "missing")
