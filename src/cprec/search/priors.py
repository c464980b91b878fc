"""What is known of items beside the model, per query: priors, which are added to the model's score of each item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.errors import ConfigError, DataError
from cprec.recommender import RankingQuery


@dataclass(frozen=True)
class Priors:
    """score(item) = weight * log P(item | history) + value(item). Suffixes: U queries, N items of the domain.

    A model with an item head has a second log-probability of each item; what the source of priors gives for
    `item_head` is its weight, and it joins the values before anything is searched.

    Raises ConfigError for a weight that is negative or no number, DataError for values that are no table of finite
    float64.
    """

    values_UN: np.ndarray
    """float64[U, N], items in the order of the catalogue."""
    weight: float = 1.0
    """Of the model's log-probability. With 0 the values alone are the score."""
    item_head: float = 0.0
    """Weight of the log-probability by the model's item head, as long as `values_UN` is without it."""

    def __post_init__(self) -> None:
        for name, weight in (("model", self.weight), ("item head", self.item_head)):
            if not 0 <= weight < math.inf:
                raise ConfigError(f"the weight {weight} of the {name} among priors must be a number of 0 or more")
        if self.values_UN.ndim != 2 or self.values_UN.dtype != np.float64:
            raise DataError(
                f"priors of shape {self.values_UN.shape} and type {self.values_UN.dtype}: give float64 values, a row "
                "for each query and a column for each item"
            )
        if not np.isfinite(self.values_UN).all():
            query, item = np.argwhere(~np.isfinite(self.values_UN))[0].tolist()
            raise DataError(
                f"the prior of item {item} for query {query} is {self.values_UN[query, item]}: priors must be finite; "
                "give items of which nothing is known a floor"
            )

    def with_head(self, log_prob_UN: np.ndarray) -> Priors:
        """The same with the log-probabilities by the item head among the values."""
        return replace(self, values_UN=self.values_UN + self.item_head * log_prob_UN, item_head=0.0)

    def check(self, num_queries: int, num_items: int) -> None:
        """Raise DataError unless the values are of so many queries and items."""
        assert not self.item_head, "what the item head says joins the values first, see `with_head`"
        if self.values_UN.shape != (num_queries, num_items):
            raise DataError(
                f"priors of {self.values_UN.shape[0]:,} queries and {self.values_UN.shape[1]:,} items were given for "
                f"{num_queries:,} queries and {num_items:,} items: they are of another catalogue or batch"
            )

    def scores(self, query: int, items: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
        """The scores of some items, by their column and the model's log-probability: float64."""
        model = self.weight * log_probs if self.weight else 0.0  # 0 * -inf is no number
        scores: np.ndarray = model + self.values_UN[query, items]
        return scores


class PriorSource(Protocol):
    """Anything that knows items of a domain beside the model."""

    @property
    def domain(self) -> str:
        """The domain of the items."""
        ...

    @property
    def weight(self) -> float:
        """The weight of the model's log-probability, as all priors have it."""
        ...

    @property
    def weights(self) -> Mapping[str, float]:
        """The weights above 0, of the model and of the parts that the priors are a sum of, by name."""
        ...

    def priors(self, domain: str, queries: Sequence[RankingQuery]) -> Priors:
        """The priors of the domain's items for queries of that domain."""
        ...

    def priors_of_parts(self, domain: str, queries: Sequence[RankingQuery]) -> dict[str, np.ndarray]:
        """The priors of each part, weighted, by its name: float64[Q, N]."""
        ...

    def with_catalogue(self, catalogue: Catalogue) -> Self:
        """The same over another catalogue of the same domains, from and to which items went and came."""
        ...
