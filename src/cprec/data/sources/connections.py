"""A domain in a database or warehouse that Ibis can reach: DuckDB files, PostgreSQL, BigQuery, Snowflake and others."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pyarrow as pa
from ibis.backends.sql.datatypes import PostgresType
from ibis.common.exceptions import TableNotFound
from sqlglot import TokenType, exp, maybe_parse, parse_one, tokenize
from sqlglot.errors import SqlglotError

from cprec.data.config import INTERACTION_FIELDS, ITEM_FIELDS, ConnectionSource
from cprec.data.engine import TableEngine
from cprec.data.sources.columns import find_columns
from cprec.data.sources.raw import RawTable
from cprec.data.sources.tables import SourceTables, canonical_tables
from cprec.data.text_files import LINE
from cprec.errors import ConfigError, DataError
from cprec.schema import ITEM_ID, TITLE, USER_ID

EXTRAS = {"postgres": "postgres", "postgresql": "postgres"}
"""Kinds of connections that have an extra of this package; for others it is one of Ibis's."""

BATCH_ROWS = 1 << 16
"""Rows in memory at a time."""


def load(engine: TableEngine, source: ConnectionSource) -> SourceTables:
    """The rows of both tables, only the columns needed. Raises DataError for an unknown table or column."""
    connection = _connect(source)
    hashes: dict[str, str] = {}
    try:
        log = _read(engine, source, connection, "interactions", source.interactions, INTERACTION_FIELDS, hashes)
        items = _read(engine, source, connection, "items", source.items, ITEM_FIELDS, hashes)
    finally:
        connection.disconnect()
    tables = canonical_tables(engine, source.domain, log, items, source.columns, source.timestamps)
    return replace(tables, files=(), hashes=hashes)


def fingerprints(source: ConnectionSource, file_hash: Callable[[Path], str]) -> dict[str, str | DataError | None]:
    """A text for each table that changes when its rows change. It begins with its kind and a colon; only texts of one
    kind can be compared.

    DuckDB and PostgreSQL give the number of the rows that are read, and a sum over their hashes: a change of any
    value that is read changes it, another order of rows does not. SQLite has no hash: there it is that of the file, by
    `file_hash`. Any other database gives None, and a table that cannot be read gives the error.

    Raises DataError or ConfigError where the database cannot be reached.
    """
    tables = {"interactions": (source.interactions, INTERACTION_FIELDS), "items": (source.items, ITEM_FIELDS)}
    found: dict[str, str | DataError | None] = dict.fromkeys(tables)
    kind = source.url.partition("://")[0]
    if kind == "sqlite":
        path = _file(_address(source))
        try:
            return dict.fromkeys(tables, _sqlite_fingerprint(path, file_hash))
        except OSError as error:
            return dict.fromkeys(tables, DataError(_brief(error, "")))
    if kind not in _ROW_HASH:
        return found
    with warnings.catch_warnings():
        # As in `connect` of the engine: Ibis calls a method of DuckDB that DuckDB has renamed.
        warnings.filterwarnings("ignore", r"fetch_arrow_table\(\) is deprecated", DeprecationWarning)
        connection = _connect(source)
        try:
            for table, (asked, fields) in tables.items():
                try:
                    _, rows, _, places = _chosen(source, connection, table, asked, fields)
                    found[table] = _fingerprint(connection, rows.query(places))
                except Exception as error:  # of a table, a column or a value
                    found[table] = DataError(_brief(error, ""))
        finally:
            connection.disconnect()
    return found


def _address(source: ConnectionSource) -> str:
    """The address with its variables filled in. Raises DataError where it names a file that is not there."""
    url = re.sub(r"\$\{?(\w+)\}?", partial(_variable, source), source.url)
    if source.url.partition("://")[0] in ("duckdb", "sqlite") and not _file(url).is_file():  # both would make one
        raise DataError(f"{_file(url)} does not exist (url of domain {source.domain!r})")
    return url


def _connect(source: ConnectionSource) -> Any:
    url = _address(source)
    kind = source.url.partition("://")[0]
    if kind == "duckdb":
        url += "?read_only=True"
    try:
        return ibis.connect(url)
    except ImportError as error:
        extra = EXTRAS.get(kind)
        fix = f"cprec[{extra}]" if extra else f"ibis-framework[{kind}]"
        raise ConfigError(f"{kind}:// needs more packages ({error}): pip install '{fix}'") from None
    except Exception as error:
        raise DataError(
            f"url of domain {source.domain!r}: {source.shown} cannot be reached: {_brief(error, url)}"
        ) from None


