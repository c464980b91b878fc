"""A number of each item, from a file of the user's."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from cprec.data.catalogue import Catalogue
from cprec.errors import ConfigError, DataError
from cprec.progress import say
from cprec.schema import DOMAIN, ITEM_ID, id_text

MAX_SHOWN = 5


def read_column(path: str | Path, name: str, catalogue: Catalogue, domain: str) -> np.ndarray:
    """The column `name` of a table with an `item_id`: float64[N], in the order of the domain's items.

    Of a table with a `domain` the rows of that domain count. Items that the catalogue lacks (preparing may have left
    them out) are passed over, with a line that says how many.

    Raises ConfigError for a file that is not there or no CSV or Parquet, DataError for one that cannot be read or lacks
    a column, an item without a value or with several rows, and a value that is no finite number.
    """
    table = _read(existing(path), name)
    places = {str(item): place for place, item in enumerate(catalogue.item_id[catalogue.rows_of(domain)])}
    values, unknown, elsewhere = dict[str, float | None](), 0, 0
    domains = table[DOMAIN].to_pylist() if DOMAIN in table.column_names else [domain] * len(table)
    rows = zip(domains, table[ITEM_ID].to_pylist(), table[name].to_pylist(), strict=True)
    for number, (of_domain, item_id, value) in enumerate(rows, start=1):
        if of_domain != domain:
            elsewhere += 1
            continue
        if isinstance(item_id, list | dict):
            raise DataError(f"{path}, row {number}: item_id {item_id!r} is no text or number")
        item = id_text(item_id) or ""
        if item in values:
            raise DataError(f"{path}, row {number}: item {item!r} stands here a second time; give each item one row")
        if item in places:
            values[item] = _number(value, f"{path}, row {number}, item {item!r}: {name}")
        unknown += item not in places
    passed_over = f"; {unknown:,} of its rows are of unknown items, {elsewhere:,} of other domains"
    if without := [item for item in places if values.get(item) is None]:
        raise DataError(
            f"{path}: {len(without):,} of the {len(places):,} items of domain {domain!r} have no {name}: "
            f"{', '.join(map(repr, without[:MAX_SHOWN]))}{', ...' if len(without) > MAX_SHOWN else ''}; give each a "
            f"number, such as the median{passed_over if unknown or elsewhere else ''}"
        )
    if unknown:
        say(f"{path}: {unknown:,} items that domain {domain!r} does not have are passed over")
    return np.array([values[item] for item in places], dtype=float)


def existing(path: str | Path) -> Path:
    """The path of a table; raises ConfigError where there is none that can be read."""
    if not str(path).lower().endswith((".csv", ".csv.gz", ".parquet")):
        raise ConfigError(f"{path}: expected a table of items, a file that ends in .csv, .csv.gz or .parquet")
    if not Path(path).is_file():
        raise ConfigError(f"{path} is no file: give a table with item_id and the column to weigh")
    return Path(path)


def _read(path: Path, name: str) -> pa.Table:
    """The table; of CSV the columns that are needed are text."""
    try:
        if path.suffix.lower() == ".parquet":
            table = pq.ParquetFile(path).read()
        else:
            types = dict.fromkeys((ITEM_ID, DOMAIN, name), pa.string())
            table = csv.read_csv(path, convert_options=csv.ConvertOptions(column_types=types))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    for needed in (ITEM_ID, name):
        if table.column_names.count(needed) != 1 or table.column_names.count(DOMAIN) > 1:
            raise DataError(
                f"{path} needs one column {needed!r}; it has {', '.join(map(repr, table.column_names))}, and columns "
                "of CSV are separated by commas"
            )
    return table


def _number(value: Any, where: str) -> float | None:
    """A cell as a number; None where it is empty. Raises DataError, with `where`, for what is no finite number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = (
            float(value) if isinstance(value, str | int | float | Decimal) and not isinstance(value, bool) else math.nan
        )
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}={value!r} is no finite number, such as 0.35 (with a point)")
    return number
