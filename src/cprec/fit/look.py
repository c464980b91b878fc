"""Looks at a log: finds its columns, counts what is in it, and says how many tokens tell its titles apart."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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
from cprec.progress import say
from cprec.schema import ITEM_ID, TITLE, USER_ID
from cprec.text.distinct import title_tokens

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
        found = find(tables["interactions"], tables.get("items"), has_times=config.timestamps != "order", ask=_ask())
        mapped = dict(zip(forms, found, strict=True))
        for name, columns in mapped.items():
            told = set(columns.values()) - set(forms[name].columns.values())
            if hint := no_header_hint(sorted(told), raw[name].key):
                raise DataError(f"{tables[name].file}: the header is {', '.join(raw[name].columns)}{hint}")
            say(f"{tables[name].file}: {', '.join(f'{column} is the {field}' for field, column in columns.items())}")
        look = _counted(engine, raw, mapped)
    if look.num_teaching < FEWEST_USERS:
        raise DataError(
            f"{raw['interactions'].files[0]}: {look.num_teaching:,} of {look.num_users:,} customers have "
            f"{EVENTS_NEEDED} events or more ({look.num_events:,} events in all), and at least {FEWEST_USERS} are "
            "needed to learn from and to be tried on: give a longer log; until then show what is popular"
        )
    files: dict[str, Any] = {name: replace(form, columns=form.columns | mapped[name]) for name, form in forms.items()}
    return TableSource(domain=config.domain, platform=config.platform, timestamps=config.timestamps, **files), look


def _columns(engine: TableEngine, raw: RawTable, form: TableFiles, limit: int) -> Columns:
    """The columns of a table, with the first rows as text."""
    table = raw.table.select(*(as_text(raw.table[name]).name(name) for name in raw.columns))
    numbers = {f"all{n}": table[name].count() for n, name in enumerate(raw.columns)}
    numbers |= {f"distinct{n}": table[name].nunique() for n, name in enumerate(raw.columns)}
    counts, first = engine.row(table.aggregate(**numbers)), engine.to_arrow(table.limit(limit))
    if not len(first):
        raise DataError(f"{raw.files[0]} has a header and no rows")
    columns = [
        Column(name, list(filter(None, first[name].to_pylist())), counts[f"distinct{n}"] / max(1, counts[f"all{n}"]))
        for n, name in enumerate(raw.columns)
    ]
    return Columns(str(raw.files[0]), columns, form.columns)


def _counted(engine: TableEngine, raw: Mapping[str, RawTable], mapped: Mapping[str, Mapping[str, str]]) -> Look:
    """Events, users, items and titles of a log."""
    titled = "items" if "items" in raw else "interactions"
    log, items = raw["interactions"].table, raw[titled].table
    users = log.group_by(mapped["interactions"][USER_ID]).aggregate(events=ibis._.count())
    teaching = (users["events"] >= EVENTS_NEEDED).sum()
    counts = engine.row(users.aggregate(events=users["events"].sum(), users=users.count(), teaching=teaching))
    texts = as_text(items[mapped[titled][TITLE]]).name(TITLE)
    titles = engine.to_arrow(texts.as_table().distinct().limit(MOST_ITEMS))[TITLE]
    return Look(
        num_events=counts["events"] or 0,
        num_users=counts["users"],
        num_items=engine.value(items[mapped[titled][ITEM_ID]].nunique()),
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
