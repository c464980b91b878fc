"""Opens the table engine and reads files into it: the only file that knows which engine it is.

Everything above speaks Ibis, so that the same expressions can run elsewhere. The engine is DuckDB: embedded, out of
core, nothing to install or start.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cprec.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

ENGINES = ("duckdb",)

LINE = "line_in_file"
"""The column that readers add: where a row stands, counted from 1; the header of a delimited file is line 1."""

_numbers = itertools.count()


@contextmanager
def connect(engine: str = "duckdb", *, memory_limit: str | None = None, spill: Path | None = None) -> Iterator[Any]:
    """An Ibis connection while the block runs.

    `memory_limit` is as '8GB'; what exceeds it goes to temporary files in `spill`. Errors of the engine leave the block
    as DataError.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: expected {' or '.join(ENGINES)}")
    import ibis

    with warnings.catch_warnings():
        # Ibis calls a method of DuckDB that DuckDB has renamed; nothing that a user could act on.
        warnings.filterwarnings("ignore", message=r"fetch_arrow_table\(\) is deprecated", category=DeprecationWarning)
        connection = ibis.duckdb.connect()
        try:
            with translated_errors("the table engine"):
                if spill is not None:
                    _run(connection, f"SET temp_directory = {_quoted(spill)}")
                _set_memory_limit(connection, memory_limit)
                yield connection
        finally:
            connection.disconnect()


def _set_memory_limit(connection: Any, memory_limit: str | None) -> None:
    import duckdb

    if memory_limit is None:
        return
    try:
        _run(connection, f"SET memory_limit = {_quoted(memory_limit)}")
    except duckdb.Error:
        raise ConfigError(f"memory_limit={memory_limit!r}: write a size, as 8GB or 500MB") from None


@contextmanager
def translated_errors(what: str) -> Iterator[None]:
    """Turn the engine's errors into DataError: they concern a file, memory or disk."""
    import duckdb

    try:
        yield
    except duckdb.OutOfMemoryException as error:
        raise DataError(f"{what}: not enough memory or disk ({_first_line(error)}); raise memory_limit") from None
    except duckdb.Error as error:
        raise DataError(f"{what}: {_first_line(error)}") from None


def materialise(connection: Any, expression: Any) -> Any:
    """Compute an expression once; the result is a table that spills to disk where memory is short."""
    return connection.create_table(_name(), expression, temp=True)


def discard(connection: Any, table: Any) -> None:
    """Drop a table that `materialise` made."""
    _run(connection, f"DROP TABLE {table.get_name()}")


def from_arrow(connection: Any, table: pa.Table) -> Any:
    """An Arrow table, seen by the engine without a copy."""
    name = _name()
    connection.con.register(name, table)
    return connection.table(name)


def read_parquet(connection: Any, path: Path) -> Any:
    """A Parquet file with its row numbers."""
    import ibis

    with translated_errors(str(path)):
        table = connection.read_parquet(str(path), table_name=_name(), file_row_number=True)
    return table.mutate((ibis._.file_row_number + 1).name(LINE)).drop("file_row_number")


def read_delimited(
    connection: Any, path: Path, columns: Sequence[str], *, separator: str, quote: str
) -> tuple[Any, Any | None]:
    """A delimited text file with a header line, every column as text: (rows, malformed rows).

    Rows with too few or too many fields, open quotes or bytes that are not UTF-8 are set aside: the second table has
    columns `line_in_file`, `reason` and `row`; it is None where there are none.
    """
    name, rejects, scans = _name(), _name(), _name()
    types = ", ".join(f"{_quoted(column)}: 'VARCHAR'" for column in columns)
    with translated_errors(str(path)):
        _run(
            connection,
            f"CREATE TEMP TABLE {name} AS SELECT *, row_number() OVER () - 1 AS {LINE} FROM read_csv("
            f"{_quoted(path)}, columns = {{{types}}}, auto_detect = false, header = true, delim = "
            f"{_quoted(separator)}, "
            f"quote = {_quoted(quote)}, escape = {_quoted(quote)}, ignore_errors = true, store_rejects = true, "
            f"rejects_table = '{rejects}', rejects_scan = '{scans}')",
        )
        malformed = f"{name}_malformed"
        _run(
            connection,
            f"CREATE TEMP TABLE {malformed} AS SELECT {LINE}, reason, row, row_number() OVER (ORDER BY {LINE}) AS "
            f"before "
            f"FROM (SELECT line::BIGINT AS {LINE}, 'malformed row: ' || lower(any_value(error_type)::VARCHAR) AS "
            f"reason, "
            f"any_value(csv_line) AS row FROM {rejects} GROUP BY line)",
        )
    rows = connection.table(name)
    if not _run(connection, f"SELECT count(*) FROM {malformed}")[0][0]:
        return rows.mutate((rows[LINE] + 2).name(LINE)), None
    # The engine numbers the rows it keeps: add the malformed ones that stand before each.
    _run(
        connection,
        f"CREATE TEMP VIEW {name}_numbered AS SELECT r.* EXCLUDE ({LINE}), r.{LINE} + 2 + coalesce(m.before, 0) AS "
        f"{LINE} "
        f"FROM {name} r ASOF LEFT JOIN {malformed} m ON r.{LINE} >= m.{LINE} - m.before - 1",
    )
    return connection.table(f"{name}_numbered"), connection.table(malformed).drop("before")


def read_json_lines(connection: Any, path: Path, columns: Sequence[str]) -> tuple[Any, Any | None]:
    """One JSON object per line, the given keys as text (lists of text joined by a comma): (rows, malformed rows)."""
    name = _name()
    with translated_errors(str(path)):
        _run(
            connection,
            f"CREATE TEMP TABLE {name} AS SELECT json, row_number() OVER () AS {LINE} FROM read_json_objects("
            f"{_quoted(path)}, format = 'newline_delimited', ignore_errors = true)",
        )
    fields = ", ".join(f"{_json_text(column)} AS {_identifier(column)}" for column in columns)
    good = "json IS NOT NULL AND json_type(json) = 'OBJECT'"
    _run(connection, f"CREATE TEMP VIEW {name}_rows AS SELECT {fields}, {LINE} FROM {name} WHERE {good}")
    _run(
        connection,
        f"CREATE TEMP VIEW {name}_malformed AS SELECT {LINE}, 'malformed row: no JSON object' AS reason, "
        f"coalesce(json::VARCHAR, '') AS row FROM {name} WHERE NOT coalesce({good}, false)",
    )
    return connection.table(f"{name}_rows"), connection.table(f"{name}_malformed")


def _json_text(key: str) -> str:
    value = "json -> " + _quoted("$." + json.dumps(key))
    text = "json ->> " + _quoted("$." + json.dumps(key))
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


def write_parquet(connection: Any, expression: Any, path: Path) -> None:
    """Write an expression to one Parquet file, in its order of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection.to_parquet(expression, str(path), compression="zstd")


def _run(connection: Any, sql: str) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = connection.con.execute(sql).fetchall()
    return rows


def _name() -> str:
    return f"cprec_{next(_numbers)}"


def _quoted(value: str | Path) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def _identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
