"""Timing ranking, by a clock that the work moves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cprec.fit.timing import seconds_each


@pytest.mark.parametrize(
    ("seconds", "asked", "expected"),
    [
        (1e6, [1, 4, 16, 64], 1.0),  # all are timed, as a batch; the first one alone took longer
        (900, [1, 4, 16], 1.0),  # four times as long would be more than a tenth of the time
        (20, [1], 9.0),  # however little time there is, one is timed
    ],
)
def test_more_queries_are_timed_while_a_tenth_of_the_time_lasts(
    seconds: float, asked: list[int], expected: float
) -> None:
    now, told = [0.0], []

    def work(queries: Sequence[object]) -> None:
        told.append(len(queries))
        now[0] += 9 if len(queries) == 1 else len(queries)

    assert seconds_each(work, [None] * 50, seconds, clock=lambda: now[0]) == expected  # type: ignore[list-item]
    assert told == [min(50, count) for count in asked]
