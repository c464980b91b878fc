from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cprec.data.ragged import Ragged, offsets_of

rows_of_numbers = st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=6)


def lists(ragged: Ragged) -> list[list[int]]:
    return [ragged[row].tolist() for row in range(len(ragged))]


@given(rows_of_numbers)
def test_rows_come_back(rows: list[list[int]]) -> None:
    ragged = Ragged.of(rows)
    assert lists(ragged) == rows
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    assert ragged.row_of.tolist() == [number for number, row in enumerate(rows) for _ in row]
    assert ragged.offsets.dtype == ragged.values.dtype == np.int64


@given(rows_of_numbers, st.data())
def test_take_gathers_rows_in_any_order(rows: list[list[int]], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)) if rows else []
    taken = Ragged.of(rows).take(np.array(wanted, dtype=np.int64))
    assert lists(taken) == [rows[row] for row in wanted]


@given(st.lists(rows_of_numbers, max_size=4))
def test_concatenation_keeps_rows(parts: list[list[list[int]]]) -> None:
    joined = Ragged.concatenate([Ragged.of(part) for part in parts])
    assert lists(joined) == [row for part in parts for row in part]


def test_the_type_of_values_may_be_chosen() -> None:
    assert Ragged.of([[1], [2, 3]], np.uint16).values.dtype == np.uint16
    assert Ragged.of([], np.uint16).values.dtype == np.uint16


def test_offsets_do_not_overflow() -> None:
    assert offsets_of(np.array([2**31 - 1, 2**31 - 1], dtype=np.int32)).tolist() == [0, 2**31 - 1, 2**32 - 2]
    assert offsets_of(np.array([], dtype=np.int64)).tolist() == [0]
