"""What stands before every request: who may ask, how much, how long; and the one line that is logged.

Pure ASGI, since it must see the bytes of a body before anybody has read them. The log and the metrics hold method,
route, status and time, never an address with its query, a body or a value.
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
# Nothing may be loaded from elsewhere. NiceGUI compiles its components in the browser.
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'"
)
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

logger = logging.getLogger("fuselip")


def fault_answer(status: int, sentence: str) -> JSONResponse:
    """One sentence in OpenAI's form of an error; `message` stands at the top too, as in MLflow's."""
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {}
    if status == 429:
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = 'Basic realm="fuselip: any name, the API key as password", charset="UTF-8"'
    content = {"error": {"message": sentence, "type": kind, "code": status}}
    return JSONResponse(content, status, headers)


def sentence_for(error: Exception) -> tuple[int, str]:
    """Status and sentence of an error: its own sentence if it has one, else no word of what it says."""
    if isinstance(error, TimeoutError):
        return 503, "the request took too long; send less at once, or try again later"
    if isinstance(error, FuselipError):
        return getattr(error, "status", 422), str(error)
    # Our lines without the message, which might quote the request.
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "fuselip_core" in frame.filename or frame is frames[-1]]
    places = ", ".join(f"{frame.filename}:{frame.lineno}" for frame in own)
    logger.error("unforeseen %s; please report it: %s", type(error).__name__, places)
    return 503, f"the server failed at this request ({type(error).__name__}); try again, or report it"


def answer_to(error: Exception) -> JSONResponse:
    """The answer that an error becomes."""
    return fault_answer(*sentence_for(error))


class Guard:
    """ASGI middleware: API key, origin, size, time, and one line in the log."""

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
        # A page elsewhere must not reach this server through the browser of somebody who may, nor under another name.
        if origin is not None and urlsplit(origin).netloc != host:
            raise Forbidden("pages of other sites may not ask this server; open its own page")
        if self._local and (urlsplit(f"//{host}").hostname or "") not in LOOPBACK:
            raise Forbidden("this server answers to 127.0.0.1 and localhost; start it with --host for others")
        if self._key is not None and scope["path"] not in OPEN_ROUTES:
            given = _key_of(headers.get("authorization", ""))
            if not hmac.compare_digest(given.encode(), self._key.encode()):
                raise Unauthorized("the API key is missing or wrong; send Authorization: Bearer KEY")


def _key_of(header: str) -> str:
    """The key in a bearer's header, or the password of the form that a browser shows by itself."""
    kind, _, value = header.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""
