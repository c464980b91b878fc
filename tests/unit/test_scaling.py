"""Power laws of the loss: known laws are found again, and intervals hold them as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from cprec.errors import ConfigError
from cprec.scaling import fit_power_law

TOKENS = 1e6 * 2.0 ** np.arange(8)


@pytest.mark.parametrize(
    ("floor", "scale", "exponent"), [(0.65, 63.9, 0.272), (2.0, 4.0, 0.05), (0.0, 500.0, 0.4), (1.0, 1e6, 1.0)]
)
def test_a_law_is_found_again_from_points_on_it(floor: float, scale: float, exponent: float) -> None:
    law = fit_power_law(TOKENS, floor + scale * TOKENS**-exponent)
    assert law.floor.value == pytest.approx(floor, abs=1e-3)
    assert law.scale.value == pytest.approx(scale, rel=1e-2)
    assert law.exponent.value == pytest.approx(exponent, rel=1e-3)
    assert law(1e7) == pytest.approx(floor + scale * 1e7**-exponent, rel=1e-6)
    assert law.error < 1e-6
    assert law.floor.high - law.floor.low < 0.01


def test_intervals_hold_the_law_as_often_as_they_say() -> None:
    """Of 60 intervals of 80 % about 48; with a standard error of three, 39 to 57."""
    generator, truth = np.random.default_rng(0), np.array([0.65, 1.5 * 1e6**0.45, 0.45])
    held, widths = np.zeros(3), []
    for _ in range(60):
        losses = truth[0] + truth[1] * TOKENS ** -truth[2] + generator.normal(0, 0.01, len(TOKENS))
        law = fit_power_law(TOKENS, losses, confidence=0.8)
        of_law = law.floor, law.scale, law.exponent
        held += [each.low <= true <= each.high for each, true in zip(of_law, truth, strict=True)]
        widths.append(law.floor.high - law.floor.low)
    assert ((held >= 39) & (held <= 57)).all(), held
    assert 0.02 < np.median(widths) < 0.08


def test_more_confidence_is_a_wider_interval() -> None:
    losses = 1 + 50 * TOKENS**-0.3 + np.array([1, -1, 1, -1, 1, -1, 1, -1]) * 0.003
    sure, unsure = fit_power_law(TOKENS, losses, 0.99), fit_power_law(TOKENS, losses, 0.5)
    assert sure.exponent.low < unsure.exponent.low < unsure.exponent.value < unsure.exponent.high < sure.exponent.high
    assert str(unsure).startswith(f"E = {unsure.floor.value:.4g} [{unsure.floor.low:.4g}, ")


@pytest.mark.parametrize(
    ("tokens", "losses", "message"),
    [
        ([1, 2, 3], [3, 2, 1], "3 different numbers of tokens and 3 losses"),
        ([1, 2, 3, 3], [3, 2, 1, 1], "3 different numbers of tokens and 4 losses"),
        ([1, 2, 3, 4], [3, 2, 1], "4 different numbers of tokens and 3 losses"),
        ([0, 1, 2, 3], [4, 3, 2, 1], "tokens must be above 0"),
        ([1, 2, 3, 4], [4, 3, np.nan, 1], "losses finite"),
        ([1, 2, 3, 4], [1, 2, 3, 4], "the loss does not fall"),
    ],
)
def test_what_no_law_can_be_fitted_to_is_refused(tokens: list[float], losses: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit_power_law(tokens, losses)
