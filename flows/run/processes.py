"""Processes of this machine and whether they still run, read from /proc."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

# Of /proc/<pid>/stat, counted from 0, and the states of a process of which only its parent's look is awaited.
STATE, PARENT, START_TIME = 2, 3, 21
ENDED = ("Z", "X")


@dataclass(frozen=True)
class Process:
    """A process of a machine. A number alone would not do: another process gets it later."""

    host: str
    pid: int
    started: str

    @classmethod
    def current(cls) -> Process:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()) or "")

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
        return self.host == socket.gethostname()

    @property
    def lives(self) -> bool:
        """Whether it still runs; asked on its own machine."""
        return _started(self.pid) == self.started


def is_starting_here(flow_run_id: UUID) -> bool:
    """Whether some process of this machine was started for the flow run, as far as this user may see."""
    wanted = f"PREFECT__FLOW_RUN_ID={flow_run_id}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def children_of(pid: int) -> list[int]:
    """Processes of this machine that `pid` has started and that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        fields = _fields(int(path.name))
        if fields and int(fields[PARENT]) == pid and fields[STATE] not in ENDED:
            found.append(int(path.name))
    return found


def parent_of(pid: int) -> int | None:
    """The process that started `pid`, or inherited it; None if there is no such process."""
    fields = _fields(pid)
    return int(fields[PARENT]) if fields else None


def _started(pid: int) -> str | None:
    """When the process started, as the kernel counts; None if there is no such process, or only its remains."""
    fields = _fields(pid)
    return fields[START_TIME] if fields and fields[STATE] not in ENDED else None


def _fields(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat but for the name, which may hold anything."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return [str(pid), "", *stat.rpartition(")")[2].split()]
