"""Restores the state that a registered model was made from (code, settings, locks, data) in a git worktree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.run.dvc_stage import dvc_repo
from flows.run.runner import stage_environment
from fuselip_core.config import SECTIONS
from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_write, read_json
from fuselip_core.registry.register import fetch_state
from fuselip_core.registry.state import OF_REPOSITORY, OF_RUN, PATCH

# Folder of a run that the training image made, without DVC.
NEW_RUN = "runs/reproduced"


@dataclass(frozen=True)
class Recorded:
    """What is known of a registered model; `folder` holds its files."""

    name: str
    version: str
    folder: Path
    state: dict[str, Any]
    settings: dict[str, Any]
    metrics: dict[str, float]

    @property
    def title(self) -> str:
        return f"{self.name} version {self.version}"


def read_recorded(uri: str, folder: Path) -> Recorded:
    """Fetches the state of the model that `uri` names into `folder`; raises FuselipError where there is none."""
    name, version, place = fetch_state(uri, folder)
    parts = {
        name: read_json(place / f"{name}.json", "register the model again") for name in ("state", "settings", "metrics")
    }
    return Recorded(name, version, place, **parts)


def restore(recorded: Recorded, repository: Path, target: Path, root: Path | None) -> Path:
    """Makes `target` a worktree in the recorded state, data included; returns the run's folder in it.

    `root` is the folder of the raw data, where the recorded one is not to be used.
    """
    _check_out(recorded, repository, target)
    folder = target / (recorded.state["run_folder"] if (recorded.folder / "dvc.yaml").exists() else NEW_RUN)
    _lay_files(recorded, target, folder)
    if root:
        _point_to(folder, root)
    _share_cache(repository, target)
    _bring_data(repository, target, folder)
    return folder


def _check_out(recorded: Recorded, repository: Path, target: Path) -> None:
    commit = recorded.state["commit"]
    if not commit or commit == "unknown":
        raise FuselipError(f"the commit of {recorded.title} is not known; its image was built without COMMIT")
    if target.exists():
        raise FuselipError(f"{target} is there already; remove it (git worktree remove --force), or choose --into")
    done = _run(["git", "worktree", "add", "--detach", str(target), commit], repository)
    if done.returncode:
        raise FuselipError(f"commit {commit[:12]} can't be checked out ({_last(done)}); `git fetch` may bring it")
    patch = recorded.folder / PATCH
    if patch.exists():
        done = _run(["git", "apply", "--whitespace=nowarn", str(patch.resolve())], target)
        if done.returncode:
            raise FuselipError(f"the recorded changes to commit {commit[:12]} do not apply ({_last(done)})")


def _lay_files(recorded: Recorded, target: Path, folder: Path) -> None:
    """The run's own files at their place; for a run without any, new ones with all of its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, names in ((folder, OF_RUN), (target, OF_REPOSITORY)):
        for name in names:
            if (recorded.folder / name).exists():
                shutil.copyfile(recorded.folder / name, place / name)
    if (recorded.folder / "dvc.yaml").exists():
        return
    shutil.copyfile(target / "dvc.yaml", folder / "dvc.yaml")
    steering = {
        "recipe": recorded.settings["recipe"],
        "settings": f"{NEW_RUN}/params.yaml",
        "repository": os.path.relpath(target, folder),
        "artifacts": f"{NEW_RUN}/artifacts",
    }
    _write_yaml(folder / "params.yaml", {**steering, **{name: recorded.settings[name] for name in SECTIONS}})


def _point_to(folder: Path, root: Path) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    _write_yaml(folder / "params.yaml", {**params, "prepare": {**params["prepare"], "root": str(root.resolve())}})


def _share_cache(repository: Path, target: Path) -> None:
    """Uses the cache and remotes of `repository`, so that data is stored only once."""
    for name in ("config", "config.local"):
        if (repository / ".dvc" / name).exists():
            shutil.copyfile(repository / ".dvc" / name, target / ".dvc" / name)
    with dvc_repo(repository) as repo:
        cache = repo.cache.local_cache_dir
        remotes = {name: str(remote["url"]) for name, remote in repo.config["remote"].items()}
    commands = [["cache", "dir", "--local", cache]]
    # Relative addresses are meant from the repository's .dvc folder.
    commands += [
        ["remote", "modify", "--local", name, "url", str((repository / ".dvc" / url).resolve())]
        for name, url in remotes.items()
        if "://" not in url
    ]
    for command in commands:
        _dvc(target, *command)


def _bring_data(repository: Path, target: Path, folder: Path) -> None:
    """Puts the raw data where the settings expect it: from DVC, drawn again, or found there."""
    prepare = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))["prepare"]
    root = Path(prepare["root"])
    if (target / "data.dvc").exists() and (target / root).is_relative_to(target / "data"):
        pulled = _run([sys.executable, "-m", "dvc", "pull", "--quiet", "data.dvc"], target)
        if pulled.returncode and prepare.get("source", "phantom") == "phantom":
            _draw_sample(target)
        elif pulled.returncode:
            raise FuselipError(f"data.dvc can't be pulled ({_last(pulled)}); `dvc push` it where the data is")
    elif not (target / root).exists() and (repository / root).exists():
        (target / root).parent.mkdir(parents=True, exist_ok=True)
        (target / root).symlink_to((repository / root).resolve(), target_is_directory=True)
    if not (target / root).exists():
        raise FuselipError(f"there is no {root} with the raw data; name its folder with --root")


def _draw_sample(target: Path) -> None:
    recorded = (target / "data.dvc").read_bytes()
    shutil.rmtree(target / "data", ignore_errors=True)
    done = _run([sys.executable, "-m", "fuselip_core", "sample", "--out", "data"], target)
    if done.returncode:
        raise FuselipError(f"the sample can't be drawn ({_last(done)})")
    # `dvc status` does not help: it only reports that the recorded bytes are missing from its cache.
    _dvc(target, "commit", "--quiet", "--force", "data.dvc")
    if (target / "data.dvc").read_bytes() != recorded:
        raise FuselipError(
            "data.dvc can't be pulled, and what this machine draws is another sample; `dvc push` it first"
        )


def _dvc(folder: Path, *arguments: str) -> str:
    done = _run([sys.executable, "-m", "dvc", *arguments], folder)
    if done.returncode:
        raise FuselipError(f"dvc {arguments[0]} fails in {folder}: {_last(done)}")
    return done.stdout


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=stage_environment(folder), capture_output=True, text=True)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {done.returncode}"


def _write_yaml(path: Path, values: dict[str, Any]) -> None:
    with atomic_write(path) as partial:
        partial.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
