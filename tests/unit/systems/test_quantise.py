"""Codes of vectors, by each kind of quantiser."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from cprec.errors import ConfigError
from cprec.systems import autoencoder
from cprec.systems.autoencoder import Autoencoder
from cprec.systems.codes import Kind, fitted
from cprec.systems.quantise import Product, Scalar, SideBySide

each_kind = pytest.mark.parametrize("kind", get_args(Kind))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "STEPS", 20)


def clustered(seed: int, deviation: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Points around four centres, and where each belongs."""
    generator = np.random.default_rng(seed)
    home = generator.permutation(np.repeat(np.arange(4), 25))
    return np.eye(4)[home] * 10 + generator.normal(0, deviation, size=(100, 4)), home


# ---- all kinds -------------------------------------------------------------------------------------------------------


@each_kind
def test_a_code_is_a_function_of_the_vector_and_the_seed(kind: Kind) -> None:
    vectors, _ = clustered(0)
    before = torch.random.get_rng_state()
    quantiser = fitted(kind, vectors, 2, 8, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before), "fitting draws from a generator of its own"
    codes = quantiser.encode(vectors)
    assert codes.shape == (100, 2) and codes.min() >= 0 and codes.max() < 8
    assert np.array_equal(fitted(kind, vectors, 2, 8, seed=1).encode(vectors), codes)
    order = np.random.default_rng(0).permutation(100)
    assert np.array_equal(quantiser.encode(vectors[order]), codes[order])
    assert np.array_equal(np.concatenate([quantiser.encode(vectors[[row]]) for row in range(100)]), codes)


@each_kind
def test_the_own_last_code_is_that_of_the_least_distance(kind: Kind) -> None:
    vectors, _ = clustered(1)
    quantiser = fitted(kind, vectors, 2, 8, seed=0)
    codes = quantiser.encode(vectors)
    distances = quantiser.last_distances(vectors, codes)
    assert distances.shape == (100, len(quantiser.centres[-1])) and distances.min() >= 0
    assert np.array_equal(distances.argmin(1), codes[:, -1])


@each_kind
def test_fewer_vectors_than_codes(kind: Kind) -> None:
    vectors = np.array([[5.0, 0, 0], [0, 3, 0], [0, 0, 1], [5, 0, 0]])
    codes = fitted(kind, vectors, 2, 256, seed=0).encode(vectors)
    assert codes.max() < 256 and np.array_equal(codes[0], codes[3])
    if kind != "autoencoder":  # whose network may take two vectors for one
        assert len(np.unique(codes, axis=0)) == 3


@each_kind
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_constant_vectors_have_one_code(kind: Kind, value: float) -> None:
    vectors = np.full((9, 5), value)
    assert len(np.unique(fitted(kind, vectors, 3, 4, seed=0).encode(vectors), axis=0)) == 1


@each_kind
def test_duplicates_have_the_same_codes_wherever_they_stand(kind: Kind) -> None:
    vectors = np.random.default_rng(2).normal(size=(7, 6))[np.random.default_rng(3).integers(0, 7, 200)]
    codes = fitted(kind, vectors, 2, 4, seed=0).encode(vectors)
    which = np.unique(vectors, axis=0, return_inverse=True)[1]
    assert len(np.unique(np.column_stack([which, codes]), axis=0)) == 7


# ---- each kind -------------------------------------------------------------------------------------------------------


def test_slices_are_of_principal_directions_strongest_first() -> None:
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.normal(size=(5, 5)))[0]
    ones_and_noise = np.column_stack([np.ones(50), generator.normal(size=(50, 5))])
    points = np.linalg.qr(ones_and_noise)[0][:, 1:]  # uncorrelated, of mean 0
    quantiser = Product.fit(points * [2, 16, 8, 1, 4] @ directions.T + 3, 2, 4, seed=0)
    found = [np.abs(slice_DC.T @ directions).round(6).argmax(1).tolist() for slice_DC in quantiser.directions]
    assert found == [[1, 2, 4], [0, 3]]


