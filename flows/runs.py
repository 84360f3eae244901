"""Where a run lives: the pipeline in the repository's root, or a folder runs/<name>/ with its own settings and lock.

A run folder holds params.yaml, a copy of dvc.yaml, dvc.lock and artifacts/; all but the last are there to be committed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from flows.lock import dvc_lock
from fuselip_core.config import (
    SECTIONS,
    Settings,
    SettingsError,
    SourceName,
    check_settings,
    load_settings,
    merge,
    parse_overrides,
    read_corrections,
    read_recipe,
)
from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_write

STAGES = ("prepare", "codebook", "tokenize", "train", "evaluate", "register")
RECIPE_OF_SOURCE: dict[str, str] = {"phantom": "sample", "rocov2": "rocov2-tiny", "vqa-rad": "vqa-rad"}
logger = logging.getLogger("fuselip")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunRequest(BaseModel):
    """What the caller wants; everything empty is the pipeline of params.yaml in the repository's root."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: SourceName | None = Field(None, description="Kind of data set; params.yaml's if empty.")
    root: Path | None = Field(None, description="Folder of the raw data set; the recipe's if empty.")
    recipe: str | None = Field(None, description="Recipe to start from; the source's if empty.")
    overrides: tuple[str, ...] = Field((), description="Corrections such as train.steps=100.")
    name: str | None = Field(None, description="Folder below runs/; the source's name if empty.")


@dataclass(frozen=True)
class Run:
    """A run that is ready to be reproduced; `folder` holds dvc.yaml and is the repository or below it."""

    repository: Path
    folder: Path
    settings: Settings

    @property
    def name(self) -> str:
        return self.settings.recipe if self.folder == self.repository else self.folder.name

    @property
    def artifacts(self) -> Path:
        return self.repository / self.settings.artifacts

    @property
    def dvc_file(self) -> str:
        """The run's dvc.yaml from the repository's root, as DVC wants it."""
        return str((self.folder / "dvc.yaml").relative_to(self.repository))


def open_run_folder(repository: Path, request: RunRequest) -> Run:
    """The run that `request` means, its settings checked and, for a run folder, its files written.

    Raises SettingsError for settings that are wrong and FuselipError for a data folder that is missing.
    """
    root_settings = load_settings(repository / "params.yaml")
    same_source = request.source in (None, root_settings.prepare.source) and request.recipe in (
        None,
        root_settings.recipe,
    )
    if same_source and not request.overrides and request.root is None and request.name is None:
        run = Run(repository, repository, root_settings)
    else:
        run = _make_run_folder(repository, request, root_settings, same_source)
    _check_data_folder(run)
    return run


def _make_run_folder(repository: Path, request: RunRequest, root_settings: Settings, same_source: bool) -> Run:
    name = request.name or request.source or request.recipe or root_settings.prepare.source
    if not NAME.fullmatch(name):
        raise SettingsError(f"'{name}' can't name a run; use letters, digits, dots, dashes and underscores")
    values = _corrections(repository, request, root_settings, same_source)
    folder = repository / "runs" / name
    relative = folder.relative_to(repository)
    values["artifacts"] = str(relative / "artifacts")
    settings = check_settings(merge(read_recipe(values["recipe"]), values), origin=f"run {name}")
    # DVC's templates need the data folder, and every section, in this very file.
    values = merge({section: {} for section in SECTIONS}, values)
    values["prepare"] = {**values["prepare"], "root": str(settings.prepare.root)}
    steering = {"settings": str(relative / "params.yaml"), "repository": os.path.relpath(repository, folder)}
    _write_if_changed(folder / "params.yaml", yaml.safe_dump({**steering, **values}, sort_keys=False))
    _write_if_changed(folder / "dvc.yaml", (repository / "dvc.yaml").read_text(encoding="utf-8"))
    if same_source:
        _start_from_root(repository, folder, str(root_settings.artifacts), values["artifacts"])
    return Run(repository, folder, settings)


def _corrections(repository: Path, request: RunRequest, root_settings: Settings, same_source: bool) -> dict[str, Any]:
    """Corrections to the recipe: the root's if the run is a variant of it, then the request's."""
    if same_source:
        values = read_corrections(repository / "params.yaml")
        values["recipe"] = root_settings.recipe
    else:
        values = {"recipe": request.recipe or RECIPE_OF_SOURCE[request.source or root_settings.prepare.source]}
        if request.source:
            values["prepare"] = {"source": request.source}
    if request.root:
        root = request.root.expanduser()
        values = merge(values, {"prepare": {"root": str(root if root.is_absolute() else _from(repository, root))}})
    return merge(values, parse_overrides(request.overrides))


def _from(repository: Path, path: Path) -> str:
    """`path`, which is meant from the current folder, as seen from the repository."""
    return os.path.relpath(path.absolute(), repository)


def _check_data_folder(run: Run) -> None:
    root = run.repository / run.settings.prepare.root
    if run.settings.prepare.source != "phantom" and not root.is_dir():
        raise FuselipError(
            f"there is no data set folder {root}; name the folder of your {run.settings.prepare.source} files "
            f"with --root (make demo SOURCE={run.settings.prepare.source} ROOT=...)"
        )


def _start_from_root(repository: Path, folder: Path, root_artifacts: str, artifacts: str) -> None:
    """Takes over what the root pipeline has done, so that a changed parameter runs only the stages behind it.

    The root's lock, with its paths turned into this run's, lets DVC fetch equal outputs from its cache and see by
    itself which stages differ.
    """
    source, target = repository / "dvc.lock", folder / "dvc.lock"
    if target.exists() or not source.exists():
        return
    settings = str((folder / "params.yaml").relative_to(repository))

    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {turned(key): turned(item) for key, item in value.items()}
        if isinstance(value, list):
            return [turned(item) for item in value]
        if isinstance(value, str):
            value = re.sub(rf"^{re.escape(root_artifacts)}(?=/)", artifacts, value)
            return re.sub(r"(^|--settings )params\.yaml$", rf"\g<1>{settings}", value)
        return value

    _write_if_changed(target, yaml.safe_dump(turned(yaml.safe_load(source.read_text())), sort_keys=False))
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    # What the cache lacks is made anew.
    with (
        dvc_lock(repository, str(folder), logger.info),
        contextlib.suppress(DvcException),
        Repo(str(repository)) as repo,
    ):
        repo.checkout([str(folder / "dvc.yaml")], force=True)


def _write_if_changed(path: Path, content: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8") == content:
        return
    with atomic_write(path) as partial:
        partial.write_text(content, encoding="utf-8")
