"""Puts flow runs whose process is gone back in the queue: ``python -m flows.server.recover [--every 30]``.

A worker is killed, a machine restarts, the kernel ends a process for want of memory: Prefect's server still calls such
a run running, or crashed, and leaves it there. This schedules the same run again with its parameters; DVC skips the
finished stages, and a stage resumes from its checkpoint.

No run is done twice. A run is only touched if the process that signed it (flows/page/flow_run.py) is gone. Its own
machine knows that for certain. A process of another machine, container or pod is gone once it has missed several of the
signs of life that Prefect's engine sends, whatever its host was called; the same holds for one that has not signed. One
that was only cut off holds DVC's lock in its checkout (flows/run/lock.py) until it has ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer
from filelock import FileLock
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId, FlowRunFilterState
from prefect.client.schemas.filters import FlowRunFilterStateType as StateTypes
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY
from prefect.states import AwaitingRetry, Cancelled, Crashed
from prefect.types._datetime import now

from flows.environment import DEFAULTS
from flows.run.child import OnLine
from flows.run.processes import HEARTBEAT, LABEL, Process, processes_of
from fuselip_core.errors import FuselipError, run_to_exit, sentence_of

RECOVERIES = "fuselip.recoveries"
POOL = "process"
# After this many starts a run is given up: it crashes by itself.
MOST_STARTS = 5
# A worker starts the process of a run within seconds, unless it is killed in between; a pod may fetch its image first.
PENDING_SECONDS = 180.0
PENDING_ELSEWHERE_SECONDS = 3600.0
# Signs of life that a process elsewhere must have missed.
MISSED = 4
# A live worker reports the end of a process itself, twice and with a delay; it goes first.
SETTLE_SECONDS = 20.0
FIRST_DELAY_SECONDS = 5.0
STOP_SECONDS = 90.0
STATES = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING, StateType.CRASHED]


def recover(on_line: OnLine, settle_seconds: float = SETTLE_SECONDS) -> list[FlowRun]:
    """Reschedules and returns runs whose process has ended."""
    recovered = []
    home = Path(os.environ.get("PREFECT_HOME", DEFAULTS["PREFECT_HOME"]))
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "recover.lock"), get_client(sync_client=True) as client:
        suspects = {run.id: run for run in _unfinished(client) if _loss(client, run)}
        if suspects:
            # A server that was away has heard nobody: those who live are heard again meanwhile.
            beats = [_heartbeat(client, run) for run in suspects.values() if not _is_here(run)]
            time.sleep(max([settle_seconds, *(1.5 * beat for beat in beats)]))
        for before in suspects.values():
            run = client.read_flow_run(before.id)
            if run.state_id != before.state_id or not (reason := _loss(client, run)):
                continue
            if run.state and run.state.is_cancelling():
                _finish_cancelling(client, run, on_line)
                continue
            _schedule(client, run, reason)
            on_line(f"{run.name}: {reason}; it resumes from its last checkpoint")
            recovered.append(run)
    return recovered


def _unfinished(client: SyncPrefectClient) -> list[FlowRun]:
    """Runs of deployments that are under way or crashed."""
    states = FlowRunFilterState(type=StateTypes(any_=STATES))
    wanted = FlowRunFilter(state=states, deployment_id=FlowRunFilterDeploymentId(is_null_=False))
    return client.read_flow_runs(flow_run_filter=wanted, limit=200)


def _loss(client: SyncPrefectClient, run: FlowRun) -> str | None:
    """Why `run` will not end by itself; None if it may."""
    assert run.state is not None
    age = (now("UTC") - run.state.timestamp).total_seconds()
    process = _process_of(run)
    if run.state.is_cancelling():
        if process and process.is_here and process.lives:
            return "its worker is gone" if _is_orphan(process) else None
    elif _recoveries(run) + 1 >= MOST_STARTS:  # Prefect's own count grows with every wait for a GPU
        return None
    if run.state.is_pending():
        lost = age > (PENDING_SECONDS if run.work_pool_name == POOL else PENDING_ELSEWHERE_SECONDS)
        return "its worker took it and never started it" if lost and not processes_of(run.id) else None
    if process is None and run.state.is_crashed():
        # Killed while its process was starting. What a worker of another kind starts, only that can judge.
        return "it crashed before it began" if run.work_pool_name == POOL else None
    if process and process.is_here:
        return None if process.lives else f"its process {process.pid} on {process.host} is gone"
    silence = MISSED * _heartbeat(client, run)
    if not silence or age < silence or _heard(client, run, silence):
        return None
    return f"nothing was heard of it for {silence:.0f} s; it ran on {process.host if process else 'another machine'}"


def _heard(client: SyncPrefectClient, run: FlowRun, seconds: float) -> bool:
    """Whether the run's process has sent a sign of life within that time."""
    wanted = EventFilter(
        event=EventNameFilter(name=["prefect.flow-run.heartbeat"]),
        resource=EventResourceFilter(id=[f"prefect.flow-run.{run.id}"]),
        occurred=EventOccurredFilter(since=now("UTC") - timedelta(seconds=seconds)),
    )
    return bool(client.read_events(wanted, limit=1).events)


