"""The requests and answers of the HTTP service, as plain dataclasses that FastAPI checks and documents.

Limits are in the metadata of the fields, under the names that pydantic knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic_core import core_schema

from cprec.schema import MAX_WHOLE, id_text

MAX_K = 100
"""Items that one list may have."""
MAX_CANDIDATES = 1_000
"""Items that one request may have scored."""
MAX_REQUESTS = 256
"""Requests that one body may hold."""
MAX_TEXT = 2_000
"""Characters of an id, a title or a search."""
LONGEST_DEADLINE = 60_000.0
"""Milliseconds that a request may wait at most."""

STRICT: dict[str, Any] = {"extra": "forbid"}
"""An unknown field is refused: a filter with a misspelt name would not filter."""

TAGS = frozenset({"an event", "an id", "one", "several"})
"""Names of the two forms that an event, or a body, may have. Pydantic puts them into the path of an error as if they
were fields."""

HUNG_UP = 499
"""The status of a request whose client has gone; only the metrics show it."""


class Refused(Exception):
    """A request that is not answered as asked; the message is for the client."""

    def __init__(self, status: int, message: str, unknown: Sequence[str] = (), retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.unknown, self.retry_after = status, list(unknown), retry_after


class _Id:
    """Has pydantic accept whole numbers as ids, as the readers of files do."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(_as_id, handler(source))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Any:
        return {"anyOf": [handler(schema), {"type": "integer"}]}


def _as_id(value: Any) -> Any:
    if isinstance(value, str):
        return value
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < MAX_WHOLE)
    if isinstance(value, bool) or not is_whole:
        raise ValueError("an id is text or a whole number")
    return id_text(value)


Id = Annotated[str, _Id()]
"""An id, as text or as a whole number."""


class _Event:
    """Has pydantic tell an object from an id before it checks it, so that it reports the mistakes of one form only."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        forms = {"an event": handler.generate_schema(Event), "an id": handler.generate_schema(Id)}
        return core_schema.tagged_union_schema(
            forms, discriminator=lambda value: "an event" if isinstance(value, (dict, Event)) else "an id"
        )


class OneOrSeveral:
    """The same for a body, which holds several requests if it has a field `requests`."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        def form(value: Any) -> str:
            is_several = "requests" in value if isinstance(value, dict) else isinstance(value, RecommendRequests)
            return "several" if is_several else "one"

        forms = {
            "several": handler.generate_schema(RecommendRequests),
            "one": handler.generate_schema(RecommendRequest),
        }
        return core_schema.tagged_union_schema(forms, discriminator=form)


def _list(about: str, most: int | None = None, least: int | None = None) -> dict[str, Any]:
    limits = {"max_length": most, "min_length": least}
    return {"description": about, **{name: value for name, value in limits.items() if value is not None}}


_HISTORY = _list("past events, oldest first; the model reads the latest `max_history`, the filters all of them")
_DOMAIN = {"description": "the domain to recommend from; by default the one that the model was made for"}
_MODEL = {"description": "the name of a model of `GET /v1/about`; by default the first"}
_DEADLINE = {
    "description": "milliseconds until the answer must be there; by default the service's own",
    "gt": 0,
    "le": LONGEST_DEADLINE,
    "allow_inf_nan": False,
}


@dataclass(frozen=True, kw_only=True)
class Event:
    """A past event, by item id or by title."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    item_id: Id | None = None
    title: str | None = None
    domain: str | None = field(default=None, metadata={"description": "by default the one recommended from"})

    def __post_init__(self) -> None:
        if (self.item_id is None) == (self.title is None):
            raise ValueError("an event has an item_id or a title: give one of them")


AnyEvent = Annotated[Event | str, _Event()]
"""A past event, or its id or title alone."""


@dataclass(frozen=True, kw_only=True)
class RecommendRequest:
    """One user who is to be recommended something."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    history: list[AnyEvent] = field(metadata=_HISTORY)
    domain: str | None = field(default=None, metadata=_DOMAIN)
    k: int = field(default=10, metadata={"description": "items to return", "ge": 1, "le": MAX_K})
    exclude_seen: bool = field(default=True, metadata={"description": "leave out the items of the history"})
    allow: list[Id] | None = field(default=None, metadata=_list("item ids that alone may be returned"))
    deny: list[Id] = field(default_factory=list, metadata=_list("item ids that must not be returned"))
    mode: Literal["auto", "exact", "beam"] = field(
        default="auto",
        metadata={"description": "exact: search until proven; auto: the same within a budget; beam: a fixed cost"},
    )
    deadline_ms: float | None = field(default=None, metadata=_DEADLINE)
    model: str | None = field(default=None, metadata=_MODEL)


