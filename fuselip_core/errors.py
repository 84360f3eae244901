"""The exception family that the command line shows as a sentence instead of a traceback."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable
from typing import NoReturn

WARNING = "warning: "


class FuselipError(ValueError):
    """Something a user can mend: the message names the thing, the place and the remedy in one sentence."""

    exit_code = 1


class Interrupted(FuselipError):
    """The run was asked to stop, has saved a checkpoint and resumes from it when started again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


def one_line(error: BaseException) -> str:
    """The error's own words without line breaks and indentation; "" where it has none."""
    return " ".join(str(error).split())


def sentence_of(error: Exception) -> str:
    """What went wrong and what to do, on one line."""
    if isinstance(error, FuselipError):
        return one_line(error)
    if isinstance(error, OSError):
        return _of_system(error)
    kind, said = type(error).__name__, one_line(error)[:300]
    if "database or disk is full" in said:  # SQLite's, of MLflow's store
        return _of_system(OSError(errno.ENOSPC, "", "MLflow's store"))
    if kind in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's, of a GPU
        return f"memory ran out ({said or kind}); lower train.batch_size, or raise train.accumulation, and try again"
    return f"unforeseen {kind} ({said}); run again with --debug for the traceback, and please report it"


def _of_system(error: OSError) -> str:
    place = f" at {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the disk{place}; free some and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read{place}; change its owner or mode, or choose another folder"
    return f"{error.strerror or error}{place}; run again with --debug for the traceback"


def log_to_stderr(debug: bool = False) -> None:
    """Lets this process say on stderr what it does; whoever reads it tells warnings by their first word."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("fuselip").setLevel(logging.DEBUG if debug else logging.INFO)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return WARNING * (record.levelno >= logging.WARNING) + super().format(record)


def run_to_exit(work: Callable[[], object], debug: bool = False) -> NoReturn:
    """Ends this process after `work`: with its exit code if it returns one, or with one line on stderr if it fails.

    The only place that turns an error into an exit code. With `debug` the traceback is shown instead.
    """
    try:
        code = work()
    except Exception as error:
        if debug:
            raise
        sys.stderr.write(f"error: {sentence_of(error)}\n")
        code = error.exit_code if isinstance(error, FuselipError) else 1
    sys.exit(code if isinstance(code, int) else 0)