def _finish_cancelling(client: SyncPrefectClient, run: FlowRun, on_line: OnLine) -> None:
    """Ends a cancelling run whose worker or process has ended; nothing else would."""
    process = _process_of(run)
    if process and process.is_here and process.lives:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while process.lives and time.monotonic() < deadline:
            time.sleep(0.5)
    client.set_flow_run_state(run.id, Cancelled(message="cancelled; its worker had gone before"), force=True)
    on_line(f"{run.name}: cancelled")


def _schedule(client: SyncPrefectClient, run: FlowRun, reason: str) -> None:
    assert run.state is not None
    if not run.state.is_crashed():
        client.set_flow_run_state(run.id, Crashed(message=reason), force=True)
    # The next process has not recorded itself yet; it must not be taken for the old one.
    client.update_flow_run_labels(run.id, {LABEL: "", RECOVERIES: str(_recoveries(run) + 1)})
    delay = min(FIRST_DELAY_SECONDS * 2 ** _recoveries(run), 300.0)
    when = now("UTC") + timedelta(seconds=delay)
    client.set_flow_run_state(run.id, AwaitingRetry(scheduled_time=when, message=reason))


def _process_of(run: FlowRun) -> Process | None:
    return Process.read(str(run.labels.get(LABEL, "")))


def _is_here(run: FlowRun) -> bool:
    process = _process_of(run)
    return process is not None and process.is_here


def _heartbeat(client: SyncPrefectClient, run: FlowRun) -> float:
    """Seconds between the signs of life of the run's process; 0 if it sends none."""
    told = run.labels.get(HEARTBEAT)
    if told is None and run.deployment_id:  # the process ended before it signed; prefect.yaml says what it would send
        variables = client.read_deployment(run.deployment_id).job_variables.get("env", {})
        told = variables.get(PREFECT_FLOWS_HEARTBEAT_FREQUENCY.name)
    return float(str(told or 0))


def _recoveries(run: FlowRun) -> int:
    return int(str(run.labels.get(RECOVERIES) or 0))


def _is_orphan(process: Process) -> bool:
    """Whether the worker that started the process is gone, so that another process has adopted it."""
    try:
        parent = psutil.Process(process.pid).parent()
        return parent is None or "worker" not in parent.cmdline()
    except psutil.Error:
        return True


def main(
    every: Annotated[float | None, typer.Option(metavar="SECONDS", help="Repeat until ended, with this pause.")] = None,
) -> None:
    """Put flow runs whose process is gone back in the queue."""
    while True:
        try:
            recover(_say)
        except httpx.TransportError as error:
            silent = FuselipError(
                f"no Prefect server answers at {PREFECT_API_URL.value()}; start it, or set PREFECT_API_URL"
            )
            if not every:
                raise silent from error
            _say(f"error: {silent}")
        except Exception as error:
            # A server that restarts or cannot be reached must not end the watch.
            if not every:
                raise
            _say(f"error: {sentence_of(error)}")
        if not every:
            return
        time.sleep(every)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    run_to_exit(lambda: typer.run(main))
