"""The documentation: the notebook runs, the site builds without a warning, and loads nothing from outside."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from fuselip_core.config import Settings


def test_the_notebook_embeds_searches_and_plots(
    repository: Path, finished_run: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSELIP_ARTIFACTS", str(finished_run.artifacts))
    notebook = nbformat.read(repository / "docs" / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute(cwd=str(repository))
    kinds = [kind for cell in notebook.cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert kinds.count("image/png") == 4, "three searches and a map"


def test_the_site_builds_strictly_and_asks_nobody(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    loads = re.compile(r'<(?:script|img|iframe)[^>]+src="(https?:[^"]+)|<link[^>]+stylesheet[^>]+href="(https?:[^"]+)')
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 10
    assert not [found for page in pages for found in loads.findall(page.read_text(encoding="utf-8"))]