@dataclass(frozen=True, kw_only=True)
class RecommendRequests:
    """Several users in one body."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    requests: list[RecommendRequest] = field(metadata=_list("one answer each, in this order", MAX_REQUESTS, 1))


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """Candidates to score after a history."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    history: list[AnyEvent] = field(metadata=_HISTORY)
    candidates: list[Id] = field(metadata=_list("item ids of the domain", MAX_CANDIDATES, 1))
    domain: str | None = field(default=None, metadata=_DOMAIN)
    deadline_ms: float | None = field(default=None, metadata=_DEADLINE)
    model: str | None = field(default=None, metadata=_MODEL)


@dataclass(frozen=True, kw_only=True)
class ExplainRequest:
    """An item whose score is to be traced to the events of a history."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    history: list[AnyEvent] = field(metadata=_HISTORY)
    item_id: Id
    domain: str | None = field(default=None, metadata=_DOMAIN)
    deadline_ms: float | None = field(default=None, metadata=_DEADLINE)
    model: str | None = field(default=None, metadata=_MODEL)


@dataclass(frozen=True, kw_only=True)
class NewItem:
    """An item to add, or the new text of one that is there."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    item_id: Id = field(metadata={"min_length": 1, "max_length": MAX_TEXT})
    domain: str
    title: str = field(metadata={"min_length": 1, "max_length": MAX_TEXT})
    brand: str = field(default="", metadata={"max_length": MAX_TEXT})
    categories: str = field(default="", metadata={"max_length": MAX_TEXT})


@dataclass(frozen=True, kw_only=True)
class NewItems:
    """Items to add or change; all of them or, where one is wrong, none."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    items: list[NewItem] = field(metadata=_list("items to add or change", 10_000, 1))


# ---- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ScoredItem:
    """An item of a list."""

    item_id: str
    title: str
    score: float = field(
        metadata={"description": "log-probability of the item after the history; of a baseline's list, its own score"}
    )


@dataclass(frozen=True, kw_only=True)
class RecommendResponse:
    """A list, best first, and how it was made."""

    items: list[ScoredItem]
    mode: str = field(
        metadata={"description": "exact, beam, or the name of a baseline; popularity where the model reads no event"}
    )
    degraded: bool = field(metadata={"description": "the deadline, or a failure, left no better list"})
    proven: bool = field(metadata={"description": "the model ranks no other item higher"})
    milliseconds: float
    domain: str
    model: str


@dataclass(frozen=True, kw_only=True)
class RecommendResponses:
    """One list for each request, in their order."""

    responses: list[RecommendResponse]


@dataclass(frozen=True, kw_only=True)
class ScoreResponse:
    """The candidates in the order of the request."""

    items: list[ScoredItem]
    milliseconds: float
    domain: str
    model: str


@dataclass(frozen=True, kw_only=True)
class EventEffect:
    """What one event adds to the score."""

    item_id: str
    title: str
    domain: str
    effect: float = field(metadata={"description": "score with all events less score without this one"})


@dataclass(frozen=True, kw_only=True)
class DomainEffect:
    """What the events of a domain add to the score together."""

    domain: str
    effect: float


@dataclass(frozen=True, kw_only=True)
class ExplainResponse:
    """The score of an item, and what the events that the model read add to it."""

    item_id: str
    title: str
    score: float
    events: list[EventEffect]
    domains: list[DomainEffect]
    num_events_read: int = field(metadata={"description": "the latest of the history; the others have no effect"})
    milliseconds: float
    domain: str
    model: str


@dataclass(frozen=True, kw_only=True)
class BaselineList:
    """What a baseline recommends."""

    name: str
    items: list[ScoredItem]


@dataclass(frozen=True, kw_only=True)
class BaselinesResponse:
    """The lists of all baselines."""

    lists: list[BaselineList]


@dataclass(frozen=True, kw_only=True)
class FoundItem:
    """An item of the catalogue."""

    item_id: str
    domain: str
    title: str


@dataclass(frozen=True, kw_only=True)
class FoundItems:
    """What a search has found."""

    items: list[FoundItem]


@dataclass(frozen=True, kw_only=True)
class Changed:
    """How many items were changed, and how many of their domain are in stock now."""

    changed: int
    in_stock: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class DomainSize:
    """A domain and the items that can be recommended from it."""

    name: str
    num_items: int


@dataclass(frozen=True, kw_only=True)
class About:
    """What the service serves."""

    model: str
    models: list[str]
    domains: list[DomainSize]
    default_domain: str | None
    baselines: list[str]
    max_history: int
    version: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why a request was refused."""

    error: str
    unknown: list[str] = field(
        default_factory=list, metadata={"description": "item ids and titles that the catalogue does not have"}
    )
