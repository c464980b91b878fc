from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cprec.data.config import SplitSpec
from cprec.data.splits import Split, cut_times, make_split
from cprec.errors import ConfigError, DataError

# Alice: four books and three toys, interleaved; Bob: two books only.
ROWS = [
    ("alice", "books", "b1", 10),
    ("alice", "books", "b2", 20),
    ("alice", "toys", "t1", 25),
    ("alice", "books", "b3", 30),
    ("alice", "toys", "t2", 35),
    ("alice", "books", "b4", 40),
    ("alice", "toys", "t3", 45),
    ("bob", "books", "b1", 15),
    ("bob", "books", "b4", 50),
]


def split_of(log: Any, **settings: Any) -> Split:
    return make_split(*log, SplitSpec(**settings))


def test_leave_one_out_by_hand(make_log: Callable[..., Any]) -> None:
    split = split_of(make_log(ROWS))
    parts = dict(zip(split.catalogue.item_id[split.interactions.item[:7]], split.part[:7].tolist(), strict=True))
    assert parts == {"b1": 0, "b2": 0, "b3": 1, "b4": 2, "t1": 0, "t2": 1, "t3": 2}
    assert split.part[7:].tolist() == [0, 0], "two events of a user in a domain are too few to hold any out"
    assert len(split.train) == 5
    assert split.train.offsets().tolist() == [0, 3, 5]
    assert split.events("test").tolist() == [False] * 5 + [True, True, False, False]


def test_specific_queries_by_hand(make_log: Callable[..., Any]) -> None:
    split = split_of(make_log(ROWS))
    names = split.catalogue.item_id
    test = split.queries("books", "test", max_history=10)
    assert test.query_id.tolist() == ["books/shop/alice/test"]
    assert names[test.history[0]].tolist() == ["b1", "b2", "b3"], "the validation event is known by then"
    assert names[test.target].tolist() == ["b4"]
    assert test.time.tolist() == [40_000_000]
    validation = split.queries("books", "validation", max_history=1)
    assert names[validation.history[0]].tolist() == ["b2"], "the latest event only"
    assert names[validation.target].tolist() == ["b3"]
    assert len(split.queries("books", "test", max_history=10, min_history=4)) == 0


def test_mixed_queries_hold_no_test_event_of_another_domain(make_log: Callable[..., Any]) -> None:
    split = split_of(make_log(ROWS))
    names = split.catalogue.item_id
    books = split.queries("books", "test", history_kind="mixed", max_history=10)
    assert names[books.history[0]].tolist() == ["b1", "b2", "t1", "b3", "t2"]
    toys = split.queries("toys", "test", history_kind="mixed", max_history=10)
    assert names[toys.history[0]].tolist() == ["b1", "b2", "t1", "b3", "t2"], "b4 came before, but it is a test event"
    earlier = split.queries("toys", "validation", history_kind="mixed", max_history=2)
    assert names[earlier.history[0]].tolist() == ["t1", "b3"]


def test_mixed_queries_leave_out_domains_without_times(make_log: Callable[..., Any]) -> None:
    split = split_of(make_log(ROWS, timeless=["toys"]))
    books = split.queries("books", "test", history_kind="mixed", max_history=10)
    assert split.catalogue.item_id[books.history[0]].tolist() == ["b1", "b2", "b3"]
    with pytest.raises(ConfigError, match="domain 'toys' has no real times"):
        split.queries("toys", "test", history_kind="mixed", max_history=10)


def test_global_time_by_dates(make_log: Callable[..., Any]) -> None:
    day = 86_400
    rows = [("alice", "books", f"b{n}", n * day) for n in range(6)] + [("bob", "toys", "t1", 4 * day)]
    split = split_of(
        make_log(rows), method="global-time", validation_from="1970-01-04", test_from="1970-01-05T00:00:00"
    )
    assert split.part.tolist() == [0, 0, 0, 1, 2, 2, 2]
    test = split.queries("books", "test", max_history=10)
    assert test.query_id.tolist() == ["books/shop/alice/test/0", "books/shop/alice/test/1"]
    assert test.history.lengths.tolist() == [4, 5], "what came before is known, the earlier test event too"
    assert len(split.queries("toys", "test", max_history=10)) == 0
    assert split.queries("toys", "test", max_history=10, min_history=0).query_id.tolist() == ["toys/shop/bob/test/0"]


