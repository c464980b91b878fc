"""The interface that the service needs of a model, and the queries that it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from cprec.data.catalogue import Catalogue
from cprec.recommender import Ranking, RankingQuery, Recommender
from cprec.schema import Item


class CacheCounts(Protocol):
    """Counts of the prompts that an engine keeps."""

    max_bytes: int
    num_bytes: int
    hits: int
    """Tokens that were kept and needed no reading."""


class Engine(Protocol):
    """A model over a catalogue, which may take queries in words. It never changes: other items make another engine,
    which shares the model.

    The service calls `rank` from one thread at a time, and the other methods from any.
    """

    name: str
    """Its name in answers."""
    domain: str | None
    """The domain that it was made for; None if it was made for all."""
    catalogue: Catalogue
    """All items that histories may name, including those withdrawn."""
    withdrawn: Mapping[str, frozenset[str]]
    """Item ids by domain that are in the catalogue but are never recommended."""
    max_history: int
    """The most events of a history that the model reads."""

    @property
    def way(self) -> str | None:
        """How it ranks, for answers; None where rankings say by their proofs whether they are exact."""

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that it recommends from; histories may name items of others."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The parts that a score is a weighted sum of, by name."""

    @property
    def item_fields(self) -> tuple[str, ...]:
        """The fields that stand for an item in every text: its title, and perhaps others. Items that agree in them look
        the same to whoever reads a list."""

    @property
    def cache(self) -> CacheCounts | None:
        """The prompts that it keeps; None if it keeps none."""

    def rank(
        self,
        queries: Sequence[RankingQuery],
        k: int,
        mode: Any = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Ranking]:
        """As `Recommender.rank`, in mode exact, auto or beam. Once `stop()` is true, the best found so far."""

    def asked_in_words(self, query: RankingQuery, text: str) -> RankingQuery:
        """A query that is asked in words as well. Raises ConfigError where none are taken, DataError for a text that
        says nothing of the items that may be returned."""

    def shown(self, query: RankingQuery) -> tuple[Item, ...]:
        """The events of a query's history that count: those that some part of the score reads."""

    def effects(self, queries: Sequence[RankingQuery], rankings: Sequence[Ranking]) -> Sequence[Mapping[str, float]]:
        """What each part adds to the score of a query's one candidate, compared with an average item; they sum up.
        Where the words of a text are added, they are the part QUERY, whose weight is the sum of `weights`."""

    def with_items(self, catalogue: Catalogue, withdrawn: Mapping[str, frozenset[str]]) -> Engine:
        """An engine with other items that shares the model. Raises CPRecError for items that it cannot take."""


class Recommends(Engine, Protocol):
    """What `cprec recommend` needs of a recommender."""

    def recommend(
        self,
        history: Sequence[Any],
        k: int = 10,
        *,
        domain: str | None = None,
        exclude_seen: bool = True,
        query: str | None = None,
    ) -> Sequence[Any]:
        """A list for one history of ids or titles, a query in words, or both, best first."""


def list_query(
    engine: Engine,
    domain: str,
    history: tuple[Item, ...],
    *,
    exclude_seen: bool = True,
    allow: Iterable[str] | None = None,
    deny: Iterable[str] = (),
    text: str = "",
) -> RankingQuery:
    """A query for a list. With `exclude_seen`, items that look the same as one of the history are left out too. For a
    text see `Engine.asked_in_words`, which may raise."""
    seen = [item.item_id for item in history if item.domain == domain and exclude_seen]
    query = RankingQuery(
        query_id="",
        domain=domain,
        history=history,
        exclude=engine.catalogue.of_equal_text(domain, seen, engine.item_fields) | frozenset(deny),
        allow=None if allow is None else frozenset(allow),
    )
    return engine.asked_in_words(query, text) if text else query


def score_query(domain: str, history: tuple[Item, ...], item_ids: Iterable[str], text: str = "") -> RankingQuery:
    """A query for the scores of items, each of them once."""
    candidates = tuple(dict.fromkeys(item_ids))
    return RankingQuery(query_id="", domain=domain, history=history, candidates=candidates, text=text)


def reads_nothing(engine: Engine, query: RankingQuery) -> bool:
    """Whether the engine reads no event of the history, so that without a text its list would be the same for
    everybody."""
    in_domain = any(item.domain == query.domain for item in query.history)
    return not in_domain and not (query.history and engine.shown(query))


class Baseline(Recommender, Protocol):
    """A recommender that answers at once, for when the model has no time."""

    catalogue: Catalogue
    """The items that it knows; items added later are not among them."""
