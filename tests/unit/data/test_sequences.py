from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cprec.data.config import SplitSpec
from cprec.data.sequences import Sequences, build_sequences
from cprec.data.splits import Split, make_split
from cprec.errors import ConfigError, DataError


def rows_of(user: str, domain: str, count: int, start: int = 0, step: int = 1) -> list[tuple[str, str, str, int]]:
    return [(user, domain, f"{domain[0]}{n:03}", start + n * step) for n in range(count)]


def split_of(log: Any) -> Split:
    return make_split(*log, SplitSpec())


def items_of(split: Split, sequences: Sequences, row: int) -> list[str]:
    events = sequences.event[sequences.offsets[row] : sequences.offsets[row + 1]]
    return split.catalogue.item_id[split.interactions.item[events]].tolist()


@pytest.mark.parametrize(
    ("num_train", "sizes"),
    [(4, []), (5, [5]), (20, [20]), (21, [11, 10]), (41, [14, 14, 13]), (60, [20, 20, 20])],
)
def test_chunks_by_hand(make_log: Callable[..., Any], num_train: int, sizes: list[int]) -> None:
    split = split_of(make_log(rows_of("alice", "books", num_train + 2)))
    sequences = build_sequences(split, ["books"], min_events=5, max_events=20)
    assert sequences.lengths.tolist() == sizes
    assert sequences.event.tolist() == list(range(num_train if sizes else 0)), "no gap, no overlap, nothing held out"
    assert set(sequences.kind.tolist()) <= {0}, "one domain gives no mixed sequence"


def test_mixed_sequences_merge_domains_in_time_order(make_log: Callable[..., Any]) -> None:
    split = split_of(make_log(rows_of("alice", "books", 5, 0, 10) + rows_of("alice", "toys", 5, 5, 10)))
    sequences = build_sequences(split, ["books", "toys"], min_events=3)
    assert sequences.kind.tolist() == [0, 0, 1]
    assert sequences.domain.tolist() == [0, 1, -1]
    assert items_of(split, sequences, 0) == ["b000", "b001", "b002"]
    assert items_of(split, sequences, 1) == ["t000", "t001", "t002"]
    assert items_of(split, sequences, 2) == ["b000", "t000", "b001", "t001", "b002", "t002"]


def test_a_mixed_chunk_of_one_domain_is_left_out(make_log: Callable[..., Any]) -> None:
    # Twelve training books, then three training toys: chunks of 5 events are books, books, toys with two books.
    split = split_of(make_log(rows_of("alice", "books", 14) + rows_of("alice", "toys", 5, 100)))
    sequences = build_sequences(split, ["books", "toys"], min_events=3, max_events=5, kinds=["mixed"])
    assert len(sequences) == 1
    assert items_of(split, sequences, 0) == ["b010", "b011", "t000", "t001", "t002"]


def test_mixed_sequences_draw_on_the_same_events_unless_pooled(make_log: Callable[..., Any]) -> None:
    split = split_of(make_log(rows_of("alice", "books", 7) + rows_of("alice", "toys", 2, 3)))
    assert len(build_sequences(split, ["books", "toys"], min_events=5, kinds=["mixed"])) == 0
    pooled = build_sequences(split, ["books", "toys"], min_events=5, kinds=["mixed"], pooled=True)
    assert pooled.lengths.tolist() == [7]


def test_domains_without_times_are_never_mixed(make_log: Callable[..., Any]) -> None:
    rows = rows_of("alice", "books", 8) + rows_of("alice", "toys", 8)
    split = split_of(make_log(rows, timeless=["toys"]))
    sequences = build_sequences(split, ["books", "toys"])
    assert sequences.kind.tolist() == [0, 0]


def test_interleaving_by_hand(make_log: Callable[..., Any]) -> None:
    # Training events: six books (real times), two toys and three games (an order each). The k-th of n stands at
    # (k - 1/2) / n: books at 1/12, 3/12, .. 11/12, toys at 1/4 and 3/4, games at 1/6, 1/2 and 5/6. Where two meet,
    # real times come first, then domains by name.
    rows = rows_of("alice", "books", 8) + rows_of("alice", "toys", 4) + rows_of("alice", "games", 5)
    rows += rows_of("bob", "toys", 5) + rows_of("bob", "books", 3, 100)
    split = split_of(make_log(rows, timeless=["games", "toys"]))
    settings: Any = {"min_events": 2, "max_events": 20, "mixed_order": "interleave"}
    sequences = build_sequences(split, ["books", "games", "toys"], kinds=["mixed"], **settings)
    assert [items_of(split, sequences, row) for row in range(len(sequences))] == [
        ["b000", "g000", "b001", "t000", "b002", "g001", "b003", "b004", "t001", "g002", "b005"]
    ], "bob has one book to learn from, fewer than min_events, and toys alone are not mixed"
    pooled = build_sequences(split, ["books", "games", "toys"], kinds=["mixed"], pooled=True, **settings)
    assert items_of(split, pooled, 1) == ["t000", "b000", "t001", "t002"], "both at the middle: the real time first"


def test_interleaving_changes_nothing_where_all_times_are_real(make_log: Callable[..., Any]) -> None:
    rows = rows_of("alice", "books", 9, 0, 10) + rows_of("alice", "toys", 7, 5, 7) + rows_of("bob", "toys", 8)
    split = split_of(make_log(rows))
    by_time, interleaved = (
        build_sequences(split, ["books", "toys"], min_events=2, max_events=5, mixed_order=order)
        for order in ("time", "interleave")
    )
    assert by_time.event.tolist() == interleaved.event.tolist()
    assert by_time.offsets.tolist() == interleaved.offsets.tolist()


def test_domain_specific_sequences_do_not_depend_on_the_mixed_order(make_log: Callable[..., Any]) -> None:
    rows = rows_of("alice", "books", 9) + rows_of("alice", "toys", 7)
    split = split_of(make_log(rows, timeless=["toys"]))
    for kinds in (["specific"], ["specific", "mixed"]):
        found = build_sequences(split, ["books", "toys"], min_events=2, kinds=kinds, mixed_order="interleave")
        assert [items_of(split, found, row) for row in range(2)] == [
            [f"b{n:03}" for n in range(7)],
            [f"t{n:03}" for n in range(5)],
        ]


def test_only_the_domains_and_users_asked_for(make_log: Callable[..., Any]) -> None:
    rows = [row for user in ("alice", "bob") for d in ("books", "toys") for row in rows_of(user, d, 8)]
    split = split_of(make_log(rows))
    sequences = build_sequences(split, ["toys"], np.array([False, True]))
    assert sequences.domain.tolist() == [1]
    assert sequences.user.tolist() == [1]
    nobody = build_sequences(split, ["toys"], np.array([False, False]))
    assert len(nobody) == 0
    assert nobody.offsets.tolist() == [0]


def test_wrong_settings_are_named(make_log: Callable[..., Any]) -> None:
    split = split_of(make_log(rows_of("alice", "books", 8)))
    with pytest.raises(ConfigError, match="min_events=6 must be at least 1 and at most max_events=5"):
        build_sequences(split, ["books"], min_events=6, max_events=5)
    with pytest.raises(ConfigError, match="kinds holds blended; expected specific, mixed"):
        build_sequences(split, ["books"], kinds=["blended"])
    with pytest.raises(ConfigError, match="mixed_order='random': expected time, interleave"):
        build_sequences(split, ["books"], mixed_order="random")
    with pytest.raises(DataError, match="there is no domain 'games'"):
        build_sequences(split, ["games"])
