"""What is known of items beside the model, per query: priors, which are added to the log-probability of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.recommender import RankingQuery


@dataclass(frozen=True)
class Priors:
    """score(item) = weight * log P(item | history) + value(item). Suffixes: U queries, N items of the domain."""

    values_UN: np.ndarray
    """float64[U, N], in the order of the catalogue."""
    weight: float = 1.0
    """Of the model's log-probability, 0 or more."""


class PriorSource(Protocol):
    """Anything that knows items of a domain beside the model."""

    def priors(self, domain: str, queries: Sequence[RankingQuery]) -> Priors:
        """The priors of the domain's items for queries of that domain."""
        ...

    def with_catalogue(self, catalogue: Catalogue) -> Self:
        """The same over another catalogue of the same domains, to which items came."""
        ...
