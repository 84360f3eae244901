"""Where a run lives: the pipeline in the repository's root, or a folder runs/<name>/ with its own settings and lock.

A run folder holds params.yaml, a copy of dvc.yaml, dvc.lock and artifacts/; all but the last are there to be committed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from flows.run.forms import (
    CodebookCorrections,
    Corrections,
    EvaluateCorrections,
    Form,
    ModelCorrections,
    PrepareCorrections,
    RecipeName,
    RegisterCorrections,
    RunName,
    TokenizeCorrections,
    TrainCorrections,
    without_empty,
)
from flows.run.lock import dvc_lock
from fuselip_core.config import (
    SECTIONS,
    Settings,
    SettingsError,
    Size,
    SourceName,
    check_run_name,
    check_settings,
    corrected_recipe,
    load_settings,
    merge,
    parse_overrides,
    read_corrections,
    recipe_names,
)
from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_write

STAGES = ("prepare", "codebook", "tokenize", "train", "evaluate", "register")
RECIPE_OF_SOURCE: dict[str, str] = {"phantom": "sample", "rocov2": "rocov2-tiny", "vqa-rad": "vqa-rad"}
logger = logging.getLogger("fuselip")


class RunRequest(Form):
    """What is to be trained, on what; everything empty is the pipeline of params.yaml in the repository's root."""

    recipe: RecipeName | None = Field(
        None, description="Recipe to start from; the source's if empty.", json_schema_extra=without_empty
    )
    size: Size | None = Field(
        None, description="Size of the encoder; the recipe's if empty.", json_schema_extra=without_empty
    )
    source: SourceName | None = Field(
        None, description="Kind of data set; the recipe's, or params.yaml's, if empty.", json_schema_extra=without_empty
    )
    root: Path | None = Field(
        None, description="Folder of the raw data set; the recipe's if empty.", json_schema_extra=without_empty
    )
    name: RunName | None = Field(
        None,
        description="Folder below runs/; source, or recipe, and size if empty.",
        json_schema_extra=without_empty,
    )
    prepare: PrepareCorrections = PrepareCorrections()
    model: ModelCorrections = ModelCorrections()
    codebook: CodebookCorrections = CodebookCorrections()
    tokenize: TokenizeCorrections = TokenizeCorrections()
    train: TrainCorrections = TrainCorrections()
    evaluate: EvaluateCorrections = EvaluateCorrections()
    register_: RegisterCorrections = Field(RegisterCorrections(), alias="register")
    overrides: tuple[str, ...] = Field((), description="More corrections, such as train.steps=100; these win.")

    def corrections(self) -> dict[str, Any]:
        """Fields that differ from the recipe, by section; raises SettingsError for an override that can't be read."""
        values: dict[str, Any] = {"model": {"size": self.size}} if self.size else {}
        return merge(merge(values, _given(self)), parse_overrides(self.overrides))

    def plan(self, repository: Path) -> Plan:
        """The run that is meant, checked and not written yet; see `plan_run`."""
        return plan_run(repository, self)


class StageRequest(Form):
    """A run that is there already, and what is to be different in the stage that runs again."""

    run: RunName | None = Field(
        None,
        description="Folder below runs/; the pipeline in the repository's root if empty.",
        json_schema_extra=without_empty,
    )

    def corrections(self) -> dict[str, Any]:
        """Fields that differ from what the run has, by section."""
        return _given(self)

    def plan(self, repository: Path) -> Plan:
        """The run with its corrections, checked and not written yet; see `plan_again`."""
        return plan_again(repository, self.run, self.corrections())


def _given(form: Form) -> dict[str, Any]:
    """What the sections of a form correct, by section."""
    parts = {section: getattr(form, "register_" if section == "register" else section, None) for section in SECTIONS}
    return {
        section: given for section, part in parts.items() if isinstance(part, Corrections) and (given := part.given())
    }


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
    like_root: Settings | None = None

    def write(self) -> Run:
        """Writes the run folder's files; a variant of the root's pipeline takes over what that has done."""
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
        if self.like_root:
            _start_from_root(run, str(self.like_root.artifacts))
        return run


