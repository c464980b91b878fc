"""The requests and answers of the HTTP service, as models that FastAPI checks and documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import core_schema

from cprec.data.word_index import MAX_QUERY
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


class Sent(BaseModel):
    """Part of a request. An unknown field is refused: a filter with a misspelt name would not filter."""

    model_config = ConfigDict(extra="forbid")


class Event(Sent):
    """A past event, by item id or by title."""

    item_id: Id | None = None
    title: str | None = None
    domain: str | None = Field(default=None, description="by default the one recommended from")

    @model_validator(mode="after")
    def _has_one_name(self) -> Event:
        if (self.item_id is None) == (self.title is None):
            raise ValueError("an event has an item_id or a title: give one of them")
        return self


def _form_of_event(value: Any) -> str:
    return "an event" if isinstance(value, (dict, Event)) else "an id"


# The form is told before it is checked, so that the mistakes of one form alone are reported.
AnyEvent = Annotated[Annotated[Event, Tag("an event")] | Annotated[Id, Tag("an id")], Discriminator(_form_of_event)]
"""A past event, or its id or title alone."""
History = Annotated[
    list[AnyEvent],
    Field(description="past events, oldest first; the model reads the latest `max_history`, the filters all of them"),
]
Text = Annotated[
    str | None,
    Field(
        description="what is asked for, in words of titles, brands or categories; beside a history or instead of one",
        max_length=MAX_QUERY,
    ),
]
Domain = Annotated[
    str | None, Field(description="the domain to recommend from; by default the one that the model was made for")
]
Model = Annotated[str | None, Field(description="the name of a model of `GET /v1/about`; by default the first")]
Deadline = Annotated[
    float | None,
    Field(
        description="milliseconds until the answer must be there; by default the service's own",
        gt=0,
        le=LONGEST_DEADLINE,
        allow_inf_nan=False,
    ),
]


class Asked(Sent):
    """A request about somebody: who had something, asks for something, or both."""

    history: History = Field(default_factory=list)
    query: Text = None

    @model_validator(mode="after")
    def _has_history_or_query(self) -> Self:
        if "history" not in self.model_fields_set and self.query is None:
            raise ValueError("give a history, which may be empty, a query, or both")
        return self


class RecommendRequest(Asked):
    """One user who is to be recommended something."""

    domain: Domain = None
    k: int = Field(default=10, description="items to return", ge=1, le=MAX_K)
    exclude_seen: bool = Field(default=True, description="leave out the items of the history")
    allow: list[Id] | None = Field(default=None, description="the only item ids that may be returned")
    deny: list[Id] = Field(default_factory=list, description="item ids that must not be returned")
    mode: Literal["auto", "exact", "beam"] = Field(
        default="auto", description="exact: search until proven; auto: the same within a budget; beam: a fixed cost"
    )
    deadline_ms: Deadline = None
    model: Model = None


class RecommendRequests(Sent):
    """Several users in one body."""

    requests: list[RecommendRequest] = Field(
        description="one answer each, in this order", max_length=MAX_REQUESTS, min_length=1
    )


def _form_of_body(value: Any) -> str:
    is_several = "requests" in value if isinstance(value, dict) else isinstance(value, RecommendRequests)
    return "several" if is_several else "one"


RecommendBody = Annotated[
    Annotated[RecommendRequests, Tag("several")] | Annotated[RecommendRequest, Tag("one")],
    Discriminator(_form_of_body),
]
"""One request or, where a body has a field `requests`, several."""


class ScoreRequest(Asked):
    """Candidates to score after a history."""

    candidates: list[Id] = Field(description="item ids of the domain", max_length=MAX_CANDIDATES, min_length=1)
    domain: Domain = None
    deadline_ms: Deadline = None
    model: Model = None


class ExplainRequest(Asked):
    """An item whose score is to be traced to the events of a history and the words of a query."""

    item_id: Id
    domain: Domain = None
    deadline_ms: Deadline = None
    model: Model = None


class NewItem(Sent):
    """An item to add, or the new text of one that is there."""

    item_id: Id = Field(min_length=1, max_length=MAX_TEXT)
    domain: str
    title: str = Field(min_length=1, max_length=MAX_TEXT)
    brand: str = Field(default="", max_length=MAX_TEXT)
    categories: str = Field(default="", max_length=MAX_TEXT)


class NewItems(Sent):
    """Items to add or change; all of them or, where one is wrong, none."""

    items: list[NewItem] = Field(description="items to add or change", max_length=10_000, min_length=1)


# ---- answers ---------------------------------------------------------------------------------------------------------


class ScoredItem(BaseModel):
    """An item of a list."""

    item_id: str
    title: str
    score: float = Field(
        description="log-probability of the item after the history, or with a blend the blended score, to which the "
        "words of a query add; of a baseline's list, its own"
    )


class RecommendResponse(BaseModel):
    """A list, best first, and how it was made."""

    items: list[ScoredItem]
    mode: str = Field(
        description="exact, beam, how else the model ranks (vectors, letters), or the name of a baseline; popularity "
        "where the model reads no event. With a query: query, query and history, or words where the model had no time"
    )
    degraded: bool = Field(description="the deadline, or a failure, left no better list")
    proven: bool = Field(description="the model ranks no other item higher")
    milliseconds: float
    domain: str
    model: str


class RecommendResponses(BaseModel):
    """One list for each request, in their order."""

    responses: list[RecommendResponse]


class ScoreResponse(BaseModel):
    """The candidates in the order of the request."""

    items: list[ScoredItem]
    milliseconds: float
    domain: str
    model: str


class PartEffect(BaseModel):
    """What one part of the score adds to that of an average item of the domain."""

    name: str = Field(description="the language model, a recommender of its blend, or the query")
    weight: float = Field(description="of the part in the score")
    effect: float = Field(description="weight * log(r): the part gives this item r times the score of an average item")


class WordEffect(BaseModel):
    """What a word of the query, which the item has, adds to its score."""

    word: str
    effect: float = Field(description="beside an item without the word")


class EventEffect(BaseModel):
    """What one event adds to the score."""

    item_id: str
    title: str
    domain: str
    effect: float = Field(description="the sum of the parts' effects with all events less that without this one")


class DomainEffect(BaseModel):
    """What the events of a domain add to the score together."""

    domain: str
    effect: float


class ExplainResponse(BaseModel):
    """The score of an item, what each part of it adds, and what the words and the events add that count."""

    item_id: str
    title: str
    score: float
    parts: list[PartEffect] = Field(description="their effects sum up to how far the score is above an average item's")
    words: list[WordEffect] = Field(description="those of the query that the item has, the largest effect first")
    events: list[EventEffect] = Field(description="of those that count, the latest, oldest first")
    domains: list[DomainEffect]
    num_events_read: int = Field(description="events of the history that count; the others have no effect")
    milliseconds: float
    domain: str
    model: str


class BaselineList(BaseModel):
    """What a baseline recommends."""

    name: str
    items: list[ScoredItem]


class BaselinesResponse(BaseModel):
    """The lists of all baselines."""

    lists: list[BaselineList]


class FoundItem(BaseModel):
    """An item of the catalogue."""

    item_id: str
    domain: str
    title: str


class FoundItems(BaseModel):
    """What a search has found."""

    items: list[FoundItem]


class Changed(BaseModel):
    """How many items were changed, and how many of their domain are in stock now."""

    changed: int
    in_stock: dict[str, int]


class DomainSize(BaseModel):
    """A domain and the items that can be recommended from it."""

    name: str
    num_items: int


class Served(BaseModel):
    """A model that is served."""

    name: str
    domains: list[str] = Field(description="those that it recommends from")
    parts: list[str] = Field(
        description="what its score is the sum of: the language model, and what is blended with it"
    )


class About(BaseModel):
    """What the service serves."""

    model: str
    models: list[str]
    served: list[Served] = Field(description="what is to know of each model, in the same order")
    domains: list[DomainSize]
    default_domain: str | None
    baselines: list[str]
    max_history: int
    version: str


class Problem(BaseModel):
    """Why a request was refused."""

    error: str
    unknown: list[str] = Field(default_factory=list, description="item ids and titles that the catalogue does not have")
