"""Neighbours against cosines by hand, and against a slow reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import sparse

from cprec.baselines import item_knn
from cprec.baselines.item_knn import ItemKNN, neighbours
from cprec.errors import ConfigError


def slow_neighbours(matrix: np.ndarray, number: int, shrinkage: float) -> np.ndarray:
    size = matrix.shape[1]
    similar = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            both = float((matrix[:, i] * matrix[:, j]).sum())
            if i != j and both:
                similar[i, j] = both / (math.sqrt(matrix[:, i].sum() * matrix[:, j].sum()) + shrinkage)
        positive = sorted(similar[i][similar[i] > 0], reverse=True)
        if len(positive) > number:
            similar[i][similar[i] < positive[number - 1]] = 0
    return similar


@pytest.mark.parametrize("number", [1, 3, 100])
@pytest.mark.parametrize("shrinkage", [0.0, 2.5])
@pytest.mark.parametrize("block", [4, 1024])
def test_equals_a_slow_reference(number: int, shrinkage: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_knn, "BLOCK", block)
    matrix = (np.random.default_rng(0).random((25, 11)) < 0.3).astype(float)
    matrix[:, 4] = 0  # an item that nobody had
    got = neighbours(sparse.csr_array(matrix), number, shrinkage).toarray()
    np.testing.assert_allclose(got, slow_neighbours(matrix, number, shrinkage), atol=1e-12)


def test_cosines_and_ties_by_hand() -> None:
    """Users a: 0 1, b: 0 2, c: 0 1 3. Of item 0 (3 users), 1 is nearest with 2 / sqrt(6); then 2 and 3 tie."""
    matrix = sparse.csr_array(np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=float))
    third = 1 / math.sqrt(3)
    assert neighbours(matrix, 1, 0.0).toarray()[0] == pytest.approx([0, 2 / math.sqrt(6), 0, 0])
    assert neighbours(matrix, 2, 0.0).toarray()[0] == pytest.approx([0, 2 / math.sqrt(6), third, third])
    assert neighbours(matrix, 1, 1.0).toarray()[0] == pytest.approx([0, 2 / (math.sqrt(6) + 1), 0, 0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"neighbours": 0}, "neighbours=0"), ({"shrinkage": -1.0}, "shrinkage=-1.0"), ({"decay": 1.5}, "decay=1.5")],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ItemKNN(**wrong)
