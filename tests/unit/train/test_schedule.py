from __future__ import annotations

import math

import pytest

from cprec.errors import ConfigError
from cprec.train.schedule import WSA, Schedule, make_schedule

SHAPES = ("1-sqrt", "linear", "cosine", "exponential")


def by_steps(num_steps: int, kind: str = "wsa", peak: float = 1.0, **changes: object) -> Schedule:
    settings = {"warmup_steps": 0, "anneal_steps": 0, "floor_ratio": 0.1, "shape": "1-sqrt"} | changes
    return make_schedule(kind, range(1, num_steps + 1), peak, **settings)  # type: ignore[arg-type]


def rates(schedule: Schedule) -> list[float]:
    return [schedule(step) for step in range(len(schedule.after_step))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("peak", [1.0, 0.3, 1e-3, 0.0123])
@pytest.mark.parametrize("floor_ratio", [0.1, 0.07, 1.0])
def test_the_phases_meet_their_ends_exactly(shape: str, peak: float, floor_ratio: float) -> None:
    schedule = by_steps(20, peak=peak, warmup_steps=4, anneal_steps=6, floor_ratio=floor_ratio, shape=shape)
    assert schedule.wsa.anneal_start == 14
    assert schedule(0) == peak / 4
    assert [schedule(step) for step in range(3, 14)] == [peak] * 11
    assert schedule(19) == floor_ratio * peak
    up, down = rates(schedule)[:4], rates(schedule)[13:]
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
    wsa = WSA(total=4, peak=3.0, warmup=0, anneal=4, floor=1.0, shape=shape)  # type: ignore[arg-type]
    assert [wsa.after(done) for done in range(1, 5)] == pytest.approx([1 + 2 * share for share in expected])


def test_exponential_annealing_by_hand() -> None:
    wsa = WSA(total=4, peak=16.0, warmup=0, anneal=4, floor=1.0, shape="exponential")
    assert [wsa.after(done) for done in range(1, 5)] == pytest.approx([8, 4, 2, 1])


def test_the_other_schedules_are_special_cases() -> None:
    arms = {"warmup_steps": 2, "anneal_steps": 4}
    assert rates(by_steps(6, "constant", **arms)) == [1.0] * 6
    assert rates(by_steps(6, "constant_with_warmup", **arms)) == [0.5] + [1.0] * 5
    cosine = rates(by_steps(6, "cosine", floor_ratio=0.0, **arms))
    assert cosine == pytest.approx([0.5, 1.0, *((1 + math.cos(math.pi * p / 4)) / 2 for p in range(1, 5))])


def test_by_tokens_the_rate_follows_what_was_read() -> None:
    after = [100, 150, 300, 400, 450, 500]  # steps of unequal size
    settings = {"floor_ratio": 0.0, "shape": "linear"}
    schedule = make_schedule("wsa", after, 2.0, warmup_steps=2, anneal_steps=2, **settings)  # type: ignore[arg-type]
    assert rates(schedule) == pytest.approx([2.0 * 100 / 150, 2.0, 2.0, 2.0, 1.0, 0.0])
    equal = make_schedule("wsa", [7 * n for n in range(1, 7)], 2.0, warmup_steps=2, anneal_steps=2, **settings)  # type: ignore[arg-type]
    assert rates(equal) == pytest.approx(rates(by_steps(6, peak=2.0, warmup_steps=2, anneal_steps=2, **settings)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total": 0}, "total must be at least 1"),
        ({"warmup": -1}, "the phases at least 0"),
        ({"warmup": 8}, r"warm-up \(8\) and annealing \(4\) take more than the 10 there are"),
        ({"floor": 2.0}, r"floor=2.0 must lie in \[0, peak=1.0\]"),
        ({"shape": "steep"}, "shape='steep' is not one of 1-sqrt, linear, cosine, exponential"),
        ({"shape": "exponential", "floor": 0.0}, "exponential annealing needs a floor above zero"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict[str, object], message: str) -> None:
    settings = {"total": 10, "peak": 1.0, "warmup": 2, "anneal": 4, "floor": 0.1} | changes
    with pytest.raises(ConfigError, match=message):
        WSA(**settings)  # type: ignore[arg-type]


def test_phases_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"warm-up \(50 steps\) and annealing \(2 steps\) take more than the 10"):
        by_steps(10, warmup_steps=50, anneal_steps=2)


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"step {step} is outside 0..9"):
        by_steps(10)(step)