def _variable(source: ConnectionSource, match: re.Match[str]) -> str:
    try:
        return os.environ[match[1]]
    except KeyError:
        raise ConfigError(f"url={source.url}: the environment has no variable {match[1]}") from None


def _read(
    engine: TableEngine,
    source: ConnectionSource,
    connection: Any,
    what: str,
    asked: str,
    fields: Sequence[str],
    hashes: dict[str, str],
) -> RawTable:
    """The columns that are needed of a table or query, copied into the engine, with the number of each row."""
    place, found, columns, places = _chosen(source, connection, what, asked, fields)
    schema = pa.schema([pa.field(name, found.schema.field(at).type) for name, at in zip(columns, places, strict=True)])
    digest = hashlib.sha256()

    def numbered() -> Iterator[pa.RecordBatch]:
        row = 0
        for batch in found.batches(places):
            # The database may have other names.
            table = pa.Table.from_batches([batch]).rename_columns(columns).cast(schema)
            numbers = pa.array(range(row + 1, row + table.num_rows + 1), pa.int64())
            row += table.num_rows
            for part in table.append_column(LINE, numbers).combine_chunks().to_batches():
                digest.update(part.serialize())
                yield part.replace_schema_metadata(None)

    try:
        lined = schema.append(pa.field(LINE, pa.int64()))
        rows = engine.from_batches(pa.RecordBatchReader.from_batches(lined, numbered()))
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{place} of domain {source.domain!r} cannot be read: {_brief(error, '')}") from None
    hashes[place] = digest.hexdigest()
    rows = rows.mutate(ibis.literal(place).name("source_file"), rows[LINE].name("sequence"))
    return RawTable(what, rows, tuple(columns), (), (Path(place),))


def _chosen(
    source: ConnectionSource, connection: Any, what: str, asked: str, fields: Sequence[str]
) -> tuple[str, _Rows, list[str], list[int]]:
    """A table's name in messages, its rows, and the names and places of the columns that are read."""
    place = f"{source.shown}/{source.domain}/{what}"  # several domains may share the address
    found = _open(source, connection, what, asked)
    raw = RawTable(what, None, tuple(found.schema.names), (), (Path(place),))
    required = (USER_ID, ITEM_ID) if what == "interactions" else (ITEM_ID, TITLE)
    columns = list(dict.fromkeys(find_columns(source.domain, raw, fields, source.columns, required).values()))
    if alike := sorted(name for name in columns if [other.lower() for other in columns].count(name.lower()) > 1):
        raise DataError(
            f"{place}: columns {' and '.join(map(repr, alike))} of domain {source.domain!r} differ in upper and "
            "lower case alone: give one of them another name in a query"
        )
    return place, found, columns, [raw.columns.index(name) for name in columns]


def _open(source: ConnectionSource, connection: Any, what: str, asked: str) -> _Rows:
    """The rows of a table, where `asked` is a name or the database has a table of that name; else of a query."""
    hint = ""
    try:
        name = _name(connection, asked)
        if name is None and not _is_query(connection, asked):
            schema, _, last = asked.rpartition(".")
            with suppress(Exception):  # a name with signs that have no place in one, as my-table
                return _of_table(connection, connection.table(last, database=schema or None))
        if name is None:
            return _of_query(connection, _statement(connection, asked))
        try:
            return _of_table(connection, _table(connection, name))
        except _Ambiguous:
            raise
        except Exception:
            with suppress(Exception):
                near = difflib.get_close_matches(name[-1], _tables(connection), n=3, cutoff=0.4)
                hint = f"; it has {', '.join(near)}" if near else ""
            raise
    except Exception as error:
        raise DataError(
            f"{source.shown}: {what} of domain {source.domain!r}, {asked!r}, cannot be read{hint} ({_brief(error, '')})"
        ) from None


