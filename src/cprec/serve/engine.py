"""What the service needs of a model: the one interface of all engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from cprec.data.catalogue import Catalogue
from cprec.recommender import Ranking, RankingQuery, Recommender
from cprec.schema import Item


class CacheCounts(Protocol):
    """What an engine tells of the prompts that it keeps."""

    max_bytes: int
    num_bytes: int
    hits: int
    """Tokens that were found and needed no reading."""


class Engine(Protocol):
    """A model over a catalogue. It never changes: other items make another engine, which shares the model.

    The service calls `rank` from one thread at a time, and the other methods from any.
    """

    @property
    def name(self) -> str:
        """What it is called in answers."""
        ...

    @property
    def domain(self) -> str | None:
        """The domain that it was made for; None where it was made for all."""
        ...

    @property
    def catalogue(self) -> Catalogue:
        """All items that histories may name, those withdrawn included."""
        ...

    @property
    def withdrawn(self) -> Mapping[str, frozenset[str]]:
        """Item ids by domain that are in the catalogue and never recommended."""
        ...

    @property
    def max_history(self) -> int:
        """The most events of a history that are read."""
        ...

    @property
    def item_fields(self) -> tuple[str, ...]:
        """What stands for an item in every text: its title, and perhaps other fields. Items that have the same are one
        to whoever reads a list."""
        ...

    @property
    def cache(self) -> CacheCounts | None:
        """What it keeps of prompts; None where it keeps nothing."""
        ...

    def rank(
        self,
        queries: Sequence[RankingQuery],
        k: int,
        mode: Any = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Ranking]:
        """As `Recommender.rank`, in mode exact, auto or beam. Once `stop()` is true, the best found, with its gap."""
        ...

    def shown(self, query: RankingQuery) -> tuple[Item, ...]:
        """The events of a history that are read."""
        ...

    def with_items(self, catalogue: Catalogue, withdrawn: Mapping[str, frozenset[str]]) -> Engine:
        """An engine of other items, which shares the model. Raises CPRecError for items that it cannot take."""
        ...


def reads_nothing(engine: Engine, query: RankingQuery) -> bool:
    """Whether the engine reads no event of a history: what it would say is the same for everybody."""
    in_domain = any(item.domain == query.domain for item in query.history)
    return not in_domain and not (query.history and engine.shown(query))


class Baseline(Recommender, Protocol):
    """A recommender that answers at once, where the model has no time."""

    @property
    def catalogue(self) -> Catalogue:
        """The items that it knows; new ones are not among them."""
        ...
