"""EASE: a linear autoencoder over items, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from scipy import sparse
from scipy.linalg import lapack

from cprec.baselines.domain import DomainRecommender, profiles, training_matrix
from cprec.choices import Choice, Real
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.machine import free_memory

BLOCK = 1024
"""Rows of the item matrix that are filled in at once, which bounds memory."""


@dataclass(frozen=True, kw_only=True)
class EASE:
    """EASE, the linear autoencoder whose items do not explain themselves (Steck 2019, equation 8).

        score(j) = sum over items i of the history of decay ** age(i) * B(i, j)
        B(i, j)  = -P(i, j) / P(j, j) off the diagonal, 0 on it, with P = inverse(X'X + regularisation I)

    X says which user had which item in the training part. Deviation: `decay`, for histories that are sequences; the
    fit itself ignores the order. It holds one matrix of items by items, of 4 or 8 bytes times the square of their
    number: 0.6 or 1.2 GB for 12,000 items. Items without a training event score 0 and take no space in it. The time to
    make it grows with the cube. Defaults lie between the best of nine settings on the validation queries of Amazon
    Beauty (100, decay 0.6) and of 25 trials on those of MovieLens 100K (1,470, decay 0.62).
    """

    regularisation: float = 200.0
    """Added to the diagonal, in users: the larger, the more users must agree."""
    decay: float = 0.6
    """Weight of an event of the history relative to the one after it; 1 weighs all alike."""
    precision: Literal["float32", "float64"] = "float32"
    """Numbers of the matrix. float32 halves memory and time."""
    max_items: int = 30_000
    """The most items with training events. More would take too long: for 30,000 the inverse takes 27 thousand billion
    multiplications, and 3.6 GB in float32."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "regularisation": Real(low=1, high=10_000, log=True),
        "decay": Real(low=0.2, high=1),
    }

    def __post_init__(self) -> None:
        if not self.regularisation > 0:
            raise ConfigError(f"regularisation={self.regularisation} must be above 0")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay={self.decay} must lie above 0 and at most at 1")
        if self.precision not in ("float32", "float64"):
            raise ConfigError(f"precision={self.precision!r}: expected float32 or float64")
        if self.max_items < 1:
            raise ConfigError(f"max_items={self.max_items} must be at least 1")

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> EASERecommender:
        """See `Settings.make`; nothing is random and nothing kept. Raises Unsuitable where items are too many."""
        return EASERecommender(split, domain, self)


PUBLISHED = EASE(regularisation=500.0, decay=1.0, precision="float64")
"""As Steck (2019) reports for MovieLens 20M; 1,000 was best for Netflix, and 200 for the Million Song Data."""


class EASERecommender(DomainRecommender):
    """Ranks a domain's items by a linear combination of the history; see `EASE`."""

    name = "EASE"

    def __init__(self, split: Split, domain: str, settings: EASE) -> None:
        super().__init__(split, domain)
        matrix = training_matrix(split, domain)
        self._decay, self._num_items = settings.decay, matrix.shape[1]
        self._known = np.flatnonzero(np.bincount(matrix.indices, minlength=matrix.shape[1]))
        check_size(len(self._known), settings, free_memory())
        self._weights = item_weights(matrix[:, self._known], settings.regularisation, settings.precision)

    def history_scores(self, history: Ragged) -> np.ndarray:
        known = profiles(history, self._num_items, self._decay)[:, self._known]
        scores = np.zeros((len(history), self._num_items), dtype=self._weights.dtype)
        scores[:, self._known] = known.astype(self._weights.dtype) @ self._weights
        return scores

    def state(self) -> dict[str, np.ndarray]:
        return {"weights": self._weights, "known": self._known, "decay": np.array(self._decay)}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        super()._restore(arrays)
        self._weights, self._known = arrays["weights"], arrays["known"]
        self._num_items, self._decay = len(self.catalogue.rows_of(self.domain)), float(arrays["decay"])


def check_size(num_items: int, settings: EASE, free_bytes: int) -> None:
    """Raise Unsuitable where the matrix of items by items is larger than the settings or the memory allow."""
    needed = num_items**2 * np.dtype(settings.precision).itemsize
    if num_items > settings.max_items:
        raise Unsuitable(
            f"EASE: {num_items:,} items have training events, more than max_items={settings.max_items:,}; their matrix "
            f"takes {needed / 1e9:.1f} GB in {settings.precision}: raise max_items if there is memory and time "
            "for it, or leave EASE out"
        )
    if needed > free_bytes:
        advice = "use precision=float32, or leave EASE out" if settings.precision == "float64" else "leave EASE out"
        raise Unsuitable(
            f"EASE: the matrix of {num_items:,} items takes {needed / 1e9:.1f} GB in {settings.precision}, but "
            f"{free_bytes / 1e9:.1f} GB of memory are free: {advice}"
        )


def item_weights(matrix_UN: sparse.csr_array, regularisation: float, precision: str) -> np.ndarray:
    """B of `EASE` for a matrix of users by items: [N, N]. Every step works in the memory of the result.

    Each regularisation needs an inverse of its own. One eigendecomposition of X'X would serve all of them, but takes
    five times as long as the two inverses of a table together (4,000 items: 15 s, against 1 s in float32 and 2 s in
    float64).
    """
    matrix_UN = matrix_UN.astype(precision)
    matrix_NU = sparse.csr_array(matrix_UN.T)
    size = matrix_UN.shape[1]
    weights = np.empty((size, size), dtype=precision)
    for start in range(0, size, BLOCK):
        weights[start : start + BLOCK] = (matrix_NU[start : start + BLOCK] @ matrix_UN).toarray()
    weights[np.diag_indices(size)] += regularisation
    # The transpose of a symmetric matrix is itself, in the order of columns that LAPACK can overwrite.
    factorise, invert = (lapack.spotrf, lapack.spotri) if precision == "float32" else (lapack.dpotrf, lapack.dpotri)
    factor, failed = factorise(weights.T, lower=1, overwrite_a=1)
    inverse, also_failed = invert(factor, lower=1, overwrite_c=1)
    if failed or also_failed:
        raise ConfigError(
            f"EASE: X'X + {regularisation} I cannot be inverted in {precision}: raise regularisation, or use float64"
        )
    weights = inverse.T  # its upper triangle holds the inverse
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        square = np.triu(weights[start:stop, start:stop])
        weights[start:stop, start:stop] = square + np.triu(square, 1).T
        weights[stop:, start:stop] = weights[start:stop, stop:].T
    weights /= -np.diag(weights).copy()
    weights[np.diag_indices(size)] = 0
    return weights
