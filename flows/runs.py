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
from pydantic import BaseModel, ConfigDict, Field

from flows.lock import dvc_lock
from flows.parameters import (
    NAME_PATTERN,
    CodebookCorrections,
    Corrections,
    EvaluateCorrections,
    ModelCorrections,
    PrepareCorrections,
    RecipeName,
    RegisterCorrections,
    RunName,
    TokenizeCorrections,
    TrainCorrections,
    without_empty,
)
from fuselip_core.config import (
    SECTIONS,
    Settings,
    SettingsError,
    Size,
    SourceName,
    check_settings,
    load_settings,
    merge,
    parse_overrides,
    read_corrections,
    read_recipe,
    recipe_names,
)
from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_write

STAGES = ("prepare", "codebook", "tokenize", "train", "evaluate", "register")
RECIPE_OF_SOURCE: dict[str, str] = {"phantom": "sample", "rocov2": "rocov2-tiny", "vqa-rad": "vqa-rad"}
logger = logging.getLogger("fuselip")


class RunRequest(BaseModel):
    """What is to be trained, on what; everything empty is the pipeline of params.yaml in the repository's root."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
        for section in SECTIONS:
            part: Corrections = getattr(self, "register_" if section == "register" else section)
            if given := part.given():
                values = merge(values, {section: given})
        return merge(values, parse_overrides(self.overrides))

    def open(self, repository: Path) -> Run:
        """The run's folder, its settings checked; see `open_run_folder`."""
        return open_run_folder(repository, self)


class StageRequest(BaseModel):
    """A run that is there already, and what is to be different in the stage that runs again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: RunName | None = Field(
        None,
        description="Folder below runs/; the pipeline in the repository's root if empty.",
        json_schema_extra=without_empty,
    )

    def corrections(self) -> dict[str, Any]:
        """Fields that differ from what the run has, by section."""
        return {}

    def open(self, repository: Path) -> Run:
        """The run, its corrections written into its params.yaml; raises FuselipError if there is no such run."""
        return reopen_run(repository, self.run, self.corrections())


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
    if same_source and not request.corrections() and request.root is None and request.name is None:
        run = Run(repository, repository, root_settings)
    else:
        run = _make_run_folder(repository, request, root_settings, same_source)
    _check_data_folder(run)
    return run


def reopen_run(repository: Path, name: str | None, corrections: Mapping[str, Any]) -> Run:
    """The run in runs/<name>/, or the root's if `name` is empty, with `corrections` to what its params.yaml says.

    The root's own params.yaml is never written: with corrections, a variant of it is opened, as open_run_folder does.
    """
    if name is None:
        return open_run_folder(repository, RunRequest.model_validate(corrections))
    _check_name(name)
    folder = repository / "runs" / name
    if not (folder / "params.yaml").is_file():
        known = sorted(path.parent.name for path in (repository / "runs").glob("*/params.yaml"))
        raise FuselipError(f"there is no run {folder}; there are: {', '.join(known) or 'none'}")
    return _write_run_folder(repository, folder, merge(read_corrections(folder / "params.yaml"), corrections))


def _make_run_folder(repository: Path, request: RunRequest, root_settings: Settings, same_source: bool) -> Run:
    kind = request.source or request.recipe or root_settings.prepare.source
    name = request.name or "-".join(filter(None, (kind, request.size)))
    _check_name(name)
    values = _corrections(repository, request, root_settings, same_source)
    folder = repository / "runs" / name
    values["artifacts"] = str(folder.relative_to(repository) / "artifacts")
    run = _write_run_folder(repository, folder, values)
    if same_source:
        _start_from_root(repository, folder, str(root_settings.artifacts), values["artifacts"])
    return run


def _write_run_folder(repository: Path, folder: Path, values: dict[str, Any]) -> Run:
    """params.yaml with `values` and dvc.yaml in `folder`; nothing is written if the settings are wrong."""
    settings = check_settings(merge(read_recipe(values["recipe"]), values), origin=f"run {folder.name}")
    # DVC's templates need the data folder, and every section, in this very file.
    values = merge({section: {} for section in SECTIONS}, values)
    values["prepare"] = {**values["prepare"], "root": str(settings.prepare.root)}
    written = str(folder.relative_to(repository) / "params.yaml")
    steering = {"settings": written, "repository": os.path.relpath(repository, folder)}
    _write_if_changed(folder / "params.yaml", yaml.safe_dump({**steering, **values}, sort_keys=False))
    _write_if_changed(folder / "dvc.yaml", (repository / "dvc.yaml").read_text(encoding="utf-8"))
    return Run(repository, folder, settings)


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name):
        raise SettingsError(f"'{name}' can't name a run; use letters, digits, dots, dashes and underscores")


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
