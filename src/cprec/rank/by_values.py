"""A model that reads no titles as one that scores every item: an evaluation asks it for a batch once, not once for each
protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cprec.rank.llm import LLMRecommender
from cprec.recommender import Proof, Ranking, RankingQuery
from cprec.scoring import ScoringRecommender


class ByValues(ScoringRecommender):
    """Ranks as the model itself does, and keeps the scores of the latest batch."""

    def __init__(self, model: LLMRecommender) -> None:
        """`model.reads_titles` must be false."""
        self.name, self.catalogue, self._model = model.name, model.catalogue, model

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """See `ScoringRecommender.scores`."""
        return self._model.values(domain, queries)

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`."""
        found, proof = super().rank(queries, k), Proof(0.0, expanded=0)
        return [
            replace(ranking, proof=proof if query.candidates is None else None)
            for query, ranking in zip(queries, found, strict=True)
        ]
