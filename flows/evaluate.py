"""Measures the encoder of an earlier run. ``python -m flows.evaluate --help``."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.command_line import run_from_command_line
from flows.run.forms import Split, StageRequest, empty
from flows.tasks import RUNNER, RunnerName, finish, run_stages
from fuselip_core.config import merge


class EvaluateRequest(StageRequest):
    """Which run to measure, and on which split."""

    split: Split | None = empty("Split to evaluate on. Empty: the run's.")

    def corrections(self) -> dict[str, Any]:
        """Settings that the request changes, by section."""
        return merge({"evaluate": {"split": self.split}} if self.split else {}, super().corrections())


ROOT_PIPELINE = EvaluateRequest()


@flow(name="evaluate")
def evaluate(request: EvaluateRequest = ROOT_PIPELINE, runner: RunnerName = RUNNER) -> Any:
    """Measures a trained encoder beside chance and controls.

    Args:
        request: Which run to measure, and on which split.
        runner: Where the stage runs: in a process on the worker's machine, or in the project's container there.
    """
    return finish(run_stages(request, ("evaluate",), runner))


if __name__ == "__main__":
    run_from_command_line(evaluate, EvaluateRequest)
