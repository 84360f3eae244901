"""The main job: prepare → codebook → tokenize → train → evaluate → register. ``python -m flows.pipeline --help``."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.console import run_from_command_line
from flows.runs import STAGES, RunRequest
from flows.steps import RunnerName, finish, run_stages
from flows.summary import publish

WHOLE_RUN = RunRequest()


@flow(name="pipeline")
def pipeline(request: RunRequest = WHOLE_RUN, runner: RunnerName = "process") -> Any:
    """From raw data to a registered model; a stage whose inputs have not changed is not run again."""
    ending = run_stages(request, STAGES, runner)
    if ending.run and not ending.error:
        publish(ending.run)
    return finish(ending)


if __name__ == "__main__":
    run_from_command_line(pipeline)
