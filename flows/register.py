"""Puts the measured encoder of a run into MLflow's registry. ``python -m flows.register --help``."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.command_line import run_from_command_line
from flows.run.forms import StageRequest
from flows.tasks import RUNNER, RunnerName, finish, run_stages

ROOT_PIPELINE = StageRequest()


@flow(name="register")
def register(request: StageRequest = ROOT_PIPELINE, runner: RunnerName = RUNNER) -> Any:
    """Registers a trained and measured encoder as a new version; the alias moves if every gate passes.

    Args:
        request: Which run to register.
        runner: Where the stage runs: in a process on the worker's machine, or in the project's container there.
    """
    return finish(run_stages(request, ("register",), runner))


if __name__ == "__main__":
    run_from_command_line(register, StageRequest)
