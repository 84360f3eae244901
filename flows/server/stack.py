"""Starts the processes of a server stack together and ends them together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx

from flows.environment import REPOSITORY
from flows.run.processes import children_of
from fuselip_core.errors import FuselipError

HOST = "127.0.0.1"
NOTHING = contextlib.nullcontext()
START_SECONDS = 900.0
CHECK_EVERY_SECONDS = 5.0
# Longer than a stage may take to save its state (flows/run/child.py).
STOP_SECONDS = 90.0
# Ctrl-C, `kill`, and the end of the terminal: the processes have sessions of their own and would stay.
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class Part:
    """A process of the stack, and its name in messages."""

    name: str
    command: tuple[str, ...]
    process: subprocess.Popen[bytes]
    # Restarted if it ends; a worker keeps no state.
    replaceable: bool = False


class Stack:
    """Processes that start and end together; the last started ends first. Without `log_folder` they say all here."""

    def __init__(self, environment: Mapping[str, str], log_folder: Path | None = None) -> None:
        self._environment = dict(environment)
        self.log_folder = log_folder
        self._parts: list[Part] = []
        if log_folder:
            log_folder.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, *command: str, replaceable: bool = False) -> None:
        """Starts ``python -m <command>``; what it says goes to ``<name>.log``."""
        self._parts.append(Part(name, command, self._open(name, command), replaceable))

    def _open(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with self._log(name).open("ab") if self.log_folder else contextlib.nullcontext() as log:
            # A session of its own: Ctrl-C comes to this process alone, which ends the others in order.
            return subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=REPOSITORY,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, name: str, *command: str) -> None:
        """Runs ``python -m <command>`` to its end; raises FuselipError with its last line if it fails."""
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=REPOSITORY,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        self._log(name).write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            raise FuselipError(f"{name} failed; see {self._log(name)}")

    def _log(self, name: str) -> Path:
        assert self.log_folder
        return self.log_folder / f"{name}.log"

    def wait_for(self, url: str) -> None:
        """Waits until `url` answers; raises FuselipError if a process ends meanwhile, or after some minutes."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url, timeout=5.0).is_success:
                    return
            time.sleep(0.5)
        raise FuselipError(f"{url} does not answer; see the logs in {self.log_folder}")

    def check(self) -> list[str]:
        """Restarts what may be restarted and returns its names; raises FuselipError if something else has ended."""
        replaced = []
        for part in self._parts:
            if part.process.poll() is None:
                continue
            if not part.replaceable:
                raise FuselipError(f"the {part.name} has ended; see {self._log(part.name)}")
            part.process = self._open(part.name, part.command)
            replaced.append(part.name)
        return replaced

    def keep(self, say: Callable[[str], object]) -> NoReturn:
        """Starts again what is replaceable and has ended, and says so; raises FuselipError as `check` does."""
        while True:
            for name in self.check():
                say(f"the {name} had ended and was started again")
            time.sleep(CHECK_EVERY_SECONDS)

    def stop(self) -> None:
        """Ends all, the last started first, and waits for each."""
        while self._parts:
            _end(self._parts.pop().process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and its flows, and waits until their stages have saved their state; after a while with SIGKILL."""
    # A worker leaves its flows alone or kills them, so they get the signal too; their stages are told by them.
    flows, family = children_of(process.pid), children_of(process.pid, recursive=True)

    def is_over() -> bool:
        return process.poll() is not None and not any(each.lives for each in family)

    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 10.0)):
        for pid in (process.pid, *(flow.pid for flow in flows)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, number)
        deadline = time.monotonic() + patience
        while not (over := is_over()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if over:
            return


@contextlib.contextmanager
def ending(stack: Stack, shown: AbstractContextManager[object] = NOTHING) -> Iterator[None]:
    """Stops `stack` at the end, or once a signal asks for it, which raises KeyboardInterrupt; `shown` meanwhile."""
    # By name: a shell starts what stands in the background with SIGINT ignored, and Python leaves that so.
    for number in ENDING:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number in ENDING:
            signal.signal(number, signal.SIG_IGN)
        with shown:
            stack.stop()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
