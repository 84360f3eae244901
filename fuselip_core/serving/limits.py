"""The server's limits, and the errors that it answers with."""

from __future__ import annotations

from dataclasses import dataclass

from fuselip_core.errors import FuselipError


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of all requests at a time."""

    body_mb: float = 64.0
    megapixels: float = 40.0
    rows: int = 256
    seconds: float = 30.0
    batch_wait_ms: float = 5.0
    batch_rows: int = 64
    waiting_rows: int = 1024
    decoders: int = 2


class ServingError(FuselipError):
    """An error with a status other than 422."""

    status = 503


class Unauthorized(ServingError):
    """No API key, or a wrong one."""

    status = 401


class Forbidden(ServingError):
    """The request comes from another site's page, or names another host."""

    status = 403


class NotFound(ServingError):
    """There is no such model, picture or index."""

    status = 404


class TooLarge(ServingError):
    """The body is larger than allowed."""

    status = 413


class WrongType(ServingError):
    """The body's content type is not supported."""

    status = 415


class TooBusy(ServingError):
    """The queue is full."""

    status = 429
