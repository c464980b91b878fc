"""The most frequent items of the training part."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cprec.baselines.ranking import rankings_of_scores
from cprec.data.splits import Split
from cprec.recommender import Ranking, RankingQuery


class PopularityRecommender:
    """Ranks by the number of training events of each item; the history changes nothing."""

    name = "popularity"

    def __init__(self, split: Split) -> None:
        self._catalogue = split.catalogue
        self._count = np.bincount(split.train.item, minlength=len(split.catalogue))

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`."""
        scores = [self._count[self._catalogue.rows_of(query.domain)] for query in queries]
        return rankings_of_scores(self._catalogue, queries, scores, k)
