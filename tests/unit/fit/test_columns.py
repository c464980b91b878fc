"""Columns are told by names and by content; what is not sure is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from cprec.errors import ConfigError, CPRecError, DataError
from cprec.fit.columns import Column, Columns, find

IDS = [f"p{number}" for number in range(20)]
TITLES = [f"Teapot for {number}" for number in range(20)]
WHO = [f"u{number % 5}" for number in range(40)]
WHAT = [IDS[number % 7] for number in range(40)]
WHEN = [f"2024-01-{1 + number % 28:02d}" for number in range(40)]
PRICES = [f"{number % 9}.99" for number in range(40)]


def table(file: str, columns: Mapping[str, Sequence[str]], **given: str) -> Columns:
    made = [Column(name, values, len(set(values)) / max(1, len(values))) for name, values in columns.items()]
    return Columns(file, made, given)


def found(
    log: Mapping[str, Sequence[str]], items: Mapping[str, Sequence[str]] | None, *, has_times: bool = True, **given: str
) -> list[str]:
    """The columns of item, time and user in the log, and of item and title in the items."""
    tables = [table("log.csv", log, **given), None if items is None else table("items.csv", items, **given)]
    told = find(tables[0], tables[1], has_times=has_times)  # type: ignore[arg-type]
    return [name for one in told for name in one.values()]


@pytest.mark.parametrize(
    ("log", "items", "expected"),
    [
        (  # usual names
            {"user_id": WHO, "item_id": WHAT, "timestamp": WHEN},
            {"item_id": IDS, "title": TITLES},
            ["item_id", "timestamp", "user_id", "item_id", "title"],
        ),
        (  # words in names, in any spelling
            {"customerNo": WHO, "SKU": WHAT, "order_date": WHEN, "unit_price": PRICES},
            {"article": IDS, "product_name": TITLES},
            ["SKU", "order_date", "customerNo", "article", "product_name"],
        ),
        (  # a German shop's
            {"Kunde": WHO, "Artikel": WHAT, "Datum": [f"{1 + n % 28}.09.2022" for n in range(40)], "Menge": PRICES},
            {"Artikel": IDS, "Bezeichnung": TITLES, "Marke": TITLES},
            ["Artikel", "Datum", "Kunde", "Artikel", "Bezeichnung"],
        ),
        (  # German compounds
            {"Kundennummer": WHO, "Artikelnr": WHAT, "Bestelldatum": WHEN, "Kundenname": WHO},
            {"Artikelnr": IDS, "Artikelname": TITLES, "Beschreibung": TITLES},
            ["Artikelnr", "Bestelldatum", "Kundennummer", "Artikelnr", "Artikelname"],
        ),
        (  # an id and a name of each
            {"customer_id": WHO, "customer_name": WHO, "product_id": WHAT, "product_name": WHAT, "time": WHEN},
            {"product_id": IDS, "product_name": TITLES, "brand": TITLES},
            ["product_id", "time", "customer_id", "product_id", "product_name"],
        ),
        (  # nothing but content
            {"a": WHO, "b": WHAT, "c": WHEN},
            {"x": IDS, "y": TITLES},
            ["b", "c", "a", "x", "y"],
        ),
        (  # ids of users that are ids of items, too: names decide
            {"user": [str(n % 9) for n in range(40)], "movie": [str(n % 7) for n in range(40)], "when": WHEN},
            {"movie": [str(n) for n in range(20)], "name": TITLES, "year": ["1999"] * 20},
            ["movie", "when", "user", "movie", "name"],
        ),
        (  # what is called a product is its title, and the other id is none
            {"reviewer": WHO, "asin": WHAT, "time": WHEN},
            {"asin": IDS, "product": TITLES, "code": [f"x{item}" for item in IDS], "brand": TITLES},
            ["asin", "time", "reviewer", "asin", "product"],
        ),
        (  # a title in every row
            {"who": WHO, "product": WHAT, "title": TITLES * 2, "time": WHEN},
            None,
            ["product", "time", "who", "title"],
        ),
    ],
)
def test_columns_are_found(
    log: Mapping[str, Sequence[str]], items: Mapping[str, Sequence[str]] | None, expected: list[str]
) -> None:
    assert found(log, items) == expected


LOG = {"user_id": WHO, "item_id": WHAT, "timestamp": WHEN}
ITEMS = {"item_id": IDS, "title": TITLES}


@pytest.mark.parametrize(
    ("log", "items", "error", "said"),
    [
        (LOG, {"item_id": IDS, "price": PRICES}, ConfigError, r"items.csv: which column is the item's title \(title\)"),
        (LOG, {"item_id": IDS, "a": TITLES, "b": TITLES}, ConfigError, r"a or b may be.*columns.title=a"),
        ({**LOG, "timestamp": ["23/07/2014"] * 40}, ITEMS, DataError, r"timestamp \(as '23/07/2014'\) are no times"),
        ({"user_id": WHO, "item_id": WHAT}, ITEMS, ConfigError, "which column is the time.*timestamps=order"),
        (
            {**LOG, "item_id": ["other"] * 40},
            ITEMS,
            DataError,
            "items.csv has no column with the ids of a column of log.csv",
        ),
        ({"a": WHO, "b": WHO, "item_id": WHAT, "time": WHEN}, ITEMS, ConfigError, r"a or b may be.*columns.user_id=a"),
        (ITEMS, LOG, DataError, "is log.csv the log, one row an event, and items.csv the items"),  # the wrong way round
    ],
)
def test_what_is_not_sure_is_told(
    log: Mapping[str, Sequence[str]], items: Mapping[str, Sequence[str]], error: type[CPRecError], said: str
) -> None:
    with pytest.raises(error, match=said):
        found(log, items)


def test_what_is_given_counts_and_must_be_there() -> None:
    log = {"a": WHO, "b": WHO, "item_id": WHAT, "time": WHEN}
    assert found(log, ITEMS, user_id="B")[2] == "b"
    with pytest.raises(ConfigError, match=r"columns.user_id=c: log.csv has no such column; it has a \(as 'u0', 'u1'\)"):
        found(log, ITEMS, user_id="c")
    assert found({"user_id": WHO, "item_id": WHAT}, ITEMS, has_times=False) == [
        "item_id",
        "user_id",
        "item_id",
        "title",
    ]


def test_a_person_may_be_asked() -> None:
    log = table("log.csv", {"a": WHO, "b": WHO, "item_id": WHAT, "time": WHEN})
    asked: list[str] = []

    def ask(question: str, names: Sequence[str]) -> str:
        asked.append(question)
        return names[1]

    assert find(log, table("items.csv", ITEMS), ask=ask)[0]["user_id"] == "b"
    assert len(asked) == 1 and "which column is the customer" in asked[0]
