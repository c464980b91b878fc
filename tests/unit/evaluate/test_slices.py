"""Slices of queries on a log of six users, with groups worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from cprec.data.splits import Split
from cprec.evaluate.slices import ABOUT, events_of_users, ordered, slices_of, training_events
from cprec.recommender import RankingQuery
from cprec.schema import TEST, VALIDATION, Item

DAYS = {
    "u0": (0, 1, 2, 900),
    "u1": (0, 1, 3, 9),
    "u2": (0, 1, 5, 9),
    "u3": (0, 2, 10, 11),
    "u4": (0, 0, 20, 21),
    "u5": (0, 5, 6),
}
"""When the events were: the last tests, the one before it validates, the others train."""
TARGETS = dict(zip(DAYS, "abcabc", strict=True))


@pytest.fixture(scope="module")
def split(split_of_rows: Callable[..., Split]) -> Split:
    """All begin with item a, and have b next where two events train; c is nearly new."""
    rows = [
        (user, "abc".index(item), day * 86_400)
        for user, days in DAYS.items()
        for item, day in zip([*"ab"[: len(days) - 2], "c", TARGETS[user]], days, strict=True)
    ]
    return split_of_rows("shop", [*"abc"], rows)


def sliced(split: Split, part: str = TEST, most: int = 10) -> dict[str, dict[str, str]]:
    """The group of each user in each slice, of queries that show `most` events."""
    asked, ids = split.queries("shop", part, max_history=most), split.catalogue.item_id
    users = split.interactions.user_id[asked.user]
    histories = [tuple(Item("shop", ids[item]) for item in asked.history[row]) for row in range(len(asked))]
    queries = [
        RankingQuery(query_id, "shop", history, user=f"p/{user}")
        for query_id, history, user in zip(asked.query_id, histories, users, strict=True)
    ]
    events_N = np.bincount(training_events(split, "shop")[1], minlength=3)
    found = slices_of(split, "shop", part, queries, list(ids[asked.target]), events_N)
    return {name: dict(zip(users, groups, strict=True)) for name, groups in found.items()}


def test_training_events_of_users_hold_nothing_held_out(split: Split) -> None:
    """Four events are two of training, and three are one; u5 comes first here."""
    queries = [RankingQuery(user, "shop", (), user=f"p/{user}") for user in reversed(DAYS)]
    assert events_of_users(split, queries).tolist() == [1, 2, 2, 2, 2, 2]


def test_gaps_of_a_history_that_vary_much_are_irregular(split: Split) -> None:
    """Variances before the targets: 0, 0.5, 4.5, 18 and 200 square days, of which the two largest are 40 %. The gap to
    the target is not part of the history: u0's would be the largest."""
    groups = ["regular"] * 3 + ["irregular"] * 2 + ["under 3 events"]
    assert sliced(split)["gaps"] == dict(zip(DAYS, groups, strict=True))


def test_gaps_are_those_of_the_events_that_are_shown(split: Split) -> None:
    """Of two events shown there is one gap, which does not vary."""
    assert "gaps" not in sliced(split, most=2)
    assert "gaps" not in sliced(split, VALIDATION)


def test_an_item_with_steady_events_is_frequent(split: Split) -> None:
    """Item a has six training events on one day, gaps of variance 0; b on days 0, 1, 1, 1, 2: gaps 1, 0, 0, 1 of
    variance 1 / 3; c none. The 30 % of two items are the first one."""
    groups = {"a": "frequent", "b": "rare", "c": "under 3 events"}
    assert sliced(split)["target gaps"] == {user: groups[target] for user, target in TARGETS.items()}


def test_times_that_are_not_real_have_no_gaps(split: Split) -> None:
    unreal = replace(split, domains={"shop": replace(split.domains["shop"], has_times=False)})
    assert sliced(split).keys() - sliced(unreal).keys() == {"first seen", "gaps", "target gaps"}


def test_equal_variances_are_in_one_group(split: Split) -> None:
    """No 40 % are picked among equals: all are regular."""
    log = split.interactions
    still = replace(split, interactions=replace(log, time=np.zeros_like(log.time)))
    assert set(sliced(still)["gaps"].values()) == {"regular", "under 3 events"}


def test_groups_stand_in_their_order_and_every_slice_is_explained(split: Split) -> None:
    found = sliced(split)
    assert ordered(np.array([*found["gaps"].values()], dtype=object)) == ["under 3 events", "regular", "irregular"]
    assert ordered(np.array([*found["target gaps"].values()], dtype=object)) == ["under 3 events", "rare", "frequent"]
    assert found.keys() <= ABOUT.keys()
    assert "the 40 % of the queries" in ABOUT["gaps"] and "the 30 % of the items" in ABOUT["target gaps"]
