"""Tracking of a run: events go to disk as JSON lines; MLflow and, if asked for, wandb read them from there.

The disk comes first. Every event is appended to ``<artifacts>/tracking/<run>/events.jsonl`` and flushed; the services
read that file behind a cursor of their own. So an unreachable, slow or lost tracking server never stops a run: one
warning, and what it missed is sent when it is back, by the same run, by the next stage, or by ``fuselip sync``.

Where events go is a matter of the environment, not of the settings: ``FUSELIP_TRACKERS`` (default ``mlflow``; also
``mlflow,wandb`` or empty for the disk alone) and ``MLFLOW_TRACKING_URI`` (default: SQLite in the repository's mlflow/).
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
from fuselip_core.tracking.store import prepare_store, repository_root, tracking_uri

# Stages that add to the run of an earlier one: evaluation belongs to the model that was trained.
RUN_OF_STAGE = {"evaluate": "train", "register": "train"}

logger = logging.getLogger("fuselip")


@contextmanager
def open_run(settings: Settings, stage: str, resume: bool = False) -> Iterator[EventLog]:
    """The tracker of `stage`'s run, closed with the right status whatever happens.

    A new run, unless `resume` (the stage goes on after an interruption) or the stage belongs to an earlier one's run.
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
    """Settings whose absolute paths say where they end: runs on two machines compare by what they were given."""
    if isinstance(value, dict):
        return {name: _without_places(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_places(each) for each in value]
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    path, root = Path(value), repository_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else f".../{path.name}"


def _log_data(log: EventLog, settings: Settings, stage: str) -> None:
    """The prepared data that the run reads, its own and those of `train.tokens`."""
    folders: dict[str, Path] = {settings.prepare.source: settings.artifacts}
    if stage == "train":
        folders |= {name: Path(tokens).parent for name, tokens in settings.train.tokens.items()}
    for name, folder in folders.items():
        manifest = find_json(folder / "prepared" / "manifest.json")
        if manifest:
            source = str(manifest.get("source", name))
            log.data(name, str(manifest.get("data_version")), source, manifest.get("counts", {}))


def experiment_name(recipe: str) -> str:
    """The experiment of a recipe's runs: each name begins with fuselip, once."""
    return recipe if recipe.startswith("fuselip") else f"fuselip-{recipe}"


def _write_recipe(settings: Settings, folder: Path) -> Path:
    """The settings of a run with their meaning, as a file that stays with it."""
    path = folder / "recipe.yaml"
    path.write_text(describe_settings(settings) + "\n", encoding="utf-8")
    return path


def sync(artifacts: Path) -> int:
    """Sends what the services have missed of every run below `artifacts`; returns how many runs still lack some.

    Also makes a local store of MLflow, or corrects one that was moved (see `prepare_store`).
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
        raise FuselipError(f"FUSELIP_TRACKERS names '{unknown[0]}'; there are: {', '.join(known)}")
    return [known[name]() for name in names]


def run_of(artifacts: Path, stage: str = "train") -> dict[str, Any]:
    """What run.json says of the stage's run (name, tags, mlflow_run_id, mlflow_uri, ...); empty if there is none."""
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
        # Two runs may start within a second, so the time alone would not tell them apart.
        "name": f"{name}-{settings.model.size}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        "experiment": experiment_name(settings.recipe),
        "tags": tags,
    }


def data_version(artifacts: Path) -> str:
    """Hash of the prepared data below `artifacts`, or `unknown`."""
    return str(find_json(artifacts / "prepared" / "manifest.json").get("data_version", "unknown"))


def dvc_version(root: Path) -> str:
    """Hash by which DVC knows the raw data at `root`, from the file that `dvc add` leaves beside it, or `unknown`."""
    beside = repository_root() / root
    try:
        known = yaml.safe_load(beside.with_name(f"{beside.name}.dvc").read_text(encoding="utf-8"))
        return str(known["outs"][0]["md5"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, yaml.YAMLError):
        return "unknown"


def _git_tags() -> dict[str, str]:
    """Commit of the code and whether tracked files differ from it; from ``FUSELIP_COMMIT`` where git is absent."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": os.environ.get("FUSELIP_COMMIT", "unknown")}
    return {"git_commit": commit, "git_dirty": str(bool(changed)).lower()}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(repository_root()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
