"""The prompts of queries: which events of a history they show, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError
from cprec.recommender import RankingQuery
from cprec.schema import SPECIFIC, Item
from cprec.text.encoding import PromptEncoder


@dataclass(frozen=True)
class Prompts:
    """Makes prompts as a model was trained on. Raises ConfigError if it has no room for the longest title after an
    empty history."""

    encoder: PromptEncoder
    history: str
    """The kind of histories: of the query's domain, or mixed."""
    max_history: int
    context: int
    """Tokens that the model reads at once."""

    def __post_init__(self) -> None:
        encoder, domains = self.encoder, np.arange(len(self.encoder.catalogue.domains))
        frame = int(encoder.frame_tokens(self.history, domains).max())
        if frame + encoder.max_item_tokens + 1 > self.context:
            raise ConfigError(
                f"the model's context of {self.context:,} tokens has no room for a prompt without a history "
                f"({frame} tokens) and a title of max_title_tokens={encoder.max_title_tokens} with its end: prepare "
                "the data with a smaller max_title_tokens, or take a model with a longer context"
            )

    def of(self, queries: Sequence[RankingQuery]) -> Ragged:
        """Prompt tokens of each query."""
        domains = self._domains(queries)
        return self.encoder.prompts(self.history, domains, self._rows(queries, domains))

    def empty(self, domain: str) -> np.ndarray:
        """The prompt of an empty history."""
        index = np.array([self.encoder.catalogue.domain_index(domain)], dtype=np.int64)
        return self.encoder.prompts(self.history, index, Ragged.of([[]]))[0]

    def shown(self, query: RankingQuery) -> tuple[Item, ...]:
        """The events of a query's history that its prompt shows: the latest, as many as were trained on and fit."""
        read = self.readable(query)
        fits = self._rows([query], self._domains([query]))[0]
        return read[len(read) - len(fits) :]

    def readable(self, query: RankingQuery) -> tuple[Item, ...]:
        """The events of a query that a prompt can show: of its domain unless mixed, the latest `max_history`."""
        if self.history == SPECIFIC:
            return tuple(item for item in query.history if item.domain == query.domain)[-self.max_history :]
        return query.history[-self.max_history :]

    def _domains(self, queries: Sequence[RankingQuery]) -> np.ndarray:
        """The number of each query's domain."""
        return np.array([self.encoder.catalogue.domain_index(query.domain) for query in queries], dtype=np.int64)

    def _rows(self, queries: Sequence[RankingQuery], domains: np.ndarray) -> Ragged:
        """Catalogue rows of each query's latest events, as many as were trained on and fit the model's context."""
        histories = [self.readable(query) for query in queries]
        names = [(item.domain, item.item_id) for events in histories for item in events]
        rows = np.empty(len(names), dtype=np.int64)
        for domain in {name for name, _ in names}:
            mine = [place for place, (name, _) in enumerate(names) if name == domain]
            rows[mine] = self.encoder.catalogue.find(domain, [names[place][1] for place in mine])
        history = Ragged(rows, offsets_of(np.array([len(events) for events in histories], dtype=np.int64)))
        room = self.context - self.encoder.max_item_tokens - 1
        return self.encoder.fit(self.history, domains, history, room)
