"""Looks at a log: finds its columns, counts what is in it, and says how many tokens tell its titles apart."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ibis

from cprec.data.config import TableFiles, TableSource
from cprec.data.engine import TableEngine, connect
from cprec.data.sources.columns import no_header_hint
from cprec.data.sources.raw import RawTable, as_text
from cprec.data.sources.table_files import read_files
from cprec.errors import DataError
from cprec.fit.columns import Ask, Column, Columns, find
from cprec.fit.config import FitConfig
from cprec.fit.sizes import title_tokens
from cprec.progress import say
from cprec.schema import ITEM_ID, TITLE, USER_ID

LOG_SAMPLE, MOST_ITEMS = 2000, 1_000_000
"""Rows of the log, and of the items, that are looked at to tell columns and titles."""
EVENTS_NEEDED = 4
"""Events of a user at least who teaches something: one each to test and to validate, one to predict and one before."""
FEWEST_USERS = 100
"""Such users with fewer of whom nothing is tried."""


@dataclass(frozen=True)
class Look:
    """What a log has."""

    num_events: int
    num_users: int
    num_items: int
    num_teaching: int
    """Users with `EVENTS_NEEDED` events or more."""
    title_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.num_events:,} events of {self.num_users:,} customers ({self.num_teaching:,} with {EVENTS_NEEDED} "
            f"or more) and {self.num_items:,} items; {self.title_tokens} tokens of a title tell them apart"
        )


def look_at(config: FitConfig) -> tuple[TableSource, Look]:
    """The source with its columns found, and what is in it. Raises DataError where too little is."""
    forms = config.forms()
    with connect("duckdb") as engine:
        raw = {name: read_files(engine, config.domain, name, form) for name, form in forms.items()}
        limits = {"interactions": LOG_SAMPLE, "items": MOST_ITEMS}
        tables = {name: _columns(engine, raw[name], forms[name], limits[name]) for name in raw}
        has_times = config.timestamps != "order"
        found = find(tables["interactions"], tables.get("items"), has_times=has_times, ask=_ask())
        mapped = dict(zip(forms, found, strict=True))
        for name, columns in mapped.items():
            _check_header(raw[name], set(columns.values()) - set(forms[name].columns.values()))
            say(f"{tables[name].file}: {', '.join(f'{column} is the {field}' for field, column in columns.items())}")
        titled = "items" if "items" in mapped else "interactions"
        look = _counted(engine, raw["interactions"].table, mapped["interactions"], raw[titled].table, mapped[titled])
    if look.num_teaching < FEWEST_USERS:
        raise DataError(
            f"{raw['interactions'].files[0]}: {look.num_teaching:,} of {look.num_users:,} customers have "
            f"{EVENTS_NEEDED} events or more ({look.num_events:,} events in all), and at least {FEWEST_USERS} are "
            "needed to learn from and to be tried on: give a longer log; until then show what is popular"
        )
    files = {name: replace(form, columns={**form.columns, **mapped[name]}) for name, form in forms.items()}
    source = TableSource(
        domain=config.domain,
        platform=config.platform,
        interactions=files["interactions"],
        items=files.get("items"),
        timestamps=config.timestamps,
    )
    return source, look


def _columns(engine: TableEngine, raw: RawTable, form: TableFiles, limit: int) -> Columns:
    """The columns of a table, with the first rows as text."""
    table = raw.table.select(*(as_text(raw.table[name]).name(name) for name in raw.columns))
    counts = engine.row(
        table.aggregate(
            **{f"all{number}": table[name].count() for number, name in enumerate(raw.columns)},
            **{f"distinct{number}": table[name].nunique() for number, name in enumerate(raw.columns)},
        )
    )
    first = engine.to_arrow(table.limit(limit))
    if not len(first):
        raise DataError(f"{raw.files[0]} has a header and no rows")
    columns = [
        Column(
            name,
            [value for value in first[name].to_pylist() if value],
            counts[f"distinct{number}"] / max(1, counts[f"all{number}"]),
        )
        for number, name in enumerate(raw.columns)
    ]
    return Columns(str(raw.files[0]), columns, form.columns)


def _check_header(raw: RawTable, found: Collection[str]) -> None:
    """Raise DataError where the names of columns that were found are values: the file has no header."""
    if hint := no_header_hint(sorted(found), raw.key):
        raise DataError(f"{raw.files[0]}: the header is {', '.join(raw.columns)}{hint}")


def _counted(engine: TableEngine, log: Any, columns: Mapping[str, str], items: Any, theirs: Mapping[str, str]) -> Look:
    """Events, users, items and titles of a log."""
    users = log.group_by(columns[USER_ID]).aggregate(events=ibis._.count())
    counts = engine.row(
        users.aggregate(
            events=users["events"].sum(), users=users.count(), teaching=(users["events"] >= EVENTS_NEEDED).sum()
        )
    )
    titles = engine.to_arrow(as_text(items[theirs[TITLE]]).name(TITLE).as_table().distinct().limit(MOST_ITEMS))[TITLE]
    return Look(
        num_events=counts["events"] or 0,
        num_users=counts["users"],
        num_items=engine.value(items[theirs[ITEM_ID]].nunique()),
        num_teaching=counts["teaching"] or 0,
        title_tokens=title_tokens(title for title in titles.to_pylist() if title),
    )


def _ask() -> Ask | None:
    """A way to ask the person at the terminal, where there is one."""
    if not sys.stdin.isatty():
        return None

    def ask(question: str, names: Sequence[str]) -> str:
        say(question)
        while (name := input("column: ").strip()) not in names:
            say(f"{name!r} is none of {', '.join(names)}")
        return name

    return ask
