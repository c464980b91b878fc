"""One rule makes text of ids: what the readers do to a column, `id_text` does to a cell."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cprec.data.engine import connect
from cprec.data.sources.lines import as_text
from cprec.data.sources.raw import as_text as column_text
from cprec.data.text_files import Scalar
from cprec.schema import id_text
from cprec.serve.histories import _json

COLUMNS = [
    pa.array(["007", "a b", " x ", None]),
    pa.array([1, 2**62 + 1, -3, None]),
    pa.array([0, 2**64 - 1], pa.uint64()),
    pa.array([1.0, 2.5, -4.0, -0.0, 1e15, 2.0**53, 1e20, 1e-7, float("nan"), float("inf"), None]),
    pa.array([Decimal("12.00"), Decimal("12.50"), Decimal("-3.00"), None]),
    pa.array([Decimal("12"), None], pa.decimal128(20, 0)),
    pa.array([True, False, None]),
    pa.array([16_000, None], pa.date32()),
]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: str(column.type))
def test_a_cell_becomes_what_its_column_becomes(column: pa.Array) -> None:
    with connect("duckdb") as engine:
        table = engine.from_arrow(pa.table({"id": column}))
        expected = engine.to_arrow(table.select(column_text(table["id"]).name("id")))["id"].to_pylist()
    assert [id_text(cell) for cell in column.to_pylist()] == expected


def test_a_value_of_json_becomes_what_its_key_becomes(tmp_path: Path) -> None:
    values = ['"a"', "1", "12345678901234567890", "7.0", "7.5", "1e3", "-0.0", "true", "null"]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"id": {value}}}\n' for value in values))
    with connect("duckdb") as engine:
        rows, _ = engine.read_json_lines(path, [Scalar("id")])
        expected = engine.to_arrow(rows)["id"].to_pylist()
    assert [id_text(_json(value)) for value in values] == expected
    assert [id_text(json.loads(value)) for value in values] == expected  # as Python reads it


@pytest.mark.parametrize("value", ["a", 7, 7.0, 7.5, 2**70, None])
def test_a_value_of_a_python_literal_becomes_text_alike(value: Any) -> None:
    assert as_text(value) == id_text(value)


def test_numbers_of_numpy_are_numbers() -> None:
    cells: list[Any] = [np.int8(3), np.uint64(2**64 - 1), np.float32(7), np.str_("x"), np.float64("nan")]
    assert [id_text(cell) for cell in cells] == ["3", str(2**64 - 1), "7", "x", None]


@pytest.mark.parametrize("value", [["a"], {"id": "a"}, b"a", object()])
def test_what_is_no_single_value_is_none(value: Any) -> None:
    with pytest.raises(TypeError, match="give text or a whole number"):
        id_text(value)
