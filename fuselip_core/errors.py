"""Errors that the command line shows as one sentence instead of a traceback."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable
from typing import NoReturn

WARNING = "warning: "
FULL, FORBIDDEN = (errno.ENOSPC, errno.EDQUOT), (errno.EACCES, errno.EPERM, errno.EROFS)


class FuselipError(ValueError):
    """An error that the user can fix: one sentence that names the thing, the place and the remedy."""

    exit_code = 1


class Interrupted(FuselipError):
    """The run was stopped on request and saved a checkpoint, from which the same command resumes."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


def one_line(error: BaseException) -> str:
    """The error's message without line breaks and indentation."""
    return " ".join(str(error).split())


def sentence_of(error: Exception) -> str:
    """The fault and the remedy, on one line."""
    if isinstance(error, FuselipError):
        return one_line(error)
    if isinstance(error, OSError):
        return _of_system(error)
    kind, said = type(error).__name__, one_line(error)[:300]
    if "database or disk is full" in said:  # SQLite's, of MLflow's store
        return _of_system(OSError(errno.ENOSPC, "", "MLflow's store"))
    if kind in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's, for a GPU
        return f"out of memory ({said or kind}); lower train.batch_size, or raise train.accumulation, and try again"
    return f"unexpected {kind} ({said}); run again with --debug for the traceback, and please report it"


def _of_system(error: OSError) -> str:
    place = f" at {error.filename}" if error.filename else ""
    if error.errno in FULL:
        return f"no space is left on the disk{place}; free some and run the same command again"
    if error.errno in FORBIDDEN:
        return f"permission denied{place}; change the owner or mode, or choose another folder"
    return f"{error.strerror or error}{place}; run again with --debug for the traceback"


def log_to_stderr(debug: bool = False) -> None:
    """Logs to stderr; warnings start with the word WARNING, by which the flows recognise them."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("fuselip").setLevel(logging.DEBUG if debug else logging.INFO)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return WARNING * (record.levelno >= logging.WARNING) + super().format(record)


def run_to_exit(work: Callable[[], object], debug: bool = False) -> NoReturn:
    """Runs `work` and exits: with the code that it returns, or after one line on stderr if it fails.

    With `debug` the traceback is shown instead.
    """
    try:
        code = work()
    except Exception as error:
        if debug:
            raise
        sys.stderr.write(f"error: {sentence_of(error)}\n")
        code = error.exit_code if isinstance(error, FuselipError) else 1
    sys.exit(code if isinstance(code, int) else 0)
