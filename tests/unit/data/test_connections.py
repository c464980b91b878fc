"""Domains in databases: a DuckDB file, and a PostgreSQL server that these tests start themselves."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from cprec.data.build import build_dataset
from cprec.data.config import ConnectionSource, Rules, TableSource
from cprec.data.engine import connect
from cprec.data.sources.connections import fingerprints, load
from cprec.errors import ConfigError, DataError
from cprec.provenance import file_sha256
from cprec.schema import TIMESTAMP

LOG = [(f"u{n % 7}", f"i{n % 5}", 1_406_116_800 + 60 * n, float(n % 5)) for n in range(300)]
ITEMS = [(f"i{n}", f"Title, the {n}th", "Acme" if n else None) for n in range(5)]


@pytest.fixture
def from_files(tmp_path: Path) -> Path:
    """The data set that the same rows give when they come from files."""
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,timestamp,rating\n" + "".join(f"{u},{i},{t},{r}\n" for u, i, t, r in LOG)
    )
    (tmp_path / "items.csv").write_text(
        "item_id,title,brand\n" + "".join(f'{i},"{title}",{brand or ""}\n' for i, title, brand in ITEMS)
    )
    source = TableSource(
        domain="toys", interactions=str(tmp_path / "log.csv"), items=str(tmp_path / "items.csv"), timestamps="seconds"
    )
    return build_dataset([source], tmp_path / "files", Rules())


def tables(folder: Path) -> list[Any]:
    return [pq.read_table(folder / name).to_pylist() for name in ("items", "interactions")]


# ---- DuckDB ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DuckDB file, which no test changes."""
    path = tmp_path_factory.mktemp("shop") / "shop.db"
    with duckdb.connect(str(path)) as connection:
        connection.execute(
            "CREATE TABLE events (customer TEXT, item_id TEXT, happened BIGINT, rating DOUBLE, secret TEXT)"
        )
        connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, 'x')", LOG)
        connection.execute("CREATE SCHEMA stock")
        connection.execute("CREATE TABLE stock.items (item_id TEXT, title TEXT, brand TEXT)")
        connection.executemany("INSERT INTO stock.items VALUES (?, ?, ?)", ITEMS)
    return path


@pytest.fixture
def database(shop: Path, tmp_path: Path) -> str:
    return f"duckdb://{shutil.copy(shop, tmp_path)}"


def source(url: str, interactions: str = "events", items: str = "stock.items", **settings: Any) -> ConnectionSource:
    columns = {"user_id": "customer", "timestamp": "happened"}
    return ConnectionSource(
        domain="toys", url=url, interactions=interactions, items=items, **{"columns": columns, **settings}
    )


@pytest.mark.slow
def test_tables_and_queries_of_duckdb_give_what_files_give(database: str, from_files: Path, tmp_path: Path) -> None:
    queries = ("events", "SELECT * FROM events;", " with e as (select * from events) select * from e")
    for number, log in enumerate(queries):
        folder = build_dataset([source(database, log)], tmp_path / f"data{number}", Rules())
        assert tables(folder) == tables(from_files)
    manifest = json.loads((folder / "dataset.json").read_text())
    assert [entry["table"] for entry in manifest["sources"]] == ["interactions", "items"]
    assert all(len(entry["sha256"]) == 64 for entry in manifest["sources"])
    again = json.loads((tmp_path / "data0" / "dataset.json").read_text())
    assert again["sources"] == manifest["sources"], "the hash is of the rows"


