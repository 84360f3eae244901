"""The main job: prepare → codebook → tokenize → train → evaluate → register. ``python -m flows.pipeline --help``."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.command_line import run_from_command_line
from flows.run.forms import RunRequest
from flows.tasks import RUNNER, RunnerName, finish, run_stages
from fuselip_core.config import STAGES

ROOT_PIPELINE = RunRequest()


@flow(name="pipeline")
def pipeline(request: RunRequest = ROOT_PIPELINE, runner: RunnerName = RUNNER) -> Any:
    """From raw data to a registered model; a stage whose inputs have not changed is skipped.

    Args:
        request: What to train, on which data.
        runner: Where stages run: in processes on the worker's machine, or in the project's containers there.
    """
    return finish(run_stages(request, STAGES, runner))


if __name__ == "__main__":
    run_from_command_line(pipeline, RunRequest)
