"""A domain in a database or warehouse that Ibis can reach: DuckDB files, PostgreSQL, BigQuery, Snowflake and others."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args
from urllib.parse import urlsplit

from cprec.data.sources.tables import (
    DEFAULT_NAMES,
    INTERACTION_FIELDS,
    ITEM_FIELDS,
    RawTable,
    SourceTables,
    TimeFormat,
    canonical_tables,
    check_names,
    find_columns,
)
from cprec.errors import ConfigError, DataError
from cprec.schema import ITEM_ID, TITLE, USER_ID

if TYPE_CHECKING:
    import pyarrow as pa

    from cprec.data.engine import TableEngine

EXTRAS = {"postgres": "postgres", "postgresql": "postgres"}
"""Kinds of connections that have an extra of this package; for others it is one of Ibis's."""

BATCH_ROWS = 1 << 16
"""Rows in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class ConnectionSource:
    """One domain in two tables, or two queries, of a database or warehouse."""

    domain: str
    """Name of the domain: letters, digits, _ - and dots."""
    platform: str = "default"
    """Users of one platform are the same people in all its domains."""
    url: str
    """What Ibis connects to, as duckdb://shop.db or postgres://user@host/database. $NAME is the environment variable of
    that name: write passwords so, because settings are recorded."""
    interactions: str
    """The log: a table, schema.table, or a query that begins with SELECT or WITH; one row per event."""
    items: str
    """The items and their titles: a table, schema.table, or a query."""
    columns: dict[str, str] = field(default_factory=dict)
    """Where canonical columns (user_id, item_id, timestamp, rating, order, title, brand, categories, description,
    price) have another name, as user_id:customer."""
    timestamps: TimeFormat = "auto"
    """seconds, milliseconds, iso (dates and timestamps of the database too), order, or auto."""

    def __post_init__(self) -> None:
        check_names(self.domain, self.platform)
        unknown = sorted(set(self.columns) - set(DEFAULT_NAMES))
        if unknown:
            raise ConfigError(f"columns maps {', '.join(unknown)}; canonical columns are {', '.join(DEFAULT_NAMES)}")
        if self.timestamps not in get_args(TimeFormat):
            raise ConfigError(f"timestamps={self.timestamps!r}: expected {', '.join(get_args(TimeFormat))}")
        if "://" not in self.url:
            raise ConfigError(
                f"url={self.url!r} is no address: write it as duckdb://shop.db or postgres://user@host/db"
            )
        if (password := urlsplit(self.url).password) and "$" not in password:
            raise ConfigError(
                "url holds a password, and settings are recorded: put it into an environment variable and write its "
                "name, as postgres://user:$PGPASSWORD@host/db"
            )

    def load(self, engine: TableEngine) -> SourceTables:
        """The rows of both tables, only the columns needed. Raises DataError for an unknown table or column."""
        from dataclasses import replace

        connection = self._connect()
        hashes: dict[str, str] = {}
        try:
            log = self._read(engine, connection, "interactions", self.interactions, INTERACTION_FIELDS, hashes)
            items = self._read(engine, connection, "items", self.items, ITEM_FIELDS, hashes)
        finally:
            connection.disconnect()
        tables = canonical_tables(engine, self.domain, log, items, self.columns, self.timestamps, items_in_log=False)
        return replace(tables, files=(), hashes=hashes)

    def fingerprints(self) -> dict[str, str | None]:
        """What the database says of the rows of each table: their number, and a sum over their hashes.

        A change of any value that is read changes it, another order of rows does not. It begins with the kind of hash
        and a colon: only those of one kind can be compared. None where the database has no such hash, or cannot be
        reached now.
        """
        tables = {"interactions": (self.interactions, INTERACTION_FIELDS), "items": (self.items, ITEM_FIELDS)}
        found: dict[str, str | None] = dict.fromkeys(tables)
        if self.url.partition("://")[0] not in _ROW_HASH:
            return found
        with warnings.catch_warnings():
            # As in `connect` of the engine: Ibis calls a method of DuckDB that DuckDB has renamed.
            warnings.filterwarnings("ignore", r"fetch_arrow_table\(\) is deprecated", DeprecationWarning)
            try:
                connection = self._connect()
            except (ConfigError, DataError):
                return found
            try:
                for table, (asked, fields) in tables.items():
                    found[table] = _fingerprint(connection, self._chosen(connection, table, asked, fields)[1])
            except DataError:  # there is no such table now
                pass
            finally:
                connection.disconnect()
        return found

    def _connect(self) -> Any:
        import ibis

        url = re.sub(r"\$\{?(\w+)\}?", self._variable, self.url)
        kind = self.url.partition("://")[0]
        if kind in ("duckdb", "sqlite"):  # both would make a file that is not there
            path = Path(url.partition("://")[2])
            if not path.is_file():
                raise DataError(f"{path} does not exist (url of domain {self.domain!r})")
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
                f"url of domain {self.domain!r}: {self.shown} cannot be reached: {_brief(error, url)}"
            ) from None

    def _variable(self, match: re.Match[str]) -> str:
        try:
            return os.environ[match[1]]
        except KeyError:
            raise ConfigError(f"url={self.url}: the environment has no variable {match[1]}") from None

    @property
    def shown(self) -> str:
        """The address without its options."""
        return self.url.partition("?")[0]

    def _read(
        self,
        engine: TableEngine,
        connection: Any,
        what: str,
        asked: str,
        fields: Sequence[str],
        hashes: dict[str, str],
    ) -> RawTable:
        """The columns needed of a table or query, numbered, with the engine."""
        import hashlib

        import ibis
        import pyarrow as pa

        from cprec.data.text_files import LINE

        place, expression = self._chosen(connection, what, asked, fields)
        columns = list(expression.columns)
        schema = pa.schema([*expression.schema().to_pyarrow(), pa.field(LINE, pa.int64())])
        digest = hashlib.sha256()

        def numbered() -> Iterator[pa.RecordBatch]:
            row = 0
            for batch in _batches(connection, expression):
                batch = pa.Table.from_batches([batch]).select(columns).cast(expression.schema().to_pyarrow())
                numbers = pa.array(range(row + 1, row + batch.num_rows + 1), pa.int64())
                row += batch.num_rows
                for part in batch.append_column(LINE, numbers).combine_chunks().to_batches():
                    digest.update(part.serialize())
                    yield part.replace_schema_metadata(None)

        try:
            rows = engine.from_batches(pa.RecordBatchReader.from_batches(schema, numbered()))
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{place} of domain {self.domain!r} cannot be read: {_brief(error, '')}") from None
        hashes[place] = digest.hexdigest()
        rows = rows.mutate(ibis.literal(place).name("source_file"), rows[LINE].name("sequence"))
        return RawTable(what, rows, tuple(columns), (), (Path(place),))

    def _chosen(self, connection: Any, what: str, asked: str, fields: Sequence[str]) -> tuple[str, Any]:
        """Where a table is, in words, and the columns of it that are read."""
        place = f"{self.shown}/{what}"
        table = self._table(connection, what, asked)
        raw = RawTable(what, table, tuple(table.columns), (), (Path(place),))
        required = (USER_ID, ITEM_ID) if what == "interactions" else (ITEM_ID, TITLE)
        columns = list(dict.fromkeys(find_columns(self.domain, raw, fields, self.columns, required).values()))
        return place, table.select(columns)

    def _table(self, connection: Any, what: str, asked: str) -> Any:
        try:
            if re.match(r"\s*(select|with)\b", asked, re.I):
                return _query(connection, f"cprec_{what}", asked.rstrip().rstrip(";"))
            schema, _, name = asked.rpartition(".")
            return connection.table(name, database=schema or None)
        except Exception as error:
            import difflib

            try:
                near = difflib.get_close_matches(asked.rpartition(".")[2], _tables(connection), n=3, cutoff=0.4)
            except Exception:
                near = []
            hint = f"; it has {', '.join(near)}" if near else ""
            raise DataError(
                f"{self.shown}: {what} of domain {self.domain!r}, {asked!r}, cannot be read{hint} ({_brief(error, '')})"
            ) from None


_ROW_HASH = {
    "sqlite": "cprec_hash({columns})",
    "duckdb": "hash(cprec_row)::HUGEINT",
    "postgres": "hashtextextended(cprec_row::text, 0)::NUMERIC",
    "postgresql": "hashtextextended(cprec_row::text, 0)::NUMERIC",
}
"""Kind of connection -> the hash of a whole row there, as a number that can be summed."""


def _fingerprint(connection: Any, expression: Any) -> str | None:
    """The number of rows of an expression and a sum over their hashes, made by the database; None where it cannot."""
    columns = ", ".join('"' + name.replace('"', '""') + '"' for name in expression.columns)
    row_hash = _ROW_HASH[connection.name].format(columns=columns)
    query = f"SELECT count(*), sum({row_hash}) FROM ({connection.compile(expression)}) cprec_row"
    if connection.name == "duckdb":
        import duckdb

        kind = f"DuckDB {duckdb.__version__}"  # its hash may be another one in the next version
        rows = connection.con.sql(query).fetchall()
    elif connection.name == "sqlite":
        kind = "SQLite"
        connection.con.create_function("cprec_hash", -1, _hash_values, deterministic=True)
        rows = connection.con.execute(query).fetchall()
    else:
        import psycopg

        kind = "PostgreSQL"
        try:
            with connection.con.cursor() as cursor:
                rows = cursor.execute(query).fetchall()
        except psycopg.Error:  # what speaks its protocol may lack the function
            return None
    [(number, total)] = rows
    return f"{kind}: {number} rows, {total or 0}"


def _hash_values(*values: Any) -> int:
    """A hash of a row for SQLite, which has none: of 32 bits, so that the sum over a table is no number too large."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=4).digest())


