"""Recommending to people: histories of ids or titles in, titled items out."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cprec.data.catalogue import Catalogue
from cprec.errors import ConfigError, DataError
from cprec.rank.prompts import Prompts
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item, id_text


@dataclass(frozen=True, slots=True)
class Recommendation:
    """One recommended item with its title, to show to people."""

    item_id: str
    title: str
    score: float
    """Log-probability of the item after the history, unless the recommender was given another `score` or a `blend`;
    higher is better, comparable within one list."""


class Recommending(ABC):
    """What a recommender that reads prompts does for people; a subclass ranks."""

    domain: str | None
    catalogue: Catalogue
    withdrawn: Mapping[str, frozenset[str]]
    """Item ids by domain that histories may name and full rankings never return."""
    prompts: Prompts

    @abstractmethod
    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`."""

    @property
    def item_fields(self) -> tuple[str, ...]:
        """What stands for an item in every text: its title, and perhaps other fields."""
        return self.prompts.encoder.template.item_fields

    def recommend(
        self, history: Sequence[str | int | Item], k: int = 10, *, domain: str | None = None, exclude_seen: bool = True
    ) -> list[Recommendation]:
        """The `k` best next items for a history of item ids or titles, oldest first.

        Texts are ids or titles, as `Catalogue.look_up` knows them, of the target domain or else of another; a whole
        number is an id that is written so. `domain` is the domain to recommend from; by default the one the model was
        fine-tuned for. `exclude_seen` leaves out the items of the history, and those of the same text (title, and other
        fields where the model has them). Of a history longer than the model was trained on, or than its context, the
        latest events are read, with a warning.

        Raises UnknownItemError for texts that are neither id nor title or may mean several titles, ValueError if `k`
        exceeds the items there are.
        """
        return self.recommend_many([history], k, domain=domain, exclude_seen=exclude_seen)[0]

    def recommend_many(
        self,
        histories: Sequence[Sequence[str | int | Item]],
        k: int = 10,
        *,
        domain: str | None = None,
        exclude_seen: bool = True,
    ) -> list[list[Recommendation]]:
        """As `recommend` for each history, in batches."""
        domain = domain or self.domain
        if domain is None or domain not in self.catalogue.domains:
            raise ConfigError(f"domain={domain!r}: name one of {', '.join(self.catalogue.domains)}")
        queries = [self._query(history, k, domain, exclude_seen) for history in histories]
        out = []
        for ranking in self.rank(queries, k):
            rows = self.catalogue.find(domain, list(ranking.item_ids[:k]))
            out.append(
                [
                    Recommendation(item_id=i, title=str(self.catalogue.title[row]), score=s)
                    for i, row, s in zip(ranking.item_ids, rows, ranking.scores, strict=False)
                ]
            )
        return out

    def _query(self, history: Sequence[str | int | Item], k: int, domain: str, exclude_seen: bool) -> RankingQuery:
        """The query of a history, with warnings of what is not read; raises as `recommend` does."""
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
        read = len(self.prompts.shown(query))
        if items and not read:
            warnings.warn(f"no event of the history is of domain {domain!r}: the ranking ignores it", stacklevel=4)
        elif read < len(self.prompts.readable(query)):
            warnings.warn(
                f"the history has {len(items)} events, and the model's context of {self.prompts.context:,} tokens "
                f"holds the latest {read}",
                stacklevel=4,
            )
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
