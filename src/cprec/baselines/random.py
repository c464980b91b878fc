"""A random order: the floor of every table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from cprec.baselines.ranking import ScoringRecommender
from cprec.data.catalogue import Catalogue
from cprec.recommender import RankingQuery


class RandomRecommender(ScoringRecommender):
    """Ranks by uniform scores, seeded by (seed, query id): a batch answers as single calls do."""

    name = "random"

    def __init__(self, catalogue: Catalogue, seed: int = 0) -> None:
        self.catalogue, self._seed = catalogue, seed

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """See `ScoringRecommender.scores`."""
        out = np.empty((len(queries), len(self.catalogue.rows_of(domain))))
        for number, query in enumerate(queries):
            digest = hashlib.sha256(f"{self._seed}/{query.query_id}".encode()).digest()
            out[number] = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32)).random(out.shape[1])
        return out
