"""A random order: the floor of every table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.recommender import Ranking, RankingQuery


class RandomRecommender:
    """Ranks by uniform scores, seeded by (seed, query id): a batch answers as single calls do."""

    name = "random"

    def __init__(self, catalogue: Catalogue, seed: int = 0) -> None:
        self._catalogue, self._seed = catalogue, seed

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`."""
        out = []
        for query in queries:
            digest = hashlib.sha256(f"{self._seed}/{query.query_id}".encode()).digest()
            generator = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
            rows = (
                self._catalogue.rows_of(query.domain)
                if query.candidates is None
                else self._catalogue.find(query.domain, query.candidates)
            )
            ids = [item for item in self._catalogue.item_id[rows] if item not in query.exclude]
            scores = generator.random(len(ids))
            order = np.argsort(-scores)[: k if query.candidates is None else None]
            out.append(Ranking(query.query_id, tuple(ids[i] for i in order), tuple(scores[order].tolist())))
        return out
