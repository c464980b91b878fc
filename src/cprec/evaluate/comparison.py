"""A comparison of arms on one domain as records, and its settings in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cprec.evaluate.results import Interval
from cprec.evaluate.statistics import Comparison

PROTOCOLS = {
    "full": "full catalogue, seen items left out",
    "full_with_seen": "full catalogue, seen items too",
    "candidates_uniform": "uniform candidates",
    "candidates_popularity": "candidates drawn by popularity",
    "new_items": "new items alone",
    "generate": "free writing",
}
"""Ways of asking, by their name in `metrics.parquet`, as people say them."""

WORDS = {
    "tie_order": "order of events at equal times",
    "part": "part asked for",
    "num_queries": "number of queries",
    "candidates_uniform_sha256": "uniform candidates",
    "candidates_popularity_sha256": "candidates drawn by popularity",
    "num_candidates": "number of candidates",
    "seen": "seen items",
    "num_items": "number of items",
    "k": "K",
    "certificate": "leakage certificate",
}
"""Keys of `protocol.json` as people say them, where it is not the key with blanks."""


@dataclass(frozen=True, kw_only=True)
class Estimate(Interval):
    """A mean over queries, and over seeds where there are several, with its 95 % interval over users and seeds."""

    error_users: float | None = None
    """Standard error from the users; None for a single seed, where the interval says it."""
    error_seeds: float | None = None
    """Standard error that seeds add; None for a single seed, which tells nothing of it."""


@dataclass(frozen=True, kw_only=True)
class ComparedArm:
    """An arm beside others."""

    name: str
    """As evaluation named it, with its run in front where another run has other numbers under that name."""
    num_seeds: int
    """Training runs that the means are over."""
    bound: bool
    """It knows what no recommender can know (an oracle), so it is never the best and is not tested."""
    estimates: Mapping[str, Estimate]
    """By metric; the first is the one that arms are compared by."""
    against_best: Comparison | None
    """This arm less the best on the same queries, p corrected for the table; None for the best and for bounds."""


@dataclass(frozen=True, kw_only=True)
class ComparisonTable:
    """Arms that answered the same queries of a domain under one protocol, the highest mean first."""

    domain: str
    """The domain whose items were ranked."""
    runs: tuple[str, ...]
    """Short names of the folders."""
    protocol: str
    """The way of asking: a key of `PROTOCOLS`."""
    settings: Mapping[str, Any]
    """What every number depends on, as `protocol.json` has it."""
    num_queries: int
    """Queries that every arm answered."""
    arms: tuple[ComparedArm, ...]
    comparisons: Mapping[tuple[str, str], Comparison]
    """Every pair of arms, the first less the second by the first metric; Holm's correction is over all of them."""

    @property
    def metric(self) -> str:
        """The metric that arms are compared by."""
        return next(iter(self.arms[0].estimates))

    @property
    def best(self) -> ComparedArm | None:
        """The arm of the highest mean, bounds aside."""
        return next((arm for arm in self.arms if not arm.bound), None)


def key_in_words(key: str) -> str:
    """A key of `protocol.json` as people say it."""
    return WORDS.get(key, key.removesuffix("_sha256").replace("_", " "))


def in_words(key: str, value: Any) -> str:
    """The value of a key of `protocol.json` as people say it; of a hash its first twelve digits."""
    if value is None:
        return "not stated"
    if key.endswith("_sha256"):
        return f"of SHA-256 {str(value)[:12]}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
