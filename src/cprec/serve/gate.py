"""The gate before the routes: room for the request, the token, the whole body within its limits, and the time taken."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.datastructures import Headers

from cprec.serve.messages import HUNG_UP
from cprec.serve.service import Service

OPEN = frozenset({"/", "/health", "/ready"})
"""Paths that need no token: the page, which holds no data, and whether the service is well."""
MAX_DISCARDED = 16
"""How much of a body that is too large is still read and thrown away, as a multiple of the largest body allowed."""
CLOSE = {"connection": "close"}
"""Header of an answer to a body that was not read: the rest of it would be taken for the next request."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Refusal(Exception):
    """The gate's answer to a request that it does not let through."""

    def __init__(self, status: int, message: str, headers: dict[str, str], *, more: bool = False) -> None:
        """With `more`, the client still sends its body."""
        super().__init__(message)
        self.status, self.headers, self.more = status, headers, more


class Gate:
    """An ASGI application before another one, the routes.

    HEAD is answered as GET is, without the body; a slash at the end of a path means nothing.
    """

    def __init__(
        self,
        app: App,
        service: Service,
        *,
        token: str | None,
        max_bytes: int,
        body_seconds: float,
        max_requests: int,
        root_path: str = "",
    ) -> None:
        self._app, self._service, self._token, self._root_path = app, service, token, root_path
        self._max_bytes, self._body_seconds = max_bytes, body_seconds
        self._room = max_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection, as ASGI asks."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, method = time.monotonic(), HUNG_UP, scope["method"]

        # Note the status for the metrics, and drop the body of an answer to HEAD.
        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        path = self._inner_path(scope["path"])
        scope = {**scope, "path": self._root_path + path, "root_path": self._root_path}
        scope["method"] = "GET" if method == "HEAD" else method
        self._room -= 1
        try:
            await self._let_through(path, scope, receive, noting)
        finally:
            self._room += 1
            route = getattr(scope.get("route"), "path", "other")
            self._service.metrics.request(method, route, status, time.monotonic() - began)

    def _inner_path(self, path: str) -> str:
        """The path without a slash at the end, and without the prefix of a proxy that does not strip it itself."""
        if path == self._root_path or path.startswith(self._root_path + "/"):
            path = path[len(self._root_path) :]
        return path.rstrip("/") or "/"

    async def _let_through(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(path, scope)
            body = await self._body(scope, receive)
            if body:
                _check_is_json(scope)
        except Refusal as refusal:
            discard = partial(self._discard, receive) if refusal.more else None
            await _refuse(send, refusal, discard)
        else:
            if body is not None:
                await self._app(scope, _replayed(body, receive), send)

    def _check(self, path: str, scope: Scope) -> None:
        """Raise Refusal where there is no room, or a token is needed and missing."""
        if self._room < 0 and path not in OPEN | {"/metrics"}:  # even an overloaded service can be watched
            self._service.metrics.refusals.inc()
            raise Refusal(503, "too many requests at one time", {"retry-after": "1"})
        if self._token is not None and path not in OPEN:
            given = Headers(scope=scope).get("authorization", "")
            if not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self._token}".encode()):
                raise Refusal(401, "send the header Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client hung up before. Raises Refusal for one that is too slow or too large."""
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_large(more=True)
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self._body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._max_bytes:
                        raise self._too_large(more)
        except TimeoutError:
            raise Refusal(408, f"the body was not there after {self._body_seconds:g} s", CLOSE) from None
        return bytes(body)

    def _too_large(self, more: bool) -> Refusal:
        most = self._max_bytes / (1 << 20)
        return Refusal(413, f"the body is larger than {most:g} MiB: send less at once", CLOSE, more=more)

    async def _discard(self, receive: Receive) -> None:
        """Read on for a while: if the connection is closed while a client still sends, the answer may be lost."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._body_seconds):
                size = 0
                while size < MAX_DISCARDED * self._max_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
                    size += len(message.get("body", b""))


async def _refuse(send: Send, refusal: Refusal, before_end: Callable[[], Awaitable[None]] | None) -> None:
    """Answer at once, and end the answer only after `before_end`: the connection may be closed then."""
    body = json.dumps({"error": str(refusal), "unknown": []}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": before_end is not None})
    if before_end is not None:
        await before_end()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _check_is_json(scope: Scope) -> None:
    """Raise Refusal where the headers say that the body is compressed, or something else than JSON."""
    headers = Headers(scope=scope)
    kind, encoding = (headers.get(f"content-{name}", "").strip().lower() for name in ("type", "encoding"))
    if encoding not in ("", "identity"):
        raise Refusal(415, f"a body with Content-Encoding {encoding} is not read: send it as it is", {})
    name = kind.partition(";")[0].strip()
    if not (name == "application/json" or (name.startswith("application/") and name.endswith("+json"))):
        was = name or "absent"
        raise Refusal(415, f"send JSON, with the header Content-Type: application/json (it was {was})", {})


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, then whatever else comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
