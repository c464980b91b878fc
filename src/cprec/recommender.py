"""The interface that all recommenders share: a ranking query in, a ranking out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from cprec.schema import Item


@dataclass(frozen=True, slots=True)
class RankingQuery:
    """One request for a ranking: the history, and the items to rank."""

    query_id: str
    domain: str
    """The domain whose items are ranked."""
    history: tuple[Item, ...]
    """Past events, oldest first; of `domain` only, or of every domain of the platform (mixed)."""
    candidates: tuple[str, ...] | None = None
    """Item ids of `domain` to rank; None ranks the full catalogue of the domain."""
    exclude: frozenset[str] = field(default_factory=frozenset)
    """Item ids of `domain` that must not be returned (the items already seen, say)."""
    allow: frozenset[str] | None = None
    """Item ids of `domain` that alone may be returned; None allows all."""
    user: str | None = None
    """Who asks, as platform/user_id, for recommenders that know users by name; None where it is not known."""
    uncounted: frozenset[str] = field(default_factory=frozenset)
    """Item ids of `domain` that do not count towards the K best: those of them that score at least as the K-th of the
    others are returned as well. With the items already seen here, one ranking says what it is with and without them."""
    text: str = ""
    """What is asked for, in words of items, for recommenders that read it; the others know the history alone. See
    `data.word_index.WordIndex`."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What is proven about a ranking of the full catalogue."""

    gap: float
    """By how much an item that was missed can at most beat the K-th in score; 0 if it is proven that there is none."""
    expanded: int
    """Prefixes of titles that the model read for it."""

    @property
    def exact(self) -> bool:
        return self.gap == 0


@dataclass(frozen=True, slots=True)
class Ranking:
    """Item ids, best first, with their scores, which never rise along the list.

    Items of equal score are tied: their order in the list means nothing, and metrics count the expected value over
    all orders. A ranking cut at K keeps every item tied with the K-th, so it may be longer than K. An item that is
    not in the list counts as not recommended.
    """

    query_id: str
    item_ids: tuple[str, ...]
    scores: tuple[float, ...]
    proof: Proof | None = None
    """None where nothing is proven, and where all items were scored."""


@runtime_checkable
class Recommender(Protocol):
    """Anything that ranks items for a history."""

    @property
    def name(self) -> str:
        """What it is called in tables."""
        ...

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """One ranking per query, in the order of the queries.

        `k` bounds the length for the full catalogue (ties with the K-th item, and the query's `uncounted` items that
        reach its score, come on top of it); a query with candidates gets all of them ranked, whatever `k`. A batch
        answers as single calls do.
        """
        ...
