"""Slates by Thompson sampling: how often an item stands in a place, by the normal distribution."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from cprec.errors import ConfigError, DataError
from cprec.online.bandit import Posterior
from cprec.online.slates import thompson

BELOW = NormalDist().cdf(1.0)
"""The chance that a draw of one of the two unsure items is below the sure one's 1."""
DRAWS = 40_000


def drawn(*, in_slate: bool, noise: float = 1.0, size: int = 2) -> np.ndarray:
    """Slates from a sure item of mean 1 and two unsure ones of mean 0."""
    mean, deviation = np.tile([1.0, 0.0, 0.0], (DRAWS, 1)), np.tile([0.0, 1.0, 1.0], (DRAWS, 1))
    return thompson(Posterior(mean, deviation), size, np.random.default_rng(0), noise=noise, in_slate=in_slate)


@pytest.mark.parametrize(
    ("in_slate", "second"), [(True, BELOW), (False, 2 * (1 - BELOW) * BELOW / (1 - BELOW**2))], ids=["in-slate", "one"]
)
def test_places_by_the_normal_distribution(in_slate: bool, second: float) -> None:
    """The sure item is first where both others are below 1. Where it is not first, the second place holds it if the
    one unsure item left is below 1: in a new draw, whatever the first was; in the same one, given that not both were
    below."""
    slate_UP = drawn(in_slate=in_slate)
    first = slate_UP[:, 0] == 0
    error = 4 * 0.5 / np.sqrt(DRAWS)
    assert first.mean() == pytest.approx(BELOW**2, abs=error)
    assert (slate_UP[~first, 1] == 0).mean() == pytest.approx(second, abs=2 * error)
    assert abs(2 * (1 - BELOW) * BELOW / (1 - BELOW**2) - BELOW) > 4 * error  # the two ways can be told apart


@pytest.mark.parametrize("in_slate", [True, False])
def test_no_item_stands_twice_and_what_must_not_be_shown_does_not(in_slate: bool) -> None:
    slate_UP = drawn(in_slate=in_slate, size=3)
    assert (np.sort(slate_UP, axis=1) == [0, 1, 2]).all()
    mean = np.array([[0.0, -np.inf, 0.0, -np.inf, 0.0]] * 50)
    shown = thompson(Posterior(mean, np.ones_like(mean)), 3, np.random.default_rng(1), in_slate=in_slate)
    assert (np.sort(shown, axis=1) == [0, 2, 4]).all()


def test_without_noise_slates_are_greedy() -> None:
    assert (drawn(in_slate=True, noise=0.0) == [0, 1]).all()


def test_noise_scales_the_deviations() -> None:
    """With noise 1/2 an unsure item is below 1 as one of deviation 1 is below 2."""
    first = (drawn(in_slate=True, noise=0.5)[:, 0] == 0).mean()
    assert first == pytest.approx(NormalDist().cdf(2.0) ** 2, abs=2 / np.sqrt(DRAWS))


def test_bad_slates_are_refused() -> None:
    generator, ones = np.random.default_rng(0), np.ones((2, 3))
    hidden = np.array([[0.0, 0.0, 0.0], [0.0, -np.inf, 0.0]])
    for size in (0, 3):
        with pytest.raises(ConfigError, match=f"size={size}, but a user has 2 items that may be shown"):
            thompson(Posterior(hidden, ones), size, generator)
    for broken in (Posterior(ones * np.nan, ones), Posterior(ones, ones * np.inf), Posterior(ones * np.inf, ones)):
        with pytest.raises(DataError, match="the posterior has NaN or infinity"):
            thompson(broken, 2, generator)
