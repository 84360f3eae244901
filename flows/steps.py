"""What all flows are made of: one Prefect task a stage, run one after the other, and how they end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.container import ContainerRunner
from flows.environment import REPOSITORY
from flows.runner import OnLine, Outcome, ProcessRunner, Runner
from flows.runs import Run, RunRequest, open_run_folder
from flows.sample_data import ensure_sample
from fuselip_core.errors import FuselipError

RunnerName = Literal["process", "docker"]


@dataclass(frozen=True)
class Ending:
    """How a flow went: what each stage did and, if it failed, why."""

    run: Run | None
    outcomes: tuple[Outcome, ...]
    error: str | None = None


def run_stages(request: RunRequest, stages: Sequence[str], runner_name: RunnerName) -> Ending:
    """Runs `stages` in order until one fails; called from within a flow."""
    outcomes: list[Outcome] = []
    try:
        run = open_run_folder(REPOSITORY, request)
    except FuselipError as wrong:
        return Ending(None, (), str(wrong))
    if error := _error_of(data_task(run, return_state=True)):
        return Ending(run, (), error)
    runner = make_runner(runner_name)
    for stage in stages:
        force = stage == "register" and _lost_from_registry(run)
        state = stage_task.with_options(name=stage, task_run_name=stage)(stage, run, runner, force, return_state=True)
        if error := _error_of(state):
            return Ending(run, tuple(outcomes), error)
        outcomes.append(state.result())
    return Ending(run, tuple(outcomes))


def finish(ending: Ending) -> State[Any]:
    """The flow's last state: failed with the stage's sentence, or completed with the Ending."""
    if ending.error:
        return Failed(message=ending.error)
    return Completed(message=", ".join(f"{each.stage} {each.status}" for each in ending.outcomes), data=ending)


def make_runner(name: RunnerName) -> Runner:
    """The runner of that name."""
    return {"process": ProcessRunner, "docker": ContainerRunner}[name](flow_run=flow_run.get_id())


@task(name="data", task_run_name="data", cache_policy=NO_CACHE)
def data_task(run: Run) -> Any:
    """Draws the sample where it is missing and compares it with data.dvc; other data must be there already."""
    prepare = run.settings.prepare
    if prepare.source != "phantom" or run.repository / prepare.root != run.repository / "data":
        return Completed(message=f"{prepare.source} in {prepare.root}")
    try:
        drawn = ensure_sample(run.repository, _task_log())
    except FuselipError as error:
        return Failed(message=f"data: {error}")
    return Completed(message="drawn" if drawn else "unchanged")


@task(cache_policy=NO_CACHE)
def stage_task(stage: str, run: Run, runner: Runner, force: bool = False) -> Any:
    """One DVC stage; completes with its Outcome, or fails with its error sentence."""
    outcome = runner.run(stage, run, _task_log(), force)
    if outcome.status in ("failed", "interrupted"):
        return Failed(message=f"{stage}: {outcome.message}")
    return Completed(message=f"{outcome.status} in {outcome.seconds:.0f} s", data=outcome)


def _task_log() -> OnLine:
    """Passes lines to the task's log; `shown` tells flows/console.py that a terminal has them already."""
    logger = get_run_logger()
    return lambda line: logger.info("%s", line, extra={"shown": True})


def _error_of(state: State[Any]) -> str | None:
    return None if state.is_completed() else state.message or state.name


def _lost_from_registry(run: Run) -> bool:
    """Whether an earlier registration is gone, as after the store in mlflow/ was removed: DVC can't see that."""
    try:
        registered = json.loads((run.artifacts / "registered.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    from fuselip_core.registry import is_registered

    return not is_registered(registered)