def test_product_codes_do_not_depend_on_how_vectors_are_turned() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(200, 6)) * 0.7 ** np.arange(6)
    turn = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    codes = fitted("product", vectors, 3, 8, seed=0).encode(vectors)
    assert np.array_equal(fitted("product", vectors @ turn + 5, 3, 8, seed=0).encode(vectors @ turn + 5), codes)
    assert [len(np.unique(codes[:, level])) for level in range(3)] == [8, 8, 8]


def test_more_slices_than_numbers_are_refused() -> None:
    for kind in ("product", "scalar"):
        with pytest.raises(ConfigError, match="vectors of 2 numbers cannot be cut into num_levels=3 slices"):
            fitted(kind, np.eye(4)[:, :2], 3, 4, seed=0)


def test_scalar_codes_say_the_step_of_each_direction() -> None:
    """A grid of 4 x 4, wider than high: with 16 codes there are 4 steps of either, the first counting most."""
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(4), np.arange(4)))
    vectors = np.column_stack([10.0 * x, y])
    assert fitted("scalar", vectors, 1, 16, seed=0).encode(vectors)[:, 0].tolist() == (4 * x + y).tolist()
    assert fitted("scalar", vectors, 1, 4, seed=0).encode(vectors)[:, 0].tolist() == x.tolist()
    assert fitted("scalar", vectors, 2, 4, seed=0).encode(vectors).tolist() == np.column_stack([x, y]).tolist()
    far = np.array([[-99.0, 99.0]])  # beyond all that it was fitted to: the outer steps
    assert Scalar.fit(vectors, 2, 4, seed=0).encode(far).tolist() == [[0, 3]]


def test_first_codes_of_the_autoencoder_are_the_clusters_of_a_clustered_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "STEPS", 100)
    vectors, home = clustered(0)
    codes = fitted("autoencoder", vectors, 2, 4, seed=0).encode(vectors)
    assert len(set(zip(codes[:, 0].tolist(), home.tolist(), strict=True))) == 4
    assert len(np.unique(codes[:, 1])) == 4


def test_a_vector_on_a_bound_has_one_scalar_code_alone_and_among_others() -> None:
    """Of 101 vectors three lie on the bounds of four steps; sums in another order differ in their last bits."""
    vectors = np.random.default_rng(0).normal(size=(101, 90))
    quantiser = fitted("scalar", vectors, 10, 4, seed=0)
    alone = np.concatenate([quantiser.encode(vectors[[row]]) for row in range(101)])
    assert np.array_equal(alone, quantiser.encode(vectors))
    assert all(np.bincount(codes).tolist() == [25, 25, 25, 26] for codes in alone.T)


def test_the_encoder_reads_vectors_of_any_scale() -> None:
    vectors, _ = clustered(3)
    found = [Autoencoder.fit(each, 2, 8, seed=0) for each in (vectors, 1000 * vectors + 77)]
    assert found[0].latent(vectors) == pytest.approx(found[1].latent(1000 * vectors + 77), abs=1e-3)
    assert np.array_equal(found[0].encode(vectors), found[1].encode(1000 * vectors + 77))


def test_centres_are_moving_averages_and_a_dead_one_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "DECAY", 0.5)
    averages = autoencoder._Averages(torch.tensor([[0.0], [8.0], [99.0]]), torch.tensor([0, 0, 1]))
    points = torch.tensor([[1.0], [3.0], [10.0]])
    chosen = averages.chosen(points, np.random.default_rng(0))
    assert chosen[:, 0].tolist() == [0, 0, 8]
    # Counts 2 and 1 stay; sums 0 and 8 go half the way to 4 and 10.
    assert averages.centre_KC[:2, 0].tolist() == [1, 9]
    assert averages.centre_KC[2] in points and averages.count_K.tolist() == [2, 1, 1]


def test_codes_of_several_kinds_stand_side_by_side() -> None:
    first, second = clustered(0)[0], clustered(1)[0][:, :3]
    parts = fitted("residual k-means", first, 2, 8, seed=0), fitted("scalar", second, 3, 4, seed=0)
    both, together = SideBySide(parts, (4, 3)), np.concatenate([first, second], axis=1)
    codes = both.encode(together)
    assert np.array_equal(codes, np.concatenate([parts[0].encode(first), parts[1].encode(second)], axis=1))
    own = parts[1].last_distances(second, codes[:, 2:])
    assert np.array_equal(both.last_distances(together, codes), own)