def test_a_fingerprint_is_of_the_rows_that_are_read(database: str) -> None:
    query = "SELECT * FROM events WHERE rating > 0"
    before = fingerprints(source(database, query), file_sha256)
    assert before["interactions"] and ": 240 rows, " in before["interactions"]

    def after(statement: str) -> list[str]:
        with duckdb.connect(database.removeprefix("duckdb://")) as connection:
            connection.execute(statement)
        now = fingerprints(source(database, query), file_sha256)
        return [table for table in before if now[table] != before[table]]

    assert after("UPDATE events SET secret = 'y'") == []
    assert after("CREATE OR REPLACE TABLE events AS FROM events ORDER BY rating DESC") == []
    assert after("DELETE FROM events WHERE rating = 0") == []
    assert after("UPDATE stock.items SET brand = NULL") == ["items"]
    assert after("INSERT INTO events FROM events LIMIT 1") == ["interactions", "items"]
    query = "SELECT customer AS t, item_id, happened FROM events"  # in SQL a column t comes before a table t
    renamed = {"user_id": "t", "timestamp": "happened"}
    before = fingerprints(source(database, query, columns=renamed), file_sha256)
    with duckdb.connect(database.removeprefix("duckdb://")) as connection:
        connection.execute("UPDATE events SET happened = happened + 1")
    now = fingerprints(source(database, query, columns=renamed), file_sha256)
    assert now["interactions"] != before["interactions"] and now["items"] == before["items"]
    for url in ("duckdb:///no/such.db", "sqlite:///no/such.db"):
        with pytest.raises(DataError, match=r"such.db does not exist \(url of domain 'toys'\)"):
            fingerprints(source(url), file_sha256)


def test_a_table_that_cannot_be_read_leaves_the_other_its_fingerprint(database: str, tmp_path: Path) -> None:
    """One that is gone, and a value that fails only while the query runs."""
    before = fingerprints(source(database), file_sha256)
    query = "SELECT customer, item_id, happened::BIGINT AS happened FROM events"
    with duckdb.connect(database.removeprefix("duckdb://")) as connection:
        connection.execute("ALTER TABLE events ALTER happened TYPE TEXT")
        connection.execute("UPDATE events SET happened = 'soon' WHERE customer = 'u3'")
    for log, reason in ((query, "Could not convert string 'soon'"), ("event", "it has events")):
        now = fingerprints(source(database, log), file_sha256)
        assert isinstance(now["interactions"], DataError) and reason in str(now["interactions"])
        assert now["items"] == before["items"]
        with pytest.raises(DataError, match=f"{reason}|domain 'toys'"):
            build_dataset([source(database, log)], tmp_path / "none", Rules())


@pytest.mark.filterwarnings("ignore:The .future.infer_string. option")  # set by Ibis
def test_a_sqlite_file_is_known_by_its_hash_and_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "shop.sqlite"
    asked = source(f"sqlite://{path}", "SELECT * FROM events WHERE rating > 0", "items")
    with pytest.raises(DataError, match=r"shop.sqlite does not exist \(url of domain 'toys'\)"):
        build_dataset([asked], tmp_path / "none", Rules())
    with pytest.raises(DataError, match=r"shop.sqlite does not exist \(url of domain 'toys'\)"):
        fingerprints(asked, file_sha256)
    assert not path.exists()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("CREATE TABLE events (customer TEXT, item_id TEXT, happened INTEGER, rating REAL, note)")
        connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, 'x')", LOG)
        connection.execute("CREATE TABLE items (item_id TEXT, title TEXT, brand TEXT)")
        connection.executemany("INSERT INTO items VALUES (?, ?, ?)", ITEMS)
    before = fingerprints(asked, file_sha256)
    assert before == dict.fromkeys(("interactions", "items"), f"SQLite file: {file_sha256(path)}")
    build_dataset([asked], tmp_path / "data", Rules())
    assert fingerprints(asked, file_sha256) == before, "reading it changes nothing"
    with closing(sqlite3.connect(path)) as connection:
        with connection:
            connection.execute("UPDATE events SET rating = 9")
        log = path.with_name("shop.sqlite-wal")
        now = f"SQLite file with changes in {log.name}: {file_sha256(path)} {file_sha256(log)}"
        assert fingerprints(asked, file_sha256) == dict.fromkeys(before, now)

        def refused(path: Path) -> str:
            raise PermissionError(13, "Permission denied", str(path))

        assert "Permission denied" in str(fingerprints(asked, refused)["items"])
    assert fingerprints(asked, file_sha256)["items"] == f"SQLite file: {file_sha256(path)}" != before["items"]


def test_times_of_the_database_are_read(database: str, from_files: Path, tmp_path: Path) -> None:
    log = "SELECT customer, item_id, to_timestamp(happened) AS happened, rating FROM events"
    assert tables(build_dataset([source(database, log)], tmp_path / "data", Rules())) == tables(from_files)


