"""What baselines share that learn one domain: its training matrix, histories as vectors, and the check of the domain.

Suffixes: U users, N items of the domain in catalogue order, Q queries.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import sparse

from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import Unsuitable
from cprec.recommender import RankingQuery
from cprec.scoring import StoredRecommender, check_domain


class DomainRecommender(StoredRecommender):
    """A recommender that has learnt one domain: a subclass scores histories, whatever the query, and says its state."""

    domain: str

    def __init__(self, split: Split, domain: str) -> None:
        self.catalogue, self.domain = split.catalogue, domain

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """See `ScoringRecommender.scores`. Raises ConfigError for another domain than its own."""
        check_domain(self.name, (self.domain,), domain)
        return self.history_scores(self.histories(domain, queries))

    @abstractmethod
    def history_scores(self, history: Ragged) -> np.ndarray:
        """Scores of the domain's items for histories of positions among them, oldest first: float[Q, N]."""

    @abstractmethod
    def state(self) -> dict[str, np.ndarray]:
        """`arrays` without the domain."""

    def arrays(self) -> dict[str, np.ndarray]:
        """See `StoredRecommender.arrays`."""
        return {"domain": np.array(self.domain), **self.state()}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.domain = str(arrays["domain"])


def sparse_arrays(name: str, matrix: sparse.csr_array) -> dict[str, np.ndarray]:
    """A square sparse matrix as arrays, which `sparse_from` reads."""
    return {f"{name}.{part}": getattr(matrix, part) for part in ("data", "indices", "indptr")}


def sparse_from(arrays: Mapping[str, np.ndarray], name: str) -> sparse.csr_array:
    """The square sparse matrix that `sparse_arrays` gave."""
    data, indices, indptr = (arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr"))
    return sparse.csr_array((data, indices, indptr), shape=(len(indptr) - 1,) * 2)


def training_matrix(split: Split, domain: str) -> sparse.csr_array:
    """Users by items of the training events of a domain: float64[U, N] of ones. Repeats count once, and users
    without events are left out.

    Raises Unsuitable where the domain has no training event.
    """
    log, items = split.train, split.catalogue.rows_of(domain)
    mine = split.catalogue.domain[log.item] == split.catalogue.domain_index(domain)
    if not mine.any():
        raise Unsuitable(f"domain {domain!r} has no training event to learn from: choose another domain or split")
    users, row = np.unique(log.user[mine], return_inverse=True)
    column = log.item[mine] - items[0]
    matrix = sparse.csr_array((np.ones(len(row)), (row, column)), (len(users), len(items)))
    matrix.data[:] = 1  # events of one (user, item) were summed
    return matrix


def profiles(history: Ragged, num_items: int, decay: float = 1.0) -> sparse.csr_array:
    """Histories as vectors: float64[Q, N], decay ** age for each item had, where the last event has age 0.

    An item that was had several times counts once, at its latest event.

    >>> profiles(Ragged.of([[2, 0, 2]]), 4, 0.5).toarray().tolist()
    [[0.5, 0.0, 1.0, 0.0]]
    """
    row = history.row_of
    key, latest = np.unique((row * num_items + history.values)[::-1], return_index=True)
    weight = (decay ** ages(history).astype(float))[::-1][latest]
    rows_and_columns = (key // num_items, key % num_items)
    return sparse.csr_array((weight, rows_and_columns), (len(history), num_items))


def ages(history: Ragged) -> np.ndarray:
    """How many events of its row come after each value: int64[len(values)].

    >>> ages(Ragged.of([[5, 6, 7], [5]])).tolist()
    [2, 1, 0, 0]
    """
    age: np.ndarray = np.repeat(history.offsets[1:], history.lengths) - 1 - np.arange(len(history.values))
    return age