_ROW_HASH = {
    "duckdb": "hash(cprec_row)::HUGEINT",
    "postgres": "hashtextextended(cprec_row::text, 0)::NUMERIC",
    "postgresql": "hashtextextended(cprec_row::text, 0)::NUMERIC",
}
"""Kind of connection -> the hash of a whole row there, as a number that can be summed."""


def _fingerprint(connection: Any, query: str) -> str:
    """The number of rows of a query and a sum over their hashes, made by the database."""
    query = f"SELECT count(*), sum({_ROW_HASH[connection.name]}) FROM (\n{query}\n) cprec_row"
    if connection.name == "duckdb":
        kind = f"DuckDB {duckdb.__version__}"  # its hash may be another one in the next version
        rows = connection.con.sql(query).fetchall()
    else:
        kind = "PostgreSQL"
        with connection.con.transaction(), connection.con.cursor() as cursor:
            rows = cursor.execute(query).fetchall()
    [(number, total)] = rows
    return f"{kind}: {number} rows, {total or 0}"


def _sqlite_fingerprint(path: Path, file_hash: Callable[[Path], str]) -> str:
    """The hash of a SQLite file, and of the log beside it where that has changes not yet in the file.

    With a log the fingerprint is of another kind: the program that closes the file last moves the changes into it,
    which alters both files and no row.
    """
    log = path.with_name(f"{path.name}-wal")
    if log.is_file() and log.stat().st_size:
        return f"SQLite file with changes in {log.name}: {file_hash(path)} {file_hash(log)}"
    return f"SQLite file: {file_hash(path)}"


def _file(url: str) -> Path:
    return Path(url.partition("://")[2])


# ---- names and queries -----------------------------------------------------------------------------------------------


class _Ambiguous(Exception):
    """Several names are meant."""


def _name(connection: Any, asked: str) -> tuple[str, ...] | None:
    """The parts of a table's name, as the database writes names: catalog, schema and table, or fewer; None of a query.

    A name may have quotes, and comments and a semicolon around it.
    """
    try:
        table = maybe_parse(asked, into=exp.Table, dialect=connection.dialect)
    except SqlglotError:
        return None
    is_name = isinstance(table.this, exp.Identifier) and not table.alias and not table.args.get("joins")
    return tuple(part for part in (table.catalog, table.db, table.name) if part) if is_name else None


def _is_query(connection: Any, asked: str) -> bool:
    """Whether the text reads as a query; a form that only this one database knows cannot be told."""
    try:
        return isinstance(parse_one(asked, dialect=connection.dialect), (exp.Query, exp.Values, exp.Pivot))
    except SqlglotError:
        return False


def _statement(connection: Any, asked: str) -> str:
    """The one statement of a query, without comments and semicolons before and after it."""
    try:
        tokens = tokenize(asked, dialect=connection.dialect)
    except SqlglotError:
        return asked.strip().rstrip(";")
    while tokens and tokens[-1].token_type == TokenType.SEMICOLON:
        tokens.pop()
    if not tokens or any(token.token_type == TokenType.SEMICOLON for token in tokens):
        raise ValueError("it holds no statement, or several; give one query")
    return asked[tokens[0].start : tokens[-1].end + 1]


def _table(connection: Any, name: tuple[str, ...]) -> Any:
    """A table by its name; where there is none exactly so, by the one that differs in upper and lower case alone."""
    *place, last = name
    database: Any = tuple(place) if len(place) > 1 else place[0] if place else None
    try:
        return connection.table(last, database=database)
    except Exception as error:
        if connection.name == "duckdb":  # finds names in any case by itself
            raise
        try:
            if place and (folded := _folded(place[-1], connection.list_databases())):
                database = (*place[:-1], folded) if len(place) > 1 else folded
            found = _folded(last, connection.list_tables(database=database))
        except _Ambiguous:
            raise
        except Exception:
            found = None
        if found is None:
            raise error from None
        return connection.table(found, database=database)


def _folded(name: str, names: Sequence[str]) -> str | None:
    """The one of some names that is `name` but for upper and lower case, None where there is none."""
    found = [other for other in names if other.lower() == name.lower()]
    if len(found) > 1 and name not in found:
        raise _Ambiguous(f"{' and '.join(map(repr, sorted(found)))} are there: write the one that is meant")
    return name if name in found else next(iter(found), None)


