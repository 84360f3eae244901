"""Starts the processes of a server stack together and ends them together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from flows.environment import REPOSITORY
from flows.run.processes import children_of
from fuselip_core.errors import FuselipError

HOST = "127.0.0.1"
START_SECONDS = 900.0
# Longer than a stage may take to save its state (flows/run/child.py).
STOP_SECONDS = 90.0


@dataclass
class Part:
    """A process of the stack, and its name in messages."""

    name: str
    command: tuple[str, ...]
    process: subprocess.Popen[bytes]
    # Restarted if it ends; a worker keeps no state.
    replaceable: bool = False


class Stack:
    """Processes that start and end together; the last started ends first."""

    def __init__(self, environment: Mapping[str, str], log_folder: Path) -> None:
        self._environment = dict(environment)
        self.log_folder = log_folder
        self._parts: list[Part] = []
        log_folder.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, *command: str, replaceable: bool = False) -> None:
        """Starts ``python -m <command>``; what it says goes to ``<name>.log``."""
        self._parts.append(Part(name, command, self._open(name, command), replaceable))

    def _open(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with (self.log_folder / f"{name}.log").open("ab") as log:
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
        (self.log_folder / f"{name}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            raise FuselipError(f"{name} failed; see {self.log_folder / name}.log")

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
                raise FuselipError(f"the {part.name} has ended; see {self.log_folder / part.name}.log")
            part.process = self._open(part.name, part.command)
            replaced.append(part.name)
        return replaced

    def stop(self) -> None:
        """Ends all, the last started first, and waits for each."""
        while self._parts:
            part = self._parts.pop()
            for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, 10.0)):
                # A worker lets its flows run on: they get the signal too, save their state and are recovered later.
                for pid in (part.process.pid, *children_of(part.process.pid)):
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    part.process.wait(patience)
                    break
