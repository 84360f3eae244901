"""Measures the encoder of a run that was trained before. ``python -m flows.evaluate --help``."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.command_line import run_from_command_line
from flows.run.folder import StageRequest
from flows.run.forms import EvaluateCorrections
from flows.tasks import RunnerName, finish, run_stages


class EvaluateRequest(StageRequest):
    """Which run is measured, and how."""

    evaluate: EvaluateCorrections = EvaluateCorrections()


LAST_RUN = EvaluateRequest()


@flow(name="evaluate")
def evaluate(request: EvaluateRequest = LAST_RUN, runner: RunnerName = "process") -> Any:
    """Measures a trained encoder beside chance and controls.

    Args:
        request: Which run, and what is to be different from its settings.
        runner: Where the stage runs: in a process on the worker's machine, or in the project's container there.
    """
    return finish(run_stages(request, ("evaluate",), runner))


if __name__ == "__main__":
    run_from_command_line(evaluate, EvaluateRequest)
