"""The canonical tables that every kind of source is turned into: columns renamed, numbers and times read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ibis

from cprec.data.config import INTERACTION_FIELDS, ITEM_FIELDS, RecBoleSource, TableSource
from cprec.data.engine import TableEngine
from cprec.data.sources.columns import check_types, find_columns, missing_column
from cprec.data.sources.numbers import Numbers, read_numbers
from cprec.data.sources.raw import RawTable, as_text
from cprec.data.sources.table_files import read_files
from cprec.data.sources.times import detect_time_format, is_moment, read_times, time_problem
from cprec.schema import BRAND, CATEGORIES, ITEM_ID, MICROSECOND, ORDER, PRICE, RATING, TIMESTAMP, TITLE, USER_ID

MAX_TEXT = 10_000
"""Characters of an item's text at most: a longer title rejects the item, longer brands and categories are left out."""
LONG_TITLE = f"title of more than {MAX_TEXT:,} characters"

POSITION = "decimal(38, 9)"
"""Positions may have all the digits of an int64, or a fraction."""


@dataclass(frozen=True)
class SourceTables:
    """The Ibis tables of a source, with every row of its files, ids and times as the files have them."""

    items: Any
    """item_id, title, brand, categories, description (text), price (float64), file (text), line, sequence (int64), and
    problem (text): why the row cannot be used, or null."""
    interactions: Any
    """user_id, item_id (text), timestamp (int64 seconds, null where it could not be parsed), microsecond (int32: what
    the time has beyond seconds), time_text (text), rating (float64), position (decimal, the source's own order, or
    null), file (text), line, sequence (int64), and problem (text): why the row cannot be used, or null."""
    malformed: tuple[tuple[str, Any], ...] = ()
    """(items or interactions, table) of the rows that could not be taken apart: file, line, reason, row."""
    has_times: bool = True
    """False where the timestamps only order one user's events."""
    time_format: str = "seconds"
    """How the timestamps were read."""
    columns: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Per table (items, interactions) the source column of each canonical one."""
    files: tuple[tuple[str, Path], ...] = ()
    """(items or interactions, file) of every file read."""
    hashes: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by name, of a source that reads no files."""
    numbers: Mapping[str, Numbers] = field(default_factory=dict)
    """How rating, price and order were read."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Table (items, interactions) -> the prefix of its settings, as `items.`; empty where it has none of its own."""


def load(engine: TableEngine, source: TableSource | RecBoleSource) -> SourceTables:
    """The rows of all files. Raises DataError for a missing file or column, or a separator that cannot be right."""
    domain, forms, timestamps = source.domain, source.forms(), source.timestamps
    is_typed = isinstance(source, RecBoleSource)  # its headers name types too: user_id:token
    read = {name: read_files(engine, domain, name, form, typed_header=is_typed) for name, form in forms.items()}
    log, mapping = read["interactions"], forms["interactions"].columns
    if is_typed and timestamps == "auto":
        has_time = TIMESTAMP in find_columns(domain, log, INTERACTION_FIELDS, mapping, required=())
        timestamps = "auto" if has_time else "order"
    item_mapping = forms["items"].columns if "items" in forms else mapping
    return canonical_tables(engine, domain, log, read.get("items"), mapping, timestamps, item_mapping=item_mapping)


def canonical_tables(
    engine: TableEngine,
    domain: str,
    log: RawTable,
    catalogue: RawTable | None,
    mapping: Mapping[str, str],
    timestamps: str,
    *,
    item_mapping: Mapping[str, str] | None = None,
) -> SourceTables:
    """Name the columns of a log and of its items canonically, and read the numbers and timestamps.

    `catalogue` is None where each event names its item itself. `item_mapping` is the items' own mapping of columns
    where it is not the log's.
    """
    titled = log if catalogue is None else catalogue
    item_mapping = mapping if item_mapping is None else item_mapping
    columns = {
        "interactions": find_columns(domain, log, INTERACTION_FIELDS, mapping, required=(USER_ID, ITEM_ID)),
        "items": find_columns(domain, titled, ITEM_FIELDS, item_mapping, required=(ITEM_ID, TITLE)),
    }
    if TIMESTAMP not in columns["interactions"] and timestamps != "order":
        hint = "; or say timestamps=order if a user's rows stand in order"
        raise missing_column(domain, log, TIMESTAMP, otherwise=hint)
    check_types(domain, log, columns["interactions"])
    check_types(domain, titled, columns["items"])
    time_format = timestamps
    if timestamps == "auto":
        time_format = detect_time_format(engine, domain, log, columns["interactions"][TIMESTAMP])
    interactions, numbers = _interactions(engine, log, columns["interactions"], time_format)
    problem = time_problem(interactions[TIMESTAMP], time_format, is_guessed=timestamps == "auto")
    items, price = _items(engine, titled, columns["items"])
    raw_tables = (log,) if catalogue is None else (log, catalogue)
    return SourceTables(
        items=_first_of_each(items) if catalogue is None else items,
        interactions=interactions.mutate(problem=ibis.coalesce(interactions["problem"], problem)),
        malformed=tuple((raw.what, table) for raw in raw_tables for table in raw.malformed),
        has_times=time_format != "order",
        time_format=time_format,
        columns=columns,
        files=tuple((raw.what, path) for raw in raw_tables for path in raw.files),
        numbers={**numbers, PRICE: price},
        keys={"interactions": log.key, "items": titled.key},
    )


