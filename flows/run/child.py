"""Runs a child process and shows its output at once: with progress bars on a terminal, line by line in a log."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

OnLine = Callable[[str], None]

CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
STOP_SECONDS = 60.0
CHUNK_BYTES = 1 << 14


def stream(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    on_line: OnLine,
    keep_open: Sequence[int] = (),
) -> int:
    """Runs `command` in `folder` and returns its exit code; `on_line` gets every line of stdout and stderr, plain.

    On a terminal the output also goes there as it comes. Whatever ends the wait (cancelling, Ctrl-C) first asks the
    child's whole group to stop, with SIGTERM, and waits a minute for it to save its state. `keep_open` are file
    descriptors that the child inherits, for locks that must live as long as it does.
    """
    terminal = sys.stderr.isatty()
    reader, writer = _open_terminal() if terminal else os.pipe()
    try:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=writer,
            start_new_session=True,
            pass_fds=tuple(keep_open),
        )
    finally:
        os.close(writer)
    try:
        _read(reader, on_line, echo=terminal)
        return child.wait()
    except BaseException:
        # Keep reading: with a full pipe the child would block instead of saving its state.
        rest = threading.Thread(target=_read, args=(reader, on_line, terminal), daemon=True)
        rest.start()
        _stop(child)
        rest.join(timeout=1.0)
        raise
    finally:
        os.close(reader)


def _open_terminal() -> tuple[int, int]:
    """A pseudo-terminal as wide as ours."""
    reader, writer = pty.openpty()
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
        fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
    return reader, writer


def _read(reader: int, on_line: OnLine, echo: bool) -> None:
    rest = b""
    while block := _block(reader):
        if echo:
            sys.stderr.buffer.write(block)
            sys.stderr.buffer.flush()
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            _pass_on(line, on_line)
    _pass_on(rest, on_line)


def _block(reader: int) -> bytes:
    try:
        return os.read(reader, CHUNK_BYTES)
    except OSError:
        # Linux reports the end of a pseudo-terminal as an input/output error.
        return b""


def _pass_on(line: bytes, on_line: OnLine) -> None:
    """The last state of a line that a progress bar has overwritten."""
    text = CONTROL.sub("", line.decode("utf-8", "replace")).rstrip("\r\n ")
    if text := text.rpartition("\r")[2]:
        on_line(text)


def _stop(child: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)
            return
