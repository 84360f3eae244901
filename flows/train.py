"""From raw data to a trained encoder, neither measured nor registered yet. ``python -m flows.train --help``."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.command_line import run_from_command_line
from flows.run.folder import RunRequest
from flows.tasks import RunnerName, finish, run_stages

STAGES = ("prepare", "codebook", "tokenize", "train")
WHOLE_RUN = RunRequest()


@flow(name="train")
def train(request: RunRequest = WHOLE_RUN, runner: RunnerName = "process") -> Any:
    """Trains an encoder; the flows evaluate and register go on with the run of the same name.

    Args:
        request: What is trained, on what. Everything empty is the pipeline of params.yaml.
        runner: Where stages run: in a process on the worker's machine, or in the project's containers there.
    """
    return finish(run_stages(request, STAGES, runner))


if __name__ == "__main__":
    run_from_command_line(train, RunRequest)
