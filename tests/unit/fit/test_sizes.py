"""What fits a log and the time, by known answers."""

from __future__ import annotations

import pytest

from cprec.errors import ConfigError
from cprec.fit.sizes import SIZES, choose, networks_for, sizes_for
from cprec.train.config import TinyModel

SMALL, MEDIUM, LARGE = (size for size, _ in SIZES[:3])
RATES = [(SMALL, 20_000.0), (MEDIUM, 10_000.0), (LARGE, 5_000.0)]


@pytest.mark.parametrize(
    ("tokens", "seconds", "size", "passes"),
    [
        (1_000_000, 600, LARGE, 3.0),  # 3 M tokens in 10 minutes: just
        (1_000_000, 599, MEDIUM, 5.0),  # 5.99 fit, and 5 are enough
        (1_000_000, 150, SMALL, 3.0),
        (1_000_000, 100, SMALL, 2.0),  # no size has time for three passes
        (1_000_000, 10, SMALL, 0.2),
        (100_000, 600, LARGE, 10.0),  # small logs are read until a million tokens are
        (10_000, 600, LARGE, 20.0),
    ],
)
def test_the_largest_model_with_time_for_its_passes(
    tokens: int, seconds: float, size: TinyModel, passes: float
) -> None:
    choice = choose(RATES, tokens, seconds, titles=0)
    assert (choice.size, choice.passes) == (size, passes)
    assert choice.seconds == passes * tokens / choice.tokens_per_second <= seconds


@pytest.mark.parametrize(("seconds", "networks"), [(80.0, 3), (81.0, 1), (240.0, 1), (241.0, 0)])
def test_three_networks_where_they_take_two_fifths_of_the_time(seconds: float, networks: int) -> None:
    assert networks_for(seconds, 600.0) == networks


def test_titles_are_read_in_the_same_time() -> None:
    choice = choose(RATES, 1_000_000, 600, titles=300_000)  # 0.1 M tokens of learning: no three passes for the largest
    assert (choice.size, choice.passes) == (MEDIUM, 5.0) and choice.seconds == pytest.approx(510)
    assert choose(RATES[:1], 1_000_000, 100, titles=300_000).passes == 1.9


def test_too_little_time_says_how_much_is_missing() -> None:
    with pytest.raises(
        ConfigError, match=r"takes 3:20 at least .* and 1:00 is left for it beside .* Give 4 minutes more"
    ):
        choose(RATES, 20_000_000, 60, titles=0)


def test_an_open_model_may_stay_as_it_is() -> None:
    choice = choose(RATES[:1], 20_000_000, 60, titles=3_000_000, may_stay=True)
    assert (choice.passes, choice.seconds) == (0.0, pytest.approx(50))
    with pytest.raises(ConfigError, match=r"takes 0:50 at least .* and 0:40 is left"):
        choose(RATES[:1], 20_000_000, 40, titles=3_000_000, may_stay=True)


def test_a_small_log_teaches_a_small_model() -> None:
    assert sizes_for(100_000) == [SMALL] and sizes_for(1_000_000) == [SMALL, MEDIUM]
    assert sizes_for(10**9) == [size for size, _ in SIZES]
