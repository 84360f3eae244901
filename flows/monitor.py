"""Compares what a model sees with its training data, on a schedule or by a button; by hand, `fuselip monitor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows.environment import REPOSITORY
from flows.page.flow_run import name_flow_run, sign
from flows.run.folder import plan
from flows.run.forms import StageRequest
from flows.search import fuselip_task
from flows.tasks import error_of
from fuselip_core.errors import FuselipError
from fuselip_core.files import read_json

DRIFT = "fuselip.drift"  # the event that prefect.yaml's deployment `readapt` waits for


class MonitorRequest(StageRequest):
    """A run, and what its model has seen since."""

    seen: Path = Field(
        Path("artifacts/prepared"),
        description="Archive (pictures, DICOM, table), or what `fuselip serve` writes with --observe.",
    )


OF_ROOT = MonitorRequest()


@flow(name="monitor")
def monitor(request: MonitorRequest = OF_ROOT) -> Any:
    """Compares what a model sees with its training data, and sends an event where they differ too much.

    Args:
        request: The run, and what its model has seen since.
    """
    sign()
    name_flow_run("monitor", request.run)
    try:
        run = plan(REPOSITORY, request).write()
        words = ["monitor", str(request.seen), "--settings", str((run.folder / "params.yaml").relative_to(REPOSITORY))]
        state: Any = fuselip_task("monitor", words, "process", return_state=True)
        if error := error_of(state):
            return Failed(message=error)
        result = read_json(run.artifacts / "monitoring" / "findings.json")
    except FuselipError as error:
        return Failed(message=str(error))
    rows = [
        f"| {each['title']} | {each['value']:.3f} | {each['at_most']:g} | {'**yes**' if each['alarm'] else 'no'} |"
        for each in result["findings"]
    ]
    table = "\n".join(["| Comparison | Value | At most | Alarm |", "| --- | --- | --- | --- |", *rows])
    create_markdown_artifact(key="monitoring", markdown=table, description=f"What {run.name} sees: {result['source']}")
    if result["alarms"]:
        emit_event(
            DRIFT,
            resource={"prefect.resource.id": f"fuselip.run.{run.name}", "prefect.resource.name": run.name},
            related=[
                {"prefect.resource.id": f"prefect.flow-run.{flow_run.get_id()}", "prefect.resource.role": "flow-run"}
            ],
            payload={"alarms": result["alarms"], "source": result["source"]},
        )
    return Completed(message=state.message)


if __name__ == "__main__":
    from flows.command_line import run_from_command_line

    run_from_command_line(monitor, MonitorRequest)
