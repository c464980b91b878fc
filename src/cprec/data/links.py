"""Links between items that stand near each other in histories."""

from __future__ import annotations

import numpy as np
from scipy import sparse


def followers(user: np.ndarray, item: np.ndarray, num_items: int, distance: int = 1) -> sparse.csr_array:
    """How often each item (column) came `distance` events after each other one (row), over the distance: csr[V, V].

    Events are sorted by user, then by time.

    >>> followers(np.array([0, 0, 0, 0, 1, 2, 2]), np.array([0, 1, 0, 1, 2, 1, 2]), 3).toarray().astype(int).tolist()
    [[0, 2, 0], [1, 0, 1], [0, 0, 0]]
    """
    together = user[:-distance] == user[distance:]
    pairs = item[:-distance][together], item[distance:][together]
    return sparse.csr_array((np.full(len(pairs[0]), 1 / distance), pairs), (num_items, num_items))


def links(user: np.ndarray, item: np.ndarray, num_items: int, *, window: int, backward: float) -> sparse.csr_array:
    """How strongly each item leads to others: csr[V, V], rows lead to columns.

        g(i, j) = w(i, j) / sqrt(pop(i) * pop(j))

    w(i, j) adds 1 / distance for each time that j follows i within `window` events of a user, and `backward` of it for
    each time that j precedes i; pop counts an item's events. Events are sorted by user, then by time.

    >>> links(np.array([0, 0, 0, 1]), np.array([0, 1, 2, 1]), 3, window=2, backward=0.5).toarray().round(3).tolist()
    [[0.0, 0.707, 0.5], [0.354, 0.0, 0.707], [0.25, 0.354, 0.0]]
    """
    graph = sparse.csr_array((num_items, num_items))
    for distance in range(1, window + 1):
        forward = followers(user, item, num_items, distance)
        graph = graph + forward + backward * forward.T
    scale = sparse.diags_array(1 / np.sqrt(np.maximum(np.bincount(item, minlength=num_items), 1)))
    return sparse.csr_array(scale @ graph @ scale)
