"""Reads the files of one table: Parquet, delimited text with or without a header, and JSON lines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cprec.data.config import TableFiles
from cprec.data.delimited import Form, split_line
from cprec.data.engine import TableEngine
from cprec.data.sources.columns import DEFAULT_NAMES, SINGLE_VALUES, no_header_hint
from cprec.data.sources.files import DELIMITED, JSON_LINES, PARQUET, find_files, suffix_of
from cprec.data.sources.raw import RawTable, raw_table
from cprec.data.text_files import LINE, Scalar, first_line, first_lines
from cprec.errors import DataError

OWN_NAMES = (LINE, "source_file", "sequence", "problem")
"""Columns that readers add: a column of a file that has one of these names gets a `_` behind it."""

SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar", "::": "two colons"}

LINES_LOOKED_AT = 1000
"""Lines of a JSON-lines file whose keys become columns."""

Read = tuple[Any, Any | None, tuple[str, ...]]
"""The rows of a file, its malformed rows where there are any, and the names of its columns."""


def read_files(
    engine: TableEngine, domain: str, what: str, form: TableFiles, *, typed_header: bool = False
) -> RawTable:
    """All files of a table, one after the other.

    `typed_header` is RecBole's: names end in a colon and a type, which is left out.
    """
    key = "" if typed_header else f"{what}."
    files = find_files(domain, what, form.path)
    columns: tuple[str, ...] = ()
    read: list[tuple[Any, Any | None]] = []
    for number, path in enumerate(files):
        kind = suffix_of(path)
        if kind in PARQUET:
            table, bad, names = _read_parquet(engine, path)
        elif kind in JSON_LINES:
            table, bad, names = _read_json_lines(engine, path, form)
        else:
            table, bad, names = _read_delimited(engine, path, form, key, typed_header)
        if number == 0:
            columns = names
        elif kind in JSON_LINES:  # objects may lack keys
            columns = (*columns, *(name for name in names if name not in columns))
        elif missing := [name for name in columns if name not in names]:
            raise DataError(
                f"{path} has no column {', '.join(missing)}, which {files[0]} has; it has {', '.join(names)}"
            )
        read.append((table, bad))
    return replace(raw_table(what, files, columns, read), key=key, decimal=form.decimal or "auto")


def _read_parquet(engine: TableEngine, path: Path) -> Read:
    try:
        table = engine.read_parquet(path)
    except DataError as error:
        raise DataError(f"{error}; it is damaged or no Parquet file: write or fetch it again") from None
    table = table.rename({_column_name(name): name for name in table.columns if name != LINE})
    return table, None, tuple(name for name in table.columns if name != LINE)


def _read_json_lines(engine: TableEngine, path: Path, form: TableFiles) -> Read:
    encoding = form.encoding or "utf-8"
    keys = _json_keys(path, form.columns, encoding)
    table, bad = engine.read_json_lines(path, keys, encoding=encoding)
    return table.rename({_column_name(name): str(name) for name in keys}), bad, tuple(map(_column_name, keys))


def _read_delimited(engine: TableEngine, path: Path, form: TableFiles, key: str, typed_header: bool) -> Read:
    separator, quote, encoding = (
        form.separator or DELIMITED[suffix_of(path)],
        form.quote or "",
        form.encoding or "utf-8",
    )
    names = form.names or _header(path, separator, quote, typed_header, encoding, key)
    names = tuple(map(_column_name, names))
    table, bad = engine.read_delimited(path, Form(names, separator, quote, not form.names, encoding))
    return table, bad, names


def _column_name(name: str) -> str:
    """The name of a file's column where it is none of those that readers add."""
    return f"{name}_" if name.lower() in OWN_NAMES else str(name)


# ---- headers ---------------------------------------------------------------------------------------------------------


