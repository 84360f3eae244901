"""The documentation: the notebook runs, the site builds without a warning, and loads nothing from outside."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
import typer
from documented_commands import Documented, documented_commands
from nbclient import NotebookClient
from training_data import write_raw

from fuselip_core.cli.main import app
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


# Programs of others. Other tests execute what matters of them: images in test_docker.py, the model server in
# test_serving.py, deployments in test_deployments.py, backup and restore in test_stack.py.
OTHERS = {
    "docker/backup.sh",
    "docker/restore.sh",
    "docker",
    "mkdir",
    "export",
    "curl",
    "eval",
    "mlflow",
    "prefect",
    "pre-commit",
    "apt-get",
    "nvidia-ctk",
    ".ci/run",
}
COMMANDS = documented_commands(Path(__file__).parents[1])


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_documented_commands_exist_with_their_options(command: Documented, repository: Path) -> None:
    # Settings of the environment stand before the program.
    words = [*itertools.dropwhile(lambda word: "=" in word, command.words)]
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=repository, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "fuselip":
        assert not complaint(arguments)
    elif program == "python" and arguments[0] == "-m":
        said = subprocess.run(
            [sys.executable, "-m", arguments[1], "--help"], cwd=repository, capture_output=True, text=True
        )
        assert said.returncode == 0
        assert all(word in said.stdout for word in arguments[2:] if word.startswith("--"))
    elif program == "python":
        script = (repository / arguments[0]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in script for word in arguments[1:] if word.startswith("--"))
    else:
        assert program in OTHERS, f"{command}: say in this test how the command is tried"


def complaint(arguments: list[str]) -> str:
    """What the real parser has against `arguments`, empty for nothing; no command runs.

    `...` stands for more options; --debug is taken out before the parser, since it may stand anywhere.
    """
    command: Any = typer.main.get_command(app)
    todo = [command]
    while todo:
        here = todo.pop()
        here.callback = lambda **_: None
        todo += getattr(here, "commands", {}).values()
    try:
        command.main([word for word in arguments if word not in ("...", "--debug")], standalone_mode=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_command_with_a_wrong_option_is_found() -> None:
    assert not complaint(["data", "inspect", "folder"])
    assert "--colour" in complaint(["data", "inspect", "folder", "--colour"])


def test_documented_commands_on_data_run_as_written(repository: Path, tmp_path: Path) -> None:
    """Those of docs/data.md on a small data set, in a folder of their own, with no environment activated."""
    write_raw(tmp_path / "data" / "rocov2")
    wanted = [
        command.words
        for command in COMMANDS
        if command.page == "docs/data.md" and command.words[1:3] in {("data", "prepare"), ("data", "inspect")}
    ]
    ran = 0
    for program, *arguments in wanted:
        if "rocov2" in " ".join(arguments):
            command = [str(repository / program), *arguments]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
            assert done.returncode == 0, done.stderr
            ran += 1
    assert ran == 2
    assert (tmp_path / "prepared" / "rocov2" / "manifest.json").is_file()
