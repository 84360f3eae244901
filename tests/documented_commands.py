"""Collects the commands that pages tell a reader to type, that messages print, and that a run ends with."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROGRAMS = r"\.venv/bin/[\w-]+ |\.ci/|docker/\w+\.sh|(?:make|fuselip|docker|mlflow|prefect|dvc|pytest|python|wandb) "
INLINE = re.compile(rf"(?<!`)`((?:[A-Z_]+=\S+ )*(?:{PROGRAMS})[^`]+)`(?!`)")
SHELLS = ("", "bash", "sh", "console")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md", "mlflow/README.md", "docs/*.md")


class Documented(NamedTuple):
    """A command as it is typed, and who names it; `sentence` if it stands within a sentence and not in a block."""

    place: str
    text: str
    sentence: bool

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


def documented_commands(repository: Path) -> list[Documented]:
    """All commands of the pages, then all that messages and docstrings name between backticks, each once."""
    found = [
        Documented(str(page.relative_to(repository)), *command)
        for pattern in PAGES
        for page in sorted(repository.glob(pattern))
        for command in _of_page(page.read_text(encoding="utf-8"))
    ]
    for folder in ("fuselip_core", "flows"):
        for source in sorted((repository / folder).rglob("*.py")):
            place = str(source.relative_to(repository))
            found += [Documented(place, text, True) for text in _of_source(source.read_text(encoding="utf-8"))]
    once: dict[tuple[str, bool], Documented] = {}
    for command in found:
        once.setdefault((command.text, command.sentence), command)
    return list(once.values())


def next_commands(said: str) -> list[str]:
    """The commands with which a finished run ends."""
    lines = said.partition("\nNext\n")[2].splitlines()
    return [line.strip().partition("    #")[0] for line in lines if line.startswith("  ")]


def _of_page(text: str) -> Iterator[tuple[str, bool]]:
    for language, block in BLOCK.findall(text):
        if language in SHELLS:
            yield from ((command, False) for command in _of_block(block))
    for inline in INLINE.findall(BLOCK.sub("", text)):
        yield " ".join(inline.split()), True


def _of_block(block: str) -> Iterator[str]:
    """A command may go on after a backslash, or within a quotation."""
    waiting = ""
    for line in block.splitlines():
        waiting = f"{waiting.removesuffix(chr(92)).rstrip()} {line.strip()}" if waiting else line.strip()
        if waiting.endswith("\\"):
            continue
        try:
            words = shlex.split(waiting, comments=True)
        except ValueError:
            continue
        if words:
            yield re.sub(r"\s+#\s.*$", "", waiting)
        waiting = ""
    assert not waiting, f"a command that does not end: {waiting}"


def _of_source(text: str) -> Iterator[str]:
    """Of all strings; what an f-string puts in is HOLE."""
    inside: set[ast.AST] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            inside |= set(node.values)
            whole = "".join(str(part.value) if isinstance(part, ast.Constant) else "HOLE" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in inside:
            whole = node.value
        else:
            continue
        yield from (" ".join(command.split()) for command in INLINE.findall(whole))
