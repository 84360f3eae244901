"""What a run tells the outside: JSON lines on disk always; MLflow, and wandb if asked for, follow them.

The disk comes first. Every event is appended to ``<artifacts>/tracking/<run>/events.jsonl`` and flushed; the services
read that file behind a cursor of their own. So a tracking server that is away, slow or lost never stops a run: one
warning, and what it missed is sent when it is back, by the same run, by the next stage, or by ``fuselip sync``.

Where events go is a matter of the environment, not of the settings: ``FUSELIP_TRACKERS`` (default ``mlflow``; also
``mlflow,wandb`` or empty for the disk alone) and ``MLFLOW_TRACKING_URI`` (default: SQLite in the repository's mlflow/).
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fuselip_core.config import Settings, describe_settings
from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.tracking.events import Event, EventLog, Service, read_events, read_run

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_A_BATCH = 1000  # MLflow's limits for one call
PARAMS_A_BATCH = 100
# Without it MLflow's page guesses from the runs, and shows what is there for language models and their judges.
PAGE_OF_TRAININGS = {"mlflow.experimentKind": "custom_model_development"}
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
                log.params(settings.model_dump(mode="json", by_alias=True))
                log.artifact(_write_recipe(settings, folder))
            yield log
        except BaseException as error:
            log.end("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit | Interrupted) else "FAILED")
            raise
        log.end("FINISHED")


def _write_recipe(settings: Settings, folder: Path) -> Path:
    """The settings of a run with their meaning, as a file that stays with it."""
    path = folder / "recipe.yaml"
    path.write_text(describe_settings(settings) + "\n", encoding="utf-8")
    return path


def sync(artifacts: Path) -> int:
    """Sends what the services have missed of every run below `artifacts`; returns how many runs still lack some."""
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


class MlflowService:
    """Sends events to MLflow in batches."""

    name = "mlflow"

    def __init__(self, uri: str | None = None) -> None:
        self.uri = uri or tracking_uri()

    def send(self, run: dict[str, Any], events: list[Event]) -> None:
        client = mlflow_client(self.uri)
        if not self._open(client, run):
            # Another store, or an emptied one: everything so far belongs there, not only what is new.
            run["sent"][self.name] = 0
            events, _ = read_events(Path(run["folder"]) / "events.jsonl", 0)
        self._send_values(client, run["mlflow_run_id"], events)
        for event in events:
            if event["type"] == "artifact":
                self._send_artifact(client, run["mlflow_run_id"], event)
        if events[-1]["type"] == "end":
            client.set_terminated(run["mlflow_run_id"], events[-1]["status"], events[-1]["time"])

    def _open(self, client: MlflowClient, run: dict[str, Any]) -> bool:
        """Whether the run was there already, with all that was sent so far; makes it if not."""
        from mlflow.exceptions import MlflowException

        if run.get("mlflow_run_id") and run.get("mlflow_uri") == self.uri:
            try:
                client.update_run(run["mlflow_run_id"], status="RUNNING")
                return True
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        experiment = experiment_id(client, run["experiment"], self.uri)
        created = client.create_run(experiment, tags={**run["tags"], **_way_back(run["tags"])}, run_name=run["name"])
        run.update(mlflow_run_id=created.info.run_id, mlflow_experiment_id=experiment, mlflow_uri=self.uri)
        return False

    def _send_values(self, client: MlflowClient, run_id: str, events: list[Event]) -> None:
        from mlflow.entities import Metric, Param

        metrics = [
            Metric(name, value, event["time"], event["step"])
            for event in events
            if event["type"] == "metrics"
            for name, value in event["values"].items()
        ]
        params = {
            name: str(value) for event in events if event["type"] == "params" for name, value in event["values"].items()
        }
        for start in range(0, len(metrics), METRICS_A_BATCH):
            client.log_batch(run_id, metrics=metrics[start : start + METRICS_A_BATCH])
        # A resumed run may state a changed setting, and MLflow refuses to change a parameter: the first one stands.
        stated = client.get_run(run_id).data.params if params else {}
        new = [Param(name, value) for name, value in params.items() if name not in stated]
        for start in range(0, len(new), PARAMS_A_BATCH):
            client.log_batch(run_id, params=new[start : start + PARAMS_A_BATCH])

    def _send_artifact(self, client: MlflowClient, run_id: str, event: Event) -> None:
        path = Path(event["path"])
        if path.is_dir():
            client.log_artifacts(run_id, str(path), event["folder"] or None)
        elif path.is_file():
            client.log_artifact(run_id, str(path), event["folder"] or None)
        else:
            logger.warning("%s is gone and can't be sent to MLflow", path)


class WandbService:
    """Sends events to wandb; ``WANDB_MODE=offline`` keeps them on disk."""

    name = "wandb"

    def send(self, run: dict[str, Any], events: list[Event]) -> None:
        import wandb

        run.setdefault("wandb_run_id", uuid.uuid4().hex[:8])
        with wandb.init(
            project=os.environ.get("WANDB_PROJECT", run["experiment"]),
            id=run["wandb_run_id"],
            name=run["name"],
            resume="allow",
            dir=run["folder"],
            settings=wandb.Settings(silent=True),
        ) as session:
            for event in events:
                if event["type"] == "params":
                    session.config.update(event["values"], allow_val_change=True)
                elif event["type"] == "metrics":
                    session.log({**event["values"], "step": event["step"]})


def repository_root() -> Path:
    """The nearest folder at or above the current one that DVC manages; the current one if there is none."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, or SQLite in the repository's mlflow/ folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{repository_root() / 'mlflow' / 'mlflow.db'}"


