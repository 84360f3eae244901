"""Tracking of a run: events go to disk as JSON lines, and from there to MLflow and, optionally, wandb.

Every event is appended to ``<artifacts>/tracking/<run>/events.jsonl`` and flushed. Each service reads that file at its
own position, so an unreachable or slow tracking server never stops a run: the run logs one warning, and the same run,
the next stage or ``fuselip sync`` sends the missing events once the server is back.

The environment says where events go: ``FUSELIP_TRACKERS`` (default ``mlflow``; also ``mlflow,wandb``, or empty for the
disk only) and ``MLFLOW_TRACKING_URI`` (default: SQLite in the repository's mlflow/).
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fuselip_core.config import Settings, describe_settings
from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.files import find_json
from fuselip_core.tracking.events import EventLog, Service, read_run
from fuselip_core.tracking.services import MlflowService, WandbService
from fuselip_core.tracking.store import git, prepare_store, repository_root, tracking_uri

# Stages that log to the run of an earlier stage: evaluation belongs to the trained model.
RUN_OF_STAGE = {"evaluate": "train", "register": "train"}

logger = logging.getLogger("fuselip")


@contextmanager
def open_run(settings: Settings, stage: str, resume: bool = False) -> Iterator[EventLog]:
    """The event log of `stage`'s run, closed with the right status in any case.

    A new run, unless `resume` is set (after an interruption) or the stage logs to the run of an earlier one.
    """
    name = RUN_OF_STAGE.get(stage, stage)
    folder = settings.artifacts / "tracking" / name
    known = read_run(folder) if resume or name != stage else {}
    if not known:
        (folder / "events.jsonl").unlink(missing_ok=True)
    with EventLog(folder, {**_describe(settings, name), **known}, services_from_environment()) as log:
        try:
            if name == stage:
                log.params(_without_places(settings.model_dump(mode="json", by_alias=True, exclude={"artifacts"})))
                log.artifact(_write_recipe(settings, folder))
                _log_data(log, settings, stage)
            yield log
        except BaseException as error:
            log.end("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit | Interrupted) else "FAILED")
            raise
        log.end("FINISHED")


def _without_places(value: Any) -> Any:
    """Settings with absolute paths made relative, so that runs on two machines can be compared."""
    if isinstance(value, dict):
        return {name: _without_places(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    path, root = Path(value), repository_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else f".../{path.name}"


def _log_data(log: EventLog, settings: Settings, stage: str) -> None:
    """Logs the prepared data that the run reads: its own and those of `train.tokens`."""
    folders: dict[str, Path] = {settings.prepare.source: settings.artifacts}
    if stage == "train":
        folders |= {name: Path(tokens).parent for name, tokens in settings.train.tokens.items()}
    for name, folder in folders.items():
        manifest = find_json(folder / "prepared" / "manifest.json")
        if manifest:
            source = str(manifest.get("source", name))
            log.data(name, str(manifest.get("data_version")), source, manifest.get("counts", {}))


def experiment_name(recipe: str) -> str:
    """The experiment of a recipe's runs: the recipe's name, with the prefix fuselip."""
    return recipe if recipe.startswith("fuselip") else f"fuselip-{recipe}"


def _write_recipe(settings: Settings, folder: Path) -> Path:
    """Writes the settings of a run, with their descriptions, into its folder."""
    path = folder / "recipe.yaml"
    path.write_text(describe_settings(settings) + "\n", encoding="utf-8")
    return path


def sync(artifacts: Path) -> int:
    """Sends the missing events of every run below `artifacts`; returns the number of runs that are still incomplete.

    Also creates a local MLflow store, or corrects one that was moved (see `prepare_store`).
    """
    prepare_store(tracking_uri())
    unsent = 0
    for path in sorted((artifacts / "tracking").glob("*/run.json")):
        with EventLog(path.parent, read_run(path.parent), services_from_environment()) as log:
            unsent += not log.flush(force=True)
    return unsent


def services_from_environment() -> list[Service]:
    """The services that ``FUSELIP_TRACKERS`` names."""
    names = [name.strip() for name in os.environ.get("FUSELIP_TRACKERS", "mlflow").split(",") if name.strip()]
    known = {"mlflow": MlflowService, "wandb": WandbService}
    if unknown := [name for name in names if name not in known]:
        raise FuselipError(f"FUSELIP_TRACKERS names '{unknown[0]}', which is unknown; use {' or '.join(known)}")
    return [known[name]() for name in names]


def run_of(artifacts: Path, stage: str = "train") -> dict[str, Any]:
    """run.json of the stage's run (name, tags, mlflow_run_id, mlflow_uri, ...); empty if there is none."""
    return read_run(artifacts / "tracking" / RUN_OF_STAGE.get(stage, stage))


def _describe(settings: Settings, name: str) -> dict[str, Any]:
    data = data_version(settings.artifacts)
    tags = {
        "stage": name,
        "recipe": settings.recipe,
        "family": settings.model.family,
        "size": settings.model.size,
        "data_version": data,
        "dvc_data": dvc_version(settings.prepare.root),
        **_git_tags(),
    }
    for tag, variable in (
        ("prefect_flow_run", "FUSELIP_FLOW_RUN"),
        ("prefect_flow_url", "FUSELIP_FLOW_URL"),
        ("mlflow.parentRunId", "FUSELIP_PARENT_RUN"),  # a trial of a sweep
    ):
        if value := os.environ.get(variable):
            tags[tag] = value
    return {
        # With random letters, since two runs may start within a second.
        "name": f"{name}-{settings.model.size}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        "experiment": experiment_name(settings.recipe),
        "tags": tags,
    }


def data_version(artifacts: Path) -> str:
    """Hash of the prepared data below `artifacts`, or `unknown`."""
    return str(find_json(artifacts / "prepared" / "manifest.json").get("data_version", "unknown"))


def dvc_version(root: Path) -> str:
    """DVC's hash of the raw data at `root`, from the .dvc file beside it, or `unknown`."""
    beside = repository_root() / root
    try:
        known = yaml.safe_load(beside.with_name(f"{beside.name}.dvc").read_text(encoding="utf-8"))
        return str(known["outs"][0]["md5"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, yaml.YAMLError):
        return "unknown"


def _git_tags() -> dict[str, str]:
    """Commit of the code and whether tracked files differ from it; without git, the commit ``FUSELIP_COMMIT``."""
    try:
        commit = git(repository_root(), "rev-parse", "HEAD").decode().strip()
        changed = git(repository_root(), "status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": os.environ.get("FUSELIP_COMMIT", "unknown")}
    return {"git_commit": commit, "git_dirty": str(bool(changed)).lower()}
