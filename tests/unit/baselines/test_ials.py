"""iALS against the normal equations one by one, and the loss that they minimise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from cprec.baselines import ials
from cprec.baselines.ials import IALS
from cprec.errors import ConfigError

SETTINGS = IALS(factors=6, regularisation=0.05, unobserved_weight=0.2, regularisation_exponent=0.7, epochs=3)


def random_pairs(rows: int, columns: int, seed: int = 0) -> sparse.csr_array:
    """Weights of rows with none to all of the columns."""
    generator = np.random.default_rng(seed)
    there = generator.random((rows, columns)) < generator.random((rows, 1))
    there[0] = False
    there[1] = True
    return sparse.csr_array(there * generator.uniform(0.2, 1, (rows, columns)))


def one_by_one(other: np.ndarray, weights: np.ndarray, settings: IALS) -> np.ndarray:
    """(V'WV + w0 H'H + ridge I) x = V'W1, for each row alone, in 64 bits."""
    out = []
    for row in weights:
        ridge = settings.regularisation * (row.sum() + settings.unobserved_weight * len(other)) ** (
            settings.regularisation_exponent
        )
        left = (other.T * row) @ other + settings.unobserved_weight * other.T @ other + ridge * np.eye(other.shape[1])
        out.append(np.linalg.solve(left, other.T @ row))
    return np.array(out)


@pytest.mark.parametrize("cells", [1, 500, 10**6])
def test_rows_solve_their_normal_equations_however_they_are_batched(
    cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ials, "CELLS", cells)
    other = np.random.default_rng(1).normal(0, 0.5, (15, 6))
    weights = random_pairs(20, 15)
    lengths = np.diff(weights.indptr)
    assert lengths.min() == 0 and (lengths < 6).sum() > 3 and (lengths > 6).sum() > 3, "both ways of solving are used"
    got = ials.solve(torch.from_numpy(other.astype(np.float32)), weights, SETTINGS).numpy()
    np.testing.assert_allclose(got, one_by_one(other, weights.toarray(), SETTINGS), atol=2e-6)


def loss(users: np.ndarray, items: np.ndarray, matrix: np.ndarray, settings: IALS) -> float:
    """The loss as it is written in `IALS`."""
    predicted = users @ items.T
    value = ((1 - predicted) ** 2 * matrix).sum() + settings.unobserved_weight * (predicted**2).sum()
    for vectors, occurs, others in ((users, matrix.sum(1), len(items)), (items, matrix.sum(0), len(users))):
        scale = (occurs + settings.unobserved_weight * others) ** settings.regularisation_exponent
        value += settings.regularisation * (scale * (vectors**2).sum(1)).sum()
    return float(value)


def test_every_half_turn_lowers_the_loss() -> None:
    matrix = sparse.csr_array((random_pairs(30, 12, seed=3).toarray() > 0).astype(float))
    losses = []
    for epochs in (1, 2, 5):
        items = ials.item_factors(matrix, replace(SETTINGS, epochs=epochs), seed=0)
        users = ials.solve(items, matrix, SETTINGS)
        losses.append(loss(users.numpy(), items.numpy(), matrix.toarray(), SETTINGS))
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_a_pair_of_one_user_and_one_item_by_hand() -> None:
    """One pair, one factor: x = h / (h^2 + w0 h^2 + ridge), with ridge = 0.5 * (1 + 0.5 * 1)."""
    settings = IALS(factors=1, regularisation=0.5, unobserved_weight=0.5)
    solved = ials.solve(torch.tensor([[2.0]]), sparse.csr_array(np.ones((1, 1))), settings)
    assert solved.item() == pytest.approx(2 / (4 + 2 + 0.75))


def test_the_seed_decides_the_first_vectors() -> None:
    matrix = sparse.csr_array((random_pairs(30, 12).toarray() > 0).astype(float))
    first, again, other = (ials.item_factors(matrix, SETTINGS, seed).numpy() for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"factors": 0}, "factors=0"),
        ({"regularisation": 0.0}, "regularisation=0.0 must be above 0"),
        ({"regularisation_exponent": 2.0}, "between 0 and 1"),
        ({"decay": 0.0}, "decay=0.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IALS(**wrong)
