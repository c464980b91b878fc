from __future__ import annotations

import math

import pytest

from cprec.errors import ConfigError
from cprec.train.schedule import WSA

SHAPES = ("1-sqrt", "linear", "cosine", "exponential")


def rates(wsa: WSA) -> list[float]:
    return [wsa(step) for step in range(wsa.num_steps)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peak", [1.0, 0.3, 1e-3, 0.0123])
@pytest.mark.parametrize("floor_ratio", [0.1, 0.07, 1.0])
def test_the_phases_meet_their_ends_exactly(shape: str, peak: float, floor_ratio: float) -> None:
    wsa = WSA(num_steps=20, peak=peak, warmup_steps=4, anneal_steps=6, floor=floor_ratio * peak, shape=shape)  # type: ignore[arg-type]
    assert wsa.anneal_start == 14
    assert wsa(0) == peak / 4
    assert [wsa(step) for step in range(3, 14)] == [peak] * 11
    assert wsa(19) == floor_ratio * peak
    up, down = rates(wsa)[:4], rates(wsa)[13:]
    assert up == sorted(set(up))
    assert down == sorted(down, reverse=True)
    assert floor_ratio == 1 or len(set(down)) == 7


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("1-sqrt", [1 - 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0]),
        ("linear", [0.75, 0.5, 0.25, 0]),
        ("cosine", [(1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
    ],
)
def test_annealing_by_hand(shape: str, expected: list[float]) -> None:
    wsa = WSA(num_steps=4, peak=3.0, warmup_steps=0, anneal_steps=4, floor=1.0, shape=shape)  # type: ignore[arg-type]
    assert rates(wsa) == pytest.approx([1 + 2 * share for share in expected])


def test_exponential_annealing_by_hand() -> None:
    wsa = WSA(num_steps=4, peak=16.0, warmup_steps=0, anneal_steps=4, floor=1.0, shape="exponential")
    assert rates(wsa) == pytest.approx([8, 4, 2, 1])


def test_a_schedule_without_phases_stays_at_the_peak() -> None:
    assert rates(WSA(num_steps=3, peak=2.0, warmup_steps=0, anneal_steps=0)) == [2.0] * 3


@pytest.mark.parametrize(
    ("num_steps", "warmup", "anneal", "expected"),
    [
        (100, 0.03, 0.15, (3, 15)),
        (10, 0.01, 0.2, (1, 2)),  # a warm-up above zero has a step
        (10, 0.0, 0.2, (0, 2)),
        (1, 0.03, 0.15, (1, 0)),
        (20, 0.05, 0.95, (1, 19)),
        (10, 0.5, 0.7, (5, 5)),  # annealing takes what warm-up leaves
        (10, 1.0, 0.5, (10, 0)),
    ],
)
def test_fractions_of_the_steps(num_steps: int, warmup: float, anneal: float, expected: tuple[int, int]) -> None:
    wsa = WSA.fractions(num_steps, 0.5, warmup=warmup, anneal=anneal, floor_ratio=0.1, shape="linear")
    assert (wsa.warmup_steps, wsa.anneal_steps) == expected
    assert wsa.floor == 0.05
    assert wsa(num_steps - 1) == (0.05 if wsa.anneal_steps else 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"warmup_steps": -1}, "the phases at least 0"),
        ({"warmup_steps": 8}, r"warm-up \(8\) and annealing \(4\) take more than the 10 steps there are"),
        ({"floor": 2.0}, r"floor=2.0 must lie in \[0, peak=1.0\]"),
        ({"shape": "steep"}, "shape='steep' is not one of 1-sqrt, linear, cosine, exponential"),
        ({"shape": "exponential", "floor": 0.0}, "exponential annealing needs a floor above zero"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict[str, object], message: str) -> None:
    settings = {"num_steps": 10, "peak": 1.0, "warmup_steps": 2, "anneal_steps": 4, "floor": 0.1} | changes
    with pytest.raises(ConfigError, match=message):
        WSA(**settings)  # type: ignore[arg-type]


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"warm-up \(50\) .* take more than the 10 steps there are"):
        WSA.fractions(10, 1.0, warmup=5.0, anneal=0.15, floor_ratio=0.1)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"step {step} is outside 0..9"):
        WSA(num_steps=10, peak=1.0, warmup_steps=2, anneal_steps=4)(step)
