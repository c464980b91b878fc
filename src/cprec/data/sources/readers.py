"""How the files of a public data set are read: each function makes a reader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cprec.data.delimited import Form
from cprec.data.engine import TableEngine
from cprec.data.sources.lines import read_lines
from cprec.data.sources.raw import RawTable, raw_table
from cprec.data.text_files import Scalar

Read = Callable[[TableEngine, str, tuple[Path, ...]], RawTable]
"""Reads some files of a table (interactions or items)."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the files of one public data set are read."""

    interactions: Read
    items: Read | None = None
    """None where the events name their item."""
    timestamps: str
    columns: Mapping[str, str] = field(default_factory=dict)
    """Canonical column to the source's, where the usual names do not find it."""


_LISTS = ("title", "categories", "category", "description")
"""Keys that may hold a list; a list under any other key counts as missing."""


def json_lines(*columns: str) -> Read:
    """JSON objects, one a line, the given keys as text."""

    def read(engine: TableEngine, what: str, files: tuple[Path, ...]) -> RawTable:
        keys = [name if name in _LISTS else Scalar(name) for name in columns]
        return raw_table(what, files, columns, [engine.read_json_lines(path, keys) for path in files])

    return read


def python_literals(*columns: str) -> Read:
    """Dicts as Python spells them, one a line, the given keys as text."""

    def read(engine: TableEngine, what: str, files: tuple[Path, ...]) -> RawTable:
        return raw_table(what, files, columns, [read_lines(engine, path, columns) for path in files])

    return read


def delimited(
    *columns: str, separator: str = ",", quote: str = '"', header: bool = False, encoding: str = "utf-8"
) -> Read:
    """Delimited text with these columns, with or without a header line."""
    form = Form(columns, separator, quote, header, encoding)

    def read(engine: TableEngine, what: str, files: tuple[Path, ...]) -> RawTable:
        return raw_table(what, files, columns, [engine.read_delimited(path, form) for path in files])

    return read


def changed(read: Read, change: Callable[[Any], Any], *more: str) -> Read:
    """A reader whose table goes through `change`, which may add the columns `more`."""

    def read_changed(engine: TableEngine, what: str, files: tuple[Path, ...]) -> RawTable:
        raw = read(engine, what, files)
        columns: Sequence[str] = [*raw.columns, *(name for name in more if name not in raw.columns)]
        return replace(raw, table=change(raw.table), columns=tuple(columns))

    return read_changed