def mlflow_client(uri: str) -> MlflowClient:
    """A client for `uri` that gives up within seconds; makes the folder of an SQLite store."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    try:
        from mlflow import MlflowClient
    # Without the library, the repository's own mlflow/ folder imports as an empty namespace.
    except ImportError as error:
        raise FuselipError("MLflow is not installed; `pip install fuselip-rocov2[train]` brings it") from error
    for name in ("alembic", "mlflow.store.db.utils"):  # they tell of every table that a new store gets
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri=uri)


def _way_back(tags: Mapping[str, str]) -> dict[str, str]:
    """The run's description on MLflow's page, which shows tags as plain text but this one as Markdown: with a link."""
    url = tags.get("prefect_flow_url")
    return {"mlflow.note.content": f"Made by [this flow run]({url})."} if url else {}


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """Id of the experiment; made if new. Beside an SQLite store its artifacts lie in ``artifacts/``."""
    from mlflow.exceptions import MlflowException

    if found := client.get_experiment_by_name(name):
        return str(found.experiment_id)
    beside = Path(uri.removeprefix("sqlite:///")).parent / "artifacts" if uri.startswith("sqlite:///") else None
    try:
        location = beside.as_uri() if beside else None
        return str(client.create_experiment(name, artifact_location=location, tags=PAGE_OF_TRAININGS))
    except MlflowException:
        # Another process was faster.
        if found := client.get_experiment_by_name(name):
            return str(found.experiment_id)
        raise


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
    for tag, variable in (("prefect_flow_run", "FUSELIP_FLOW_RUN"), ("prefect_flow_url", "FUSELIP_FLOW_URL")):
        if value := os.environ.get(variable):
            tags[tag] = value
    return {
        "name": f"{name}-{settings.model.size}-{data[:8]}",
        "experiment": f"fuselip-{settings.recipe}",
        "tags": tags,
    }


def data_version(artifacts: Path) -> str:
    """Hash of the prepared data below `artifacts`, or `unknown`."""
    try:
        manifest = json.loads((artifacts / "prepared" / "manifest.json").read_text(encoding="utf-8"))
        return str(manifest["data_version"])
    except (OSError, ValueError, KeyError):
        return "unknown"


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
