"""Collects the commands that README and docs tell a reader to type."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:\.venv/bin/|make |fuselip |docker )[^`]+)`")
SHELLS = ("", "bash", "sh", "console")


class Documented(NamedTuple):
    """A command and the page that names it."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def documented_commands(repository: Path) -> list[Documented]:
    """All commands of README, CONTRIBUTING, docs, benchmarks and mlflow; a command over several lines is one."""
    pages = [repository / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "mlflow/README.md")]
    pages += sorted((repository / "docs").glob("*.md"))
    found = [
        Documented(str(page.relative_to(repository)), tuple(words))
        for page in pages
        for words in _commands_of(page.read_text(encoding="utf-8"))
    ]
    return list(dict.fromkeys(found))


def _commands_of(text: str) -> Iterator[list[str]]:
    for language, block in BLOCK.findall(text):
        if language not in SHELLS:
            continue
        waiting = ""
        for line in block.splitlines():
            waiting = f"{waiting.removesuffix(chr(92))} {line}" if waiting else line
            if waiting.endswith("\\"):
                continue
            try:
                words = shlex.split(waiting, comments=True)
            except ValueError:  # a quotation that goes on in the next line
                continue
            if words:
                yield words
            waiting = ""
        assert not waiting, f"a command that does not end: {waiting}"
    for inline in INLINE.findall(BLOCK.sub("", text)):
        yield shlex.split(inline)
