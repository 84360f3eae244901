"""A run's folder: the repository's root, or runs/<name>/ with its own settings and lock.

A run folder holds params.yaml, a copy of dvc.yaml, dvc.lock and artifacts/; all but the last are there to be committed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.run.dvc_stage import dvc_problem, dvc_repo, transfer
from flows.run.forms import Request, RunRequest, StageRequest, field_of
from flows.run.lock import dvc_lock
from fuselip_core.config import (
    SECTIONS,
    Settings,
    SettingsError,
    check_run_name,
    check_settings,
    corrected_recipe,
    load_settings,
    merge,
    read_corrections,
    recipe_names,
)
from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_write

RECIPE_OF_SOURCE: dict[str, str] = {
    "phantom": "sample",
    "rocov2": "rocov2-tiny",
    "vqa-rad": "vqa-rad",
    "folder": "pictures",
    "dicom": "pictures",
}
logger = logging.getLogger("fuselip")


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


@dataclass(frozen=True)
class Plan:
    """A run that is checked and not written yet. `values` is what its params.yaml will say; None: as it stands."""

    run: Run
    values: dict[str, Any] | None = None
    start_from: Run | None = None

    def write(self) -> Run:
        """Writes the run folder's files; a variant of another run, such as the root's, starts from its results."""
        run = self.run
        if self.values is None:
            return run
        written = run.folder / "params.yaml"
        steering = {
            "settings": str(written.relative_to(run.repository)),
            "repository": os.path.relpath(run.repository, run.folder),
        }
        # DVC's templates need the data folder, and every section, in this very file.
        values = merge({section: {} for section in SECTIONS}, self.values)
        values["prepare"] = {**values["prepare"], "root": str(run.settings.prepare.root)}
        _write_if_changed(written, yaml.safe_dump({**steering, **values}, sort_keys=False).encode())
        _write_if_changed(run.folder / "dvc.yaml", (run.repository / "dvc.yaml").read_bytes())
        if self.start_from:
            _start_from(run, self.start_from)
        return run


def plan(repository: Path, request: Request, base: Run | None = None) -> Plan:
    """The run that `request` means: the root's pipeline, or a folder runs/<name>/; checked, and not written yet.

    A new run starts from the results of `base`, or from the root's where it is a variant of that.
    Raises SettingsError for wrong settings and FuselipError for a run or data folder that is missing.
    """
    if isinstance(request, StageRequest):
        return _plan_again(repository, request)
    assert isinstance(request, RunRequest)
    return _plan_run(repository, request, base)


def _plan_run(repository: Path, request: RunRequest, base: Run | None = None) -> Plan:
    root = load_settings(repository / "params.yaml")
    same_source = request.source in (None, root.prepare.source) and request.recipe in (None, root.recipe)
    if same_source and not request.corrections() and request.root is None and request.name is None:
        planned = Plan(Run(repository, repository, root))
    else:
        kind = request.source or request.recipe or root.prepare.source
        folder = _run_folder(repository, request.name or "-".join(filter(None, (kind, request.size))))
        values = _corrections(repository, request, root, same_source)
        values["artifacts"] = str(folder.relative_to(repository) / "artifacts")
        start = base or (Run(repository, repository, root) if same_source else None)
        planned = Plan(_checked(repository, folder, values), values, start)
    settings = planned.run.settings.prepare
    if (
        settings.source != "phantom"
        and not (repository / settings.root).is_dir()
        and not _pull(repository, settings.root)
    ):
        example = "" if field_of("root") != "--root" else f" (make demo SOURCE={settings.source} ROOT=...)"
        raise FuselipError(
            f"there is no data set folder {repository / settings.root}; name the folder of your {settings.source} "
            f"files with {field_of('root')}{example}"
        )
    return planned


def _pull(repository: Path, root: Path) -> bool:
    """Whether FUSELIP_STORE has brought the data set, of which DVC knows the version by ``<root>.dvc``."""
    version = repository / f"{root}.dvc"
    if not os.environ.get("FUSELIP_STORE") or not version.exists():
        return False
    transfer(repository, "pull", version, logger.info)
    return True


def _plan_again(repository: Path, request: StageRequest) -> Plan:
    """The run with the request's changes to what its params.yaml says.

    The root's own params.yaml is never written: a changed root means a variant of it.
    """
    if request.run is None:
        return _plan_run(repository, RunRequest(overrides=request.corrections()))
    folder = _run_folder(repository, request.run)
    if not (folder / "params.yaml").is_file():
        known = sorted(path.parent.name for path in (repository / "runs").glob("*/params.yaml"))
        raise FuselipError(f"there is no run {folder}; {field_of('run')} may be: {', '.join(known) or 'none yet'}")
    values = merge(read_corrections(folder / "params.yaml"), request.corrections())
    return Plan(_checked(repository, folder, values), values)


def _checked(repository: Path, folder: Path, values: Mapping[str, Any]) -> Run:
    settings = check_settings(corrected_recipe(values), origin=f"run {folder.name}")
    return Run(repository, folder, settings)


def _run_folder(repository: Path, name: str) -> Path:
    check_run_name(name)
    return repository / "runs" / name


def _corrections(repository: Path, request: RunRequest, root_settings: Settings, same_source: bool) -> dict[str, Any]:
    """Corrections to the recipe: the root's if the run is a variant of it, then the request's."""
    if same_source:
        values = read_corrections(repository / "params.yaml")
        values["recipe"] = root_settings.recipe
    else:
        source = request.source or root_settings.prepare.source
        recipe = request.recipe or RECIPE_OF_SOURCE.get(source)
        if recipe is None:
            names = ", ".join(recipe_names())
            raise SettingsError(f"{source} has no recipe of its own; choose one with {field_of('recipe')}: {names}")
        values = {"recipe": recipe}
        if request.source:
            values["prepare"] = {"source": request.source}
    if request.root:
        root = request.root.expanduser()
        # A relative folder is meant from the current folder.
        seen = str(root) if root.is_absolute() else os.path.relpath(root.absolute(), repository)
        values = merge(values, {"prepare": {"root": seen}})
    return merge(values, request.corrections())


def _start_from(run: Run, base: Run) -> None:
    """Takes over the results of `base`, so that a changed parameter runs only the stages behind it.

    Its recorded hashes become those of this run's stages; DVC compares them with this run's settings, finds the stages
    that differ, and fetches the outputs of the others from its cache.
    """
    from dvc.exceptions import DvcException

    if (run.folder / "dvc.lock").exists() or not (base.folder / "dvc.lock").exists():
        return
    settings, artifacts = str((run.folder / "params.yaml").relative_to(run.repository)), f"{run.settings.artifacts}/"

    def at_base(path: str) -> str:
        if path.startswith(artifacts):
            return f"{base.settings.artifacts}/{path.removeprefix(artifacts)}"
        return str((base.folder / "params.yaml").relative_to(base.repository)) if path == settings else path

    with dvc_lock(run.repository, str(run.folder), logger.info), dvc_repo(run.repository) as repo:
        try:
            done = {stage.name: stage for stage in repo.stage.load_all(str(base.folder / "dvc.yaml"))}
            for stage in repo.stage.load_all(str(run.folder / "dvc.yaml")):
                before = done[stage.name]
                if before.cmd_changed or not all(out.hash_info for out in before.outs):
                    continue
                recorded = {item.def_path: item for item in (*before.deps, *before.outs)}
                for item in (*stage.deps, *stage.outs):
                    if its := recorded.get(at_base(item.def_path)):
                        item.meta, item.hash_info = its.meta, its.hash_info
                stage.dump(update_pipeline=False)
        except Exception as error:  # what DVC raises on a damaged file is not always its own
            raise dvc_problem(error) from error
        # What the cache lacks is made anew.
        with contextlib.suppress(DvcException):
            repo.checkout([str(run.folder / "dvc.yaml")], force=True)


def _write_if_changed(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    with atomic_write(path) as partial:
        partial.write_bytes(content)
