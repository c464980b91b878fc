"""Item-based nearest neighbours: other items that the users of an item had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy import sparse

from cprec.baselines.domain import DomainRecommender, profiles, sparse_arrays, sparse_from, training_matrix
from cprec.choices import Choice, Real, Whole
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError

BLOCK = 1024
"""Items whose neighbours are found at once, which bounds memory."""


@dataclass(frozen=True, kw_only=True)
class ItemKNN:
    """Item-based nearest neighbours by cosine (Sarwar et al. 2001; Deshpande and Karypis 2004).

        score(j) = sum over items i of the history of decay ** age(i) * s(i, j)
        s(i, j)  = both(i, j) / (sqrt(users(i) * users(j)) + shrinkage), for the j most similar to i

    Deviations: shrinkage, which is usual today, and `decay`, since histories are sequences. Defaults lie between the
    best of 25 trials on the validation queries of Amazon Beauty (210 neighbours, shrinkage 31, decay 0.40) and of
    MovieLens 100K (30, 2.6, 0.61).
    """

    neighbours: int = 100
    """Most similar items that each item keeps; those tied with the last of them are kept too."""
    shrinkage: float = 10.0
    """Added to the denominator, in users: items that few users had become less similar."""
    decay: float = 0.5
    """Weight of an event of the history relative to the one after it; 1 weighs all alike."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "neighbours": Whole(low=10, high=1000, log=True),
        "shrinkage": Real(low=0, high=100),
        "decay": Real(low=0.2, high=1),
    }

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise ConfigError(f"neighbours={self.neighbours} must be at least 1")
        if self.shrinkage < 0:
            raise ConfigError(f"shrinkage={self.shrinkage} must not be below 0")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay={self.decay} must lie above 0 and at most at 1")

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> ItemKNNRecommender:
        """See `Settings.make`; nothing is random and nothing kept."""
        return ItemKNNRecommender(split, domain, self)


PUBLISHED = ItemKNN(neighbours=20, shrinkage=0.0, decay=1.0)
"""As Deshpande and Karypis (2004) ran it with cosines: 20 neighbours, no shrinkage, equal weights in a basket.
They also scale users to unit length, and each item's similarities to a sum of one; this does neither."""


class ItemKNNRecommender(DomainRecommender):
    """Ranks a domain's items by their similarity to the history; see `ItemKNN`.

    Items near nothing in the history are not returned from the full catalogue, and stand last among candidates.
    """

    name = "ItemKNN"
    floor = 0.0

    def __init__(self, split: Split, domain: str, settings: ItemKNN) -> None:
        super().__init__(split, domain)
        self._decay = settings.decay
        self._similar = neighbours(training_matrix(split, domain), settings.neighbours, settings.shrinkage)

    def history_scores(self, history: Ragged) -> np.ndarray:
        scores: np.ndarray = (profiles(history, self._similar.shape[0], self._decay) @ self._similar).toarray()
        return scores

    def state(self) -> dict[str, np.ndarray]:
        return {"decay": np.array(self._decay), **sparse_arrays("similar", self._similar)}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        super()._restore(arrays)
        self._decay, self._similar = float(arrays["decay"]), sparse_from(arrays, "similar")


def neighbours(matrix_UN: sparse.csr_array, number: int, shrinkage: float) -> sparse.csr_array:
    """Shrunk cosines of the columns of a matrix of ones, the `number` largest of each row and their ties: csr[N, N].

    An item is no neighbour of itself.
    """
    items_NU = sparse.csr_array(matrix_UN.T)
    norm_N = np.sqrt(np.diff(items_NU.indptr))
    blocks = []
    for start in range(0, items_NU.shape[0], BLOCK):
        both = sparse.coo_array(items_NU[start : start + BLOCK] @ matrix_UN)
        row, column = both.coords
        other = row + start != column
        row, column, both_of = row[other], column[other], both.data[other]
        similar = both_of / (norm_N[row + start] * norm_N[column] + shrinkage)
        kept = _largest(row, similar, number, both.shape[0])
        blocks.append(sparse.csr_array((similar[kept], (row[kept], column[kept])), both.shape))
    return sparse.csr_array(sparse.vstack(blocks))


def _largest(row: np.ndarray, value: np.ndarray, number: int, num_rows: int) -> np.ndarray:
    """A mask of the `number` largest values of each row, and those equal to the last of them."""
    order = np.lexsort((-value, row))
    length = np.bincount(row, minlength=num_rows)
    last = np.cumsum(length) - length + np.minimum(length, number) - 1
    least = np.full(num_rows, np.inf)
    least[length > 0] = value[order][last[length > 0]]
    mask: np.ndarray = value >= least[row]
    return mask
