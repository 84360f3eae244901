"""Puts the measured encoder of a run into MLflow's registry. ``python -m flows.register --help``."""

from __future__ import annotations

from typing import Any

from prefect import flow
from pydantic import Field

from flows.command_line import run_from_command_line
from flows.run.folder import StageRequest
from flows.run.forms import RegisterCorrections
from flows.tasks import RunnerName, finish, run_stages


class RegisterRequest(StageRequest):
    """Which run is registered, and how."""

    register_: RegisterCorrections = Field(RegisterCorrections(), alias="register")


LAST_RUN = RegisterRequest()


@flow(name="register")
def register(request: RegisterRequest = LAST_RUN, runner: RunnerName = "process") -> Any:
    """Makes a version of a trained and measured encoder; the alias moves if every gate passes.

    Args:
        request: Which run, and what is to be different from its settings.
        runner: Where the stage runs: in a process on the worker's machine, or in the project's container there.
    """
    return finish(run_stages(request, ("register",), runner))


if __name__ == "__main__":
    run_from_command_line(register, RegisterRequest)
