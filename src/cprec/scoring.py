"""Recommenders that score every item of a domain: from scores to rankings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar, Literal, Self

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError
from cprec.recommender import Ranking, RankingQuery

BATCH = 256
"""Queries whose scores exist at once."""


class ScoringRecommender(ABC):
    """A recommender that scores every item of a domain: a subclass says how, `rank` does the rest.

    Suffixes: Q queries, N items of the domain, in catalogue order.
    """

    name: str
    catalogue: Catalogue
    floor: float = -np.inf
    """An item scored this or less has nothing that speaks for it: it is not returned from the full catalogue, and
    stands last among candidates."""
    scale: ClassVar[Literal["share", "logit"]] = "share"
    """What a score means beside the others of its query: `share`, as much as it is large, and nothing at 0 or below; or
    `logit`, the logarithm of that."""
    least_share: ClassVar[float] = 0.0
    """The least that an item's share of the best score can be."""

    _latest: tuple[Mapping[Hashable, int], np.ndarray] = ({}, np.empty((0, 0)))
    """The latest batch of queries by row, and their scores: other protocols ask the same queries again."""

    @abstractmethod
    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """Scores of the domain's items for queries of that domain: float[Q, N], higher is better.

        What a query leaves out, allows or offers as candidates is not its concern.
        """

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`."""
        out: list[Ranking | None] = [None] * len(queries)
        for domain in dict.fromkeys(query.domain for query in queries):
            members = [number for number, query in enumerate(queries) if query.domain == domain]
            for start in range(0, len(members), BATCH):
                chosen = members[start : start + BATCH]
                asked = [queries[number] for number in chosen]
                rows_QN = self._scores_once(domain, asked)
                for number, query, row_N in zip(chosen, asked, rows_QN, strict=True):
                    out[number] = ranking_of(self.catalogue, query, row_N, k, self.floor)
        return [ranking for ranking in out if ranking is not None]

    def _scores_once(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """`scores`, or the latest ones where that batch had all of these queries, whatever they leave out or allow."""
        keys = [(domain, query.query_id, query.user, query.history) for query in queries]
        row_of, rows_QN = self._latest
        if not all(key in row_of for key in keys):
            rows_QN = self.scores(domain, queries)
            rows_QN = rows_QN if rows_QN.dtype.kind == "f" else rows_QN.astype(float)
            self._latest = {key: row for row, key in enumerate(keys)}, rows_QN
            return rows_QN
        return rows_QN[[row_of[key] for key in keys]]

    def histories(self, domain: str, queries: Sequence[RankingQuery]) -> Ragged:
        """See `histories_of`."""
        return histories_of(self.catalogue, domain, queries)


class StoredRecommender(ScoringRecommender):
    """One whose state is a few arrays: it can be written beside a model, and opened again without its training data."""

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """All that its scores depend on beside the catalogue, by name; text and numbers as arrays of no dimension."""

    @abstractmethod
    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the state from what `arrays` gave; the catalogue is there already."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], catalogue: Catalogue) -> Self:
        """The recommender that gave the arrays; `catalogue` must be the one that it was made for."""
        made = cls.__new__(cls)
        made.catalogue = catalogue
        made._restore(arrays)
        return made


def ranking_of(
    catalogue: Catalogue, query: RankingQuery, score_N: np.ndarray, k: int, floor: float = -np.inf
) -> Ranking:
    """A query's ranking by the scores of all items of its domain, in the order of the catalogue.

    Ties with the K-th item are kept; equal scores stand by item id. For `floor` see `ScoringRecommender`.
    """
    first = int(catalogue.rows_of(query.domain)[0])

    def positions(items: frozenset[str]) -> np.ndarray:
        found: np.ndarray = catalogue.find(query.domain, items) - first
        return found

    permitted_N = np.full(len(score_N), query.allow is None)
    permitted_N[positions(query.allow or frozenset())] = True
    permitted_N[positions(query.exclude)] = False
    if query.candidates is not None:
        order = catalogue.find(query.domain, query.candidates) - first
        score = np.maximum(score_N[order], floor)
    else:
        counted_N = score_N.copy()
        counted_N[~permitted_N] = -np.inf
        counted_N[positions(query.uncounted)] = -np.inf
        bound = kth_largest(counted_N, min(k, len(counted_N)))
        order = np.flatnonzero((score_N >= bound) & (score_N > floor))
        score = score_N[order]
    kept = permitted_N[order] & (score > -np.inf)
    order, score = order[kept], score[kept].astype(float)
    best = np.lexsort((order, -score))
    ids = catalogue.item_id[first + order[best]].tolist()
    return Ranking(query.query_id, tuple(ids), tuple(score[best].tolist()))


def histories_of(catalogue: Catalogue, domain: str, queries: Sequence[RankingQuery]) -> Ragged:
    """Each query's events in the domain, oldest first, as positions among the domain's items.

    Raises UnknownItemError for items that the catalogue does not have.
    """
    items = [[item.item_id for item in query.history if item.domain == domain] for query in queries]
    first = int(catalogue.rows_of(domain)[0])
    found = catalogue.find(domain, [item for of_query in items for item in of_query]) - first
    return Ragged(found, offsets_of(np.array([len(of_query) for of_query in items], dtype=np.int64)))


def kth_largest(values: np.ndarray, k: int) -> float:
    """The K-th largest of some numbers, of which equal ones count apart.

    The K-th largest of the maxima of blocks is no larger than it, so only what reaches that is sorted: much quicker
    than a partition where most numbers are equal, as scores of sparse graphs are.

    >>> kth_largest(np.array([0.0, 3.0, 1.0, 3.0]), 2), kth_largest(np.array([0.0, 3.0, 1.0, 3.0]), 3)
    (3.0, 1.0)
    """
    starts = np.arange(0, len(values), max(1, len(values) // (8 * k)))
    bound = np.sort(np.maximum.reduceat(values, starts))[-k]
    reached = values[values >= bound]
    return float(np.sort(reached)[len(reached) - k])


def check_domain(name: str, made_for: Sequence[str], asked: str) -> None:
    """Raise ConfigError unless a recommender was made for the domain that it is asked about."""
    if asked not in made_for:
        raise ConfigError(
            f"{name} was made for domain {', '.join(map(repr, made_for))} and is asked about {asked!r}: "
            "make one for that domain"
        )
