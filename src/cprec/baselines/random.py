"""A random order: the floor of every table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from cprec.baselines.ranking import rankings_of_scores
from cprec.data.catalogue import Catalogue
from cprec.recommender import Ranking, RankingQuery


class RandomRecommender:
    """Ranks by uniform scores, seeded by (seed, query id): a batch answers as single calls do."""

    name = "random"

    def __init__(self, catalogue: Catalogue, seed: int = 0) -> None:
        self._catalogue, self._seed = catalogue, seed

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`."""
        scores = []
        for query in queries:
            digest = hashlib.sha256(f"{self._seed}/{query.query_id}".encode()).digest()
            generator = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
            scores.append(generator.random(len(self._catalogue.rows_of(query.domain))))
        return rankings_of_scores(self._catalogue, queries, scores, k)
