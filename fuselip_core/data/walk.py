"""Lists the files below a folder, with one rule for links, hidden files and unreadable folders:

- Linked folders are followed, but every folder is listed only once, so loops end; a folder that is linked from within
  the tree is listed at its own place. Linked files are listed under each of their names.
- Broken links are mentioned in the notes.
- Hidden names (".DS_Store", "._scan.dcm", ".ipynb_checkpoints/"), "__MACOSX" and "lost+found" are left out.
- An unreadable folder raises PermissionError, instead of losing part of a data set silently.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

NO_DATA = ("__MACOSX", "lost+found")


def files_below(root: Path, suffixes: Collection[str] = (), notes: list[str] | None = None) -> list[Path]:
    """All files below `root`, sorted by path, or only those with `suffixes` (lower case, with dot).

    Adds a sentence about broken links to `notes`. Raises OSError for an unreadable folder.
    """
    found: list[Path] = []
    broken: list[Path] = []
    seen: set[tuple[int, int]] = set()
    linked = [root]
    while linked:  # folders in the tree come before linked ones, so that they keep their own paths
        starts, linked = sorted(linked), []
        for start in starts:
            for path, is_link in _entries(start, seen):
                if is_link and path.is_dir():
                    linked.append(path)
                elif is_link and not path.is_file():
                    broken.append(path.relative_to(root))
                elif not suffixes or path.suffix.lower() in suffixes:
                    found.append(path)
    if broken and notes is not None:
        notes.append(f"{len(broken)} links below {root} are broken, such as {min(broken)}")
    return sorted(found)


def _entries(start: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[Path, bool]]:
    """The files and links below `start`, without following links, and without folders in `seen`, which is updated."""
    folders = [start]
    while folders:
        folder = folders.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in os.scandir(folder):
            if entry.name.startswith(".") or entry.name in NO_DATA:
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(folder / entry.name)
            elif entry.is_symlink() or entry.is_file():  # not a pipe or device
                yield folder / entry.name, entry.is_symlink()
