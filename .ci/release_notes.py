"""The version that a tag must have, and the changelog's section for it. Needs Python 3.11 and nothing else."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def version_of(tag: str) -> str:
    """The version in pyproject.toml, the only place that has it; ends the process where `tag` is another."""
    version = str(tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])
    if tag != f"v{version}":
        sys.exit(
            f"error: the tag is {tag}, and pyproject.toml says {version}; tag v{version}, or change pyproject.toml"
        )
    return version


def notes_of(version: str) -> str:
    """The text below the heading `## VERSION` in CHANGELOG.md; ends the process where there is none."""
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", changelog, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if heading.split()[0] == version and text.strip():
            return text.strip() + "\n"
    sys.exit(f'error: CHANGELOG.md has no section "## {version}"; rename "Unreleased" to it')


if __name__ == "__main__":
    what, tag = sys.argv[1:]
    version = version_of(tag)
    notes = notes_of(version)
    sys.stdout.write(notes if what == "notes" else version)
