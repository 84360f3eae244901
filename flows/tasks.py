"""Building blocks of all flows: one Prefect task for each stage, their order, and how a run ends."""

from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any, Literal

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas import State
from prefect.exceptions import TerminationSignal
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed

from flows.environment import REPOSITORY
from flows.page.artifacts import publish
from flows.page.flow_run import flow_url, name_flow_run, run_name, sign
from flows.page.progress import ProgressArtifact
from flows.run.container import ContainerRunner
from flows.run.estimate import preview
from flows.run.folder import Run, plan
from flows.run.forms import Request, RunRequest, StageRequest
from flows.run.gpu import gpu_slot
from flows.run.lock import run_lock
from flows.run.runner import Ending, OnLine, Outcome, ProcessRunner, Runner
from flows.run.sample_data import ensure_sample
from flows.run.store import KeptRunner, fetch_run
from fuselip_core.errors import WARNING, FuselipError, sentence_of
from fuselip_core.files import find_json
from fuselip_core.preflight import check_prepared, check_run

RunnerName = Literal["process", "docker"]
# What the form shows and what an empty field means: the workers of docker/compose.yaml say `docker`.
RUNNER: RunnerName = "docker" if os.environ.get("FUSELIP_RUNNER") == "docker" else "process"
# Only what another try can mend is tried again: a stage that was asked to stop and saved its state, as on a machine
# that is taken away; a download whose host does not answer. The waits are in seconds.
INTERRUPTED = "Interrupted"
RETRY_AFTER: list[float] = [10, 60, 300]


def run_stages(
    request: Request,
    stages: Sequence[str],
    runner_name: RunnerName,
    base: Run | None = None,
    wrap: Callable[[Runner], Runner] | None = None,
) -> Ending:
    """Runs `stages` in order until one fails; called from within a flow. Another flow on the same run waits.

    A new run starts from the results of `base`; `wrap` may put something around the runner.
    """
    sign()
    # Until the run is known, and for good if the request is wrong.
    name_flow_run(str(flow_run.get_flow_name()), _asked_for(request))
    owner = f"flow run {flow_run.get_name()} (process {os.getpid()})"
    try:
        run = plan(REPOSITORY, request, base).run
        if isinstance(request, RunRequest) and request.dry_run:
            name_flow_run("dry-run", run_name(run, with_data=False))
            create_markdown_artifact(key="dry-run", markdown=preview(run), description=f"What {run.name} would be")
            return Ending(run, (), dry=True)
        check_run(run.settings, stages, REPOSITORY)
        with run_lock(REPOSITORY, run.folder, owner, get_run_logger().info):
            fetch_run(run, get_run_logger().info)
            # Planned again: the flow that held the lock may have changed the run.
            runner = make_runner(runner_name)
            return _run_stages(plan(REPOSITORY, request, base).write(), stages, wrap(runner) if wrap else runner)
    except (FuselipError, OSError) as wrong:
        return Ending(None, (), sentence_of(wrong))


def _asked_for(request: Request) -> str | None:
    """The request in a word, for the name of a flow run."""
    if isinstance(request, StageRequest):
        return request.run
    assert isinstance(request, RunRequest)
    return request.name or request.recipe or request.source


def _run_stages(run: Run, stages: Sequence[str], runner: Runner) -> Ending:
    outcomes: list[Outcome] = []
    name_flow_run(run_name(run, with_data="prepare" not in stages))
    if "prepare" in stages and (error := error_of(data_task(run, return_state=True))):
        return Ending(run, (), error)
    for stage in stages:
        force = stage == "register" and _lost_from_registry(run)
        state: Any = stage_task.with_options(name=stage, task_run_name=stage)(
            stage, run, runner, force, return_state=True
        )
        if error := error_of(state):
            return Ending(run, tuple(outcomes), error)
        outcomes.append(state.result())
        if stage == "prepare":
            name_flow_run(run_name(run, with_data=True))
            check_prepared(run.settings, stages, REPOSITORY)
    return Ending(run, tuple(outcomes))


def finish(ending: Ending) -> State[Any]:
    """The flow's last state: failed with the stage's sentence, or completed with the Ending and its artifacts made."""
    if ending.error:
        return Failed(message=ending.error)
    if ending.dry:
        return Completed(message="dry run: the settings are among the artifacts; nothing was run", data=ending)
    if ending.run:
        publish(ending.run)
    return Completed(message=", ".join(f"{each.stage} {each.status}" for each in ending.outcomes), data=ending)


def make_runner(name: RunnerName) -> Runner:
    """The runner of that name."""
    kind = {"process": ProcessRunner, "docker": ContainerRunner}[name]
    runner = kind(flow_run=flow_run.get_id(), flow_url=flow_url(), slot=gpu_slot)
    store = os.environ.get("FUSELIP_STORE")
    return KeptRunner(runner, store) if store else runner


def may_pass(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Whether a failed task is worth another try."""
    return state.name == INTERRUPTED


def stoppable(work: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a task that is asked to stop end as cancelled; without this, Prefect would report a crash in red."""

    @functools.wraps(work)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            return work(*arguments, **options)
        except (TerminationSignal, KeyboardInterrupt) as stop:
            return Cancelled(message="stopped", data=stop)

    return run


def error_of(state: Any) -> str | None:
    """What a failed task says; None for one that went well. Where a task was stopped, the flow ends with it."""
    if state.is_cancelled():
        stop = state.result(raise_on_failure=False)
        raise stop if isinstance(stop, BaseException) else TerminationSignal(signal.SIGTERM)
    return None if state.is_completed() else state.message or state.name


@task(name="data", task_run_name="data", cache_policy=NO_CACHE)
@stoppable
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
@stoppable
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
    """Passes a stage's lines to the task's log; by the logger's name a console can tell them from Prefect's own."""
    adapter: Any = get_run_logger()
    lines = type(adapter)(adapter.logger.getChild("stage"), extra=adapter.extra)

    def pass_on(line: str) -> None:
        level = logging.WARNING if line.startswith(WARNING) else logging.INFO
        lines.log(level, "%s", line.removeprefix(WARNING))

    return pass_on


def _lost_from_registry(run: Run) -> bool:
    """Whether an earlier registration is gone, as after the store in mlflow/ was removed: DVC can't see that."""
    registered = find_json(run.artifacts / "registered.json")
    if not registered:
        return False
    from fuselip_core.registry.register import is_registered

    return not is_registered(registered)
