"""The rows of a source under the names that its files use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ibis

from cprec.data.config import DecimalSign
from cprec.data.sources.numbers import exact
from cprec.data.text_files import LINE


@dataclass(frozen=True)
class RawTable:
    """One table of a source as an Ibis table: its own columns, and `source_file`, `line_in_file` and `sequence`."""

    what: str
    """interactions or items."""
    table: Any
    columns: tuple[str, ...]
    malformed: tuple[Any, ...]
    """Tables of the rows that could not be taken apart: file, line, reason, row."""
    files: tuple[Path, ...]
    key: str = ""
    """Prefix of this table's settings in messages, as `items.`; empty where it has no settings of its own."""
    decimal: DecimalSign = "auto"
    """Before the decimals of numbers in text."""


def raw_table(
    what: str, files: Sequence[Path], columns: Sequence[str], read: Sequence[tuple[Any, Any | None]]
) -> RawTable:
    """One table out of several files; `read` has the rows and the malformed rows of each, as the engine gives them.

    `sequence` numbers the rows of all files: the file's number times 2 ** 40, more lines than a file has, and the line.
    """
    tables, malformed = [], []
    for number, (path, (table, bad)) in enumerate(zip(files, read, strict=True)):
        file = ibis.literal(str(path))
        sequence = ibis.literal(number).cast("int64") * (1 << 40) + table[LINE]
        absent = [ibis.null("string").name(name) for name in columns if name not in table.columns]
        numbered = table.mutate(file.name("source_file"), sequence.name("sequence"), *absent)
        tables.append(numbered.select(*columns, LINE, "source_file", "sequence"))
        if bad is not None:
            malformed.append(bad.select(file.name("file"), bad[LINE].cast("int64").name("line"), "reason", "row"))
    for name in columns:
        # Ids, say, may be numbers in one file and text in another.
        if len({table[name].type().copy(nullable=True) for table in tables}) > 1:
            tables = [table.mutate(as_text(table[name]).name(name)) for table in tables]
    whole = ibis.union(*tables) if len(tables) > 1 else tables[0]
    return RawTable(what, whole, tuple(columns), tuple(malformed), tuple(files))


def as_text(value: Any) -> Any:
    """A column as text; lists of text are joined by commas, and whole numbers have no decimal point."""
    kind = value.type()
    if kind.is_array():
        return value.cast("array<string>").join(", ")
    if kind.is_floating():  # ids that were read beside missing ones: 12345.0, and NaN where there is none
        number = exact(value)
        whole = ibis.ifelse(number == number.floor(), number, ibis.null("float64")).cast("int64").cast("string")
        is_none = value.isnan() | value.isinf()
        return ibis.coalesce(whole, ibis.ifelse(is_none, ibis.null("string"), value.cast("string")))
    text = value.cast("string")
    return text.re_replace(r"\.0+$", "") if kind.is_decimal() and kind.scale != 0 else text