def _tables(connection: Any) -> list[str]:
    if connection.name == "duckdb":
        rows = connection.con.sql("SELECT table_name FROM information_schema.tables").fetchall()
        return [name for (name,) in rows]
    return list(connection.list_tables())


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """The rows of a table or a query."""

    schema: pa.Schema
    """All its columns; a query may give several the same name."""
    batches: Callable[[Sequence[int]], Iterator[pa.RecordBatch]]
    """The columns at some places, in batches, asked for so that the database sends no more at once."""
    query: Callable[[Sequence[int]], str]
    """The query of these columns, as the database takes it."""


def _of_table(connection: Any, table: Any) -> _Rows:
    def query(places: Sequence[int]) -> str:
        return str(connection.compile(table.select([table[place] for place in places])))

    def batches(places: Sequence[int]) -> Iterator[pa.RecordBatch]:
        expression = table.select([table[place] for place in places])
        if connection.name == "duckdb":
            yield from connection.con.sql(query(places)).to_arrow_reader(BATCH_ROWS)
        elif connection.name == "postgres":
            yield from _from_postgres(connection, query(places), expression.schema().to_pyarrow())
        else:
            yield from connection.to_pyarrow_batches(expression, chunk_size=BATCH_ROWS)

    return _Rows(table.schema().to_pyarrow(), batches, query)


def _of_query(connection: Any, query: str) -> _Rows:
    """A query, handed over as it is where Ibis's own way takes fewer, or fails with today's drivers."""
    if connection.name == "duckdb":
        return _of_duckdb(connection.con, query)
    if connection.name == "postgres":
        return _of_postgres(connection, query)
    return _of_table(connection, connection.sql(query))


def _of_duckdb(connection: Any, query: str) -> _Rows:
    relation = connection.sql(query)
    if relation is None:
        raise ValueError("it gives no rows")
    types = [
        field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        for field in relation.limit(0).to_arrow_table().schema
    ]
    schema = pa.schema([pa.field(name, kind) for name, kind in zip(relation.columns, types, strict=True)])

    def numbered(places: Sequence[int]) -> str:
        return ", ".join(f"#{place + 1}" for place in places)

    def batches(places: Sequence[int]) -> Iterator[pa.RecordBatch]:
        yield from relation.project(numbered(places)).to_arrow_reader(BATCH_ROWS)

    return _Rows(schema, batches, lambda places: relation.project(numbered(places)).sql_query())


def _of_postgres(connection: Any, query: str) -> _Rows:
    with connection.con.transaction(), connection.con.cursor() as cursor:
        cursor.execute(f"SELECT * FROM (\n{query}\n) AS asked LIMIT 0")
        names = [column.name for column in cursor.description]
        kinds = [(cursor.pgresult.ftype(place), cursor.pgresult.fmod(place)) for place in range(len(names))]
        spelt = [cursor.execute("SELECT format_type(%s, %s)", kind).fetchone()[0] for kind in kinds]
    types = [ibis.schema({"column": PostgresType.from_string(kind)}).to_pyarrow().field(0).type for kind in spelt]

    def chosen(places: Sequence[int]) -> str:
        numbered = ", ".join(f"c{place}" for place in range(len(names)))
        wanted = ", ".join(f"c{place}" for place in places)
        return f"SELECT {wanted} FROM (\n{query}\n) AS asked({numbered})"

    def batches(places: Sequence[int]) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([(f"c{place}", types[place]) for place in places])
        yield from _from_postgres(connection, chosen(places), schema)

    return _Rows(pa.schema([pa.field(name, kind) for name, kind in zip(names, types, strict=True)]), batches, chosen)


def _from_postgres(connection: Any, query: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Through a cursor of the server: an ordinary one brings the whole result at once."""
    with connection.con.transaction(), connection.con.cursor(name="cprec") as cursor:
        cursor.itersize = BATCH_ROWS
        cursor.execute(query)
        while rows := cursor.fetchmany(BATCH_ROWS):
            columns = zip(*rows, strict=True)
            yield pa.record_batch(
                [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)], schema
            )


def _brief(error: Exception, secret: str) -> str:
    """The first line of an error, without the address that may hold a password."""
    if isinstance(error, TableNotFound):  # it says the name alone
        return "there is no such table"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].replace(secret, "...") if secret else lines[0]