def open_run_folder(repository: Path, request: RunRequest) -> Run:
    """The run that `request` means, its settings checked and, for a run folder, its files written; see `plan_run`."""
    return plan_run(repository, request).write()


def plan_run(repository: Path, request: RunRequest) -> Plan:
    """The run that `request` means: the root's pipeline, or a folder runs/<name>/.

    Raises SettingsError for settings that are wrong and FuselipError for a data folder that is missing.
    """
    root = load_settings(repository / "params.yaml")
    same_source = request.source in (None, root.prepare.source) and request.recipe in (None, root.recipe)
    if same_source and not request.corrections() and request.root is None and request.name is None:
        plan = Plan(Run(repository, repository, root))
    else:
        kind = request.source or request.recipe or root.prepare.source
        folder = _run_folder(repository, request.name or "-".join(filter(None, (kind, request.size))))
        values = _corrections(repository, request, root, same_source)
        values["artifacts"] = str(folder.relative_to(repository) / "artifacts")
        plan = Plan(_checked(repository, folder, values), values, root if same_source else None)
    _check_data_folder(plan.run)
    return plan


def plan_again(repository: Path, name: str | None, corrections: Mapping[str, Any]) -> Plan:
    """The run in runs/<name>/, or the root's if `name` is empty, with `corrections` to what its params.yaml says.

    The root's own params.yaml is never written: with corrections, a variant of it is meant. Raises FuselipError if
    there is no such run.
    """
    if name is None:
        return plan_run(repository, RunRequest.model_validate(corrections))
    folder = _run_folder(repository, name)
    if not (folder / "params.yaml").is_file():
        known = sorted(path.parent.name for path in (repository / "runs").glob("*/params.yaml"))
        raise FuselipError(f"there is no run {folder}; there are: {', '.join(known) or 'none'}")
    values = merge(read_corrections(folder / "params.yaml"), corrections)
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
        values = {"recipe": request.recipe or _recipe_of(request.source or root_settings.prepare.source)}
        if request.source:
            values["prepare"] = {"source": request.source}
    if request.root:
        root = request.root.expanduser()
        values = merge(values, {"prepare": {"root": str(root if root.is_absolute() else _from(repository, root))}})
    return merge(values, request.corrections())


def _recipe_of(source: str) -> str:
    if source not in RECIPE_OF_SOURCE:
        raise SettingsError(f"no recipe is meant for {source}; name one with --recipe: {', '.join(recipe_names())}")
    return RECIPE_OF_SOURCE[source]


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


def _start_from_root(run: Run, root_artifacts: str) -> None:
    """Takes over what the root pipeline has done, so that a changed parameter runs only the stages behind it.

    The root's lock, with its paths turned into this run's, lets DVC fetch equal outputs from its cache and see by
    itself which stages differ.
    """
    source, target = run.repository / "dvc.lock", run.folder / "dvc.lock"
    if target.exists() or not source.exists():
        return
    settings = str((run.folder / "params.yaml").relative_to(run.repository))
    artifacts = str(run.settings.artifacts)

    def turned(value: Any) -> Any:
        if isinstance(value, dict):
            return {turned(key): turned(item) for key, item in value.items()}
        if isinstance(value, list):
            return [turned(item) for item in value]
        if isinstance(value, str):
            value = re.sub(rf"^{re.escape(root_artifacts)}(?=/)", artifacts, value)
            return re.sub(r"(^|--settings )params\.yaml$", rf"\g<1>{settings}", value)
        return value

    try:
        done = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError):
        done = None
    if not isinstance(done, dict):
        raise FuselipError(f"{source} is damaged; bring it back with git, or delete it")
    _write_if_changed(target, yaml.safe_dump(turned(done), sort_keys=False).encode())
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    # What the cache lacks is made anew.
    with (
        dvc_lock(run.repository, str(run.folder), logger.info),
        contextlib.suppress(DvcException),
        Repo(str(run.repository)) as repo,
    ):
        repo.checkout([str(run.folder / "dvc.yaml")], force=True)


def _write_if_changed(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    with atomic_write(path) as partial:
        partial.write_bytes(content)
