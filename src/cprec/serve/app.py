"""The HTTP interface: routes, and the gate before them (token, body, time); no thought of its own."""

# The annotations of the routes are read by FastAPI, which looks for names where they are defined: they are evaluated.

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cprec import __version__
from cprec.serve import messages as m
from cprec.serve.service import HUNG_UP, Refused, Service

log = logging.getLogger("cprec.serve")

PAGE = Path(__file__).with_name("page.html")
OPEN = frozenset({"/", "/health", "/ready"})
"""What may be read without a token: the page, which holds no data, and whether the service is well."""

DISCARDED = 16
"""Of a body that is too large, so many times what is allowed is still read, and thrown away."""

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_HISTORY_EXAMPLE = ["books-01", "Elwood Bold Merry Novel"]
_ONE = {"history": _HISTORY_EXAMPLE, "k": 5}
_FILTERED = {
    "history": [{"item_id": "books-01"}, {"title": "Elwood Bold Merry Novel", "domain": "books"}],
    "k": 3,
    "deny": ["books-02"],
    "mode": "exact",
    "deadline_ms": 500,
}
RECOMMEND_EXAMPLES: dict[str, Any] = {
    "one": {"summary": "One user, ids and titles mixed", "value": _ONE},
    "filtered": {"summary": "Filters, a mode and a deadline", "value": _FILTERED},
    "many": {"summary": "Several users", "value": {"requests": [_ONE, _FILTERED]}},
}
SCORE_EXAMPLES: dict[str, Any] = {
    "score": {"value": {"history": _HISTORY_EXAMPLE, "candidates": ["books-02", "books-03"]}}
}
EXPLAIN_EXAMPLES: dict[str, Any] = {"explain": {"value": {"history": _HISTORY_EXAMPLE, "item_id": "books-02"}}}
ITEM_EXAMPLES: dict[str, Any] = {
    "new": {"value": {"items": [{"item_id": "books-new", "domain": "books", "title": "Whitby Quiet Mystery"}]}}
}


