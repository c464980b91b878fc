"""Ranking metrics as pure functions of ranks; ties count with their expected value over all orders.

Every query has one target. `better` is the number of items scored above it and `tied` the size of its group of equal
scores, itself included (0 if the target was not returned at all). In a random order of the group the target's rank is
uniform over better + 1 .. better + tied, and each metric is averaged over those ranks (McSherry and Najork, 2008).
Suffix Q: queries.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def _expected(better_Q: np.ndarray, tied_Q: np.ndarray, upto: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Mean of a metric over the ranks of a tie group, from its sum over ranks 1..n; 0 where the target is missing."""
    better, tied = np.asarray(better_Q, dtype=np.int64), np.asarray(tied_Q, dtype=np.int64)
    return np.where(tied > 0, (upto(better + tied) - upto(better)) / np.maximum(tied, 1), 0.0)


def recall(better_Q: np.ndarray, tied_Q: np.ndarray, k: int) -> np.ndarray:
    """Recall@K: the probability that the target is among the first K. With one target it equals HitRate@K.

    >>> recall(np.array([0, 9, 10, 9]), np.array([1, 1, 1, 2]), 10).tolist()
    [1.0, 1.0, 0.0, 0.5]
    """
    return _expected(better_Q, tied_Q, lambda rank: np.minimum(rank, k).astype(float))


def ndcg(better_Q: np.ndarray, tied_Q: np.ndarray, k: int) -> np.ndarray:
    """NDCG@K: 1 / log2(rank + 1) up to rank K; the best achievable is 1, for there is one target (Järvelin 2002).

    >>> ndcg(np.array([0, 2, 10]), np.array([1, 1, 1]), 10).round(3).tolist()
    [1.0, 0.5, 0.0]
    """
    gains = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(1, k + 1) + 1))])
    return _expected(better_Q, tied_Q, lambda rank: gains[np.minimum(rank, k)])


def reciprocal_rank(better_Q: np.ndarray, tied_Q: np.ndarray) -> np.ndarray:
    """1 / rank of the target, 0 where it was not returned; its mean is MRR.

    >>> reciprocal_rank(np.array([0, 1, 0, 0]), np.array([1, 1, 2, 0])).tolist()
    [1.0, 0.5, 0.75, 0.0]
    """
    better, tied = np.asarray(better_Q), np.asarray(tied_Q)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, int((better + tied).max(initial=0)) + 1))])
    return _expected(better, tied, lambda rank: harmonic[rank])


def bootstrap_interval(
    values_Q: np.ndarray, *, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over queries with a percentile bootstrap interval (Efron 1979): (mean, low, high).

    Differences of two arms on the same queries are paired by passing their difference per query.
    """
    values = np.asarray(values_Q, dtype=float)
    if not len(values):
        raise ValueError("no queries to average over")
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    step = max(1, 4_000_000 // len(values))
    for start in range(0, samples, step):
        drawn = generator.integers(0, len(values), (min(step, samples - start), len(values)))
        means[start : start + len(drawn)] = values[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)
