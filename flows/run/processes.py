"""Identifies processes and tells whether they still run."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import psutil

LABEL = "fuselip.process"  # of a flow run: the process that runs it
HEARTBEAT = "fuselip.heartbeat"  # of a flow run: seconds between the signs of life that its process sends


@dataclass(frozen=True)
class Process:
    """A process of a machine or container. The start time tells it from a later process with the same number."""

    host: str  # where its number means something: see `here`
    pid: int
    started: str

    @classmethod
    def current(cls) -> Process:
        """This process."""
        return cls(here(), os.getpid(), _started(os.getpid()) or "")

    @classmethod
    def read(cls, label: str) -> Process | None:
        """The process that a label names; None if it names none."""
        match label.split("/"):
            case [host, pid, started] if pid.isdigit():
                return cls(host, int(pid), started)
        return None

    def __str__(self) -> str:
        return f"{self.host}/{self.pid}/{self.started}"

    @property
    def is_here(self) -> bool:
        return self.host == here()

    @property
    def lives(self) -> bool:
        """Whether it still runs; only its own machine or container can tell."""
        return _started(self.pid) == self.started


def here() -> str:
    """The host name and the namespace of process numbers, which a container may not share with a host of its name."""
    namespace = str(Path("/proc/self/ns/pid").readlink()).strip("pid:[]")
    return f"{socket.gethostname()}:{namespace}"


def processes_of(flow_run_id: UUID) -> list[psutil.Process]:
    """Processes of this machine that were started for the flow run, as far as this user may see."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == str(flow_run_id):
                found.append(process)
    return found


def children_of(pid: int, recursive: bool = False) -> list[Process]:
    """Processes that `pid` has started and that still run; with `recursive` also theirs."""
    try:
        children = psutil.Process(pid).children(recursive)
    except psutil.NoSuchProcess:
        return []
    return [Process(here(), child.pid, started) for child in children if (started := _started(child.pid))]


def _started(pid: int) -> str | None:
    """Start time in seconds after boot; None if the process has ended.

    Counted from boot: a clock that is set must not make a living process look like another one.
    """
    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        return f"{process.create_time() - psutil.boot_time():.2f}"
    except psutil.NoSuchProcess:
        return None
