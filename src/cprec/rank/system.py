"""A trained system of the line-up as a recommender for people, and for `cprec.serve`: an engine that never changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.data.word_index import check_query
from cprec.errors import ConfigError
from cprec.rank.recommending import Recommending
from cprec.recommender import Proof, Ranking, RankingQuery
from cprec.schema import TITLE, Item
from cprec.scoring import ScoringRecommender, StoredRecommender, check_domain
from cprec.systems.letters import LetterRecommender
from cprec.systems.words import WordedRecommender

VECTORS, LETTERS = "vectors", "letters"
"""How systems rank that score every item: by products of vectors, or by letters of what a retriever found."""

ITEM_TEXTS = (TITLE, "brand", "categories")
"""What systems may have learnt of an item beside its events."""


class SystemRecommender(Recommending):
    """Ranks as the recommender does that a system made, without items that are withdrawn. Where every item is scored,
    lists are proven; what writes tokens of items proves its own."""

    cache = None
    item_fields = (TITLE,)

    def __init__(self, recommender: Any, name: str) -> None:
        """`recommender` is one that `lineup.Settings.make` gave for a trained row, `name` what answers call it."""
        self.recommender, self.name, self._domain = recommender, name, str(recommender.domain)
        self.domain = self._domain
        self.catalogue: Catalogue = recommender.catalogue
        self.max_history = int(recommender.max_length)
        self.withdrawn: Mapping[str, frozenset[str]] = {}

    @property
    def way(self) -> str | None:
        """How it ranks, for answers; None where the proof of a list says whether it is exact or a beam's."""
        if isinstance(self.recommender, LetterRecommender):
            return LETTERS
        return VECTORS if isinstance(self.recommender, ScoringRecommender) else None

    @property
    def domains(self) -> tuple[str, ...]:
        """The one domain that it was trained on."""
        return (self._domain,)

    @property
    def weights(self) -> Mapping[str, float]:
        """The parts of a score: the system alone."""
        return {self.name: 1.0}

    def rank(
        self,
        queries: Sequence[RankingQuery],
        k: int,
        mode: Any = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Ranking]:
        """See `Recommender.rank`. A `mode` (exact, auto or beam) is for what writes tokens of items, which `stop` does
        not end: `max_nodes` of its settings does. Raises ConfigError for another domain than its own."""
        for query in queries:
            check_domain(self.name, self.domains, query.domain)
        gone = self.withdrawn.get(self._domain, frozenset())
        asked = [replace(q, exclude=q.exclude | gone) if gone and q.candidates is None else q for q in queries]
        if self.way is None:
            found: list[Ranking] = self.recommender.rank(asked, k, mode or "auto")
            return found
        proof = Proof(0.0, expanded=0)
        rankings = self.recommender.rank(asked, k)
        return [
            r if q.candidates is not None else replace(r, proof=proof) for q, r in zip(asked, rankings, strict=True)
        ]

    def asked_in_words(self, query: RankingQuery, text: str) -> RankingQuery:
        """See `Recommending.asked_in_words`; for systems that have learnt to read words, which rank all items by them.
        Raises ConfigError for the others, DataError for a text without a word that was learnt."""
        if not isinstance(self.recommender, WordedRecommender):
            raise ConfigError(f"{self.name} reads histories, not queries in words: leave the query out")
        self.recommender.read_text(check_query(text))
        return replace(query, text=text)

    def reading(self, query: RankingQuery) -> tuple[int, str]:
        """See `Recommending.reading`."""
        is_unread = self._reads_words_alone(query) and query.history
        return len(self.shown(query)), f"{self.name} reads the query alone, not the history" if is_unread else ""

    def _reads_words_alone(self, query: RankingQuery) -> bool:
        reader = self.recommender
        return bool(query.text) and isinstance(reader, WordedRecommender) and not reader.reads_histories

    def shown(self, query: RankingQuery) -> tuple[Item, ...]:
        """The events of a query's history that count: the latest of its domain, if any."""
        if self._reads_words_alone(query):
            return ()
        return tuple(item for item in query.history if item.domain == self._domain)[-self.max_history :]

    def effects(self, queries: Sequence[RankingQuery], rankings: Sequence[Ranking]) -> list[dict[str, float]]:
        """How far the score of a query's one candidate lies above that of an average item of the domain: log r, where
        the item has r times the mean share. Shares sum to one, so that by tokens the mean is one in the items."""
        score_Q = np.array([ranking.scores[0] for ranking in rankings])
        average_Q = np.full(len(queries), -np.log(len(self.catalogue.rows_of(self._domain))))
        if self.way is not None:
            scores_QN = self.recommender.scores_once(self._domain, queries).astype(float)
            average_Q += np.logaddexp.reduce(scores_QN, axis=1)
        return [{self.name: effect} for effect in (score_Q - average_Q).tolist()]

    def with_items(self, catalogue: Catalogue, withdrawn: Mapping[str, frozenset[str]]) -> SystemRecommender:
        """The same system over another catalogue, less the items `withdrawn` (ids by domain). New items of its domain
        need a system that can tell by their titles what they are (its recommender's `with_items` or `with_catalogue`).

        Raises ConfigError where it has none, and where an item of its domain has another text than when it was trained.
        """
        out = copy.copy(self)
        out.catalogue, out.withdrawn = catalogue, {domain: ids for domain, ids in withdrawn.items() if ids}
        before, after = self.catalogue.rows_of(self._domain), catalogue.rows_of(self._domain)
        was, now = _texts(self.catalogue, before), _texts(catalogue, after)
        if changed := [item for item, texts in was.items() if now.get(item) != texts]:
            raise ConfigError(
                f"{self.name} has learnt title, brand and categories of item {changed[0]!r}: keep them, or train again"
            )
        if new := [item for item in now if item not in was]:
            out.recommender = self._grown(catalogue)
            if out.recommender is None:
                raise ConfigError(
                    f"{self.name} ranks the items that it was trained on alone, and {new[0]!r} is none of them: train "
                    "it again with that item"
                )
        return out

    def _grown(self, catalogue: Catalogue) -> Any:
        """The recommender with the items that came; None where it can say nothing of them."""
        if hasattr(self.recommender, "with_items"):
            return self.recommender.with_items(catalogue)
        is_stored = isinstance(self.recommender, StoredRecommender)
        return self.recommender.with_catalogue(catalogue) if is_stored else None


def _texts(catalogue: Catalogue, rows: np.ndarray) -> dict[str, tuple[str, ...]]:
    """All texts of items, by their ids."""
    columns = zip(*(getattr(catalogue, name)[rows].tolist() for name in ITEM_TEXTS), strict=True)
    return dict(zip(catalogue.item_id[rows].tolist(), columns, strict=True))