def test_global_time_by_fractions_keeps_equal_times_together(make_log: Callable[..., Any]) -> None:
    times = [1, 2, 3, 4, 5, 6, 7, 8, 8, 9]
    rows = [("alice", "books", f"b{n}", time) for n, time in enumerate(times)]
    split = split_of(make_log(rows), method="global-time", validation_fraction=0.2, test_fraction=0.2)
    assert split.part.tolist() == [0, 0, 0, 0, 0, 0, 1, 2, 2, 2]


def test_global_time_needs_times_in_every_domain(make_log: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="needs real times in every domain, but toys only has an order"):
        split_of(make_log(ROWS, timeless=["toys"]), method="global-time")


def test_global_time_refuses_an_empty_part(make_log: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"leaves no event for test; the log runs from 1970-01-01 00:00:10 to"):
        split_of(make_log(ROWS), method="global-time", validation_from="1970-01-01T00:00:30", test_from="2001-01-01")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "random"}, "expected leave-one-out, last-n, global-time"),
        ({"test_fraction": 0.1}, "test_fraction means something for method=global-time only"),
        ({"method": "global-time", "test_fraction": 1.5}, "must lie between 0 and 1"),
        ({"method": "global-time", "test_fraction": 0.6, "validation_fraction": 0.5}, "nothing would train"),
        ({"method": "global-time", "test_from": "2014-01-01"}, "together"),
        ({"method": "global-time", "test_from": "2014-01-01", "validation_from": "July"}, "is no ISO date"),
        ({"method": "global-time", "test_from": "2014-01-01", "validation_from": "2015-01-01"}, "must be before"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SplitSpec(**settings)


def test_a_query_asks_for_a_held_out_part_of_a_known_domain(make_log: Callable[..., Any]) -> None:
    split = split_of(make_log(ROWS))
    with pytest.raises(ConfigError, match="part='train'"):
        split.queries("books", "train", max_history=5)
    with pytest.raises(DataError, match="there is no domain 'games'"):
        split.queries("games", "test", max_history=5)


def test_last_n_holds_out_as_many_as_asked(make_log: Callable[..., Any]) -> None:
    rows = [("a", "toys", f"i{n}", n) for n in range(6)] + [("b", "toys", f"i{n}", n) for n in range(3)]
    split = split_of(make_log(rows), method="last-n", num_validation=1, num_test=2)
    # b has three events: none would be left to learn from, so all of them train.
    by_user = {name: split.part[split.interactions.user == row].tolist() for row, name in enumerate("ab")}
    assert by_user == {"a": [0, 0, 0, 1, 2, 2], "b": [0, 0, 0]}
    queries = split.queries("toys", "test", max_history=10)
    assert queries.query_id.tolist() == ["toys/shop/a/test/0", "toys/shop/a/test/1"]
    ids = split.catalogue.item_id
    assert [ids[row].tolist() for row in (queries.history[0], queries.history[1])] == [
        ["i0", "i1", "i2", "i3"],
        ["i0", "i1", "i2", "i3", "i4"],
    ], "what was held out is known by the time of the next"


def test_last_n_of_one_each_is_leave_one_out(make_log: Callable[..., Any]) -> None:
    rows = [(user, "toys", f"i{n}", n) for user in "abc" for n in range(ord(user) - 94)]
    log = make_log(rows)
    assert split_of(log, method="last-n").part.tolist() == split_of(log).part.tolist()


def test_unseen_users_have_context_in_place_of_training(make_log: Callable[..., Any]) -> None:
    rows = [(f"u{user}", "toys", f"i{n}", n) for user in range(50) for n in range(4)]
    split = split_of(make_log(rows), unseen_user_share=0.4)
    per_user = split.part.reshape(50, 4).tolist()
    assert sorted({tuple(parts) for parts in per_user}) == [(0, 0, 1, 2), (3, 3, 1, 2)]
    assert 8 <= per_user.count([3, 3, 1, 2]) <= 32
    assert split_of(make_log(rows), unseen_user_share=0.4).part.tolist() == split.part.tolist(), (
        "by hash, not by chance"
    )
    asked = split.queries("toys", "test", max_history=10)
    assert len(asked) == 50 and (asked.history.lengths == 3).all(), "context is shown"
    with pytest.raises(ConfigError, match="unseen_user_share=1.0 must lie between"):
        SplitSpec(unseen_user_share=1.0)
    with pytest.raises(ConfigError, match="num_test means something for method=last-n only"):
        SplitSpec(num_test=2)


def test_last_n_counts_in_each_domain(make_log: Callable[..., Any]) -> None:
    split = split_of(make_log(ROWS), method="last-n", num_validation=2, num_test=1)
    parts = dict(zip(split.catalogue.item_id[split.interactions.item[:7]], split.part[:7].tolist(), strict=True))
    # Alice's four books leave one to learn from; her three toys would leave none.
    assert parts == {"b1": 0, "b2": 1, "b3": 1, "b4": 2, "t1": 0, "t2": 0, "t3": 0}
    names = split.catalogue.item_id
    asked = split.queries("books", "validation", max_history=10, min_history=1)
    assert asked.query_id.tolist() == ["books/shop/alice/validation/0", "books/shop/alice/validation/1"]
    assert [names[asked.history[row]].tolist() for row in range(2)] == [["b1"], ["b1", "b2"]]
    later = split.queries("books", "validation", max_history=10, min_history=2)
    assert later.query_id.tolist() == ["books/shop/alice/validation/1"], "a query keeps its name when others fall out"
    mixed = split.queries("books", "test", history_kind="mixed", max_history=10)
    assert names[mixed.history[0]].tolist() == ["b1", "b2", "t1", "b3", "t2"]


def test_last_n_histories_hold_no_test_event_of_another_domain(make_log: Callable[..., Any]) -> None:
    rows = [("a", d, f"{d[0]}{n}", 10 * n + (d == "toys")) for n in range(5) for d in ("books", "toys")]
    split = split_of(make_log(rows), method="last-n", num_validation=1, num_test=2)
    names = split.catalogue.item_id
    asked = split.queries("toys", "test", history_kind="mixed", max_history=10)
    assert [names[asked.history[row]].tolist() for row in range(2)] == [
        ["b0", "t0", "b1", "t1", "b2", "t2"],  # not b3, which tests
        ["b0", "t0", "b1", "t1", "b2", "t2", "t3"],  # t3 tests too, but in this domain it is known by then
    ]


def test_cuts_of_a_whole_log_hold_in_its_parts(make_log: Callable[..., Any]) -> None:
    rows = [(f"u{user}", "toys", f"i{n}", 100 * user + n) for user in range(6) for n in range(5)]
    catalogue, log, domains = make_log(rows)
    spec = SplitSpec(method="global-time", validation_fraction=0.2, test_fraction=0.2)
    whole = make_split(catalogue, log, domains, spec)
    times, counts = np.unique(log.time, return_counts=True)
    cuts = cut_times(spec, domains, times, counts)
    assert cuts == (303_000_000, 404_000_000), "the 19th and the 25th of 30 events"
    found = [
        make_split(catalogue, log.select(mask), domains, spec, cuts=cuts).part.tolist()
        for mask in (log.user < 2, (log.user >= 2) & (log.user < 5), log.user == 5)
    ]
    assert found[0] == [0] * 10, "a part may have no held-out event"
    assert sum(found, []) == whole.part.tolist()


def test_unseen_users_have_context_with_every_method(make_log: Callable[..., Any]) -> None:
    rows = [(f"u{user}", "toys", f"i{n}", 100 * n + user) for user in range(40) for n in range(6)]
    log = make_log(rows)
    for settings in (
        {"method": "last-n", "num_test": 2},
        {"method": "global-time"},
        {"method": "global-time", "validation_from": "1970-01-01T00:05:00", "test_from": "1970-01-01T00:06:40"},
    ):
        seen, unseen = split_of(log, **settings), split_of(log, unseen_user_share=0.5, **settings)
        assert ((seen.part == 0) == ((unseen.part == 0) | (unseen.part == 3))).all()
        assert (seen.part == np.where(unseen.part == 3, 0, unseen.part)).all(), "the held-out events are the same"
        learnt, context = (set(unseen.interactions.user[unseen.part == code].tolist()) for code in (0, 3))
        assert learnt and context and not learnt & context
        asked, asked_too = (split.queries("toys", "test", max_history=10) for split in (seen, unseen))
        assert asked.query_id.tolist() == asked_too.query_id.tolist()
        assert asked.history.values.tolist() == asked_too.history.values.tolist()


def test_who_is_unseen_depends_on_the_user_and_the_seed_alone(make_log: Callable[..., Any]) -> None:
    rows = [(f"u{user}", "toys", f"i{n}", n) for user in range(40) for n in range(4)]

    def unseen(some: list[Any], seed: int = 0) -> set[str]:
        split = make_split(*make_log(some), SplitSpec(unseen_user_share=0.5), seed=seed)
        return set(split.interactions.user_id[split.interactions.user[split.events("context")]])

    assert unseen(rows[:80]) == unseen(rows) & {f"u{user}" for user in range(20)}
    assert unseen(rows, seed=1) != unseen(rows)
