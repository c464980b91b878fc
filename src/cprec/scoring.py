"""Recommenders that score every item of a domain: from scores to rankings."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Hashable, Mapping, Sequence
from itertools import chain, pairwise
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError, CPRecError
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item

BATCH = 256
"""Queries whose scores exist at once."""
CELLS = 1_000_000
"""Scores that are searched at once: this bounds the memory that lists need."""


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

    _latest: tuple[Mapping[Hashable, tuple[int, tuple[Item, ...]]], np.ndarray] = ({}, np.empty((0, 0)))
    """The latest batch of queries by row, with their histories, and their scores: other protocols ask the same queries
    again."""

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
                rows_QN = self.scores_once(domain, asked)
                made = rankings_of(self.catalogue, asked, rows_QN, k, self.floor)
                for number, ranking in zip(chosen, made, strict=True):
                    out[number] = ranking
        return [ranking for ranking in out if ranking is not None]

    def scores_once(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """`scores`, or the latest ones where that batch had all of these queries, whatever they leave out or allow."""
        # A history is compared, not hashed: protocols share one tuple, and to compare it with itself costs nothing.
        keys = [(domain, query.query_id, query.user, query.text) for query in queries]
        known, rows_QN = self._latest
        found = [known.get(key, (-1, ())) for key in keys]
        if all(row >= 0 and past == query.history for (row, past), query in zip(found, queries, strict=True)):
            rows = [row for row, _ in found]
            return rows_QN if rows == list(range(len(rows_QN))) else rows_QN[rows]
        rows_QN = self.scores(domain, queries)
        rows_QN = rows_QN if rows_QN.dtype.kind == "f" else rows_QN.astype(float)
        histories = [query.history for query in queries]
        self._latest = dict(zip(keys, enumerate(histories), strict=True)), rows_QN
        return rows_QN

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

    def with_catalogue(self, catalogue: Catalogue) -> Self | None:
        """The same over another catalogue of the same domains, to which items came: it tells by their titles what they
        are, learns nothing, and what it says of the others stays as it is. None where it can say nothing of items that
        came after."""
        return None

    def _over(self, catalogue: Catalogue) -> Self:
        """A copy over another catalogue, to be changed."""
        made = copy.copy(self)
        made.catalogue, made._latest = catalogue, ScoringRecommender._latest
        return made

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], catalogue: Catalogue) -> Self:
        """The recommender that gave the arrays; `catalogue` must be the one that it was made for."""
        made = cls.__new__(cls)
        made.catalogue = catalogue
        made._restore(arrays)
        return made


# ---- from scores to rankings -----------------------------------------------------------------------------------------


def rankings_of(
    catalogue: Catalogue, queries: Sequence[RankingQuery], scores_QN: np.ndarray, k: int, floor: float = -np.inf
) -> list[Ranking]:
    """Rankings of queries of one domain by the scores of all its items, float[Q, N] in the order of the catalogue.

    Ties with the K-th item are kept; equal scores stand by item id; what scored minus infinity is never returned. For
    `floor` see `ScoringRecommender`. Raises CPRecError where an item to choose from, or to leave uncounted, scored NaN.
    """
    step = max(1, CELLS // scores_QN.shape[1])
    return [
        ranking
        for start in range(0, len(queries), step)
        for ranking in _rankings_of(catalogue, queries[start : start + step], scores_QN[start : start + step], k, floor)
    ]


def _rankings_of(
    catalogue: Catalogue, queries: Sequence[RankingQuery], scores_QN: np.ndarray, k: int, floor: float
) -> list[Ranking]:
    domain = queries[0].domain
    permitted_QN = _permitted(catalogue, domain, queries, scores_QN.shape)
    offered = positions_of(catalogue, domain, [query.candidates or () for query in queries])
    listed = _of_candidates(scores_QN, permitted_QN, offered, floor)
    offers_Q = np.array([query.candidates is not None for query in queries])
    if not offers_Q.all():
        counted_QN = scores_QN.copy()
        counted_QN[offers_Q] = -np.inf
        if permitted_QN is not None:
            np.copyto(counted_QN, -np.inf, where=~permitted_QN)
        uncounted = positions_of(catalogue, domain, [query.uncounted for query in queries])
        best = _best(counted_QN, uncounted, k, floor)
        if np.isnan(best.score).any():
            broken = queries[best.row[np.isnan(best.score)][0]]
            raise CPRecError(f"query {broken.query_id!r} got a score that is NaN: its model is broken")
        listed = listed.joined(best)
    order = np.lexsort((listed.column, -listed.score, listed.row))
    ids = catalogue.item_id[catalogue.rows_of(domain)[0] + listed.column[order]].tolist()
    scores = listed.score[order].astype(float).tolist()
    bounds = offsets_of(np.bincount(listed.row, minlength=len(queries))).tolist()
    return [
        Ranking(query.query_id, tuple(ids[start:stop]), tuple(scores[start:stop]))
        for query, (start, stop) in zip(queries, pairwise(bounds), strict=True)
    ]


class Listed(NamedTuple):
    """Items of lists, in any order."""

    row: np.ndarray
    """The query of each: int64[E]."""
    column: np.ndarray
    """Its place among the domain's items: int64[E]."""
    score: np.ndarray
    """float[E]."""

    def where(self, kept_E: np.ndarray) -> Listed:
        return Listed(*(values[kept_E] for values in self))

    def joined(self, others: Listed) -> Listed:
        return Listed(*(np.concatenate(pair) for pair in zip(self, others, strict=True)))


