"""Strict JSON: a request whose meaning would depend on its reader is refused, not guessed."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from cprec.serve.messages import MAX_TEXT


class StrictRequest(Request):
    """A request whose JSON is read by `read_json`."""

    async def json(self) -> Any:
        return read_json(await self.body())


class StrictRoute(APIRoute):
    """A route whose handler gets a StrictRequest."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return handle_strictly


def read_json(body: bytes) -> Any:
    """The value of a body. Raises JSONDecodeError, which names what is wrong with it."""
    try:
        return json.loads(body, object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)
    except RecursionError:
        raise json.JSONDecodeError("lists or objects are nested too deeply", "", 0) from None
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError(f"byte {error.start:,} is not {error.encoding.upper()}", "", 0) from None


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of two equal ones only the last would count."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise json.JSONDecodeError(f"the key {twice!r} occurs twice in one object", "", 0)
    return found


def _constant(name: str) -> Any:
    """NaN and Infinity, which Python's reader would accept."""
    raise json.JSONDecodeError(f"{name} is no number of JSON", "", 0)


def _integer(digits: str) -> int:
    if len(digits) > MAX_TEXT:  # Python takes quadratic time for it
        raise json.JSONDecodeError(f"a number of {len(digits):,} digits", "", 0)
    return int(digits)
