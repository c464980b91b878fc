"""Metrics as pure functions: of a target's rank, with ties at their expected value, and of what lists hold.

**Of ranks.** Every query has one target. `better` is the number of items scored above it and `tied` the size of its
group of equal scores, itself included (0 if the target was not returned at all). In a random order of the group the
target's rank is uniform over better + 1 .. better + tied, and each metric is averaged over those ranks (McSherry and
Najork 2008).

**Of lists.** Lists come flat: `list_N` says to which of `num_lists` lists an entry belongs, `item_N` its item's
position in the catalogue. They are cut at K first (`first_k`); of items that tie with the K-th those count that the
list names first. What has no value (the novelty of an empty list) is NaN: whoever takes a mean leaves it out.

Suffixes: Q queries, N entries of all lists, I items of the catalogue, D terms of a vocabulary, L lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

HEAD_SHARE = 0.2
"""Share of the catalogue's items that are its head: the 20 of the rule of 80 and 20."""


# ---- of ranks --------------------------------------------------------------------------------------------------------


def _expected(better_Q: np.ndarray, tied_Q: np.ndarray, upto: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Mean of a metric over the ranks of a tie group, from its sum over ranks 1..n; 0 where the target is missing."""
    better, tied = np.asarray(better_Q, dtype=np.int64), np.asarray(tied_Q, dtype=np.int64)
    return np.where(tied > 0, (upto(better + tied) - upto(better)) / np.maximum(tied, 1), 0.0)


def _gain(better_Q: np.ndarray, tied_Q: np.ndarray, gain_K: np.ndarray) -> np.ndarray:
    """Expected value of a metric that is `gain_K[r - 1]` at rank r, and 0 past the last."""
    summed = np.concatenate([[0.0], np.cumsum(gain_K)])
    return _expected(better_Q, tied_Q, lambda rank: summed[np.minimum(rank, len(gain_K))])


def _ranks(k: int) -> np.ndarray:
    if k < 1:
        raise ValueError(f"k={k} must be at least 1: it is the rank that a metric is cut at")
    return np.arange(1, k + 1)


def recall(better_Q: np.ndarray, tied_Q: np.ndarray, k: int) -> np.ndarray:
    """Recall@K: the probability that the target is among the first K. With one target it equals HitRate@K.

    Raises ValueError if k is below 1, as every metric with a cut does.

    >>> recall(np.array([0, 9, 10, 9]), np.array([1, 1, 1, 2]), 10).tolist()
    [1.0, 1.0, 0.0, 0.5]
    """
    return _gain(better_Q, tied_Q, np.ones_like(_ranks(k), dtype=float))


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
    return _gain(better_Q, tied_Q, 1 / np.log2(_ranks(k) + 1))


def reciprocal_rank(better_Q: np.ndarray, tied_Q: np.ndarray, k: int | None = None) -> np.ndarray:
    """1 / rank of the target, 0 where it was not returned or stands past rank `k`; its mean is MRR (Voorhees 1999).

    >>> reciprocal_rank(np.array([0, 1, 0, 0]), np.array([1, 1, 2, 0])).tolist()
    [1.0, 0.5, 0.75, 0.0]
    >>> reciprocal_rank(np.array([1, 2, 1]), np.array([1, 1, 2]), 2).tolist()
    [0.5, 0.0, 0.25]
    """
    last = int((np.asarray(better_Q) + np.asarray(tied_Q)).max(initial=1)) if k is None else k
    return _gain(better_Q, tied_Q, 1 / _ranks(last))


def average_precision(better_Q: np.ndarray, tied_Q: np.ndarray, k: int) -> np.ndarray:
    """Average precision cut at K: the mean over relevant items of the precision where each stands; its mean is MAP@K.

    With one target it is the precision at the target's rank, so it equals the reciprocal rank cut at K.

    >>> average_precision(np.array([0, 3, 4]), np.array([1, 1, 1]), 4).round(6).tolist()
    [1.0, 0.25, 0.0]
    """
    return reciprocal_rank(better_Q, tied_Q, k)


def valid_ratio(num_valid_Q: np.ndarray) -> float:
    """ValidRatio: the share of queries that a recommender answered with an item that it may name (Liao et al. 2024).

    `num_valid_Q` counts the items of each answer that are among the candidates. Raises ValueError without queries.

    >>> valid_ratio(np.array([1, 0, 10, 1]))
    0.75
    """
    valid = np.asarray(num_valid_Q) > 0
    if not len(valid):
        raise ValueError("num_valid_Q is empty: there are no queries to take a share of")
    return float(valid.mean())


# ---- of lists --------------------------------------------------------------------------------------------------------


def first_k(list_N: np.ndarray, k: int) -> np.ndarray:
    """bool[N]: the first K entries of each list, in the order given. Entries of a list need not stand together.

    >>> first_k(np.array([0, 0, 1, 0, 1]), 2).tolist()
    [True, True, True, False, True]
    """
    lists = np.asarray(list_N)
    _ranks(k)
    order = np.argsort(lists, kind="stable")
    begins = np.searchsorted(lists[order], lists[order])
    first = np.empty(len(lists), dtype=bool)
    first[order] = np.arange(len(lists)) - begins < k
    return first


def coverage(item_N: np.ndarray, num_items: int) -> float:
    """Catalogue coverage: the share of the catalogue's items that are in at least one list (Ge et al. 2010).

    It grows with the number of lists: compare it between arms that answered the same queries.

    >>> coverage(np.array([0, 2, 0, 2]), 8)
    0.25
    """
    if num_items < 1:
        raise ValueError(f"num_items={num_items} must be at least 1: it is the size of the catalogue")
    return len(np.unique(item_N)) / num_items


def gini(count_I: np.ndarray) -> float:
    """Gini index of how often each item is listed: 0 where all are alike, 1 - 1 / I where one item has everything.

    `count_I` has every item of the catalogue, those that no list holds with 0; leaving these out makes a recommender
    that names ten items look fair. Source: Gini (1912) in the form of Fleder and Hosanagar (2009).
    Raises ValueError where nothing is listed.

    >>> gini(np.array([5, 5, 5, 5])), gini(np.array([0, 0, 0, 9])), gini(np.array([3, 1]))
    (0.0, 0.75, 0.25)
    """
    counts = np.sort(np.asarray(count_I, dtype=float))
    total = counts.sum()
    if not total > 0:
        raise ValueError("count_I holds no listed item: a Gini index needs at least one")
    return float((2 * np.arange(1, len(counts) + 1) - len(counts) - 1) @ counts / (len(counts) * total))


def novelty(
    list_N: np.ndarray, item_N: np.ndarray, num_lists: int, num_users_I: np.ndarray, num_users: int
) -> np.ndarray:
    """float[L], bits: mean self-information -log2(share of training users who had the item) over each list.

    `num_users_I` counts, of `num_users` training users, those who had each item. An item that none had counts as if one
    had: its information is not infinite, and no item is more novel than a novelty that one user found. Source: Zhou et
    al. (2010); Castells, Hurley and Vargas (2015) call it mean inverse user frequency. NaN for an empty list.

    >>> novelty(np.array([0, 0, 1]), np.array([0, 1, 2]), 3, np.array([8, 2, 0]), 8).tolist()
    [1.0, 3.0, nan]
    """
    if num_users < 1 or np.max(num_users_I, initial=0) > num_users:
        raise ValueError(f"num_users={num_users} must be at least 1 and at least every item's number of users")
    share_I = np.maximum(np.asarray(num_users_I), 1) / num_users
    return _mean_of_lists(list_N, -np.log2(share_I)[item_N] + 0.0, num_lists)  # no -0.0


def head(popularity_I: np.ndarray, share: float = HEAD_SHARE) -> np.ndarray:
    """bool[I]: the most popular `share` of the catalogue's items, rounded up; of equally popular ones the first.

    >>> head(np.array([1, 7, 0, 7, 2])).tolist()
    [False, True, False, False, False]
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} must lie between 0 and 1: it is the head's share of the catalogue's items")
    popularity = np.asarray(popularity_I)
    size = math.ceil(share * len(popularity) - 1e-9)
    return np.isin(np.arange(len(popularity)), np.argsort(-popularity, kind="stable")[:size])


