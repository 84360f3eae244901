"""The clients of MLflow and Weights & Biases."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselip_core.errors import FuselipError
from fuselip_core.tracking.events import Event, read_events

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("fuselip")

METRICS_A_BATCH = 1000  # MLflow's limits for one call
PARAMS_A_BATCH = 100
# Without it MLflow's page guesses from the runs, and shows what is there for language models and their judges.
PAGE_OF_TRAININGS = {"mlflow.experimentKind": "custom_model_development"}


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
