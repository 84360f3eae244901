"""The main job: prepare → codebook → tokenize → train → evaluate → register. ``python -m flows.pipeline --help``."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.command_line import run_from_command_line
from flows.run.folder import STAGES, RunRequest
from flows.tasks import RunnerName, finish, run_stages

WHOLE_RUN = RunRequest()


@flow(name="pipeline")
def pipeline(request: RunRequest = WHOLE_RUN, runner: RunnerName = "process") -> Any:
    """From raw data to a registered model; a stage whose inputs have not changed is not run again.

    Args:
        request: What is trained, on what. Everything empty is the pipeline of params.yaml.
        runner: Where stages run: in a process on the worker's machine, or in the project's containers there.
    """
    return finish(run_stages(request, STAGES, runner))


if __name__ == "__main__":
    run_from_command_line(pipeline, RunRequest)
