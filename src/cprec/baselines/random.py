"""A random order: the floor of every table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from cprec.choices import Choice
from cprec.data.catalogue import Catalogue
from cprec.data.splits import Split
from cprec.recommender import RankingQuery
from cprec.scoring import ScoringRecommender


@dataclass(frozen=True, kw_only=True)
class Random:
    """A random order: there is nothing to set."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {}

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> RandomRecommender:
        """See `Settings.make`."""
        return RandomRecommender(split.catalogue, seed)


class RandomRecommender(ScoringRecommender):
    """Ranks by uniform scores, seeded by (seed, query id): a batch answers as single calls do."""

    name = "random"

    def __init__(self, catalogue: Catalogue, seed: int = 0) -> None:
        self.catalogue, self._seed = catalogue, seed

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        out = np.empty((len(queries), len(self.catalogue.rows_of(domain))))
        for number, query in enumerate(queries):
            digest = hashlib.sha256(f"{self._seed}/{query.query_id}".encode()).digest()
            out[number] = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32)).random(out.shape[1])
        return out
