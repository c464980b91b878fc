"""Reads delimited text and JSON lines with DuckDB, counting every row: each is kept, or set aside with a reason."""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cprec.errors import DataError

LINE = "line_in_file"
"""The column that readers add: where a row stands, counted from 1; the header of a delimited file is line 1."""

MAX_LINE = 1 << 22
"""Bytes of a row at most."""

SHOWN = 1000
"""Characters of a malformed row that are kept."""

_numbers = itertools.count()


def read_delimited(
    connection: Any,
    path: Path,
    columns: Sequence[str],
    separator: str,
    quote: str,
    *,
    header: bool = True,
    encoding: str = "utf-8",
) -> tuple[str, str | None]:
    """A delimited text file, every column as text, into tables of a DuckDB connection; `encoding` utf-8 or latin-1.

    Returns the name of the table of rows, and of the table of malformed rows (too few or too many fields, text after a
    closing quote, bytes of another encoding, more than `MAX_LINE` bytes) with columns `line_in_file`, `reason` and
    `row`; None where there are none. Lines without any character are no rows. `line_in_file` is where a row begins.

    Raises DataError for a file of another encoding as a whole, one that ends too early, and a quote that is opened and
    never closed.
    """
    check_encoding(path)
    name, rejects, scans = new_name(), new_name(), new_name()
    types = ", ".join(f"{quoted(column)}: 'VARCHAR'" for column in columns)
    try:
        connection.execute(
            f"CREATE TEMP TABLE {name} AS SELECT *, row_number() OVER () - 1 AS {LINE} FROM read_csv({quoted(path)}, "
            f"columns = {{{types}}}, auto_detect = false, header = {str(header).lower()}, delim = {quoted(separator)}, "
            f"quote = {quoted(quote)}, escape = {quoted(quote)}, encoding = {quoted(encoding)}, ignore_errors = true, "
            f"max_line_size = {MAX_LINE}, buffer_size = {16 * MAX_LINE}, store_rejects = true, rejects_limit = 0, "
            f"rejects_table = '{rejects}', rejects_scan = '{scans}')",
        )
    except Exception as error:
        raise _explained(path, error) from None
    malformed = f"{name}_malformed"
    connection.execute(
        f"CREATE TEMP TABLE {malformed} AS SELECT {LINE}, reason, row, row_number() OVER (ORDER BY {LINE}) "
        f"AS before FROM (SELECT line::BIGINT AS {LINE}, 'malformed row: ' || "
        f"lower(min(error_type)::VARCHAR) AS reason, any_value(csv_line)[:{SHOWN}] AS row FROM {rejects} "
        "GROUP BY line)",
    )
    swallowed = connection.execute(
        f"SELECT line, csv_line FROM {rejects} WHERE error_type = 'UNQUOTED VALUE' AND contains(csv_line, chr(10)) "
        "ORDER BY line LIMIT 1"
    ).fetchall()
    for line, text in swallowed:
        raise DataError(
            f"{path}, line {line}: a quote ({quote}) opens a field here and is not closed where a field ends, "
            f"so that {text.count(chr(10)):,} more lines would belong to it: {text[:80]!r}. Correct the line, or set "
            'quote="" if quotes are ordinary characters in this file'
        )
    num_rows, num_bad = (
        connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0] for table in (name, malformed)
    )
    first = 2 if header else 1
    # DuckDB counts records. Where every record is a line, the two agree; else the lines are found one by one.
    if num_rows + num_bad == _count_lines(path) - (first - 1):
        _number_records(connection, name, malformed if num_bad else None, first)
    else:
        _number_lines(connection, path, name, malformed, separator, quote, encoding, header)
    return f"{name}_numbered", malformed if num_bad else None


def _explained(path: Path, error: Exception) -> DataError:
    """What DuckDB says of a file that it gave up, and what to do."""
    first = str(error).strip().splitlines()[0]
    if "GZIP" in first.upper():
        return DataError(f"{path} ends too early or is damaged ({first}): fetch or write it again; nothing was used")
    if "state machine" in first:
        return DataError(
            f"{path} mixes ends of lines (some \\n, some \\r\\n), so rows cannot be told apart safely: convert it, "
            f"with `sed -i 's/\\r$//' {path.name}`, say"
        )
    return DataError(f"{path} cannot be read: {first}")


