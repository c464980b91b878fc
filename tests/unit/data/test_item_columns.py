"""Columns of items' numbers: each item has its own, and what is missing, double or no number is named."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.data.catalogue import Catalogue
from cprec.data.item_columns import read_column
from cprec.errors import CPRecError

BOOKS = pa.table({"item_id": ["007", "12", "b"], "title": ["x", "y", "z"]})
CATALOGUE = Catalogue.from_tables({"books": BOOKS, "games": pa.table({"item_id": ["b"], "title": ["w"]})})


def read(path: str | Path) -> list[float]:
    return read_column(path, "margin", CATALOGUE, "books").tolist()


def test_rows_in_any_order_and_of_any_types(
    write: Callable[[str, str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids of CSV are text, whole numbers of Parquet are ids as well; other domains' rows do not count."""
    assert read(write("m.csv", "margin,title,item_id\n2,,b\n-1e-1,t,007\n3.5,,12\n")) == [-0.1, 3.5, 2.0]
    assert read(write("d.csv", "item_id,domain,margin\nb,games,9\nb,books,2\n007,books,0\n12,books,1\n")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"item_id": ["b", "12", "007"], "margin": [Decimal("1.5"), Decimal(2), Decimal(0)]}), path)
    assert read(path) == [0, 2, 1.5]


def test_items_that_the_catalogue_lacks_are_told(
    write: Callable[[str, str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert read(write("m.csv", "item_id,margin\nb,1\n007,2\n12,3\ngone,nan\n7,9\n")) == [2, 3, 1]
    assert "2 items that domain 'books' does not have are passed over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,margin\nb,1\n007,\n", "2 of the 3 items of domain 'books' have no margin: '007', '12'; give each"),
        ("item_id,margin\nb,1\n007,2\nb,1\n", "row 3: item 'b' stands here a second time"),
        ("item_id,margin\nb,nan\n", "row 1, item 'b': margin='nan' is no finite number"),
        ("item_id,margin\nb,-inf\n", "margin='-inf' is no finite number"),
        ("item_id,margin\nb,high\n", "margin='high' is no finite number"),
        ("item_id;margin\nb;1\n", "needs one column 'item_id'; it has 'item_id;margin'"),
        ("item_id,margin,margin\nb,1,2\n", "needs one column 'margin'"),
        ("item_id,margin\nb,1,2\n", "cannot be read"),
        ("item_id,domain,margin\nb,shop,1\nzz,books,1\n", "median; 1 of its rows are of unknown items, 1 of other"),
        (
            "item_id,domain,domain,margin\nb,books,books,1\n",
            "needs one column 'item_id'; it has 'item_id', 'domain', 'do",
        ),
        ("", "cannot be read"),
    ],
)
def test_what_gives_no_number_to_each_item_is_refused(
    text: str, message: str, write: Callable[[str, str], str]
) -> None:
    with pytest.raises(CPRecError, match=message) as refused:
        read(write("m.csv", text))
    assert "m.csv" in str(refused.value)


@pytest.mark.parametrize("values", [[True, False, True], ["1", "2", "3%"], [1.0, float("inf"), 2.0]])
def test_columns_of_parquet_must_be_numbers(values: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"item_id": ["007", "12", "b"], "margin": values}), path)
    with pytest.raises(CPRecError, match="is no finite number"):
        read(path)


def test_files_that_are_no_tables_are_refused(write: Callable[[str, str], str], tmp_path: Path) -> None:
    with pytest.raises(CPRecError, match=r"gone.csv is no file"):
        read(tmp_path / "gone.csv")
    with pytest.raises(CPRecError, match=r"expected a table of items, a file that ends in .csv, .csv.gz or .parquet"):
        read(write("m.xlsx", ""))
    with pytest.raises(CPRecError, match="cannot be read"):
        read(write("m.parquet", "no table"))
