"""iALS: matrix factorisation of implicit feedback by alternating least squares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from scipy import sparse

from cprec.baselines.domain import DomainRecommender, profiles, training_matrix
from cprec.choices import Choice, Real, Whole
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError

CELLS = 16_000_000
"""Numbers of the batch of equations that is solved at once, unless one row alone has more."""


@dataclass(frozen=True, kw_only=True)
class IALS:
    """iALS (Hu, Koren and Volinsky 2008) with the loss and the scaling of Rendle et al. (2022).

        sum over observed (u, i): (1 - w_u h_i)^2  +  unobserved_weight * sum over all (u, i): (w_u h_i)^2
        + regularisation * sum over u: (items(u) + unobserved_weight * N) ** regularisation_exponent * |w_u|^2
        + the same over i, with users(i) and the number of users

    Users and items are solved exactly, in turns. The vector of a query solves the same equation for its history, so
    histories outside the training data are served as well. Deviation: `decay` weighs the events of that history. The
    defaults were the best of some ten settings on the validation queries of Amazon Beauty (NDCG@10 0.067); MovieLens
    100K prefers an unobserved_weight near 0.1 (0.104 in place of 0.09). No other classical baseline depends as much on
    its settings: tune it before you put it into a table.
    """

    factors: int = 256
    """Length of a vector."""
    regularisation: float = 0.003
    """Weight of the squared lengths."""
    unobserved_weight: float = 0.01
    """Weight of all pairs, relative to the observed ones; 1 / alpha of Hu et al."""
    regularisation_exponent: float = 1.0
    """How the weight grows with the events of a user or item; 0: the same for all, as in Hu et al."""
    epochs: int = 16
    """Turns of users and items."""
    initial_deviation: float = 0.1
    """Standard deviation of the length of an item's first vector."""
    decay: float = 0.6
    """Weight of an event of the history relative to the one after it; 1 weighs all alike."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "factors": Whole(low=32, high=512, log=True),
        "regularisation": Real(low=0.0005, high=0.1, log=True),
        "unobserved_weight": Real(low=0.001, high=1, log=True),
        "decay": Real(low=0.2, high=1),
    }

    def __post_init__(self) -> None:
        if self.factors < 1 or self.epochs < 1:
            raise ConfigError(f"factors={self.factors} and epochs={self.epochs} must be at least 1")
        for name in ("regularisation", "unobserved_weight", "initial_deviation"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.regularisation_exponent <= 1:
            raise ConfigError(f"regularisation_exponent={self.regularisation_exponent} must lie between 0 and 1")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay={self.decay} must lie above 0 and at most at 1")

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> IALSRecommender:
        """See `Settings.make`; the seed decides the first vectors, and nothing is kept."""
        return IALSRecommender(split, domain, self, seed)


PUBLISHED = IALS(factors=192, regularisation=0.007, unobserved_weight=0.3, epochs=12, decay=1.0)
"""As Rendle et al. (2022) ran it on MovieLens 1M, their smallest log; events of a history weigh the same."""


class IALSRecommender(DomainRecommender):
    """Ranks a domain's items by their vectors' product with the history's; see `IALS`.

    Items without a training event have a vector of zeros and score 0. A batch gives the same answers as single
    calls, up to the rounding of 32-bit sums.
    """

    name = "iALS"

    def __init__(self, split: Split, domain: str, settings: IALS, seed: int) -> None:
        super().__init__(split, domain)
        self._settings = settings
        self._items = item_factors(training_matrix(split, domain), settings, seed)

    def history_scores(self, history: Ragged) -> np.ndarray:
        asked = profiles(history, len(self._items), self._settings.decay)
        scores: np.ndarray = (solve(self._items, asked, self._settings) @ self._items.T).numpy()
        return scores

    def state(self) -> dict[str, np.ndarray]:
        return {"items": self._items.numpy(), "settings": np.array(json.dumps(asdict(self._settings)))}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        super()._restore(arrays)
        self._items, self._settings = torch.from_numpy(arrays["items"]), IALS(**json.loads(str(arrays["settings"])))


def item_factors(matrix_UN: sparse.csr_array, settings: IALS, seed: int) -> torch.Tensor:
    """The items' vectors after all epochs: float32[N, factors]."""
    size = (matrix_UN.shape[1], settings.factors)
    deviation = settings.initial_deviation / np.sqrt(settings.factors)
    items = torch.from_numpy(np.random.default_rng(seed).normal(0, deviation, size).astype(np.float32))
    matrix_NU = sparse.csr_array(matrix_UN.T)
    for _ in range(settings.epochs):
        users = solve(items, matrix_UN, settings)
        items = solve(users, matrix_NU, settings)
    return items


def solve(other_MF: torch.Tensor, weight_RM: sparse.csr_array, settings: IALS) -> torch.Tensor:
    """The vectors of R rows that minimise the loss while those of the other side are fixed: float32[R, factors].

    `weight_RM` holds the weight of each observed pair. Let V be the vectors of a row's pairs, W the diagonal matrix of
    their weights, and A the part that no pair changes. The vector is then (V'WV + A)^-1 V'W1, with as many equations as
    factors. A row with fewer pairs than that is solved as A^-1 V' (VA^-1V' + W^-1)^-1 1, with as many equations as
    pairs (Woodbury). Everything is done in the basis of the other side's principal axes, where A is diagonal. Rows of
    similar length are solved together, padded with vectors of zeros.
    """
    num_other, size = other_MF.shape
    spread_F, axes_FF = torch.linalg.eigh(settings.unobserved_weight * (other_MF.T @ other_MF))
    padded = torch.cat([other_MF @ axes_FF, other_MF.new_zeros(1, size)])
    occurs = np.asarray(weight_RM.sum(axis=1)) + settings.unobserved_weight * num_other
    ridge_R = torch.from_numpy((settings.regularisation * occurs**settings.regularisation_exponent).astype(np.float32))
    length_R = np.diff(weight_RM.indptr)
    longest_first = np.argsort(-length_R, kind="stable")
    solved = other_MF.new_zeros(weight_RM.shape[0], size)
    start = 0
    while start < len(longest_first) and (longest := int(length_R[longest_first[start]])):  # no pairs: all zeros
        rows = longest_first[start : start + max(1, CELLS // (size * (longest + min(longest, size))))]
        start += len(rows)
        there = np.arange(longest) < length_R[rows][:, None]
        pair = np.where(there, weight_RM.indptr[rows][:, None] + np.arange(longest), 0)
        vectors = padded[torch.from_numpy(np.where(there, weight_RM.indices[pair], num_other).astype(np.int64))]
        weights = torch.from_numpy(weight_RM.data[pair].astype(np.float32))[:, :, None]
        diagonal = spread_F.clamp(min=0) + ridge_R[torch.from_numpy(rows)][:, None]
        if longest < size:
            scaled = vectors / diagonal[:, None, :]
            between = scaled @ vectors.mT
            between.diagonal(dim1=1, dim2=2).add_(1 / weights[:, :, 0])
            vector = scaled.mT @ torch.cholesky_solve(torch.ones_like(weights), torch.linalg.cholesky(between))
        else:
            weighted = (vectors * weights).mT
            within = weighted @ vectors
            within.diagonal(dim1=1, dim2=2).add_(diagonal)
            vector = torch.cholesky_solve(weighted.sum(dim=2, keepdim=True), torch.linalg.cholesky(within))
        solved[torch.from_numpy(rows)] = vector[:, :, 0]
    return solved @ axes_FF.T
