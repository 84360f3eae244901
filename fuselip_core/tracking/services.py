"""The clients of MLflow and Weights & Biases."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
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
DIGEST_LETTERS = 36
RESULTS_FILE = "results.json"
COLUMNS = ("metric", "value", "low", "high")


class MlflowService:
    """Sends events to MLflow in batches."""

    name = "mlflow"

    def __init__(self, uri: str | None = None) -> None:
        self.uri = uri or tracking_uri()

    def send(self, run: dict[str, Any], events: list[Event]) -> None:
        client = mlflow_client(self.uri)
        if not self._open(client, run):
            # The run is new in this store, which may be another or an emptied one: send all events, not only new ones.
            run["sent"][self.name] = 0
            events, _ = read_events(Path(run["folder"]) / "events.jsonl", 0)
        self._send_values(client, run["mlflow_run_id"], events)
        for event in events:
            if event["type"] == "artifact":
                self._send_artifact(client, run, event)
            elif event["type"] == "data":
                _send_data(client, run["mlflow_run_id"], event)
            elif event["type"] == "results":
                _send_results(client, run["mlflow_run_id"], event["values"])
        if events[-1]["type"] == "end":
            client.set_terminated(run["mlflow_run_id"], events[-1]["status"], events[-1]["time"])

    def _open(self, client: MlflowClient, run: dict[str, Any]) -> bool:
        """Reopens the run and returns True; if the store does not have it, creates it and returns False."""
        from mlflow.exceptions import MlflowException

        if known := run.get("mlflow_run_id"):
            try:
                found = client.get_run(known).info
                if found.lifecycle_stage == "deleted":
                    experiment_id(client, run["experiment"], self.uri)  # raises if the whole experiment is deleted
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
        # MLflow refuses to change a parameter, so a resumed run with a changed setting keeps the first value.
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
            logger.warning("%s is gone and can't be uploaded to MLflow", path)


def _send_results(client: MlflowClient, run_id: str, values: Mapping[str, float]) -> None:
    """Logs a table in the format of `log_table`, which would append the rows if a run is evaluated twice."""
    client.log_dict(run_id, {"columns": list(COLUMNS), "data": result_rows(values)}, RESULTS_FILE)
    client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([{"path": RESULTS_FILE, "type": "table"}]))


def _send_data(client: MlflowClient, run_id: str, event: Event) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = Dataset(
        event["name"],
        event["digest"][:DIGEST_LETTERS],
        source_type="fuselip",
        source=json.dumps({"kind": event["source"], "data_version": event["digest"]}),
        profile=json.dumps(event["counts"]),
    )
    client.log_inputs(run_id, datasets=[DatasetInput(data, [InputTag("mlflow.data.context", "training")])])


def result_rows(values: Mapping[str, float]) -> list[Any]:
    """Rows of metric, value, and lower and upper bound of its interval, from the numbers of metrics.json."""
    bounds = {f"{name}/{end}" for name in values for end in ("low", "high")}
    return [
        [name, value, values.get(f"{name}/low"), values.get(f"{name}/high")]
        for name, value in sorted(values.items())
        if name not in bounds
    ]


class WandbService:
    """Sends events to wandb, with one session per process. ``WANDB_MODE=offline`` keeps them in one folder per run.

    Each session makes a new folder. If a run continues offline in another process, as in the stage `evaluate`, the new
    folder gets all events from the start and replaces the previous one.
    """

    name = "wandb"

    def __init__(self) -> None:
        self._session: Any = None

    def send(self, run: dict[str, Any], events: list[Event]) -> None:
        if self._session is None:
            self._session = _open_session(run)
            if self._session.settings._offline:
                events, _ = read_events(Path(run["folder"]) / "events.jsonl", 0)
                if before := run.get("wandb_folder"):
                    shutil.rmtree(before, ignore_errors=True)
            run["wandb_folder"] = str(Path(self._session.dir).parent)
        for event in events:
            _send_to_session(self._session, run, event)
        if events[-1]["type"] == "end":
            offline = self._session.settings._offline
            self._session.finish(exit_code=0 if events[-1]["status"] == "FINISHED" else 1)
            self._session = None
            if offline:
                folder = shlex.quote(os.path.relpath(run["wandb_folder"]))
                program = shlex.quote(os.path.relpath(Path(sys.executable).with_name("wandb")))
                logger.info("W&B: the run is in %s; upload it with: %s sync %s", folder, program, folder)


def _open_session(run: dict[str, Any]) -> Any:
    import wandb

    run.setdefault("wandb_run_id", uuid.uuid4().hex[:8])
    kept = ("stage", "recipe", "family", "size")
    session = wandb.init(
        project=os.environ.get("WANDB_PROJECT", run["experiment"]),
        id=run["wandb_run_id"],
        name=run["name"],
        tags=[run["tags"][name] for name in kept if name in run.get("tags", {})],
        config={f"run.{name}": value for name, value in run.get("tags", {}).items() if name not in kept},
        resume="allow",
        dir=run["folder"],
        settings=wandb.Settings(silent=True, console="off"),
    )
    # Plot over the run's own steps; wandb would count calls.
    session.define_metric("step", hidden=True)
    session.define_metric("*", step_metric="step")
    return session


def _send_to_session(session: Any, run: dict[str, Any], event: Event) -> None:
    import wandb

    if event["type"] == "params":
        session.config.update(event["values"], allow_val_change=True)
    elif event["type"] == "metrics":
        session.log({**event["values"], "step": event["step"]})
    elif event["type"] == "results":
        session.summary.update(event["values"])
        session.log({"results": wandb.Table(columns=list(COLUMNS), data=result_rows(event["values"]))})
    elif event["type"] == "data":
        session.config.update({f"data.{event['name']}": event["digest"]}, allow_val_change=True)
    elif event["type"] == "artifact":
        path = Path(run["folder"], event["path"]).resolve()
        page = path / "index.html"
        if page.is_file():
            session.log({event["folder"] or path.name: wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
        elif path.is_file():
            session.save(str(path), base_path=str(path.parent), policy="now")


def _way_back(tags: Mapping[str, str]) -> dict[str, str]:
    """A link to the flow run, as the run's description, the only tag that MLflow's page shows as Markdown."""
    url = tags.get("prefect_flow_url")
    return {"mlflow.note.content": f"Made by [this flow run]({url})."} if url else {}
