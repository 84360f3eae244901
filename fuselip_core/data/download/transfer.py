"""Downloads one file over HTTP: resuming (RFC 9110, Range and If-Range), retrying, verified, atomic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import httpx

from fuselip_core.data.download.partial_file import Digests, Partial, RemoteFile, disk_errors, require_space
from fuselip_core.data.download.retries import (
    Access,
    DownloadError,
    Patience,
    TransientError,
    network_errors,
    persist,
    refuse_status,
)

# A damaged file is fetched again from the start; if it is damaged again, the fault is at its source.
MISMATCHES_ALLOWED = 1


class Stopped(Exception):
    """Another file of the download failed, so this one stops at the next block."""


class Meter(Protocol):
    """Receives the number of new bytes (negative if some must be fetched again)."""

    def advance(self, count: int) -> None: ...


@dataclass
class Fetch:
    """Fetches one file with `run`; holds the state between attempts."""

    client: httpx.Client
    file: RemoteFile
    final: Path
    access: Access
    patience: Patience
    meter: Meter
    stopped: Callable[[], bool] = lambda: False
    furthest: int = 0
    mismatches: int = 0

    def run(self) -> Digests:
        """Fetches the file to `final` and returns its digests; raises DownloadError, OSError or Stopped."""
        partial = Partial(self.final, self.file)
        self.meter.advance(partial.size)
        self.furthest = partial.size
        with disk_errors(self.final):
            persist(lambda: self._attempt(partial), self.patience, self.file.path)
            partial.keep()
        return partial.digests

    def _attempt(self, partial: Partial) -> None:
        if self.stopped():
            raise Stopped
        if self.file.size is not None and partial.size > self.file.size:
            self._restart(partial)
        if self.file.size is None or partial.size < self.file.size:
            self._receive(partial)
        if partial.digests.match:
            return
        found = partial.digests.found
        self._restart(partial)
        self._mismatch(f"came with checksum {found} instead of {self.file.checksum}")

    def _receive(self, partial: Partial) -> None:
        headers = {"Accept-Encoding": "identity", **self.access.headers_for(self.file.url)}
        if partial.size:
            headers["Range"] = f"bytes={partial.size}-"
            if partial.etag:
                headers["If-Range"] = partial.etag
        with (
            network_errors(urlsplit(self.file.url).hostname or "the host"),
            self.client.stream("GET", self.file.url, headers=headers) as response,
        ):
            if response.status_code == 416:
                self._nothing_left(response, partial)
                return
            total = self._start(response, partial)
            self._copy(response, partial)
        if total is not None and partial.size != total:
            self._cut_short(partial)

    def _nothing_left(self, response: httpx.Response, partial: Partial) -> None:
        """Handles 416: the file is already complete (and verified next), or belongs to another version."""
        if _content_range(response).total == partial.size and self.file.size is None:
            return
        self._restart(partial)
        raise TransientError("the server refused to resume where the last run stopped")

    def _start(self, response: httpx.Response, partial: Partial) -> int | None:
        """Size of the whole file after this response, or None if the server does not say."""
        refuse_status(response, self.access)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise DownloadError(
                f"{response.url.host} sends {self.file.path} compressed, although asked not to; use another mirror"
            )
        if response.status_code == 206:
            span = _content_range(response)
            if span.start != partial.size:
                self._restart(partial)
                raise TransientError("the server sent another part than the one asked for")
            total = span.total
        else:
            # First request, a server that cannot resume, or a changed file.
            self._restart(partial)
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
        self._check_total(total, partial)
        etag = response.headers.get("ETag")
        partial.remember(etag if etag and not etag.startswith("W/") else None)
        return total

    def _check_total(self, total: int | None, partial: Partial) -> None:
        if total is None:
            return
        if self.file.size is not None and total != self.file.size:
            self._restart(partial)
            self._mismatch(f"is offered with {total:,} bytes instead of {self.file.size:,}")
        if self.file.size is None:
            require_space(self.final.parent, total - partial.size, self.file.path)

    def _copy(self, response: httpx.Response, partial: Partial) -> None:
        try:
            with partial.opened() as descriptor:
                # Raw blocks, because larger ones would be buffered and lost if the connection breaks.
                for block in response.iter_raw():
                    if self.stopped():
                        raise Stopped
                    partial.append(descriptor, block)
                    self.meter.advance(len(block))
        except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError):
            self._cut_short(partial)

    def _cut_short(self, partial: Partial) -> None:
        progressed = partial.size > self.furthest
        self.furthest = max(self.furthest, partial.size)
        raise TransientError(f"the connection broke after {partial.size:,} bytes", progressed=progressed)

    def _restart(self, partial: Partial) -> None:
        self.meter.advance(-partial.size)
        partial.restart()

    def _mismatch(self, how: str) -> None:
        self.mismatches += 1
        if self.mismatches > MISMATCHES_ALLOWED:
            raise DownloadError(
                f"{self.file.path} {how}, {self.mismatches} times; it may be damaged at its source, see "
                f"{self.access.page}"
            )
        raise TransientError(f"it {how}")


class _Span(NamedTuple):
    start: int | None
    total: int | None


def _content_range(response: httpx.Response) -> _Span:
    """``bytes 5-9/10`` → (5, 10), ``bytes */10`` → (None, 10); None for invalid parts."""
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    span, _, total = rest.partition("/")
    start = span.partition("-")[0]
    if unit != "bytes":
        return _Span(None, None)
    return _Span(int(start) if start.isdigit() else None, int(total) if total.isdigit() else None)