def _permitted(
    catalogue: Catalogue, domain: str, queries: Sequence[RankingQuery], shape: tuple[int, ...]
) -> np.ndarray | None:
    """Whether a query may return an item: bool[Q, N]; None where each may return all."""
    if not any(query.exclude or query.allow is not None for query in queries):
        return None
    permitted_QN = np.ones(shape, dtype=bool)
    rows_of: dict[frozenset[str], list[int]] = {}  # many queries allow the same items: these are found once
    for row, query in enumerate(queries):
        if query.allow is not None:
            rows_of.setdefault(query.allow, []).append(row)
    for allow, rows in rows_of.items():
        permitted_QN[rows] = False
        permitted_QN[np.ix_(np.array(rows), positions_of(catalogue, domain, [allow]).values)] = True
    excluded = positions_of(catalogue, domain, [query.exclude for query in queries])
    permitted_QN[excluded.row_of, excluded.values] = False
    return permitted_QN


def _of_candidates(scores_QN: np.ndarray, permitted_QN: np.ndarray | None, offered: Ragged, floor: float) -> Listed:
    """All candidates that are permitted and have a score; one scored less than the floor has that."""
    row, column = offered.row_of, offered.values
    found = Listed(row, column, np.maximum(scores_QN[row, column], floor))
    kept_E = found.score > -np.inf
    return found.where(kept_E if permitted_QN is None else kept_E & permitted_QN[row, column])


def _best(counted_QN: np.ndarray, uncounted: Ragged, k: int, floor: float) -> Listed:
    """The K best items above the floor, those tied with the K-th, and uncounted ones as good; or items of score NaN.

    `counted_QN` are the scores, minus infinity for items that a query may not return; it is written to.
    """
    row, column = uncounted.row_of, uncounted.values
    aside = Listed(row, column, counted_QN[row, column])
    counted_QN[row, column] = -np.inf
    # What reaches a bound below the K-th is sorted, and nothing else.
    bound_Q = below_kth(counted_QN, k)
    reached_QN = counted_QN >= bound_Q[:, None]
    low_Q = ~(bound_Q > floor)
    reached_QN[low_Q] = ~(counted_QN[low_Q] <= floor)
    row, column = np.divmod(np.flatnonzero(reached_QN), counted_QN.shape[1])
    counted = Listed(row, column, counted_QN[row, column])
    found = counted.joined(aside)
    if (wrong_E := np.isnan(found.score)).any():
        return found.where(wrong_E)
    kth_Q = _kth(counted, k, len(counted_QN))
    return found.where((found.score > floor) & (found.score >= kth_Q[found.row]))


def below_kth(values_QN: np.ndarray, k: int) -> np.ndarray:
    """A number for each row that is not above the K-th largest of it, of which equal ones count apart: float[Q].

    It is the K-th largest of the maxima of blocks, so that hardly more than K numbers reach it. A partition of the row
    takes several times as long, and many times where most numbers are equal, as scores of sparse graphs are. NaN where
    the row has NaN, and minus infinity where it has fewer than K.

    >>> below_kth(np.array([[0.0, 3.0, 1.0, 3.0]]), 2).tolist(), below_kth(np.array([[0.0, 3.0]]), 3).tolist()
    ([3.0], [-inf])
    """
    num_values = values_QN.shape[1]
    starts = np.arange(0, num_values, max(1, num_values // (8 * k)))
    sorted_QB = np.sort(np.maximum.reduceat(values_QN, starts, axis=1), axis=1)  # NaN comes last
    bound_Q = sorted_QB[:, -k] if len(starts) >= k else np.full(len(values_QN), -np.inf)
    return np.where(np.isnan(sorted_QB[:, -1]), np.nan, bound_Q)


def _kth(listed: Listed, k: int, num_rows: int) -> np.ndarray:
    """The K-th largest score of each row, minus infinity where it has fewer: float[Q]."""
    size_Q = np.bincount(listed.row, minlength=num_rows)
    enough_Q = size_Q >= k
    sorted_E = listed.score[np.lexsort((-listed.score, listed.row))]
    kth_Q = np.full(num_rows, -np.inf)
    kth_Q[enough_Q] = sorted_E[(np.cumsum(size_Q) - size_Q)[enough_Q] + k - 1]
    return kth_Q


# ---- items as positions ----------------------------------------------------------------------------------------------


def histories_of(catalogue: Catalogue, domain: str, queries: Sequence[RankingQuery]) -> Ragged:
    """Each query's events in the domain, oldest first, as positions among the domain's items.

    Raises UnknownItemError for items that the catalogue does not have.
    """
    items = [[item.item_id for item in query.history if item.domain == domain] for query in queries]
    return positions_of(catalogue, domain, items)


def positions_of(catalogue: Catalogue, domain: str, items_Q: Sequence[Collection[str]]) -> Ragged:
    """Items of each query as positions among the domain's items, in the order given.

    Raises UnknownItemError for items that the catalogue does not have.
    """
    found = catalogue.find(domain, chain.from_iterable(items_Q)) - int(catalogue.rows_of(domain)[0])
    return Ragged(found, offsets_of(np.array([len(items) for items in items_Q], dtype=np.int64)))


def check_domain(name: str, made_for: Sequence[str], asked: str) -> None:
    """Raise ConfigError unless a recommender was made for the domain that it is asked about."""
    if asked not in made_for:
        raise ConfigError(
            f"{name} was made for domain {', '.join(map(repr, made_for))} and is asked about {asked!r}: "
            "make one for that domain"
        )
