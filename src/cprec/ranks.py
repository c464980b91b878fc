"""Metrics of ranks as pure functions, and the one way to count a rank.

Every query has one target. `better` is the number of items scored above it and `tied` the size of its group of equal
scores, itself included (0 if the target was not returned at all). In a random order of the group the target's rank is
uniform over better + 1 .. better + tied, and each metric is averaged over those ranks (McSherry and Najork 2008).

Suffixes: Q queries, N entries of all lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cprec.recommender import Ranking


def count(
    query_N: np.ndarray, score_N: np.ndarray, is_target_N: np.ndarray, num_queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of the lists of `num_queries` queries, all entries in one array: `better` and `tied` of each target, int64[Q].

    >>> query, score = np.array([0, 0, 0, 1]), np.array([3.0, 2.0, 2.0, 1.0])
    >>> better, tied = count(query, score, np.array([False, True, False, False]), 2)
    >>> better.tolist(), tied.tolist()
    ([1, 0], [2, 0])
    """
    of_target_Q = np.full(num_queries, np.nan)
    of_target_Q[query_N[is_target_N]] = score_N[is_target_N]
    better_Q = np.bincount(query_N[score_N > of_target_Q[query_N]], minlength=num_queries)
    tied_Q = np.bincount(query_N[score_N == of_target_Q[query_N]], minlength=num_queries)
    return better_Q, np.where(np.isnan(of_target_Q), 0, tied_Q)


def count_rankings(rankings: Sequence[Ranking], targets: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`count` of rankings, each with the id of its target."""
    query_N = np.repeat(np.arange(len(rankings)), [len(ranking.item_ids) for ranking in rankings])
    item_N = np.array([item for ranking in rankings for item in ranking.item_ids], dtype=object)
    score_N = np.array([score for ranking in rankings for score in ranking.scores], dtype=float)
    is_target_N = item_N == np.array(targets, dtype=object)[query_N]
    return count(query_N, score_N, is_target_N, len(rankings))


def _gain(better_Q: np.ndarray, tied_Q: np.ndarray, gain_K: np.ndarray) -> np.ndarray:
    """Mean over the ranks of a tie group of a metric that is `gain_K[r - 1]` at rank r, and 0 past the last; 0 where
    the target is missing."""
    better, tied = np.asarray(better_Q, dtype=np.int64), np.asarray(tied_Q, dtype=np.int64)
    # The sum of the gains of ranks 1..n is upto[n], so that of the group is a difference of two.
    upto = np.concatenate([[0.0], np.cumsum(gain_K)])
    last, before = np.minimum(better + tied, len(gain_K)), np.minimum(better, len(gain_K))
    return np.where(tied > 0, (upto[last] - upto[before]) / np.maximum(tied, 1), 0.0)


def ranks_up_to(k: int) -> np.ndarray:
    """The ranks 1 to K: int64[K]. Raises ValueError if K is below 1."""
    if k < 1:
        raise ValueError(f"k={k} must be at least 1: it is the rank that a metric is cut at")
    return np.arange(1, k + 1)


def recall(better_Q: np.ndarray, tied_Q: np.ndarray, k: int) -> np.ndarray:
    """Recall@K: the probability that the target is among the first K. With one target it equals HitRate@K.

    Raises ValueError if k is below 1, as every metric with a cut does.

    >>> recall(np.array([0, 9, 10, 9]), np.array([1, 1, 1, 2]), 10).tolist()
    [1.0, 1.0, 0.0, 0.5]
    """
    return _gain(better_Q, tied_Q, np.ones_like(ranks_up_to(k), dtype=float))


def precision(better_Q: np.ndarray, tied_Q: np.ndarray, k: int) -> np.ndarray:
    """Precision@K: the share of the first K that is the target, at most 1 / K. Short lists are divided by K too.

    >>> precision(np.array([0, 3, 4, 3]), np.array([1, 1, 1, 2]), 4).tolist()
    [0.25, 0.25, 0.0, 0.125]
    """
    return recall(better_Q, tied_Q, k) / k


def ndcg(better_Q: np.ndarray, tied_Q: np.ndarray, k: int) -> np.ndarray:
    """NDCG@K: 1 / log2(rank + 1) up to rank K; the best achievable is 1, for there is one target.

    Source: Järvelin and Kekäläinen (2002), with the discount of Burges et al. (2005), which is below 1 from rank 2 on.

    >>> ndcg(np.array([0, 2, 10]), np.array([1, 1, 1]), 10).round(3).tolist()
    [1.0, 0.5, 0.0]
    """
    return _gain(better_Q, tied_Q, 1 / np.log2(ranks_up_to(k) + 1))


def reciprocal_rank(better_Q: np.ndarray, tied_Q: np.ndarray, k: int | None = None) -> np.ndarray:
    """1 / rank of the target, 0 where it was not returned or stands past rank `k`; its mean is MRR (Voorhees 1999).

    >>> reciprocal_rank(np.array([0, 1, 0, 0]), np.array([1, 1, 2, 0])).tolist()
    [1.0, 0.5, 0.75, 0.0]
    >>> reciprocal_rank(np.array([1, 2, 1]), np.array([1, 1, 2]), 2).tolist()
    [0.5, 0.0, 0.25]
    """
    last = int((np.asarray(better_Q) + np.asarray(tied_Q)).max(initial=1)) if k is None else k
    return _gain(better_Q, tied_Q, 1 / ranks_up_to(last))


def average_precision(better_Q: np.ndarray, tied_Q: np.ndarray, k: int) -> np.ndarray:
    """Average precision cut at K: the mean over relevant items of the precision where each stands; its mean is MAP@K.

    With one target it is the precision at the target's rank, so it equals the reciprocal rank cut at K.

    >>> average_precision(np.array([0, 3, 4]), np.array([1, 1, 1]), 4).round(6).tolist()
    [1.0, 0.25, 0.0]
    """
    return reciprocal_rank(better_Q, tied_Q, k)
