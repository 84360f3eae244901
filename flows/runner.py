"""How a stage is run: here in a process on this machine; in a container, see flows/container.py."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from flows.lock import dvc_lock
from flows.reproduce import UNCHANGED
from flows.runs import Run
from flows.stream import OnLine, stream
from fuselip_core.errors import Interrupted

Status = Literal["done", "unchanged", "interrupted", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended; `message` is its error, or its last line."""

    stage: str
    status: Status
    seconds: float
    message: str


class Runner(Protocol):
    """Runs one stage of a run to its end."""

    def run(self, stage: str, run: Run, on_line: OnLine, force: bool = False) -> Outcome:
        """Runs `stage` if DVC finds it stale, or in any case with `force`; `on_line` gets each line of output."""


class ProcessRunner:
    """Runs the stage through DVC in a child process."""

    def __init__(self, flow_run: str | None = None) -> None:
        self.flow_run = flow_run

    def run(self, stage: str, run: Run, on_line: OnLine, force: bool = False) -> Outcome:
        address = f"{run.dvc_file}:{stage}"
        command = [sys.executable, "-m", "flows.reproduce", address, *(["--force"] if force else [])]
        start = time.monotonic()
        lines = LastLines(on_line)
        environment = self.environment(run.repository)
        with dvc_lock(run.repository, f"{address} (process {os.getpid()})", on_line) as descriptor:
            if not force and is_unchanged(run.repository, address):
                return Outcome(stage, "unchanged", time.monotonic() - start, "nothing has changed")
            code = stream(command, run.repository, environment, lines, keep_open=(descriptor,))
        return Outcome(stage, _status(code), time.monotonic() - start, lines.message(code))

    def environment(self, repository: Path) -> dict[str, str]:
        """What the stage's process finds in its environment."""
        return stage_environment(repository, self.flow_run)


def is_unchanged(repository: Path, address: str) -> bool:
    """Whether DVC finds the stage up to date; asked here, where DVC is loaded once, and not in a process a stage."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(repository)) as repo:
            # A whole path, since DVC takes targets from the current folder.
            return not repo.status(targets=[str(repository / address)])
    except DvcException:
        # The stage's own process meets the same error and says it.
        return False


def stage_environment(repository: Path, flow_run: str | None = None) -> dict[str, str]:
    """This process's environment, with its own tools and the repository's code found first."""
    tools = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "PYTHONPATH": f"{repository}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
    }
    if flow_run:
        environment["FUSELIP_FLOW_RUN"] = flow_run
    return environment


class LastLines:
    """Passes lines on and remembers the one that tells why a process failed."""

    def __init__(self, on_line: OnLine) -> None:
        self.on_line = on_line
        self._last = self._error = ""

    def __call__(self, line: str) -> None:
        self._last = line
        if line.startswith("error: "):
            self._error = line.removeprefix("error: ")
        self.on_line(line)

    def message(self, code: int) -> str:
        """Why a process that ended with `code` failed; the last line is only a hint, so the code stands beside it."""
        return self._error or (f"ended with code {code}; its last line was: {self._last}" if code else self._last)


def _status(code: int) -> Status:
    return {0: "done", UNCHANGED: "unchanged", Interrupted.exit_code: "interrupted"}.get(code, "failed")  # type: ignore[return-value]