def test_what_cannot_be_read_is_named(database: str, tmp_path: Path) -> None:
    def message(**settings: Any) -> str:
        with pytest.raises((DataError, ConfigError)) as raised:
            build_dataset([source(**{"url": database, **settings})], tmp_path / "data", Rules())
        return str(raised.value)

    assert "'event', cannot be read; it has events" in message(interactions="event")
    assert "cannot be read" in message(interactions="SELECT nothing FROM events")
    assert "no column for user_id (looked for 'who')" in message(columns={"user_id": "who"})
    assert "nowhere.db does not exist" in message(url="duckdb://nowhere.db")
    assert "the environment has no variable CPREC_NO_SUCH" in message(url="postgres://u:$CPREC_NO_SUCH@localhost/db")
    with pytest.raises(ConfigError, match="put it into an environment variable"):
        source("postgres://user:secret@localhost/db")
    with pytest.raises(ConfigError, match="is no address"):
        source("shop.db")


EVENTS = "SELECT customer, item_id, happened, rating FROM events"
QUERIES = (
    "EVENTS",
    '"Events"',
    "shop.main.events",
    "-- the log\nevents;",
    "odd-name",
    "SELECT CUSTOMER AS customer, item_id AS Item_Id, happened, rating FROM EVENTS",
    f"{EVENTS} ; ; -- all of it\n",
    f"-- all\n/* of it */ {EVENTS} -- all",
    f"(({EVENTS}))",
    f"with e as ({EVENTS}) -- first\nselect * from e;",
    "FROM events",
    "TABLE events",
    f"({EVENTS} LIMIT 0) UNION ALL ({EVENTS})",
    "SELECT a.*, b.secret FROM events a JOIN (SELECT DISTINCT secret FROM events) b USING (secret)",
    "PIVOT (SELECT *, 'k' AS k FROM events) ON k USING any_value(secret)",
)


@pytest.mark.parametrize("log", QUERIES)
def test_any_query_and_any_name_that_the_database_takes_is_read(log: str, database: str) -> None:
    with duckdb.connect(database.removeprefix("duckdb://")) as connection:
        connection.execute('CREATE VIEW "odd-name" AS FROM events')
    with connect() as engine:
        found = load(engine, source(database, log)).interactions
        rows = engine.to_arrow(found.order_by("timestamp")).to_pylist()
    assert [(row["user_id"], row["item_id"], row["timestamp"], row["rating"]) for row in rows] == LOG


@pytest.mark.parametrize(
    ("log", "columns", "message"),
    [
        (
            "SELECT a.*, b.* FROM events a JOIN events b USING (happened)",
            {},
            "'customer' and 'customer' of .* be meant",
        ),
        (
            'SELECT customer AS "ID", item_id AS "Id", happened FROM events',
            {"user_id": "id", "item_id": "Id"},
            "'ID' and 'Id' of the interactions of domain 'toys' may each be meant by user_id",
        ),
        (
            'SELECT customer AS "ID", item_id AS "id", happened FROM events',
            {"user_id": "ID", "item_id": "id"},
            "'ID' and 'id' of domain 'toys' differ in upper and lower case alone",
        ),
        ("SELECT 1; SELECT 2", {}, "several; give one query"),
        ("", {}, "no statement"),
        ("SELECT ';", {}, "cannot be read"),
    ],
)
def test_what_may_mean_several_columns_is_named(log: str, columns: dict[str, str], message: str, database: str) -> None:
    mapped = {"user_id": "customer", "timestamp": "happened"} | columns
    with connect() as engine, pytest.raises(DataError, match=message):
        load(engine, source(database, log, columns=mapped))


def test_columns_are_found_in_the_case_that_the_database_gives(database: str) -> None:
    log = 'SELECT customer AS "CUSTOMER", item_id AS "ITEM_ID", happened AS "HAPPENED" FROM events'
    items = 'SELECT item_id AS "ITEM_ID", title AS "TITLE" FROM stock.items'
    with connect() as engine:
        tables = load(engine, source(database, log, items))
        assert engine.value(tables.interactions[TIMESTAMP].nunique()) == len(LOG)
    assert tables.columns["interactions"]["user_id"] == "CUSTOMER"


# ---- PostgreSQL ------------------------------------------------------------------------------------------------------