def _header(path: Path, separator: str, quote: str, typed: bool, encoding: str, key: str) -> tuple[str, ...]:
    """The names in the first line of a delimited file; `key` stands before the names of its settings in messages."""
    line = first_line(path, encoding)
    if told := re.fullmatch(r'"?sep=(.)"?', line.strip(" ,;\t")) or re.fullmatch("sep=([,;\t])", line):
        raise DataError(
            f"{path}: the first line, {line!r}, is a note for Excel: delete it"
            + (f", and set {key}separator={json.dumps(told[1])} if that is not the separator already" if key else "")
        )
    names = _split(line, separator, quote)
    if names is None:
        raise DataError(
            f"{path}: the header {line[:200]!r} has a quote that is not closed; names stand on one line"
            + (f'. Set {key}quote="" if quotes are ordinary characters in this file' if key else "")
        )
    if len(names) == 1:
        _check_separator(path, line, separator, quote, key)
    if typed:
        names = [name.partition(":")[0] for name in names]
    _check_header(path, line, names, key)
    return tuple(names)


def _check_separator(path: Path, line: str, separator: str, quote: str, key: str) -> None:
    """Raise DataError where a header of a single column has several with another separator."""
    counts = {other: len(_split(line, other, quote) or ()) for other in SEPARATORS if other != separator}
    other = max(counts, key=lambda candidate: counts[candidate])
    if counts[other] > 1:
        raise DataError(
            f"{path}: with {SEPARATORS.get(separator, repr(separator))} as separator the header is the single "
            f"column {line!r}; it looks as if {SEPARATORS[other]} separates the fields"
            + (f": set {key}separator={json.dumps(other)}" if key else "")
        )


def _check_header(path: Path, line: str, names: list[str], key: str) -> None:
    """Raise DataError where a column has no name, or one that another column has."""
    if not line.strip():
        raise DataError(f"{path}: the first line is empty, and should name the columns")
    if not all(names):
        raise DataError(
            f"{path}: column {names.index('') + 1} of the header {line!r} has no name{no_header_hint(names, key)}"
        )
    lower = [name.lower() for name in names]
    if twice := sorted({name for name in names if lower.count(name.lower()) > 1}):
        raise DataError(
            f"{path}: the header names {' and '.join(twice)}{' twice' if len(twice) == 1 else ''}; give each column a "
            f"name of its own (upper and lower case count as the same){no_header_hint(names, key)}"
        )


def _split(line: str, separator: str, quote: str) -> list[str] | None:
    names = split_line(line, separator, quote)
    return None if names is None else [name.strip() for name in names]


# ---- keys of JSON objects --------------------------------------------------------------------------------------------


def _json_keys(path: Path, mapping: Mapping[str, str], encoding: str) -> tuple[str, ...]:
    """The keys of the first objects of a JSON-lines file, and optional ones that are mapped.

    Of keys that differ in case only there is one: the one that a canonical column may have.
    """
    wanted = {alias for aliases in DEFAULT_NAMES.values() for alias in aliases} | set(mapping.values())
    keys: dict[str, str] = {}
    for key in dict.fromkeys(key for value in _first_objects(path, encoding) for key in value):
        if key and "\0" not in key and key.lower() != LINE and (key.lower() not in keys or key in wanted):
            keys[key.lower()] = key
    for name, key in mapping.items():
        if name not in SINGLE_VALUES:  # an optional key may be rare
            keys.setdefault(key.lower(), key)
    single: set[str] = set()
    for name in SINGLE_VALUES:
        single.update(alias.lower() for alias in ([mapping[name]] if name in mapping else DEFAULT_NAMES[name]))
    return tuple(Scalar(key) if key.lower() in single else key for key in keys.values())


def _first_objects(path: Path, encoding: str) -> list[dict[str, Any]]:
    """The objects in the first lines of a file. Raises DataError where it is one list, or has none."""
    lines = [line for line in first_lines(path, LINES_LOOKED_AT, encoding) if line.strip()]
    objects = [value for value in map(json_object, lines) if value is not None]
    if not objects or lines[0].lstrip().startswith("["):
        shown = f"line 1 is not a JSON object: {lines[0][:80]!r}" if lines else "there is no line in it"
        select = ".[]" if lines and lines[0].lstrip().startswith("[") else "."
        raise DataError(
            f"{path}: {shown}; the file must hold one object per line: convert it, with "
            f"`jq -c '{select}' {path.name} > new.jsonl`, say"
        )
    return objects


def json_object(line: str) -> dict[str, Any] | None:
    """The object in a line of JSON; None where it is something else, or no JSON."""
    try:
        value = json.loads(line, parse_int=str)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