def _interactions(
    engine: TableEngine, log: RawTable, columns: Mapping[str, str], time_format: str
) -> tuple[Any, dict[str, Numbers]]:
    """The canonical columns of a log, and how its ratings and positions were read."""
    table, order = log.table, columns.get(ORDER)
    time = table[columns[TIMESTAMP]] if TIMESTAMP in columns else table["sequence"]
    timestamp, microsecond = read_times(engine, time, time_format)
    ordered_by_time = order is not None and is_moment(table[order].type())
    numbers = {
        RATING: read_numbers(engine, table, columns.get(RATING), log.decimal),
        ORDER: read_numbers(engine, table, None if ordered_by_time else order, log.decimal),
    }
    position = _position(engine, _or_null(table, order), numbers[ORDER].values)
    interactions = table.select(
        as_text(table[columns[USER_ID]]).name(USER_ID),
        as_text(table[columns[ITEM_ID]]).name(ITEM_ID),
        timestamp.name(TIMESTAMP),
        microsecond.name(MICROSECOND),
        time.cast("string").name("time_text"),
        numbers[RATING].values.name(RATING),
        _or_null(table, "problem" if "problem" in log.columns else None).name("problem"),
        position.name("position"),
        table["source_file"].name("file"),
        table["line_in_file"].cast("int64").name("line"),
        table["sequence"],
    )
    return interactions, numbers


def _items(engine: TableEngine, catalogue: RawTable, columns: Mapping[str, str]) -> tuple[Any, Numbers]:
    """The canonical columns of a catalogue, and how its prices were read."""
    table = catalogue.table
    price = read_numbers(engine, table, columns.get(PRICE), catalogue.decimal)
    texts = [as_text(_or_null(table, columns.get(name))).name(name) for name in ITEM_FIELDS if name != PRICE]
    items = table.select(
        *texts,
        price.values.name(PRICE),
        table["source_file"].name("file"),
        table["line_in_file"].cast("int64").name("line"),
        table["sequence"],
    )
    is_long = {name: items[name].length() > MAX_TEXT for name in (TITLE, BRAND, CATEGORIES)}
    items = items.mutate(
        *(ibis.ifelse(long, None, items[name]).name(name) for name, long in is_long.items()),
        problem=ibis.ifelse(ibis.coalesce(is_long[TITLE], False), LONG_TITLE, ibis.null("string")),
    )
    return items, price


def _first_of_each(items: Any) -> Any:
    """Each item once, where every event repeats it: the first row that has a title."""
    titled = ibis.coalesce(items[TITLE], "") != ""
    first = ibis.row_number().over(group_by=items[ITEM_ID], order_by=[~titled, items["sequence"]])
    return items.mutate(first.name("place")).filter(ibis._.place == 0, ibis._[ITEM_ID].notnull()).drop("place")


def _or_null(table: Any, column: str | None) -> Any:
    return ibis.null("string") if column is None else table[column]


def _position(engine: TableEngine, value: Any, number: Any) -> Any:
    """The source's own order: numbers with all their digits, and times as microseconds.

    `number` is what the text of the column was read as, with the decimal sign that it has.
    """
    kind = value.type()
    if is_moment(kind):
        seconds, microsecond = read_times(engine, value, "iso")
        value = seconds * 10**6 + microsecond
    elif kind.is_string():  # a float lacks digits of a long whole number
        whole = ibis.ifelse(value.re_search(r"^\s*[+-]?\d+\s*$"), value, ibis.null("string"))
        return ibis.coalesce(whole.try_cast(POSITION), number.try_cast(POSITION))
    return value.try_cast(POSITION)
