"""The routes of the service: each hands its request to the service and returns the answer."""

# FastAPI evaluates the annotations of the routes, so that this module has no `from __future__ import annotations`.

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse

from cprec.serve import messages as m
from cprec.serve.service import Service
from cprec.serve.strict_json import StrictRoute

PAGE = Path(__file__).with_name("page.html")

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
    "query": {"summary": "Somebody new, who says what is wanted", "value": {"query": "quiet novel", "k": 5}},
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

CHANGE_PROBLEMS: dict[int | str, dict[str, Any]] = {
    409: {"model": m.Problem, "description": "The service has no folder for changes"},
    507: {"model": m.Problem, "description": "The disk cannot take the change, which was not made"},
}

router = APIRouter(route_class=StrictRoute)


async def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


AService = Annotated[Service, Depends(_service)]


# ---- lists and scores ------------------------------------------------------------------------------------------------


@router.post("/v1/recommend", response_model=m.RecommendResponse | m.RecommendResponses)
async def recommend(
    request: Request,
    service: AService,
    body: Annotated[m.RecommendBody, Body(openapi_examples=RECOMMEND_EXAMPLES)],
) -> Any:
    """The next items for one history or for several, by the deadline, and how each list was made."""
    if isinstance(body, m.RecommendRequests):
        return m.RecommendResponses(responses=await service.recommend(body.requests, _hung_up(request)))
    return (await service.recommend([body], _hung_up(request)))[0]


@router.post("/v1/baselines")
async def baselines(
    service: AService, body: Annotated[m.RecommendRequest, Body(openapi_examples={"one": RECOMMEND_EXAMPLES["one"]})]
) -> m.BaselinesResponse:
    """What the baselines recommend for the same history; `mode`, `deadline_ms` are not read."""
    return await service.baselines(body)


@router.post("/v1/score")
async def score(
    request: Request, service: AService, body: Annotated[m.ScoreRequest, Body(openapi_examples=SCORE_EXAMPLES)]
) -> m.ScoreResponse:
    """The score of each candidate after a history, in the order of the candidates."""
    return await service.score(body, _hung_up(request))


@router.post("/v1/explain")
async def explain(
    request: Request, service: AService, body: Annotated[m.ExplainRequest, Body(openapi_examples=EXPLAIN_EXAMPLES)]
) -> m.ExplainResponse:
    """What each part of the score, each event of a history, and the events of each domain together add to the score of
    an item."""
    return await service.explain(body, _hung_up(request))


def _hung_up(request: Request) -> Callable[[], Awaitable[None]]:
    """A function that returns when the client is gone."""

    async def wait() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return wait


# ---- items -----------------------------------------------------------------------------------------------------------


@router.get("/v1/items")
async def find_items(
    service: AService,
    query: Annotated[str, Query(description="words of the title, or an id", max_length=m.MAX_TEXT)] = "",
    domain: Annotated[str | None, Query(description="by default all domains")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> m.FoundItems:
    """Items in stock whose title has all words of the query, upper and lower case alike, or whose id it is."""
    return await service.stock.find(query, domain, limit)


@router.put("/v1/items", responses=CHANGE_PROBLEMS)
async def put_items(service: AService, body: Annotated[m.NewItems, Body(openapi_examples=ITEM_EXAMPLES)]) -> m.Changed:
    """Add items, change their text, or put back what was withdrawn: in effect and on disk with the answer."""
    return await service.stock.put(body.items)


@router.delete("/v1/items", responses=CHANGE_PROBLEMS)
async def withdraw_items(
    service: AService,
    item_id: Annotated[list[str], Query(description="the items, each as item_id=ID", min_length=1)],
    domain: Annotated[str | None, Query(description="by default the one that the model was made for")] = None,
) -> m.Changed:
    """Withdraw items. Once this is answered they are no longer recommended; histories may still name them."""
    return await service.stock.withdraw(domain, item_id)


# ---- the service itself ----------------------------------------------------------------------------------------------


@router.get("/v1/about")
async def about(service: AService) -> m.About:
    """The models, domains and baselines that are served."""
    return service.about()


@router.get("/health", response_class=PlainTextResponse)
async def health(service: AService) -> Response:
    """200 while the engine answers; 503 once it fails every time, and a restart may help."""
    healthy = service.is_healthy
    return PlainTextResponse("ok\n" if healthy else "the engine fails\n", status_code=200 if healthy else 503)


@router.get("/ready", response_class=PlainTextResponse)
async def ready(service: AService) -> Response:
    """200 while requests are taken; 503 while the service shuts down or is not healthy."""
    is_ready = service.is_healthy and not service.closing
    return PlainTextResponse("ready\n" if is_ready else "not ready\n", status_code=200 if is_ready else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: AService) -> Response:
    """Metrics in the text format of Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/", include_in_schema=False)
async def page() -> Response:
    if not PAGE.is_file():
        return PlainTextResponse("This installation has no page; the interface is described at /docs\n", 404)
    headers = {"content-security-policy": "frame-ancestors 'none'"}  # a <meta> of the page holds the rest of the policy
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)
