"""What the server takes on, and the errors by which it declines."""

from __future__ import annotations

from dataclasses import dataclass

from fuselip_core.errors import FuselipError


@dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of what may run and wait at once."""

    body_mb: float = 64.0
    megapixels: float = 40.0
    rows: int = 256
    seconds: float = 30.0
    # Requests that arrive within the wait run together; see batching.py.
    batch_wait_ms: float = 5.0
    batch_rows: int = 64
    waiting_rows: int = 1024
    decoders: int = 2


class ServingError(FuselipError):
    """A request that is declined with another status than 422."""

    status = 503


class Unauthorized(ServingError):
    """No API key, or a wrong one."""

    status = 401


class Forbidden(ServingError):
    """A page of another site asked."""

    status = 403


class NotFound(ServingError):
    """There is nothing of that name."""

    status = 404


class TooLarge(ServingError):
    """The body is larger than allowed."""

    status = 413


class WrongType(ServingError):
    """The body is of a content type that is not read here."""

    status = 415


class TooBusy(ServingError):
    """Too many rows wait already."""

    status = 429
