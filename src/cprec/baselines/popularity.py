"""The most frequent items of the training part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cprec.baselines.ranking import ScoringRecommender
from cprec.data.splits import Split
from cprec.recommender import RankingQuery


class PopularityRecommender(ScoringRecommender):
    """Ranks by the number of training events of each item; the history changes nothing."""

    name = "popularity"

    def __init__(self, split: Split) -> None:
        self.catalogue = split.catalogue
        self._count = np.bincount(split.train.item, minlength=len(split.catalogue))

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """See `ScoringRecommender.scores`."""
        count_N = self._count[self.catalogue.rows_of(domain)]
        return np.broadcast_to(count_N, (len(queries), len(count_N)))
