"""One number of each item, whatever the history: how new it is, or what a column of a file says (its price, say).

Only the order of the numbers counts, so that a weight in a blend means the same whatever they measure.
Suffix: N items of the domain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from cprec.baselines.domain import DomainRecommender
from cprec.choices import Choice
from cprec.data.catalogue import Catalogue
from cprec.data.item_columns import read_column
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import DataError, Unsuitable


class ItemValuesRecommender(DomainRecommender):
    """Ranks a domain's items by one number each; the history changes nothing. Scores are `places`, as logits."""

    scale: ClassVar[Literal["share", "logit"]] = "logit"
    least_share: ClassVar[float] = math.exp(-1)

    def __init__(self, name: str, catalogue: Catalogue, domain: str, place_N: np.ndarray) -> None:
        self.name, self.catalogue, self.domain, self._place_N = name, catalogue, domain, place_N

    @classmethod
    def read(cls, name: str, path: str | Path, catalogue: Catalogue, domain: str) -> ItemValuesRecommender:
        """By the column `name` of a file. Raises as `read_column` does, and DataError where all values are equal."""
        place_N = places(read_column(path, name, catalogue, domain))
        if not place_N.any():
            raise DataError(f"{path}: all items of domain {domain!r} have the same {name}, so it tells none apart")
        return cls(name, catalogue, domain, place_N)

    def history_scores(self, history: Ragged) -> np.ndarray:
        return np.broadcast_to(self._place_N, (len(history), len(self._place_N)))

    def state(self) -> dict[str, np.ndarray]:
        return {"name": np.array(self.name), "place": self._place_N}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        super()._restore(arrays)
        self.name, self._place_N = str(arrays["name"]), arrays["place"]


def places(value_N: np.ndarray) -> np.ndarray:
    """Where each number stands among all: float64[N], from 0, the least, to 1, the greatest; all 0 where all are equal.

    Equal numbers stand in the middle of the places that they take together.

    >>> places(np.array([5.0, 700.0, 5.0, 6.0])).tolist()
    [0.0, 1.0, 0.0, 0.6]
    """
    _, number_N, count = np.unique(value_N, return_inverse=True, return_counts=True)
    middle = np.cumsum(count) - (count + 1) / 2
    result: np.ndarray = ((middle - middle[0]) / max(middle[-1] - middle[0], 1))[number_N]
    return result


class FreshnessRecommender(ItemValuesRecommender):
    """Ranks a domain's items by how new they are; see `Freshness`."""

    def with_catalogue(self, catalogue: Catalogue) -> FreshnessRecommender:
        """See `StoredRecommender.with_catalogue`: items that came are as new as the newest."""
        made, was_N = self._over(catalogue), catalogue.places_in(self.catalogue, self.domain)
        made._place_N = np.where(was_N < 0, 1.0, self._place_N[was_N])
        return made


@dataclass(frozen=True, kw_only=True)
class Freshness:
    """The newest items first: those whose first training event is the latest. There is nothing to set.

    Held-out events are not looked at, so an item without a training event stands last, with the oldest. The order is
    that at the end of the training part for all queries, which with leave-one-out lies after many targets. In a blend,
    items that came after training are as new as the newest.
    """

    SEARCH: ClassVar[Mapping[str, Choice]] = {}

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> FreshnessRecommender:
        """See `Settings.make`; nothing is random and nothing kept.

        Raises Unsuitable where the domain's times are not real, or all its items are equally new.
        """
        if not split.domains[domain].has_times:
            raise Unsuitable(
                f"freshness: the times of domain {domain!r} only order the events of one user, so no item is newer "
                "than another: give real times, or leave it out"
            )
        log, rows = split.train, split.catalogue.rows_of(domain)
        first_N = np.full(len(split.catalogue), np.iinfo(np.int64).max)
        np.minimum.at(first_N, log.item, log.time)
        first_N = first_N[rows]
        is_known_N = np.isin(rows, log.item)
        place_N = np.zeros(len(rows))
        if is_known_N.any():
            place_N[is_known_N] = places(first_N[is_known_N])
        if not place_N.any():
            raise Unsuitable(f"freshness: no item of domain {domain!r} is newer in training than another: leave it out")
        return FreshnessRecommender("freshness", split.catalogue, domain, place_N)