def program(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


needs_postgres = pytest.mark.skipif(
    program("initdb") is None or program("pg_ctl") is None or find_spec("psycopg") is None,
    reason="needs PostgreSQL's initdb and pg_ctl, and psycopg: pip install 'cprec[postgres]'",
)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The folder of the socket of a server of our own; the database programs do not run as root."""
    root = Path("/tmp") if os.geteuid() == 0 else tmp_path_factory.mktemp("postgres")
    folder = root / f"cprec-postgres-{os.getpid()}"
    folder.mkdir(mode=0o700)
    user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    if os.geteuid() == 0:
        shutil.chown(folder, user)

    def run(*command: str) -> None:
        done = subprocess.run(
            command,
            cwd=folder,
            user=user if os.geteuid() == 0 else None,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        )
        assert done.returncode == 0, done.stdout

    data = str(folder / "data")
    initdb, pg_ctl = program("initdb"), program("pg_ctl")
    assert initdb and pg_ctl
    try:
        run(initdb, "--pgdata", data, "--username", "cprec", "--auth", "trust", "--no-sync", "--encoding", "UTF8")
        run(pg_ctl, "--pgdata", data, "--wait", "--log", str(folder / "log"), "--options",
            f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off", "start")  # fmt: skip
        yield str(folder)
        run(pg_ctl, "--pgdata", data, "--wait", "--mode", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@needs_postgres
def test_a_postgres_server_gives_what_files_give(server: str, from_files: Path, tmp_path: Path) -> None:
    import psycopg

    with psycopg.connect(host=server, user="cprec", dbname="postgres") as connection:
        connection.execute(
            "CREATE TABLE events (customer text, item_id text, happened bigint, rating double precision, note text)"
        )
        connection.execute("CREATE SCHEMA stock")
        connection.execute("CREATE TABLE stock.items (item_id text, title text, brand text)")
        with connection.cursor() as cursor:
            cursor.executemany("INSERT INTO events VALUES (%s, %s, %s, %s, 'x')", LOG)
            cursor.executemany("INSERT INTO stock.items VALUES (%s, %s, %s)", ITEMS)
        connection.execute('CREATE VIEW "Odd" AS SELECT * FROM events')
        connection.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
    url = f"postgres://cprec@/postgres?host={server}"
    for number, log in enumerate(
        (
            "events",
            "EVENTS",
            "SELECT customer, item_id, to_timestamp(happened) AS happened, rating FROM events",
            '-- all\n(SELECT customer AS "CUSTOMER", item_id, happened::numeric(20, 6), rating FROM "Odd"); -- of it',
            "WITH e AS (TABLE events) SELECT e.*, 'a' AS note FROM e ORDER BY happened;",
        )
    ):
        folder = build_dataset([source(url, log)], tmp_path / f"data{number}", Rules())
        assert tables(folder) == tables(from_files)
    with pytest.raises(DataError, match="'customer' and 'customer' of the interactions"):
        build_dataset([source(url, "SELECT a.*, b.* FROM events a, events b")], tmp_path / "none", Rules())
    with pytest.raises(DataError, match="'event', cannot be read; it has events"):
        build_dataset([source(url, "event")], tmp_path / "none", Rules())
    with pytest.raises(DataError, match="cannot be reached"):
        build_dataset([source(f"postgres://cprec@/no_such_database?host={server}")], tmp_path / "none", Rules())
    before = fingerprints(source(url), file_sha256)
    assert before["interactions"] and before["interactions"].startswith("PostgreSQL: 300 rows, ")
    writing = "-c default_transaction_read_only=off"
    with psycopg.connect(host=server, user="cprec", dbname="postgres", autocommit=True, options=writing) as connection:
        connection.execute("UPDATE events SET note = 'y'")  # it is not read, and the rows stand in another order
        assert fingerprints(source(url), file_sha256) == before
        connection.execute("UPDATE events SET rating = 0.5 WHERE item_id = 'i3'")
        after = fingerprints(source(url), file_sha256)
        assert after["interactions"] != before["interactions"] and after["items"] == before["items"]
        connection.execute("UPDATE events SET rating = 3 WHERE item_id = 'i3'")
        assert fingerprints(source(url), file_sha256) == before
