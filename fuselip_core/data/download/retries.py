"""Which HTTP failures to retry, and how often.

Messages contain hosts, pages and variables, but never headers, queries or tokens.
"""

from __future__ import annotations

import email.utils
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx
import tenacity

from fuselip_core.errors import FuselipError

Result = TypeVar("Result")
SPENT = re.compile(r";\s*r=0\s*;\s*t=(\d+)")
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

logger = logging.getLogger("fuselip")


class DownloadError(FuselipError):
    """A download that cannot continue; the message says what is missing and what to do."""


class GaveUp(DownloadError):
    """Every attempt failed; a later call resumes where this one stopped."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class TransientError(Exception):
    """A failure worth a retry. retry_after: seconds that the server asks to wait. progressed: new bytes arrived."""

    def __init__(self, reason: str, *, retry_after: float | None = None, progressed: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.progressed = progressed


@dataclass(frozen=True)
class Access:
    """Access to a host: the page that explains it, the variable for a token, and the header with the token.

    The header is sent only to `origin` (scheme and host), never to a redirect's target.
    """

    what: str
    page: str
    token_variable: str | None = None
    origin: str = ""
    headers: dict[str, str] = field(default_factory=dict, repr=False)

    def headers_for(self, url: str) -> dict[str, str]:
        parts = urlsplit(url)
        return dict(self.headers) if f"{parts.scheme}://{parts.netloc}" == self.origin else {}


@dataclass(frozen=True)
class Patience:
    """When to give up: number of consecutive failures without new data, and the waits in seconds between them."""

    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 300.0
    sleep: Callable[[float], object] = time.sleep


def persist(attempt: Callable[[], Result], patience: Patience, what: str) -> Result:
    """Calls `attempt` until it raises no TransientError. Waits grow exponentially, or are as long as the server asks.

    An attempt that received new bytes resets the count. Raises GaveUp according to `patience`.
    """
    failures = 0
    backoff = tenacity.wait_exponential_jitter(
        multiplier=patience.first_wait, max=patience.longest_wait, jitter=patience.first_wait
    )

    def counted() -> Result:
        nonlocal failures
        try:
            return attempt()
        except TransientError as error:
            failures = 1 if error.progressed else failures + 1
            raise

    def enough(state: tenacity.RetryCallState) -> bool:
        return failures >= patience.attempts or (_error_of(state).retry_after or 0.0) > patience.longest_wait

    def wait(state: tenacity.RetryCallState) -> float:
        asked = _error_of(state).retry_after
        # Tenacity counts all attempts, but the wait depends on the failures since the last new byte.
        state.attempt_number = failures
        return asked if asked is not None else backoff(state)

    def sleep(seconds: float) -> None:
        patience.sleep(seconds)

    def tell(state: tenacity.RetryCallState) -> None:
        logger.warning("%s: %s; another attempt in %.1f s", what, _error_of(state), state.upcoming_sleep)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(TransientError),
        stop=enough,
        wait=wait,
        sleep=sleep,
        before_sleep=tell,
        reraise=True,
    )
    try:
        return retrying(counted)
    except TransientError as error:
        raise GaveUp(_gave_up(what, error, failures, patience)) from None


def _error_of(state: tenacity.RetryCallState) -> TransientError:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, TransientError)
    return error


def _gave_up(what: str, error: TransientError, failures: int, patience: Patience) -> str:
    if (error.retry_after or 0.0) > patience.longest_wait:
        return f"{what}: {error}, and its server asks to wait {error.retry_after:.0f} s; run it again after that"
    return f"{what}: {error}, {failures} times in a row; run it again later to resume"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date; None without one.

    The Hub sends RateLimit instead (`"api";r=0;t=55`: no requests left for 55 seconds).
    """
    value = headers.get("Retry-After")
    if value is None:
        spent = SPENT.search(headers.get("RateLimit", ""))
        return float(spent[1]) if spent else None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        moment = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


@contextmanager
def network_errors(host: str) -> Iterator[None]:
    """Turns connection failures into TransientError, and other errors of the request into DownloadError."""
    try:
        yield
    except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError) as error:
        raise TransientError(f"connection to {host} failed ({type(error).__name__})") from None
    except (httpx.TooManyRedirects, httpx.UnsupportedProtocol, httpx.InvalidURL, httpx.DecodingError) as error:
        raise DownloadError(f"{host} cannot be read over HTTP ({type(error).__name__}); check the address") from None


def refuse_status(response: httpx.Response, access: Access) -> None:
    """Raises TransientError, or DownloadError with the remedy, if the response is an error."""
    status, host = response.status_code, response.url.host
    if status in RETRY_STATUS:
        raise TransientError(f"{host} answered {status}", retry_after=retry_after(response.headers))
    if status in (401, 403) and response.history and not access.headers_for(str(response.url)):
        # The signed URL has expired; the next attempt gets a new one.
        raise TransientError(f"{host} answered {status} to a temporary URL")
    if status in (401, 403):
        raise DownloadError(no_access(access, status))
    if status in (404, 410):
        raise DownloadError(f"{access.what} is not at {host} (answer {status}); check its name, see {access.page}")
    if status >= 400:
        raise DownloadError(f"{host} answered {status} for {access.what}; see {access.page}")


def no_access(access: Access, status: int) -> str:
    """The sentence for a data set that requires accepting its terms, a token, or both."""
    remedy = f"accept its terms on {access.page}"
    if access.token_variable:
        remedy += f" and set {access.token_variable} to a token of the account that accepted them"
    return f"{access.what} may not be read without permission (answer {status}); {remedy}"


def public_url(url: str) -> str:
    """`url` without user name, password, query and fragment, which may contain secrets."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    netloc = f"{host}:{parts.port}" if parts.port else host
    return urlunsplit((parts.scheme, netloc, parts.path, "", ""))
