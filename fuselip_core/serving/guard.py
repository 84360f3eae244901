"""Middleware for every request: API key, origin, body size, timeout, metrics and one log line.

Pure ASGI, so that it can count the bytes of a body as they arrive. Log and metrics contain method, route, status and
time, but never a query string or a body.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from fuselip_core.errors import FuselipError
from fuselip_core.serving.limits import Forbidden, Limits, ServingError, TooLarge, Unauthorized
from fuselip_core.serving.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN_ROUTES = {"/health", "/ready", "/ping"}
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
# No external resources. NiceGUI compiles its components in the browser, which needs unsafe-eval.
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'"
)
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

logger = logging.getLogger("fuselip")


def fault_answer(status: int, sentence: str) -> JSONResponse:
    """An error in OpenAI's format, with one sentence as its message."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {}
    if status == 429:
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="fuselip: any name, the API key as password", charset="UTF-8"'
    content = {"error": {"message": sentence, "type": kind, "code": status}}
    return JSONResponse(content, status, headers)


def sentence_for(error: Exception) -> tuple[int, str]:
    """Status and sentence of an error. Only our own errors are quoted: others might repeat the request."""
    if isinstance(error, TimeoutError):
        return 503, "the request took too long; send less at once, or try again later"
    if isinstance(error, FuselipError):
        return getattr(error, "status", 422), str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "fuselip_core" in frame.filename or frame is frames[-1]]
    places = ", ".join(f"{frame.filename}:{frame.lineno}" for frame in own)
    logger.error("unexpected %s; please report it: %s", type(error).__name__, places)
    return 503, f"the server failed to answer ({type(error).__name__}); try again, or report it"


def answer_to(error: Exception) -> JSONResponse:
    """The response for an error."""
    return fault_answer(*sentence_for(error))


class Guard:
    """The ASGI middleware of this module."""

    def __init__(
        self, app: Any, limits: Limits, metrics: Metrics, api_key: str | None = None, local: bool = True
    ) -> None:
        self.app, self.limits, self.metrics, self._key, self._local = app, limits, metrics, api_key, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._socket(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
        except ServingError:
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.perf_counter(), 0

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"], headers["Referrer-Policy"] = "nosniff", "no-referrer"
                headers["Content-Security-Policy"] = POLICY
            await send(message)

        try:
            self._check(scope)
            async with asyncio.timeout(self.limits.seconds):
                await self.app(scope, self._counted(scope, receive), answer)
        except Exception as error:
            if status:
                raise
            await answer_to(error)(scope, receive, answer)
        finally:
            route = getattr(scope.get("route"), "path", "page" if status < 400 else "none")
            seconds = time.perf_counter() - began
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.seconds.labels(route).observe(seconds)
            logger.debug("%s %s %d %.0f ms", scope["method"], route, status, 1000 * seconds)

    def _counted(self, scope: Scope, receive: Receive) -> Receive:
        most, length = int(self.limits.body_mb * 1e6), Headers(scope=scope).get("content-length", "")
        too_large = TooLarge(f"the body has more than {self.limits.body_mb:g} MB; send less at once")
        if length.isdigit() and int(length) > most:
            raise too_large
        received = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise too_large
            return message

        return counted

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        # Against cross-site requests, and against DNS rebinding.
        if origin is not None and urlsplit(origin).netloc != host:
            raise Forbidden("pages of other sites may not use this server; open its own page")
        if self._local and (urlsplit(f"//{host}").hostname or "") not in LOOPBACK:
            raise Forbidden(
                "this server answers only to 127.0.0.1 and localhost; use one of these, or start it with --host"
            )
        if self._key is not None and scope["path"] not in OPEN_ROUTES:
            given = _key_of(headers.get("authorization", ""))
            if not hmac.compare_digest(given.encode(), self._key.encode()):
                raise Unauthorized("the API key is missing or wrong; send Authorization: Bearer KEY")


def _key_of(header: str) -> str:
    """The key of a Bearer header, or the password of a Basic one, which browsers ask for in a dialog."""
    kind, _, value = header.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""
