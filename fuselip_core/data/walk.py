"""Lists the files below a folder: the one place that decides about links, hidden files and folders that cannot be read.

- Linked folders are followed, each folder once, whatever leads to it: a loop ends, and a folder that is linked from
  within the tree is listed at its own place. Linked files are listed under each of their names.
- A link that leads nowhere is named in the notes.
- Hidden names (".DS_Store", "._scan.dcm", ".ipynb_checkpoints/"), "__MACOSX" and "lost+found" are no data: left out.
- A folder that may not be read raises PermissionError: half of a data set is worse than none.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

NO_DATA = ("__MACOSX", "lost+found")


def files_below(root: Path, suffixes: Collection[str] = (), notes: list[str] | None = None) -> list[Path]:
    """All files below `root` in the order of their paths; of `suffixes` (lower case, with dot) only, if there are any.

    `notes` takes a sentence about links that lead nowhere. Raises OSError for a folder that cannot be read.
    """
    found: list[Path] = []
    broken: list[Path] = []
    seen: set[tuple[int, int]] = set()
    linked = [root]
    while linked:  # folders of the tree come before those that links add, so that they keep their own paths
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
        notes.append(f"{len(broken)} links below {root} lead nowhere, such as {min(broken)}")
    return sorted(found)


def _entries(start: Path, seen: set[tuple[int, int]]) -> Iterator[tuple[Path, bool]]:
    """The files and links in `start` and in its own folders, but not in those of `seen`, to which it adds."""
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
            elif entry.is_symlink() or entry.is_file():  # no pipe and no device
                yield folder / entry.name, entry.is_symlink()
