"""A release: its version in one place, its notes, and workflows that run what the Makefile runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

WORKFLOWS = ("ci", "audit", "release")
PINNED = re.compile(r"uses: [\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")


def version_of(repository: Path) -> str:
    return str(tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"])


def workflow(repository: Path, name: str) -> dict[str, Any]:
    return yaml.safe_load((repository / ".github" / "workflows" / f"{name}.yml").read_text())


def notes(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / ".ci" / "release_notes.py"), *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def released(tmp_path: Path, repository: Path) -> Path:
    """A checkout with version 1.2.3 and a section for it in its changelog."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(repository / ".ci" / "release_notes.py", tmp_path / ".ci")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## Unreleased\n- later\n\n## 1.2.3 (2026-12-01)\n- a thing\n- another\n\n## 1.2.2\n- old\n"
    )
    return tmp_path


def test_the_version_stands_in_pyproject_alone(repository: Path) -> None:
    version = version_of(repository)
    said = subprocess.run(
        [sys.executable, "-m", "fuselip_core", "--version"], capture_output=True, text=True, check=True, cwd=repository
    )
    assert said.stdout == f"fuselip {version}\n"
    for path in (
        *repository.glob("Dockerfile.*"),
        *repository.glob("docker/Dockerfile.*"),
        repository / "CITATION.cff",
    ):
        assert version not in path.read_text(errors="replace"), path


def test_notes_are_the_section_of_the_version(released: Path) -> None:
    assert notes(released, "version", "v1.2.3").stdout == "1.2.3"
    assert notes(released, "notes", "v1.2.3").stdout == "- a thing\n- another\n"


def test_a_tag_that_is_not_the_version_is_refused(released: Path) -> None:
    done = notes(released, "version", "v1.3.0")
    assert done.returncode == 1 and not done.stdout
    assert "the tag is v1.3.0, and pyproject.toml says 1.2.3; tag v1.2.3, or change pyproject.toml" in done.stderr


def test_a_version_without_notes_is_refused(released: Path) -> None:
    (released / "CHANGELOG.md").write_text("# Changelog\n\n## Unreleased (1.2.3)\n- a thing\n")
    done = notes(released, "version", "v1.2.3")
    assert done.returncode == 1 and not done.stdout
    assert 'CHANGELOG.md has no section "## 1.2.3"; rename "Unreleased" to it' in done.stderr


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_and_permissions_are_few(repository: Path, name: str) -> None:
    text = (repository / ".github" / "workflows" / f"{name}.yml").read_text()
    for line in text.splitlines():
        if "uses:" in line and "./.github" not in line:
            assert PINNED.search(line), line
    found = workflow(repository, name)
    assert found["permissions"] == {}
    for job in found["jobs"].values():
        writes = {scope for scope, right in job["permissions"].items() if right == "write"}
        assert writes <= {"packages", "contents"}
        for step in job.get("steps", ()):
            assert "${{" not in step.get("run", ""), "expressions belong in env: the shell must not read them as code"


def test_workflows_run_commands_that_there_are(repository: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), flags=re.MULTILINE))
    checks = workflow(repository, "ci")["jobs"]
    assert set(checks["checks"]["strategy"]["matrix"]["command"]) <= targets
    text = "".join((repository / ".github" / "workflows" / f"{name}.yml").read_text() for name in WORKFLOWS)
    assert set(re.findall(r"(?:run:|NEED_DOCKER=1) make ([a-z-]+)", text)) <= targets
    for path in re.findall(r"\.ci/[\w.-]+|tests/\w+\.py", text):
        assert (repository / path).is_file(), path


def test_a_release_pushes_every_image(repository: Path) -> None:
    files = {
        str(path.relative_to(repository)) for path in repository.rglob("Dockerfile.*") if ".venv" not in path.parts
    }
    jobs = workflow(repository, "release")["jobs"]
    assert {each["file"] for each in jobs["images"]["strategy"]["matrix"]["include"]} == files
    assert {"checks", "audit"} <= set(jobs["images"]["needs"]) and "images" in jobs["release"]["needs"]
    (build,) = [step["run"] for step in jobs["images"]["steps"] if "buildx build" in step.get("run", "")]
    assert "--sbom=true" in build and "--provenance=mode=max" in build


def test_a_windows_clone_keeps_the_line_ends_that_shells_need(repository: Path) -> None:
    names = ["Makefile", ".ci/run", "docker/backup.sh", "docker/entrypoint.sh", "requirements.lock"]
    asked = ["git", "check-attr", "eol", *names]
    said = subprocess.run(asked, cwd=repository, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == [f"{name}: eol: lf" for name in names]
