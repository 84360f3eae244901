"""What all flows are made of: one Prefect task a stage, run one after the other, and how they end."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from flows.environment import REPOSITORY
from flows.page.artifacts import publish
from flows.page.flow_run import flow_url, name_flow_run, sign
from flows.page.progress import ProgressArtifact
from flows.run.container import ContainerRunner
from flows.run.folder import Plan, Run
from flows.run.gpu import gpu_slot
from flows.run.lock import run_lock
from flows.run.runner import Ending, OnLine, Outcome, ProcessRunner, Runner
from flows.run.sample_data import ensure_sample
from fuselip_core.errors import FuselipError, sentence_of

RunnerName = Literal["process", "docker"]
# Only what another try can mend is tried again: a stage that was asked to stop and saved its state, as on a machine
# that is taken away; a download whose host does not answer. The waits are in seconds.
INTERRUPTED = "Interrupted"
RETRY_AFTER: list[float] = [10, 60, 300]


class Request(Protocol):
    """What a flow is asked for; see flows/run/folder.py."""

    def plan(self, repository: Path) -> Plan:
        """The run that is meant, checked and not written yet."""


def run_stages(request: Request, stages: Sequence[str], runner_name: RunnerName) -> Ending:
    """Runs `stages` in order until one fails; called from within a flow. Another flow on the same run waits."""
    sign()
    owner = f"flow run {flow_run.get_name()} (process {os.getpid()})"
    try:
        folder = request.plan(REPOSITORY).run.folder
        with run_lock(REPOSITORY, folder, owner, get_run_logger().info):
            # Planned again: the flow that held the lock may have changed the run.
            return _run_stages(request.plan(REPOSITORY).write(), stages, make_runner(runner_name))
    except (FuselipError, OSError) as wrong:
        return Ending(None, (), sentence_of(wrong))


def _run_stages(run: Run, stages: Sequence[str], runner: Runner) -> Ending:
    outcomes: list[Outcome] = []
    name_flow_run(run, with_data="prepare" not in stages)
    if "prepare" in stages and (error := error_of(data_task(run, return_state=True))):
        return Ending(run, (), error)
    for stage in stages:
        force = stage == "register" and _lost_from_registry(run)
        state = stage_task.with_options(name=stage, task_run_name=stage)(stage, run, runner, force, return_state=True)
        if error := error_of(state):
            return Ending(run, tuple(outcomes), error)
        outcomes.append(state.result())
        if stage == "prepare":
            name_flow_run(run, with_data=True)
    return Ending(run, tuple(outcomes))


def finish(ending: Ending) -> State[Any]:
    """The flow's last state: failed with the stage's sentence, or completed with the Ending and its artifacts made."""
    if ending.error:
        return Failed(message=ending.error)
    if ending.run:
        publish(ending.run)
    return Completed(message=", ".join(f"{each.stage} {each.status}" for each in ending.outcomes), data=ending)


def make_runner(name: RunnerName) -> Runner:
    """The runner of that name."""
    kind = {"process": ProcessRunner, "docker": ContainerRunner}[name]
    return kind(flow_run=flow_run.get_id(), flow_url=flow_url(), slot=gpu_slot)


def may_pass(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Whether a failed task is worth another try."""
    return state.name == INTERRUPTED


@task(name="data", task_run_name="data", cache_policy=NO_CACHE)
def data_task(run: Run) -> Any:
    """Draws the sample where it is missing and compares it with data.dvc; other data must be there already."""
    prepare = run.settings.prepare
    if prepare.source != "phantom" or run.repository / prepare.root != run.repository / "data":
        return Completed(message=f"{prepare.source} in {prepare.root}")
    try:
        drawn = ensure_sample(run.repository, task_log())
    except (FuselipError, OSError) as error:
        return Failed(message=f"data: {sentence_of(error)}")
    return Completed(message="drawn" if drawn else "unchanged")


@task(cache_policy=NO_CACHE, retries=len(RETRY_AFTER), retry_delay_seconds=RETRY_AFTER, retry_condition_fn=may_pass)
def stage_task(stage: str, run: Run, runner: Runner, force: bool = False) -> Any:
    """One DVC stage; completes with its Outcome, or fails with its error sentence."""
    progress = ProgressArtifact(stage, task_log())
    outcome = runner.run(stage, run, progress, force)
    if outcome.status in ("failed", "interrupted"):
        name = INTERRUPTED if outcome.status == "interrupted" else None
        return Failed(name=name, message=f"{stage}: {outcome.message}")
    progress.close()
    return Completed(message=f"{outcome.status} in {outcome.seconds:.0f} s", data=outcome)


def task_log() -> OnLine:
    """Passes lines to the task's log; `shown` tells flows/command_line.py that a terminal has them already."""
    logger = get_run_logger()
    return lambda line: logger.info("%s", line, extra={"shown": True})


def error_of(state: State[Any]) -> str | None:
    """What a failed task says; None for one that went well."""
    return None if state.is_completed() else state.message or state.name


def _lost_from_registry(run: Run) -> bool:
    """Whether an earlier registration is gone, as after the store in mlflow/ was removed: DVC can't see that."""
    try:
        registered = json.loads((run.artifacts / "registered.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    from fuselip_core.registry.register import is_registered

    return not is_registered(registered)
