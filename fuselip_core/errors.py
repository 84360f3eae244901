"""The exception family that the command line shows as a sentence instead of a traceback."""

from __future__ import annotations


class FuselipError(ValueError):
    """Something a user can mend: the message names the thing, the place and the remedy in one sentence."""

    exit_code = 1


class Interrupted(FuselipError):
    """The run was asked to stop, has saved a checkpoint and goes on from it when started again."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later
