"""Metrics of lists as pure functions: how much of the catalogue they show, and how alike their items are.

Lists come flat: `list_N` says to which of `num_lists` lists an entry belongs, `item_N` its item's position in the
catalogue. They are cut at K first (`first_k`); of items that tie with the K-th those count that the list names first.
A list without a value (the novelty of an empty list, say) has NaN; means leave it out.

Suffixes: Q queries, N entries of all lists, I items of the catalogue, D terms of a vocabulary, L lists.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.sparse import csr_array

from cprec.ranks import ranks_up_to

HEAD_SHARE = 0.2
"""Share of the catalogue's items that are its head: the 20 of the rule of 80 and 20."""


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
    ranks_up_to(k)
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