def _tables(connection: Any) -> list[str]:
    if connection.name == "duckdb":
        rows = connection.con.sql("SELECT table_name FROM information_schema.tables").fetchall()
        return [name for (name,) in rows]
    return list(connection.list_tables())


def _query(connection: Any, name: str, query: str) -> Any:
    """A query as a table. Where Ibis's own way fails with today's drivers, through a temporary view of this session."""
    if connection.name == "duckdb":
        connection.con.sql(f"CREATE TEMP VIEW {name} AS {query}")
    elif connection.name == "postgres":
        with connection.con.cursor() as cursor:
            cursor.execute(f"CREATE TEMP VIEW {name} AS {query}")
    else:
        return connection.sql(query)
    return connection.table(name)


def _batches(connection: Any, expression: Any) -> Iterator[pa.RecordBatch]:
    """The rows of an expression a batch at a time, asked for so that the database sends no more at once."""
    if connection.name == "duckdb":
        yield from connection.con.sql(connection.compile(expression)).to_arrow_reader(BATCH_ROWS)
    elif connection.name == "postgres":
        yield from _from_postgres(connection, expression)
    else:
        yield from connection.to_pyarrow_batches(expression, chunk_size=BATCH_ROWS)


def _from_postgres(connection: Any, expression: Any) -> Iterator[pa.RecordBatch]:
    """Through a cursor of the server: an ordinary one brings the whole result at once."""
    import pyarrow as pa

    schema = expression.schema().to_pyarrow()
    with connection.con.transaction(), connection.con.cursor(name="cprec") as cursor:
        cursor.itersize = BATCH_ROWS
        cursor.execute(connection.compile(expression))
        while rows := cursor.fetchmany(BATCH_ROWS):
            columns = zip(*rows, strict=True)
            yield pa.record_batch(
                [pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)], schema
            )


def _brief(error: Exception, secret: str) -> str:
    """The first line of an error, without the address that may hold a password."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].replace(secret, "...") if secret else lines[0]
