"""Recommending to people: histories of ids or titles in, titled items out."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cprec.data.catalogue import Catalogue
from cprec.data.word_index import check_query
from cprec.errors import ConfigError, DataError
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item, id_text


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommended item with its title, to show to people."""

    item_id: str
    title: str
    score: float
    """Log-probability of the item after the history, unless the recommender was given another `score` or a `blend`;
    higher is better, comparable within one list. The words of a query are added (`WordIndex`), or, by a system that has
    learnt to read words, read."""
    words: tuple[str, ...] = ()
    """The words of the query that its title, brand or categories have, those that add most first."""


class Recommending(ABC):
    """What a recommender does for people; a subclass ranks."""

    name: str
    domain: str | None
    catalogue: Catalogue
    withdrawn: Mapping[str, frozenset[str]]
    """Item ids by domain that histories may name and full rankings never return."""

    @abstractmethod
    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`."""

    @property
    @abstractmethod
    def item_fields(self) -> tuple[str, ...]:
        """What stands for an item in every text: its title, and perhaps other fields."""

    @abstractmethod
    def shown(self, query: RankingQuery) -> tuple[Item, ...]:
        """The events of a query's history that count: those that some part of the score reads."""

    @abstractmethod
    def reading(self, query: RankingQuery) -> tuple[int, str]:
        """How many events of a query's history are read, and why not more where that is worth a warning."""

    def asked_in_words(self, query: RankingQuery, text: str) -> RankingQuery:
        """A query that is asked in words as well. A list after a history of which no event is read is of items that
        have one of the words. Raises DataError for what can be no text, and where no item that may be returned has one;
        ConfigError where no words are taken."""
        gone = query.exclude | self.withdrawn.get(query.domain, frozenset())
        found = self.catalogue.items_with_words(
            query.domain,
            check_query(text),
            lambda item: item not in gone and (query.allow is None or item in query.allow),
        )
        lists_these = query.candidates is None and not (query.history and self.shown(query))
        return replace(query, text=text, allow=found if lists_these else query.allow)

    def recommend(
        self,
        history: Sequence[str | int | Item] = (),
        k: int = 10,
        *,
        domain: str | None = None,
        exclude_seen: bool = True,
        query: str | None = None,
    ) -> list[Recommendation]:
        """The `k` best next items for a history of item ids or titles, oldest first, for a query in words, or for both.

        Texts are ids or titles, as `Catalogue.look_up` knows them, of the target domain or else of another; a whole
        number is an id that is written so. `domain` is the domain to recommend from; by default the one the model was
        fine-tuned for. `exclude_seen` leaves out the items of the history, and those of the same text (title, and other
        fields where the model has them). Of a history longer than the model was trained on, or than its context, the
        latest events are read, with a warning.

        `query` is what is asked for, in words of titles, brands or categories. Without a history that is read, only
        items that have one of its words are returned, so that the list may be shorter; a trained system that reads
        words ranks all items by them.

        Raises UnknownItemError for texts that are neither id nor title or may mean several titles, ValueError if `k`
        exceeds the items there are, DataError for a query that no item has a word of, or of which such a system has
        learnt no word, ConfigError for one where the recommender takes none.
        """
        queries = None if query is None else [query]
        return self.recommend_many([history], k, domain=domain, exclude_seen=exclude_seen, queries=queries)[0]

    def recommend_many(
        self,
        histories: Sequence[Sequence[str | int | Item]],
        k: int = 10,
        *,
        domain: str | None = None,
        exclude_seen: bool = True,
        queries: Sequence[str | None] | None = None,
    ) -> list[list[Recommendation]]:
        """As `recommend` for each history, with the query at its place where there are any, in batches."""
        domain = domain or self.domain
        if domain is None or domain not in self.catalogue.domains:
            raise ConfigError(f"domain={domain!r}: name one of {', '.join(self.catalogue.domains)}")
        texts = [None] * len(histories) if queries is None else queries
        if len(texts) != len(histories):
            raise ConfigError(f"{len(texts)} queries for {len(histories)} histories: give one for each, or None")
        asked = [
            self._query(history, text, k, domain, exclude_seen) for history, text in zip(histories, texts, strict=True)
        ]
        return [self._named(ranking, query, k) for ranking, query in zip(self.rank(asked, k), asked, strict=True)]

    def _named(self, ranking: Ranking, query: RankingQuery, k: int) -> list[Recommendation]:
        """The `k` best items of a ranking with their titles, and the words of the query that they have."""
        rows = self.catalogue.find(query.domain, ranking.item_ids[:k])
        first = int(self.catalogue.rows_of(query.domain)[0])
        index = self.catalogue.words_of(query.domain) if query.text else None
        return [
            Recommendation(
                item_id=item_id,
                title=str(self.catalogue.title[row]),
                score=score,
                words=() if index is None else tuple(index.matched(row - first, query.text)),
            )
            for item_id, row, score in zip(ranking.item_ids, rows.tolist(), ranking.scores, strict=False)
        ]

    def _query(
        self, history: Sequence[str | int | Item], text: str | None, k: int, domain: str, exclude_seen: bool
    ) -> RankingQuery:
        """The query of a history and a text, with warnings of what is not read; raises as `recommend` does."""
        items = tuple(event if isinstance(event, Item) else self._find(event, domain) for event in history)
        seen = [item.item_id for item in items if item.domain == domain and exclude_seen]
        exclude = self.catalogue.of_equal_text(domain, seen, self.item_fields)
        gone = self.withdrawn.get(domain, frozenset())
        available = len(self.catalogue.rows_of(domain)) - len(exclude | gone)
        if not 1 <= k <= available:
            raise ValueError(
                f"k={k}: domain {domain!r} has {available} items outside this history; choose 1 to {available}"
            )
        query = RankingQuery(query_id="", domain=domain, history=items, exclude=exclude)
        if text is not None:
            query = self.asked_in_words(query, text)
        read, warning = self.reading(query)
        if items and not read:
            warning = warning or f"no event of the history is of domain {domain!r}: the ranking ignores it"
        if warning:
            warnings.warn(warning, stacklevel=4)
        return query

    def _find(self, event: str | int, domain: str) -> Item:
        """An item by id or title, of the target domain first."""
        text = id_text(event)
        if text is None:
            raise DataError(f"{event!r} in the history is neither an id nor a title: leave it out")
        item = self.catalogue.item_of(domain, text)
        if item is None:
            self.catalogue.find_titles(domain, [text])  # raises, naming the nearest titles
            raise AssertionError("a title that look_up does not find must be unknown")
        return item
