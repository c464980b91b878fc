"""Dense vectors of item texts."""

from __future__ import annotations

import numpy as np

from cprec.data.titles import title_vectors
from cprec.systems.vectors import text_vectors

WORDS = ["red", "green", "shoe", "boot", "tea", "lamp", "desk", "oil", "wool", "iron", "salt", "cup"]


def some_titles(number: int) -> list[str]:
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, 3)) for _ in range(number)]


def test_vectors_are_the_strongest_singular_directions() -> None:
    titles = some_titles(60)
    left, strengths, _ = np.linalg.svd(title_vectors(titles).toarray())
    expected = left[:, :4] * strengths[:4]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = text_vectors(titles, size=4)
    assert found.dtype == np.float32
    assert np.allclose(found @ found.T, expected @ expected.T, atol=1e-5)


def test_more_directions_than_the_titles_have_are_zero() -> None:
    found = text_vectors(["red shoe", "green shoe", "shoe", ""], size=16)
    assert found.shape == (4, 16)
    assert np.allclose(np.linalg.norm(found, axis=1), [1, 1, 1, 0])
    assert not found[:, 3:].any()


def test_the_seed_decides_only_how_directions_are_found() -> None:
    titles = some_titles(60)
    first, again, other = (text_vectors(titles, size=6, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.allclose(first, other, atol=1e-4)