def tail_share(list_N: np.ndarray, item_N: np.ndarray, num_lists: int, popularity_I: np.ndarray) -> np.ndarray:
    """float[L]: the share of each list outside the head, which is the 20 % of items most popular in training.

    Source: Abdollahpouri, Burke and Mobasher (2019), average percentage of long tail items; they take as head the items
    with 80 % of events, which is another number of items in every data set. NaN for an empty list.

    >>> tail_share(np.array([0, 0, 1]), np.array([1, 0, 1]), 3, np.array([1, 7, 0, 7, 2])).tolist()
    [0.5, 0.0, nan]
    """
    return _mean_of_lists(list_N, ~head(popularity_I)[item_N], num_lists)


def intra_list_diversity(list_N: np.ndarray, item_N: np.ndarray, num_lists: int, vectors_ID: csr_array) -> np.ndarray:
    """float[L]: mean cosine distance (1 - cosine) over all pairs of items of each list.

    Rows of `vectors_ID` have length 1 (TF-IDF of titles, say); a row of zeros is at distance 1 from everything. The sum
    of all cosines of a list is the squared length of its summed vectors, so no pair is formed. NaN for a list of fewer
    than two items. Source: Ziegler et al. (2005), as a distance.

    >>> from scipy.sparse import csr_array
    >>> vectors = csr_array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    >>> intra_list_diversity(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 2, 0]), 3, vectors).round(3).tolist()
    [1.0, 0.4, nan]
    """
    from scipy.sparse import csr_array

    lists, items = np.asarray(list_N, dtype=np.int64), np.asarray(item_N, dtype=np.int64)
    squared_I = np.asarray((vectors_ID * vectors_ID).sum(axis=1)).ravel()
    wrong = np.flatnonzero((np.abs(squared_I - 1) > 1e-4) & (squared_I > 0))
    if len(wrong):
        length = math.sqrt(squared_I[wrong[0]])
        raise ValueError(f"row {wrong[0]} of vectors_ID has length {length:.4g}: divide every row by its length")
    shape = (num_lists, vectors_ID.shape[0])
    summed_LD = csr_array((np.ones(len(lists)), (lists, items)), shape=shape) @ vectors_ID
    cosines_L = np.asarray((summed_LD * summed_LD).sum(axis=1)).ravel()
    cosines_L -= np.bincount(lists, weights=squared_I[items], minlength=num_lists)  # an item with itself is no pair
    size_L = np.bincount(lists, minlength=num_lists)
    pairs_L = size_L * (size_L - 1)
    return np.where(pairs_L > 0, 1 - cosines_L / np.maximum(pairs_L, 1), np.nan)


def _mean_of_lists(list_N: np.ndarray, value_N: np.ndarray, num_lists: int) -> np.ndarray:
    size_L = np.bincount(list_N, minlength=num_lists)
    summed_L = np.bincount(list_N, weights=value_N, minlength=num_lists)
    return np.where(size_L > 0, summed_L / np.maximum(size_L, 1), np.nan)