def check_encoding(path: Path) -> None:
    """Raise DataError for a file that begins as UTF-16 or UTF-32, or is compressed though its name does not say so."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or start in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        raise DataError(f"{path} is UTF-16 or UTF-32: save it as UTF-8, with `iconv -f utf-16 -t utf-8`, say")
    is_gzip, is_named = start[:2] == b"\x1f\x8b", path.suffix.lower() == ".gz"
    if is_gzip and not is_named:
        raise DataError(f"{path} is compressed with gzip, but its name does not end in .gz: rename it")
    if is_named and not is_gzip:
        raise DataError(f"{path} is named .gz but is not compressed with gzip: rename it, or fetch it again")
    for mark, kind in ((b"PAR1", "Parquet"), (b"PK\3\4", "a zip archive"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if start == mark:
            raise DataError(f"{path} is no text but {kind}: give it the suffix of what it is, or unpack it")


def _count_lines(path: Path) -> int:
    """Lines with at least one character that ends them or stands in them."""
    count, last = 0, b""
    for block in _blocks(path):
        count += block.count(b"\n")
        last = block
    return count + (1 if last and not last.endswith(b"\n") else 0)


def _blocks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    with open(path, "rb") as raw:
        stream: Any = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
        while block := stream.read(size):
            yield block


def _number_records(connection: Any, name: str, malformed: str | None, first: int) -> None:
    """A view of the rows with the number of their line, where each record is a line."""
    if malformed is None:
        connection.execute(
            f"CREATE TEMP VIEW {name}_numbered AS SELECT * EXCLUDE ({LINE}), {LINE} + {first} AS {LINE} FROM {name}"
        )
        return
    # The engine numbers the rows it keeps: add the malformed ones that stand before each.
    connection.execute(
        f"CREATE TEMP VIEW {name}_numbered AS SELECT r.* EXCLUDE ({LINE}), r.{LINE} + {first} + coalesce(m.before, 0) "
        f"AS {LINE} FROM {name} r ASOF LEFT JOIN (SELECT {LINE} - before - {first - 1} AS upto, max(before) AS before "
        f"FROM {malformed} GROUP BY ALL) m ON r.{LINE} >= m.upto",
    )


def _number_lines(
    connection: Any,
    path: Path,
    name: str,
    malformed: str,
    separator: str,
    quote: str,
    encoding: str,
    header: bool,
) -> None:
    """A view of the rows with the number of the line where each begins, found by reading the file once more."""
    import pyarrow as pa

    starts = list(_record_starts(path, quote, encoding))[int(header) :]
    first = 2 if header else 1
    table = pa.table({"record": pa.array(range(first, len(starts) + first), pa.int64()), "start": starts})
    lines = new_name()
    connection.register(lines, table)
    _number_records(connection, name, malformed, first)
    connection.execute(f"ALTER VIEW {name}_numbered RENAME TO {name}_records")
    # A record that this reading does not find keeps its number: the two agree but for broken quotes.
    connection.execute(
        f"CREATE TEMP TABLE {name}_numbered AS SELECT r.* EXCLUDE ({LINE}), coalesce(l.start, r.{LINE}) AS {LINE} "
        f"FROM {name}_records r LEFT JOIN {lines} l ON r.{LINE} = l.record"
    )
    connection.execute(f"UPDATE {malformed} SET {LINE} = l.start FROM {lines} l WHERE {malformed}.{LINE} = l.record")


def _record_starts(path: Path, quote: str, encoding: str) -> Iterator[int]:
    """The line where each record that is not empty begins; a line end inside quotes does not end a record."""
    mark = quote.encode(encoding)
    is_open, start = False, 1
    for number, line in enumerate(_lines(path), start=1):
        if not is_open:
            if not line.rstrip(b"\r\n"):
                continue
            start = number
        if mark and line.count(mark) % 2:
            is_open = not is_open
        if not is_open:
            yield start
    if is_open:
        yield start


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as raw:
        yield from gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw


def read_json_lines(connection: Any, path: Path, columns: Sequence[str]) -> tuple[str, str]:
    """One JSON object per line, the given keys as text (lists joined by a comma), into tables of a DuckDB connection.

    Returns the names of the tables of rows and of malformed rows (`line_in_file`, `reason`, `row`).
    """
    # A unit separator cannot stand in JSON, so each line is one field.
    lines, bad = read_delimited(connection, path, ["json"], "\x1f", "", header=False)
    name = new_name()
    fields = ", ".join(f"{_json_text(column)} AS {_identifier(column)}" for column in columns)
    connection.execute(
        f"CREATE TEMP TABLE {name} AS SELECT {LINE}, json AS line, "
        f"CASE WHEN json_valid(json) THEN CASE WHEN json_type(json) = 'OBJECT' THEN json::JSON END END AS json "
        f"FROM {lines} WHERE trim(json, chr(32) || chr(9) || chr(13)) <> ''"
    )
    connection.execute(f"CREATE TEMP VIEW {name}_rows AS SELECT {fields}, {LINE} FROM {name} WHERE json IS NOT NULL")
    more = f"UNION ALL SELECT {LINE}, reason, row FROM {bad}" if bad else ""
    connection.execute(
        f"CREATE TEMP VIEW {name}_malformed AS SELECT {LINE}, 'malformed row: no JSON object' AS reason, "
        f"line[:{SHOWN}] AS row FROM {name} WHERE json IS NULL {more}",
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
    check_encoding(path)
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
