"""EASE against its definition: each item is predicted from the others by ridge regression."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from cprec.baselines import ease
from cprec.baselines.ease import EASE, check_size, item_weights
from cprec.errors import ConfigError

MATRIX = (np.random.default_rng(0).random((40, 9)) < 0.35).astype(float)


@pytest.mark.parametrize("block", [4, 1024])
@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_every_item_is_explained_by_the_others(
    precision: str, tolerance: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ease, "BLOCK", block)
    got = item_weights(sparse.csr_array(MATRIX), 3.0, precision)
    assert got.dtype == precision
    expected = np.zeros((9, 9))
    for item in range(9):
        others = np.delete(np.arange(9), item)
        X = MATRIX[:, others]
        expected[others, item] = np.linalg.solve(X.T @ X + 3.0 * np.eye(8), X.T @ MATRIX[:, item])
    np.testing.assert_allclose(got, expected, atol=tolerance)


def test_two_items_by_hand() -> None:
    """Item 0 has 3 users, item 1 has 2, both have 1 in common: weights 1 / (3 + 1) and 1 / (2 + 1)."""
    matrix = sparse.csr_array(np.array([[1, 1], [1, 0], [1, 0], [0, 1]], dtype=float))
    np.testing.assert_allclose(item_weights(matrix, 1.0, "float64"), [[0, 1 / 4], [1 / 3, 0]])


def test_too_many_items_are_refused_with_the_memory_that_they_take() -> None:
    settings = EASE(max_items=10_000)
    check_size(10_000, settings, 400_000_000)
    with pytest.raises(ConfigError, match=r"10,001 items .* max_items=10,000; .* 0.4 GB in float32"):
        check_size(10_001, settings, 10**12)
    with pytest.raises(ConfigError, match=r"10,000 items takes 0.8 GB in float64, but 0.5 GB .* precision=float32"):
        check_size(10_000, EASE(precision="float64"), 500_000_000)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"regularisation": 0.0}, "regularisation=0.0"),
        ({"decay": 0.0}, "decay=0.0"),
        ({"precision": "float16"}, "expected float32 or float64"),
        ({"max_items": 0}, "max_items=0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EASE(**wrong)
