"""Candidate sets: what may be in them, and that they depend on the query alone."""

from __future__ import annotations

import numpy as np
import pytest

from cprec.evaluate.candidates import draw_candidates

TITLES = [f"item number {chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(200)]


def test_the_target_and_others_outside_the_history() -> None:
    taken = np.arange(50)
    drawn = draw_candidates("q", 7, taken, TITLES, 20, seed=0)
    assert len(drawn) == len(set(drawn.tolist())) == 20
    assert 7 in drawn
    assert not set(drawn.tolist()) & (set(range(50)) - {7})


def test_seeded_by_query_and_not_by_target() -> None:
    taken = np.array([1, 2, 3])
    first = set(draw_candidates("q1", 1, taken, TITLES, 20, seed=0).tolist()) - {1}
    again = set(draw_candidates("q1", 2, taken, TITLES, 20, seed=0).tolist()) - {2}
    other = set(draw_candidates("q2", 1, taken, TITLES, 20, seed=0).tolist()) - {1}
    assert first == again
    assert len(first & other) < 10


def test_others_are_uniform_and_the_target_stands_anywhere() -> None:
    counts, places = np.zeros(len(TITLES)), []
    for number in range(2000):
        drawn = draw_candidates(f"q{number}", 0, np.array([0]), TITLES, 5, seed=0)
        counts[drawn] += 1
        places.append(drawn.tolist().index(0))
    expected = 2000 * 4 / 199
    assert (np.abs(counts[1:] - expected) < 5 * np.sqrt(expected)).all()
    assert (np.abs(np.bincount(places, minlength=5) - 400) < 5 * np.sqrt(400)).all()


def test_titles_inside_one_another_never_meet() -> None:
    titles = ["Soap", "soap", "Soap Dish", "Rose Soap"] + [f"thing {chr(97 + n)}" for n in range(20)]
    for number in range(50):
        drawn = draw_candidates(f"q{number}", 0, np.array([0]), titles, 15, seed=0)
        assert not set(drawn.tolist()) & {1, 2, 3}


@pytest.mark.parametrize(
    ("taken", "titles", "weights", "expected"),
    [
        ([0, 1], TITLES[:5], None, [0, 2, 3, 4]),  # all that the user did not have
        ([0, 1, 2, 3, 4], TITLES[:5], None, [0]),
        ([0], ["same"] * 30, None, [0]),
        ([0], TITLES[:5], [9, 0, 1, 0, 1], [0, 2, 4]),  # those with training events
    ],
)
def test_where_there_are_fewer_all_are_taken(
    taken: list[int], titles: list[str], weights: list[int] | None, expected: list[int]
) -> None:
    given = None if weights is None else np.array(weights)
    drawn = draw_candidates("q", 0, np.array(taken), titles, 20, seed=0, weights=given)
    assert sorted(drawn.tolist()) == expected


def test_as_many_as_there_are_are_found_however_rarely_they_are_drawn() -> None:
    weights = np.array([10**9, *[1] * 19])
    drawn = draw_candidates("q", 5, np.array([0, 5]), TITLES[:20], 19, seed=0, weights=weights)
    assert sorted(drawn.tolist()) == list(range(1, 20))


def test_what_is_hard_to_draw_follows_the_weights_too() -> None:
    """One item takes all draws; of the others those of weight 1,000 come before those of a thousandth."""
    titles = [f"{chr(97 + row % 26)}{row:03}" for row in range(111)]
    weights = np.array([1e15, *[1e3] * 10, *[1e-3] * 100])
    drawn = draw_candidates("q", 0, np.array([0]), titles, 11, seed=0, weights=weights)
    assert sorted(drawn.tolist()) == list(range(11))
