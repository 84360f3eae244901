"""The state that a registered model was made from, stored with it for `fuselip reproduce`.

The state is a folder of plain files: state.json (commit, run folder, versions), settings.json and metrics.json, beside
them copies of the run's params.yaml, dvc.yaml and dvc.lock, of data.dvc, and changes.patch where the code was not that
of the commit. All of it is known when the register stage starts, and none of it needs to be committed first.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fuselip_core.config import Settings
from fuselip_core.files import sha256_of, write_json
from fuselip_core.tracking.run import data_version
from fuselip_core.tracking.store import repository_root

STATE_FOLDER = "state"
PATCH = "changes.patch"
# Files that DVC wrote or reads: of the run's folder, and of the repository.
OF_RUN = ("params.yaml", "dvc.yaml", "dvc.lock")
OF_REPOSITORY = ("data.dvc",)
# What a stage's output can depend on; anything else in the repository may differ from the commit.
CODE = ("fuselip_core", "dvc.yaml", "params.yaml", "pyproject.toml", "requirements.lock")
LIBRARIES = ("torch", "numpy", "pillow")
# Files whose bytes are a stage's result, without times or paths in them; in the order in which they are made.
RESULTS = {
    "prepared data": "prepared/manifest.json",
    "image tokenizer": "codebook/model.safetensors",
    "encoder": "model/model.safetensors",
}


def write_state(folder: Path, settings: Settings, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Fills `folder` with the state that the outputs of `settings` were made from; returns what state.json holds."""
    repository = repository_root()
    run_folder = repository / settings.artifacts.parent
    for place, names in ((run_folder, OF_RUN), (repository, OF_REPOSITORY)):
        for name in names:
            if (place / name).is_file():
                shutil.copyfile(place / name, folder / name)
    write_json(folder / "settings.json", settings.model_dump(mode="json", by_alias=True))
    write_json(folder / "metrics.json", dict(sorted(metrics.items())))
    patch = changes_of(repository)
    if patch:
        (folder / PATCH).write_bytes(patch)
    state = {
        "commit": commit_of(repository),
        "changed": bool(patch),
        "run_folder": os.path.relpath(run_folder, repository),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "results": results_of(repository / settings.artifacts),
    }
    write_json(folder / "state.json", state)
    return state


def results_of(artifacts: Path) -> dict[str, str]:
    """Hash of each result that there is: of a file's bytes, and for prepared data of its shards."""
    found = {}
    for name, place in RESULTS.items():
        path = artifacts / place
        if path.is_file():
            found[name] = data_version(artifacts) if path.suffix == ".json" else sha256_of(path)
    return found


def commit_of(repository: Path) -> str | None:
    """The commit that is checked out; ``FUSELIP_COMMIT`` where git is absent, as in the images; else None."""
    try:
        return _git(repository, "rev-parse", "HEAD").decode().strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("FUSELIP_COMMIT")


def changes_of(repository: Path) -> bytes:
    """A patch from the commit to the code as it is, new files included; empty if they are the same.

    Where git is absent, the patch that ``FUSELIP_CHANGES`` names: flows/run/container.py makes one for its container.
    """
    there = [name for name in CODE if (repository / name).exists()]
    try:
        # An index of its own, so that what the user has staged stays as it is.
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            _git(repository, "read-tree", "HEAD", environment=index)
            _git(repository, "add", "--all", "--", *there, environment=index)
            return _git(repository, "diff", "--cached", "--binary", "HEAD", "--", *CODE, environment=index)
    except (OSError, subprocess.SubprocessError):
        given = os.environ.get("FUSELIP_CHANGES")
        return Path(given).read_bytes() if given else b""


def _git(repository: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> bytes:
    command = ["git", "-C", str(repository), *arguments]
    own = {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, check=True, timeout=60, env=own).stdout
