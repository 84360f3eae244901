"""Keeps Prefect's UI to this machine.

The server keeps to itself when its analytics are off. Its pages of Prefect 3.8 do not quite: before they ask the server
whether they may, they load the settings of a counting service from its host. Without that service's key they don't.
"""

from __future__ import annotations

import re
from pathlib import Path

KEY = re.compile(r"(?<=return`)[0-9a-f]{32}(?=`)")
SERVICE = "amplitude"


def silence(folder: Path) -> int:
    """Takes the key out of the scripts below `folder`, the server's own copy of its pages; returns how many had one."""
    changed = 0
    for path in folder.rglob("*.js"):
        text = path.read_text(encoding="utf-8")
        if SERVICE in text and KEY.search(text):
            path.write_text(KEY.sub("", text), encoding="utf-8")
            changed += 1
    return changed
