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
from fuselip_core.tracking.store import experiment_id, mlflow_client, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("fuselip")

METRICS_A_BATCH = 1000  # MLflow's limits for one call
PARAMS_A_BATCH = 100


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
                self._send_artifact(client, run, event)
        if events[-1]["type"] == "end":
            client.set_terminated(run["mlflow_run_id"], events[-1]["status"], events[-1]["time"])

    def _open(self, client: MlflowClient, run: dict[str, Any]) -> bool:
        """Whether the run was there already, with all that was sent so far; makes it if not."""
        from mlflow.exceptions import MlflowException

        if known := run.get("mlflow_run_id"):
            try:
                found = client.get_run(known).info
                if found.lifecycle_stage == "deleted":
                    experiment_id(client, run["experiment"], self.uri)  # raises where the whole experiment is deleted
                    raise FuselipError(
                        f"the MLflow run {known} is deleted; restore it with `MLFLOW_TRACKING_URI={self.uri} "
                        f".venv/bin/mlflow runs restore --run-id {known}` and run `fuselip sync`"
                    )
                client.update_run(known, status="RUNNING")
                run.update(mlflow_uri=self.uri, mlflow_experiment_id=found.experiment_id)
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

    def _send_artifact(self, client: MlflowClient, run: dict[str, Any], event: Event) -> None:
        path, run_id = Path(run["folder"], event["path"]), run["mlflow_run_id"]
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


def _way_back(tags: Mapping[str, str]) -> dict[str, str]:
    """The run's description on MLflow's page, which shows tags as plain text but this one as Markdown: with a link."""
    url = tags.get("prefect_flow_url")
    return {"mlflow.note.content": f"Made by [this flow run]({url})."} if url else {}
