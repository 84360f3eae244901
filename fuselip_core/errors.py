"""The one exception family that the command line shows as a sentence instead of a traceback."""

from __future__ import annotations


class FuselipError(ValueError):
    """Something a user can mend: the message names the thing, the place and the remedy in one sentence."""
