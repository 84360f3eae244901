"""Runs a stage in a process of this machine (in a container: container.py)."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from flows.run.child import OnLine, stream
from flows.run.dvc_stage import UNCHANGED, dvc_repo, settings_of
from flows.run.folder import Run
from flows.run.lock import dvc_lock
from fuselip_core.errors import Interrupted

Status = Literal["done", "unchanged", "interrupted", "failed"]
# What a stage waits for before it starts, such as a GPU; given the stage's name and where to say so.
Slot = Callable[[str, OnLine], AbstractContextManager[None]]
LINES_KEPT = 5


@dataclass(frozen=True)
class Outcome:
    """How a stage ended; `message` is its error, or its last line."""

    stage: str
    status: Status
    seconds: float
    message: str


@dataclass(frozen=True)
class Ending:
    """How a flow went: what each stage did and, if it failed, why."""

    run: Run | None
    outcomes: tuple[Outcome, ...]
    error: str | None = None
    dry: bool = False


class Runner(Protocol):
    """Runs one stage of a run to its end."""

    def run(self, stage: str, run: Run, on_line: OnLine, force: bool = False) -> Outcome:
        """Runs `stage` if DVC finds it stale, or in any case with `force`; `on_line` gets each line of output."""


class ProcessRunner:
    """Runs the stage through DVC in a child process."""

    def __init__(self, flow_run: str | None = None, flow_url: str | None = None, slot: Slot | None = None) -> None:
        self.flow_run = flow_run
        self.flow_url = flow_url
        self.slot = slot or (lambda stage, on_line: nullcontext())

    def run(self, stage: str, run: Run, on_line: OnLine, force: bool = False) -> Outcome:
        address = f"{run.dvc_file}:{stage}"
        command = [sys.executable, "-m", "flows.run.dvc_stage", address, *(["--force"] if force else [])]
        start = time.monotonic()
        lines = LastLines(on_line)
        environment = self.environment(run.repository)
        with dvc_lock(run.repository, f"{address} (process {os.getpid()})", on_line) as descriptor:
            if not force and is_unchanged(run.repository, address):
                return Outcome(stage, "unchanged", time.monotonic() - start, "nothing has changed")
            with self.slot(stage, on_line):
                code = stream(command, run.repository, environment, lines, keep_open=(descriptor,))
        return Outcome(stage, _status(code), time.monotonic() - start, lines.message(code))

    def environment(self, repository: Path) -> dict[str, str]:
        """What the stage's process finds in its environment."""
        return stage_environment(repository, self.flow_run, self.flow_url)


def is_unchanged(repository: Path, address: str) -> bool:
    """Whether DVC finds the stage up to date; asked here, where DVC is loaded once, and not in a process a stage."""
    try:
        with dvc_repo(repository) as repo:
            # A whole path, since DVC takes targets from the current folder.
            return not repo.status(targets=[str(repository / each) for each in (settings_of(address), address)])
    except Exception:
        # The stage's own process meets the same error, whatever it is, and says it.
        return False


def stage_environment(repository: Path, flow_run: str | None = None, flow_url: str | None = None) -> dict[str, str]:
    """This process's environment, with its own tools and the repository's code found first."""
    tools = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": f"{repository}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
        # The flow's last screen and its artifacts show what came out; sixty numbers a stage would bury the log.
        "FUSELIP_SUMMARY": "off",
    }
    told = {"FUSELIP_FLOW_RUN": flow_run, "FUSELIP_FLOW_URL": flow_url}
    return {**environment, **{name: value for name, value in told.items() if value}}


class LastLines:
    """Passes lines on and remembers those that tell why a process failed."""

    def __init__(self, on_line: OnLine) -> None:
        self.on_line = on_line
        self._last: deque[str] = deque(maxlen=LINES_KEPT)
        self._error = ""

    def __call__(self, line: str) -> None:
        self._last.append(line)
        if line.startswith("error: "):
            self._error = line.removeprefix("error: ")
        self.on_line(line)

    def message(self, code: int) -> str:
        """Why a process that ended with `code` failed: its error, or else the code beside its last lines."""
        if code and not self._error:
            return f"ended with code {code}; its last lines were: {' / '.join(self._last)}"
        return self._error or (self._last[-1] if self._last else "")


def _status(code: int) -> Status:
    """A stage that saved its state, or that SIGTERM ended before it had any, was interrupted: it may go on."""
    if code in (Interrupted.exit_code, 128 + signal.SIGTERM):
        return "interrupted"
    return {0: "done", UNCHANGED: "unchanged"}.get(code, "failed")  # type: ignore[return-value]
