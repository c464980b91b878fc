"""The HTTP interface as an ASGI application: the routes, the form of errors, and the gate before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from cprec import __version__
from cprec.serve import messages as m
from cprec.serve.gate import Gate
from cprec.serve.routes import router
from cprec.serve.service import Service

MOST_MISTAKES = 5
"""Errors of a request that a refusal lists at most."""

PROBLEMS: dict[int | str, dict[str, Any]] = {
    401: {"model": m.Problem, "description": "The token is missing or wrong"},
    408: {"model": m.Problem, "description": "The body took too long"},
    413: {"model": m.Problem, "description": "The body is too large"},
    415: {"model": m.Problem, "description": "The body is not JSON, or is compressed"},
    422: {"model": m.Problem, "description": "A field is wrong, or names what is not in the catalogue"},
    503: {"model": m.Problem, "description": "Overload, or no time: try again after `Retry-After` seconds"},
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
    gate = Gate(
        _application(service),
        service,
        token=token,
        max_bytes=int(max_body_mb * (1 << 20)),
        body_seconds=body_seconds,
        max_requests=max_requests,
        root_path=root_path,
    )
    if not cors:
        return gate
    # Outside the gate: a browser asks for permission without a token, and must be able to read refusals.
    return CORSMiddleware(
        gate,
        allow_origins=list(cors),
        allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
        allow_headers=["Authorization", "Content-Type"],
        expose_headers=["Retry-After"],
    )


def _application(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="CPRec",
        version=__version__,
        description="Next-item recommendations by a language model over the titles of a catalogue.",
        lifespan=lifespan,
        responses=PROBLEMS,
        redirect_slashes=False,
    )
    app.state.service = service
    app.include_router(router)
    app.add_exception_handler(m.Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _broken)
    return app


# ---- errors ----------------------------------------------------------------------------------------------------------


async def _refused(_: Request, error: Any) -> JSONResponse:
    headers = None if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return _problem(error.status, str(error), error.unknown, headers)


async def _invalid(_: Request, error: Any) -> JSONResponse:
    found = [_mistake(each) for each in error.errors()]
    more = f"; and {len(found) - MOST_MISTAKES} more" if len(found) > MOST_MISTAKES else ""
    return _problem(422, "; ".join(found[:MOST_MISTAKES]) + more)


async def _http_error(_: Request, error: Any) -> JSONResponse:
    return _problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))


async def _broken(_: Request, error: Exception) -> JSONResponse:
    return _problem(500, "an error in the service; see its log")


def _problem(
    status: int, error: str, unknown: Sequence[str] = (), headers: dict[str, str] | None = None
) -> JSONResponse:
    body = {"error": _sendable(error), "unknown": [_sendable(text) for text in unknown]}
    return JSONResponse(body, status_code=status, headers=headers)


def _sendable(text: str) -> str:
    """Text that can be written as UTF-8: half of a surrogate pair, which JSON can name, is shown escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _mistake(error: dict[str, Any]) -> str:
    """A mistake that pydantic found: where in the form that was sent, and what."""
    if error["type"] == "json_invalid":
        return f"body: this is not valid JSON: {error['ctx']['error']}"
    where = ".".join(str(part) for part in error["loc"] if part not in m.TAGS)
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"{where}: Input should be an object"
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such field here"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"
