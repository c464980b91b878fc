"""Second-order random walks on a graph of items (node2vec, Grover and Leskovec 2016), and their exact entropy.

Suffixes: V items, L links, W walks, T places of a walk.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from scipy import sparse

from cprec.data.ragged import places
from cprec.errors import ConfigError

MOST_STEPS, TOLERANCE = 100_000, 1e-12
"""When the search for the stationary distribution ends: at the latest, and once a step changes less."""
MOST_PAIRS = 1 << 25
"""Links that follow each other for which exact entropies are computed, at most: they take about a gigabyte."""


class SecondOrderWalks:
    """Walks whose next step depends on the last two items (Grover and Leskovec 2016, section 3.2.1).

    From item v, reached from item t, the walk goes to x in proportion to a(t, x) w(v, x):

        a(t, x) = 1 / p where x is t, 1 where a link leads from t to x, 1 / q for others

    A walk begins with a link, drawn in proportion to its weight; the paper begins at each item equally often, which
    tells most of the items that hardly occur. Links from an item to itself are left out.

    Raises ConfigError for p or q that are not above 0, where there are no links, and where an item is reached that
    leads nowhere.
    """

    def __init__(self, weights_VV: sparse.csr_array, *, p: float, q: float) -> None:
        """Rows lead to columns; weights are not negative."""
        for name, value in (("p", p), ("q", q)):
            if not 0 < value < np.inf:
                raise ConfigError(f"{name}={value} must be a number above 0")
        entries = weights_VV.tocoo()
        is_link = (entries.row != entries.col) & (entries.data > 0)
        kept = (entries.data[is_link], (entries.row[is_link], entries.col[is_link]))
        links_VV = sparse.csr_array(kept, weights_VV.shape)
        if not links_VV.nnz:
            raise ConfigError("no item leads to another one: there is nothing to walk on")
        self._num_items = weights_VV.shape[0]
        self._from_L = np.repeat(np.arange(self._num_items), np.diff(links_VV.indptr))
        self._to_L = links_VV.indices.astype(np.int64)
        self._weight_L = links_VV.data.astype(np.float64)
        self._first_V = links_VV.indptr.astype(np.int64)
        """The links of item v are those from first[v] to before first[v + 1]."""
        self._total_L = np.concatenate([[0.0], np.cumsum(self._weight_L)])
        """The weight of all links before each."""
        self._key_L = self._key(self._from_L, self._to_L)
        self._return, self._away = 1 / p, 1 / q
        ends = np.setdiff1d(self._to_L, self._from_L)
        if len(ends):
            raise ConfigError(
                f"{len(ends):,} items are reached and lead nowhere, as number {ends[0]}: a walk ends there"
            )

    def sample(self, num_walks: int, length: int, generator: np.random.Generator) -> np.ndarray:
        """Items by walk, of at least two steps: int64[W, T]. Memory is of the links, not of pairs of them."""
        items_WT = np.empty((num_walks, length), dtype=np.int64)
        first_W = self._drawn(np.zeros(num_walks, np.int64), np.full(num_walks, len(self._to_L)), generator)
        items_WT[:, 0], items_WT[:, 1] = self._from_L[first_W], self._to_L[first_W]
        highest = max(self._return, 1.0, self._away)
        for place in range(2, length):
            waiting = np.arange(num_walks)
            # A step by the weights alone is taken with a chance of a(t, x) over its highest value, or drawn again.
            while len(waiting):
                before, here = items_WT[waiting, place - 2], items_WT[waiting, place - 1]
                link = self._drawn(self._first_V[here], self._first_V[here + 1], generator)
                taken = generator.random(len(waiting)) * highest < self._factor(before, self._to_L[link])
                taken |= self._first_V[here + 1] - self._first_V[here] == 1  # there is nothing else to draw
                items_WT[waiting[taken], place] = self._to_L[link[taken]]
                waiting = waiting[~taken]
        return items_WT

    def entropies(self, length: int) -> np.ndarray:
        """The exact entropy of each place of walks, given the places before it, in nats: float64[T].

        It sums to the entropy of a whole walk, which is the least loss that any model of these walks has on average.
        Raises ConfigError for a graph that is too large.
        """
        first_V = np.bincount(self._from_L, self._weight_L, self._num_items) / self._total_L[-1]
        chance_L = self._weight_L / self._total_L[-1]
        out = [_entropy(first_V), _entropy(chance_L) - _entropy(first_V)]
        for _ in range(2, length):
            out.append(float(chance_L @ self._step_entropy_L))
            chance_L = self._chain_LL.T @ chance_L
        return np.array(out)

    def entropy_rate(self) -> float:
        """The exact entropy of a step of walks that have gone on for long, given the two items before, in nats.

        It is the mean over the links that walks come by in the long run: the stationary distribution of the chain of
        links, in which parts of the graph without links between them keep the shares that they begin with.

        Raises ConfigError for a graph that is too large, and where walks have not come to rest after `MOST_STEPS`.
        """
        chance_L = self._weight_L / self._total_L[-1]
        for _ in range(MOST_STEPS):
            # Half of the walks stay, so that those which go to and fro come to rest, too.
            next_L = (chance_L + self._chain_LL.T @ chance_L) / 2
            change, chance_L = np.abs(next_L - chance_L).sum(), next_L
            if change < TOLERANCE:
                return float(chance_L @ self._step_entropy_L)
        raise ConfigError(
            f"walks have not come to rest after {MOST_STEPS:,} steps: the graph hangs together too loosely"
        )

    @cached_property
    def _chain_LL(self) -> sparse.csr_array:
        """The chance of each link after each other one. Raises ConfigError where more than `MOST_PAIRS` have one."""
        num_next = np.diff(self._first_V)[self._to_L]
        if num_next.sum() > MOST_PAIRS:
            raise ConfigError(
                f"{num_next.sum():,} pairs of links follow each other, and exact entropies are for {MOST_PAIRS:,} at "
                "most: keep the strongest links of each item"
            )
        link = np.repeat(np.arange(len(self._to_L)), num_next)
        after = places(self._first_V[self._to_L], num_next)
        weight = self._weight_L[after] * self._factor(self._from_L[link], self._to_L[after])
        chance = weight / np.bincount(link, weight)[link]
        return sparse.csr_array((chance, (link, after)), (len(self._to_L), len(self._to_L)))

    @cached_property
    def _step_entropy_L(self) -> np.ndarray:
        """The entropy of the step after each link."""
        surprise_LL = self._chain_LL.copy()
        surprise_LL.data = -surprise_LL.data * np.log(surprise_LL.data)
        summed_L: np.ndarray = surprise_LL.sum(1)
        return summed_L

    def _drawn(self, first: np.ndarray, stop: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """One of the links from `first` to before `stop` for each, in proportion to their weights."""
        low, high = self._total_L[first], self._total_L[stop]
        found = np.searchsorted(self._total_L, low + generator.random(len(first)) * (high - low), side="right") - 1
        return np.clip(found, first, stop - 1)

    def _factor(self, before: np.ndarray, to: np.ndarray) -> np.ndarray:
        """a(t, x) of pairs of items."""
        key = self._key(before, to)
        at = np.minimum(np.searchsorted(self._key_L, key), len(self._key_L) - 1)
        return np.where(before == to, self._return, np.where(self._key_L[at] == key, 1.0, self._away))

    def _key(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return one.astype(np.int64) * self._num_items + other


def _entropy(chances: np.ndarray) -> float:
    positive = chances[chances > 0]
    return float(-(positive * np.log(positive)).sum())
