"""Puts flow runs whose process is gone back in the queue: ``python -m flows.server.recover [--every 30]``.

A worker is killed, a machine restarts, the kernel ends a process for want of memory: Prefect's server still calls such
a run running, or crashed, and leaves it there. This schedules the same run again with its parameters; DVC skips the
finished stages, and a stage resumes from its checkpoint.

No run is done twice. A run is only touched if the process that signed it (flows/page/flow_run.py) is gone, which its
own machine knows for certain; only one of these commands works at a time; and what the old process left behind holds
DVC's lock (flows/run/lock.py) until it has ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import psutil
import typer
from filelock import FileLock
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId, FlowRunFilterState
from prefect.client.schemas.filters import FlowRunFilterStateType as StateTypes
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import AwaitingRetry, Cancelled, Crashed
from prefect.types._datetime import now

from flows.environment import DEFAULTS
from flows.run.child import OnLine
from flows.run.processes import LABEL, Process, processes_of
from fuselip_core.errors import run_to_exit, sentence_of

RECOVERIES = "fuselip.recoveries"
POOL = "process"
# After this many starts a run is given up: it crashes by itself.
MOST_STARTS = 5
# A worker starts the process of a run within seconds, unless it is killed in between.
PENDING_SECONDS = 180.0
# A live worker reports the end of a process itself, twice and with a delay; it goes first.
SETTLE_SECONDS = 20.0
FIRST_DELAY_SECONDS = 5.0
STOP_SECONDS = 90.0
STATES = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING, StateType.CRASHED]


def recover(on_line: OnLine, gone: Collection[str] = (), settle_seconds: float = SETTLE_SECONDS) -> list[FlowRun]:
    """Reschedules and returns runs whose process has ended; `gone` lists machines that will not come back."""
    recovered = []
    home = Path(os.environ.get("PREFECT_HOME", DEFAULTS["PREFECT_HOME"]))
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "recover.lock"), get_client(sync_client=True) as client:
        suspects = {run.id: run.state_id for run in _unfinished(client) if _loss(run, gone, lambda line: None)}
        if suspects:
            time.sleep(settle_seconds)
        for run in _unfinished(client):
            if run.state and run.state.is_cancelling():
                _finish_cancelling(client, run, on_line)
            elif (reason := _loss(run, gone, on_line)) and suspects.get(run.id) == run.state_id:
                _schedule(client, run, reason)
                on_line(f"{run.name}: {reason}; it resumes from its last checkpoint")
                recovered.append(run)
    return recovered


def _unfinished(client: SyncPrefectClient) -> list[FlowRun]:
    """Runs of deployments that are under way or crashed."""
    states = FlowRunFilterState(type=StateTypes(any_=STATES))
    wanted = FlowRunFilter(state=states, deployment_id=FlowRunFilterDeploymentId(is_null_=False))
    return client.read_flow_runs(flow_run_filter=wanted, limit=200)


def _loss(run: FlowRun, gone: Collection[str], on_line: OnLine) -> str | None:
    """Why `run` will not end by itself; None if it may, or if only another machine can tell."""
    assert run.state is not None
    if max(run.run_count, _recoveries(run)) >= MOST_STARTS:
        return None
    if run.state.is_pending():
        age = (now("UTC") - run.state.timestamp).total_seconds()
        lost = age > PENDING_SECONDS and not processes_of(run.id)
        return "its worker took it and never started it" if lost else None
    process = _process_of(run)
    if process is None:
        # Killed while its process was starting. What a worker of another kind starts, only that can judge.
        ours = run.state.is_crashed() and run.work_pool_name == POOL
        return "it crashed before it began" if ours else None
    if not (process.is_here or process.host in gone):
        on_line(f"{run.name} is of {process.host}; if that machine will not come back, add --gone {process.host}")
        return None
    if process.is_here and process.lives:
        return None
    return f"its process {process.pid} on {process.host} is gone"


def _finish_cancelling(client: SyncPrefectClient, run: FlowRun, on_line: OnLine) -> None:
    """Ends a cancelling run whose worker has ended; nothing else would."""
    process = _process_of(run)
    if process is None or not process.is_here or not process.lives or not _is_orphan(process):
        # Its worker does it, or, where that is gone too, the server's own clock.
        return
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
    gone: Annotated[list[str] | None, typer.Option(metavar="HOST", help="Machine that will not come back.")] = None,
) -> None:
    """Put flow runs whose process is gone back in the queue."""
    while True:
        try:
            recover(_say, gone or ())
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
