"""Reads delimited text and JSON lines with DuckDB, counting every row: each is kept, or set aside with a reason."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cprec.errors import DataError

LINE = "line_in_file"
"""The column that readers add: where a row stands, counted from 1; the header of a delimited file is line 1."""

_numbers = itertools.count()


def read_delimited(
    connection: Any, path: Path, columns: Sequence[str], separator: str, quote: str
) -> tuple[str, str | None]:
    """A delimited text file with a header line, every column as text, into tables of a DuckDB connection.

    Returns the name of the table of rows, and of the table of malformed rows (too few or too many fields, open quotes,
    bytes that are not UTF-8) with columns `line_in_file`, `reason` and `row`; None where there are none.
    """
    name, rejects, scans = new_name(), new_name(), new_name()
    types = ", ".join(f"{quoted(column)}: 'VARCHAR'" for column in columns)
    connection.execute(
        f"CREATE TEMP TABLE {name} AS SELECT *, row_number() OVER () - 1 AS {LINE} FROM read_csv("
        f"{quoted(path)}, columns = {{{types}}}, auto_detect = false, header = true, delim = "
        f"{quoted(separator)}, quote = {quoted(quote)}, escape = {quoted(quote)}, ignore_errors = true, "
        f"store_rejects = true, rejects_table = '{rejects}', rejects_scan = '{scans}')",
    )
    malformed = f"{name}_malformed"
    connection.execute(
        f"CREATE TEMP TABLE {malformed} AS SELECT {LINE}, reason, row, row_number() OVER (ORDER BY {LINE}) "
        f"AS before FROM (SELECT line::BIGINT AS {LINE}, 'malformed row: ' || "
        f"lower(any_value(error_type)::VARCHAR) AS reason, any_value(csv_line) AS row FROM {rejects} "
        "GROUP BY line)",
    )
    if not connection.execute(f"SELECT count(*) FROM {malformed}").fetchone()[0]:
        connection.execute(
            f"CREATE TEMP VIEW {name}_numbered AS SELECT * EXCLUDE ({LINE}), {LINE} + 2 AS {LINE} FROM {name}"
        )
        return f"{name}_numbered", None
    # The engine numbers the rows it keeps: add the malformed ones that stand before each.
    connection.execute(
        f"CREATE TEMP VIEW {name}_numbered AS SELECT r.* EXCLUDE ({LINE}), r.{LINE} + 2 + coalesce(m.before, 0) "
        f"AS {LINE} FROM {name} r ASOF LEFT JOIN {malformed} m ON r.{LINE} >= m.{LINE} - m.before - 1",
    )
    return f"{name}_numbered", malformed


def read_json_lines(connection: Any, path: Path, columns: Sequence[str]) -> tuple[str, str]:
    """One JSON object per line, the given keys as text (lists joined by a comma), into tables of a DuckDB connection.

    Returns the names of the tables of rows and of malformed rows (`line_in_file`, `reason`, `row`).
    """
    name = new_name()
    connection.execute(
        f"CREATE TEMP TABLE {name} AS SELECT json, row_number() OVER () AS {LINE} FROM read_json_objects("
        f"{quoted(path)}, format = 'newline_delimited', ignore_errors = true)",
    )
    fields = ", ".join(f"{_json_text(column)} AS {_identifier(column)}" for column in columns)
    good = "json IS NOT NULL AND json_type(json) = 'OBJECT'"
    connection.execute(f"CREATE TEMP VIEW {name}_rows AS SELECT {fields}, {LINE} FROM {name} WHERE {good}")
    connection.execute(
        f"CREATE TEMP VIEW {name}_malformed AS SELECT {LINE}, 'malformed row: no JSON object' AS reason, "
        f"coalesce(json::VARCHAR, '') AS row FROM {name} WHERE NOT coalesce({good}, false)",
    )
    return f"{name}_rows", f"{name}_malformed"


def _json_text(key: str) -> str:
    value = "json -> " + quoted("$." + json.dumps(key))
    text = "json ->> " + quoted("$." + json.dumps(key))
    return (
        f"CASE json_type({value}) WHEN 'ARRAY' THEN array_to_string(({value} ->> '$[*]'), ', ') "
        f"WHEN 'NULL' THEN NULL ELSE {text} END"
    )


def first_line(path: Path) -> str:
    """The first line of a text file, also of a compressed one, without its end and byte order mark."""
    return next(iter(first_lines(path, 1)), "")


def first_lines(path: Path, count: int) -> list[str]:
    """Up to `count` lines of a text file, also of a compressed one. Raises DataError where it cannot be read."""
    try:
        with open(path, "rb") as raw:
            stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline=None) as text:
                return [line.rstrip("\n") for line in itertools.islice(text, count)]
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def new_name() -> str:
    """A name that no table of this process has."""
    return f"cprec_{next(_numbers)}"


def quoted(value: str | Path) -> str:
    """A text literal of SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
