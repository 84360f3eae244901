"""The state that a registered model was made from, stored with it for `fuselip reproduce`.

The state is a folder: state.json (commit, run folder, versions), settings.json, metrics.json, copies of the run's
params.yaml, dvc.yaml and dvc.lock and of data.dvc, and changes.patch if the code differed from the commit. Nothing of
it needs to be committed before registering.
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
from fuselip_core.tracking.store import git, repository_root

STATE_FOLDER = "state"
PATCH = "changes.patch"
# Files that DVC wrote or reads: of the run's folder, and of the repository.
OF_RUN = ("params.yaml", "dvc.yaml", "dvc.lock")
OF_REPOSITORY = ("data.dvc",)
# Code that a stage's output can depend on; other files may differ from the commit.
CODE = ("fuselip_core", "dvc.yaml", "params.yaml", "pyproject.toml", "requirements.lock")
LIBRARIES = ("torch", "numpy", "pillow")
# Reproducible results of the stages (no times or paths in them), in the order of the pipeline.
RESULTS = {
    "prepared data": "prepared/manifest.json",
    "image tokenizer": "codebook/model.safetensors",
    "encoder": "model/model.safetensors",
}


def write_state(folder: Path, settings: Settings, metrics: Mapping[str, float]) -> dict[str, Any]:
    """Writes the state that the outputs of `settings` were made from into `folder`; returns state.json's content."""
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
    """Hash of each existing result: of the file, or for prepared data of its shards."""
    found = {}
    for name, place in RESULTS.items():
        path = artifacts / place
        if path.is_file():
            found[name] = data_version(artifacts) if path.suffix == ".json" else sha256_of(path)
    return found


def commit_of(repository: Path) -> str | None:
    """The commit that is checked out; without git, as in the images, ``FUSELIP_COMMIT``; None if unknown."""
    try:
        return git(repository, "rev-parse", "HEAD").decode().strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("FUSELIP_COMMIT")


def changes_of(repository: Path) -> bytes:
    """A patch from the commit to the present code, new files included; empty if they are the same.

    Without git, the content of the file ``FUSELIP_CHANGES``, which flows/run/container.py writes for its container.
    """
    there = [name for name in CODE if (repository / name).exists()]
    try:
        # In a separate git index, so that the user's staged changes stay untouched.
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            git(repository, "read-tree", "HEAD", environment=index)
            git(repository, "add", "--all", "--", *there, environment=index)
            return git(repository, "diff", "--cached", "--binary", "HEAD", "--", *CODE, environment=index)
    except (OSError, subprocess.SubprocessError):
        given = os.environ.get("FUSELIP_CHANGES")
        return Path(given).read_bytes() if given else b""
