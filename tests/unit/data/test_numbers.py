"""Numbers as people write them, read by hand beside."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from cprec.data.engine import connect
from cprec.data.sources.numbers import Numbers, read_numbers


def read(column: Any, decimal: Any = "auto") -> tuple[list[float | None], Numbers]:
    with connect() as engine:
        table = engine.from_arrow(pa.table({"row": range(len(column)), "x": column}))
        numbers = read_numbers(engine, table, "x", decimal)
        values = engine.to_arrow(table.select("row", numbers.values.name("value")).order_by("row"))["value"]
    return values.to_pylist(), numbers


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["12,50", "4,5", "0,123", ",5", "1234,567", "-3,0"], [12.5, 4.5, 0.123, 0.5, 1234.567, -3.0]),
        (["12.50", "4.5", "0.123", ".5", "1234.567", "1e3"], [12.5, 4.5, 0.123, 0.5, 1234.567, 1000.0]),
        (["1.234,50", "1.234", "1.234.567", "7"], [1234.5, 1234.0, 1_234_567.0, 7.0]),
        (["1,234.50", "1,234", "12,34,567.5", "7"], [1234.5, 1234.0, 1_234_567.5, 7.0]),
        (["1,234,567", "1,234"], [1_234_567.0, 1234.0]),
        (["1 234,50", "1\u202f234", "1\u00a0234,5"], [1234.5, 1234.0, 1234.5]),
        (["1'234.50", "1’234"], [1234.5, 1234.0]),
        (["€ 12,50", "12,50 €", "EUR 12,50", "1.234,50 zł", "kr 12,5"], [12.5, 12.5, 12.5, 1234.5, 12.5]),
        (["$12.50", "US$ 12.50", "12.50 USD", " 12.50 "], [12.5] * 4),
        (["12,5", "12.5", "3"], [12.5, 12.5, 3.0]),
        (["", " ", "NaN", "NULL", "n/a", "\\N", "-", "4,5"], [None] * 7 + [4.5]),
        (["1.234", "999"], [1.234, 999.0]),
    ],
)
def test_numbers_in_text(texts: list[str], values: list[float | None]) -> None:
    found, numbers = read(texts)
    assert found == values
    assert numbers.num_unread == 0


@pytest.mark.parametrize(
    ("texts", "values", "unclear", "unread"),
    [
        (["1,234", "999"], [None, 999.0], 1, 1),
        (["12,5", "12.5", "1,234", "1.234"], [12.5, 12.5, None, None], 2, 2),
        (["4,5", "85%", "4/5", "4,5 stars", "1.2.3", "inf", "1e999"], [4.5] + [None] * 6, 0, 6),
    ],
)
def test_what_has_two_meanings_or_none_is_left_out_and_counted(
    texts: list[str], values: list[float | None], unclear: int, unread: int
) -> None:
    found, numbers = read(texts)
    assert found == values
    assert (numbers.num_unclear, numbers.num_unread) == (unclear, unread)
    assert (numbers.unclear in texts) == (unclear > 0)


@pytest.mark.parametrize(
    ("decimal", "values"), [(",", [1.234, 1234.0, 12.5, None]), (".", [1234.0, 1.234, None, 12.5])]
)
def test_the_decimal_sign_can_be_told(decimal: str, values: list[float | None]) -> None:
    found, numbers = read(["1,234", "1.234", "12,5", "12.5"], decimal)
    assert found == values
    assert (numbers.num_unread, numbers.comma) == (1, "")


def test_columns_of_numbers_are_taken_as_they_are() -> None:
    found, numbers = read(pa.array([1.5, None, float("nan"), float("inf")]), ",")
    assert found == [1.5, None, None, None]
    assert numbers.num_unread == 0