def make_app(
    service: Service,
    *,
    token: str | None = None,
    max_body_mb: float = 4.0,
    body_seconds: float = 10.0,
    max_requests: int = 1_000,
    cors: Sequence[str] = (),
    root_path: str = "",
) -> Any:
    """The ASGI application of a service; closing it closes the service.

    With `token`, all but the page and the health checks ask for it. A body larger than `max_body_mb` is refused with
    413, one that is not there after `body_seconds` with 408; requests beyond `max_requests` at one time with 503.
    Pages of the origins `cors` may ask from a browser. `root_path` is what a proxy strips from the front of paths.
    """
    from fastapi import Body, FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
    from fastapi.routing import APIRoute
    from starlette.exceptions import HTTPException
    from starlette.middleware.cors import CORSMiddleware

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    problems: dict[int | str, dict[str, Any]] = {
        401: {"model": m.Problem, "description": "The token is missing or wrong"},
        408: {"model": m.Problem, "description": "The body took too long"},
        413: {"model": m.Problem, "description": "The body is too large"},
        415: {"model": m.Problem, "description": "The body is not JSON, or is compressed"},
        422: {"model": m.Problem, "description": "A field is wrong, or names what is not in the catalogue"},
        503: {"model": m.Problem, "description": "Overload, or no time: try again after `Retry-After` seconds"},
    }
    app = FastAPI(
        title="CPRec",
        version=__version__,
        description="Next-item recommendations by a language model over the titles of a catalogue.",
        lifespan=lifespan,
        responses=problems,
        redirect_slashes=False,
    )

    class OnceRequest(Request):
        async def json(self) -> Any:
            return _json(await self.body())

    class Route(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
            handle = super().get_route_handler()

            async def handle_once(request: Request) -> Response:
                return await handle(OnceRequest(request.scope, request.receive))

            return handle_once

    app.router.route_class = Route

    def problem(status: int, error: str, unknown: list[str], headers: dict[str, str] | None = None) -> JSONResponse:
        body = {"error": _sendable(error), "unknown": [_sendable(text) for text in unknown]}
        return JSONResponse(body, status_code=status, headers=headers)

    @app.exception_handler(Refused)
    async def _refused(_: Request, error: Refused) -> JSONResponse:
        headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        return problem(error.status, str(error), error.unknown, headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = [_mistake(each) for each in error.errors()]
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        return problem(422, "; ".join(found[:5]) + more, [])

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), [], dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def _broken(_: Request, error: Exception) -> JSONResponse:
        return problem(500, "a mistake of the service; its log says more", [])

    @app.post("/v1/recommend", response_model=m.RecommendResponse | m.RecommendResponses)
    async def recommend(
        request: Request,
        body: Annotated[
            m.RecommendRequests | m.RecommendRequest, m.OneOrSeveral(), Body(openapi_examples=RECOMMEND_EXAMPLES)
        ],
    ) -> Any:
        """The next items for one history or for several, by the deadline, and how each list was made."""
        several = isinstance(body, m.RecommendRequests)
        requests = body.requests if isinstance(body, m.RecommendRequests) else [body]
        lists = await service.recommend(requests, _hung_up(request.receive))
        return m.RecommendResponses(responses=lists) if several else lists[0]

    @app.post("/v1/baselines")
    async def baselines(
        body: Annotated[m.RecommendRequest, Body(openapi_examples={"one": RECOMMEND_EXAMPLES["one"]})],
    ) -> m.BaselinesResponse:
        """What the baselines recommend for the same history; `mode`, `deadline_ms` are not read."""
        return await service.baselines(body)

    @app.post("/v1/score")
    async def score(
        request: Request, body: Annotated[m.ScoreRequest, Body(openapi_examples=SCORE_EXAMPLES)]
    ) -> m.ScoreResponse:
        """The score of each candidate after a history, in the order of the candidates."""
        return await service.score(body, _hung_up(request.receive))

    @app.post("/v1/explain")
    async def explain(
        request: Request, body: Annotated[m.ExplainRequest, Body(openapi_examples=EXPLAIN_EXAMPLES)]
    ) -> m.ExplainResponse:
        """What each event of a history, and the events of each domain together, add to the score of an item."""
        return await service.explain(body, _hung_up(request.receive))

    @app.get("/v1/items")
    async def find_items(
        query: Annotated[str, Query(description="words of the title, or an id", max_length=m.MAX_TEXT)] = "",
        domain: Annotated[str | None, Query(description="by default all domains")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
    ) -> m.FoundItems:
        """Items in stock whose title has all words of the query, upper and lower case alike, or whose id it is."""
        return await service.find(query, domain, limit)

    changes: dict[int | str, dict[str, Any]] = {
        409: {"model": m.Problem, "description": "The service has no folder for changes"},
        507: {"model": m.Problem, "description": "The disk cannot take the change, which was not made"},
    }

    @app.put("/v1/items", responses=changes)
    async def put_items(body: Annotated[m.NewItems, Body(openapi_examples=ITEM_EXAMPLES)]) -> m.Changed:
        """Add items, change their text, or put back what was withdrawn: in effect and on disk with the answer."""
        return await service.put_items(body.items)

    @app.delete("/v1/items", responses=changes)
    async def withdraw_items(
        item_id: Annotated[list[str], Query(description="the items, each as item_id=ID", min_length=1)],
        domain: Annotated[str | None, Query(description="by default the one that the model was made for")] = None,
    ) -> m.Changed:
        """Withdraw items: they are recommended no more, with the answer; histories may go on naming them."""
        return await service.withdraw_items(domain, item_id)

    @app.get("/v1/about")
    async def about() -> m.About:
        """The models, domains and baselines that are served."""
        return service.about()

    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> Response:
        """200 while the engine answers; 503 once it fails every time, and a restart may help."""
        healthy = service.is_healthy
        return PlainTextResponse("ok\n" if healthy else "the engine fails\n", status_code=200 if healthy else 503)

    @app.get("/ready", response_class=PlainTextResponse)
    async def ready() -> Response:
        """200 while requests are taken; 503 while the service shuts down or is not healthy."""
        is_ready = service.is_healthy and not service.closing
        return PlainTextResponse("ready\n" if is_ready else "not ready\n", status_code=200 if is_ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        if not PAGE.is_file():
            return PlainTextResponse("This installation has no page; the interface is described at /docs\n", 404)
        headers = {"content-security-policy": "frame-ancestors 'none'"}  # which no <meta> can say; it has the rest
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)

    gate = Gate(
        app,
        service,
        token=token,
        max_bytes=int(max_body_mb * (1 << 20)),
        body_seconds=body_seconds,
        max_requests=max_requests,
        root_path=root_path,
    )
    if not cors:
        return gate
    # Outside the gate: a browser asks for leave without a token, and must be able to read refusals.
    return CORSMiddleware(
        gate,
        allow_origins=list(cors),
        allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
        allow_headers=["Authorization", "Content-Type"],
        expose_headers=["Retry-After"],
    )


class Gate:
    """Before every route: room, the token, the whole body within its limits, and the time that all takes.

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
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, method = time.monotonic(), HUNG_UP, scope["method"]
        path = scope["path"]
        if path == self._root_path or path.startswith(self._root_path + "/"):  # of a proxy that does not strip it
            path = path[len(self._root_path) :]
        path = path.rstrip("/") or "/"
        scope = {**scope, "path": self._root_path + path, "root_path": self._root_path}
        scope["method"] = "GET" if method == "HEAD" else method

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        self._room -= 1
        try:
            if self._room < 0 and path not in OPEN | {"/metrics"}:  # overload can be watched
                self._service.metrics.shed()
                await _refuse(noting, 503, "too many requests at one time", {"retry-after": "1"})
                return
            if self._token is not None and path not in OPEN and not self._has_token(scope):
                await _refuse(
                    noting, 401, "send the header Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"}
                )
                return
            try:
                body = await asyncio.wait_for(self._body(scope, receive), self._body_seconds)
            except TimeoutError:
                await _refuse(noting, 408, f"the body was not there after {self._body_seconds:g} s", _CLOSE)
            except _TooLarge as too_large:
                most = self._max_bytes / (1 << 20)
                error = f"the body is larger than {most:g} MiB: send less at once"
                discard = partial(self._discard, receive) if too_large.more else None
                await _refuse(noting, 413, error, _CLOSE, discard)
            else:
                if body and (refusal := _not_json(scope)):
                    await _refuse(noting, 415, refusal, {})
                elif body is not None:
                    await self._app(scope, _replayed(body, receive), noting)
        finally:
            self._room += 1
            route = getattr(scope.get("route"), "path", "other")
            self._service.metrics.request(method, route, status, time.monotonic() - began)

    def _has_token(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        assert self._token is not None
        return hmac.compare_digest(given, f"Bearer {self._token}".encode())

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client hung up before."""
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise _TooLarge(more=True)
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._max_bytes:
                raise _TooLarge(more=message.get("more_body", False))
            if not message.get("more_body", False):
                return b"".join(chunks)

    async def _discard(self, receive: Receive) -> None:
        """Reads on for a while: where a connection is closed on a client that still sends, its answer may be lost."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._body_seconds):
                size = 0
                while size < DISCARDED * self._max_bytes:
                    message = await receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
                    size += len(message.get("body", b""))


class _TooLarge(Exception):
    """`more` of the body is to come."""

    def __init__(self, more: bool) -> None:
        super().__init__()
        self.more = more


_CLOSE = {"connection": "close"}
"""What is left of such a body is no request."""


async def _refuse(
    send: Send,
    status: int,
    error: str,
    headers: dict[str, str],
    before_end: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Answer at once; the connection may be closed only after `before_end`."""
    body = json.dumps({"error": error, "unknown": []}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body, "more_body": before_end is not None})
    if before_end is not None:
        await before_end()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _not_json(scope: Scope) -> str | None:
    """Why a body that came cannot be read, by what its headers say."""
    headers = {name: value.decode("latin-1").strip().lower() for name, value in scope["headers"]}
    kind, encoding = headers.get(b"content-type", ""), headers.get(b"content-encoding", "")
    if encoding not in ("", "identity"):
        return f"a body with Content-Encoding {encoding} is not read: send it as it is"
    name = kind.partition(";")[0].strip()
    if not (name == "application/json" or (name.startswith("application/") and name.endswith("+json"))):
        return f"send JSON, with the header Content-Type: application/json (it was {name or 'absent'})"
    return None


def _json(body: bytes) -> Any:
    """What a body says. Raises JSONDecodeError, which names what is wrong with it."""
    try:
        return json.loads(body, object_pairs_hook=_once, parse_constant=_no_constant, parse_int=_whole_number)
    except RecursionError:
        raise json.JSONDecodeError("lists or objects are nested too deeply", "", 0) from None
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError(f"byte {error.start:,} is not {error.encoding.upper()}", "", 0) from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys are told apart: of two that are equal, one would count and the other not."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise json.JSONDecodeError(f"the key {twice!r} occurs twice in one object", "", 0)
    return found


def _no_constant(name: str) -> Any:
    raise json.JSONDecodeError(f"{name} is no number of JSON", "", 0)


def _whole_number(digits: str) -> int:
    if len(digits) > m.MAX_TEXT:
        raise json.JSONDecodeError(f"a number of {len(digits):,} digits", "", 0)
    return int(digits)


def _mistake(error: dict[str, Any]) -> str:
    """A mistake that pydantic found: where, in the form that was sent, and what."""
    if error["type"] == "json_invalid":
        return f"body: this is no JSON: {error['ctx']['error']}"
    where = ".".join(str(part) for part in error["loc"] if part not in m.TAGS)
    if error["type"] == "dataclass_type":
        return f"{where}: Input should be an object"
    if error["type"] == "unexpected_keyword_argument":
        return f"{where}: there is no such field here"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, then what else comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _hung_up(receive: Receive) -> Callable[[], Awaitable[None]]:
    """Returns when the client is gone."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    return wait


def _sendable(text: str) -> str:
    """Text that UTF-8 can say: JSON can name half a character, which it then shows escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
