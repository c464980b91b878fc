"""What a data folder was made from decides whether it is used again: files, patterns, tables of a database, texts."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import pytest

from cprec import provenance
from cprec.data.config import ConnectionSource, PublicSource, RecBoleSource, TableSource
from cprec.data.dataset import read_manifest
from cprec.data.sources.files import files_of
from cprec.errors import DataError, InputChanged
from cprec.evaluate.config import EvaluateConfig
from cprec.provenance import FileHashes, differences, file_sha256
from cprec.text import prepare as stage
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare
from cprec.text.tokenizer import train_tokenizer

USERS, ITEMS, EVENTS = 8, 6, 6


def log(separator: str = ",", *, users: range = range(USERS)) -> str:
    """Events of some users, one a line: each walks through the items from one of its own on."""
    rows = [(f"u{u}", f"i{(u + n) % ITEMS}", 1_500_000_000 + 86_400 * n) for u in users for n in range(EVENTS)]
    return "".join(f"{separator.join(map(str, row))}\n" for row in rows)


def titles(separator: str = ",") -> str:
    return "".join(f"i{n}{separator}the thing {n}\n" for n in range(ITEMS))


CONFIG = PrepareConfig(
    output_dir="data",
    tables=(TableSource(domain="toys", platform="shop", interactions="logs/*.csv", items="items.csv"),),
    recbole=(RecBoleSource(domain="books", platform="shop", prefix="atomic/books"),),
    connections=(
        ConnectionSource(domain="games", platform="shop", url="duckdb://shop.db", interactions="log", items="items"),
    ),
    target_domains=("toys",),
    tokenizer="base",
    k_core=0,
    min_events=2,
    min_history=1,
    workers=1,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with input of every kind, and the data folder made from it."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("logs", "atomic"):
        (folder / name).mkdir()
    (folder / "logs/a.csv").write_text(f"user_id,item_id,timestamp\n{log(users=range(4))}")
    (folder / "logs/b.csv").write_text(f"user_id,item_id,timestamp\n{log(users=range(4, USERS))}")
    (folder / "items.csv").write_text(f"item_id,title\n{titles()}")
    (folder / "atomic/books.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\n" + log("\t").replace(",", "\t")
    )
    (folder / "atomic/books.item").write_text("item_id:token\ttitle:token_seq\n" + titles("\t"))
    train_tokenizer(["the thing 0 1 2 3 4 5 History Next Domain"] * 9, 300).save_pretrained(folder / "base")
    (folder / "base/model.safetensors").write_bytes(b"weights")
    with duckdb.connect(str(folder / "shop.db")) as connection:
        connection.execute(f"CREATE TABLE log AS FROM read_csv('{folder}/logs/*.csv')")
        connection.execute(f"CREATE TABLE items AS FROM read_csv('{folder}/items.csv')")
        connection.execute("CREATE TABLE other (n INTEGER)")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(CONFIG)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, in which the test stands."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def sql(statement: str) -> Callable[[], None]:
    def run() -> None:
        with duckdb.connect("shop.db") as connection:
            connection.execute(statement)

    return run


def write(path: str, old: str, new: str) -> Callable[[], None]:
    """Another content of the same length, with the same time."""
    assert len(old) == len(new)

    def run() -> None:
        before, text = os.stat(path), Path(path).read_text()
        assert old in text
        Path(path).write_text(text.replace(old, new))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return run


def append(path: str, text: str) -> Callable[[], None]:
    return lambda: Path(path).write_text(Path(path).read_text() + text) and None


CHANGES: dict[str, tuple[Callable[[], Any], str]] = {
    "a file longer": (append("logs/a.csv", "u0,i3,1600000000\n"), "logs/a.csv changed"),
    "a file of the same size and time": (write("items.csv", "the thing 3", "the thong 3"), "items.csv changed"),
    "a file more": (lambda: shutil.copy("logs/a.csv", "logs/c.csv"), "logs/c.csv is new"),
    "a file less": (lambda: Path("logs/b.csv").unlink(), "logs/b.csv is gone"),
    "another name": (lambda: Path("logs/b.csv").rename("logs/0.csv"), "logs/0.csv is new; logs/b.csv is gone"),
    "atomic events": (append("atomic/books.inter", "u0\ti3\t1600000000\n"), "atomic/books.inter changed"),
    "atomic items": (write("atomic/books.item", "thing 5", "thing 9"), "atomic/books.item changed"),
    "rows of a table": (sql("INSERT INTO log VALUES ('u0', 'i1', 1600000000)"), "games/interactions in duckdb://shop"),
    "a value of a table": (sql("UPDATE items SET title = 'a' WHERE item_id = 'i2'"), "games/items in duckdb://shop.db"),
    "a table less": (
        sql("DROP TABLE log"),
        "games/interactions in duckdb://shop.db cannot be read now: .*there is no such table",
    ),
    "a column renamed": (
        sql("ALTER TABLE items RENAME title TO t"),
        "games/items in duckdb://shop.db cannot be read now: .*title",
    ),
    "both tables": (
        sql("DROP TABLE log; UPDATE items SET title = 'a' WHERE item_id = 'i2'"),
        "games/interactions in .* cannot be read now: .*; games/items in duckdb://shop.db changed",
    ),
    "a tokenizer": (append("base/tokenizer_config.json", "\n"), r"tokenizer_config.json changed \(tokenizer=base\)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_made_from_other_input_is_refused(here: Path, change: str) -> None:
    make, named = CHANGES[change]
    assert prepare(CONFIG) == Path("data")
    stamp = Path("data/dataset.json").stat().st_mtime_ns
    make()
    with pytest.raises(InputChanged, match=f"data was prepared from other input: {named}.*delete data to prepare it"):
        prepare(CONFIG)
    assert Path("data/dataset.json").stat().st_mtime_ns == stamp


def replaced() -> None:
    """Every file by one of the same content, and times that went backwards."""
    for path in [*Path("logs").iterdir(), Path("items.csv"), *Path("atomic").iterdir(), *Path("base").iterdir()]:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        os.utime(path, (10**9, 10**9))


def linked() -> None:
    shutil.move("logs", "elsewhere")
    Path("logs").symlink_to("elsewhere")
    Path("second.csv").hardlink_to("items.csv")


UNCHANGED: dict[str, Callable[[], Any]] = {
    "nothing": lambda: None,
    "times": replaced,
    "links": linked,
    "weights beside the tokenizer": lambda: Path("base/model.safetensors").write_bytes(b"others"),
    "another table": sql("INSERT INTO other VALUES (1)"),
    "the order of a table": sql("CREATE OR REPLACE TABLE log AS FROM log ORDER BY item_id"),
    "the notes": lambda: Path("data/hashes.json").write_text("damaged"),
}


@pytest.mark.parametrize("change", UNCHANGED)
def test_the_same_input_is_used_again(here: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    UNCHANGED[change]()
    prepare(CONFIG)
    said = capsys.readouterr().err
    assert "complete with these settings, reused" in said and "cannot be seen" not in said


def test_a_moved_folder_is_used_again(here: Path) -> None:
    Path("data").rename("moved")
    assert prepare(replace(CONFIG, output_dir="moved")) == Path("moved")
    with pytest.raises(InputChanged, match="logs/a.csv changed"):
        append("logs/a.csv", "\n")()
        prepare(replace(CONFIG, output_dir=str(Path("moved").resolve())))


def test_input_that_is_gone_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("logs", "atomic", "base"):
        shutil.rmtree(name)
    Path("shop.db").unlink()
    prepare(CONFIG)
    said = capsys.readouterr().err
    for name in (
        "toys/interactions are gone",
        "books/items are gone",
        "the database of games cannot be reached now (shop.db does not exist",
        "base is gone",
    ):
        assert name in said, said
    Path("items.csv").write_text("item_id,title\ni0,another\n")
    with pytest.raises(InputChanged, match="items.csv changed"):
        prepare(CONFIG)


def test_folders_made_before_are_compared_by_the_hashes_they_have(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They recorded the SHA-256 of files, but no times, no files of tokenizers and nothing that a database says."""
    Path("data/hashes.json").unlink()
    record = json.loads(Path("data/run.json").read_text())
    record["inputs"] = {entry["path"]: entry["sha256"] for entry in read_manifest("data")["sources"]}
    Path("data/run.json").write_text(json.dumps(record))
    prepare(CONFIG)
    assert "games/interactions in duckdb://shop.db, which gave nothing to compare it by" in capsys.readouterr().err
    append("logs/a.csv", "\n")()
    with pytest.raises(InputChanged, match="logs/a.csv changed"):
        prepare(CONFIG)


@pytest.mark.slow
def test_names_of_recorded_inputs_are_those_of_one_input_each(here: Path) -> None:
    """Sources lie where names of the tokenizer's files and tables might, and two domains share a database."""
    for name in ("tokenizer", "games"):
        Path(name).mkdir()
    shutil.copy("logs/a.csv", "tokenizer/ev.csv")
    shutil.copy("items.csv", "games/items.csv")
    (games,) = CONFIG.connections
    config = replace(
        CONFIG,
        output_dir="named",
        tables=(replace(CONFIG.tables[0], interactions="tokenizer/*.csv", items="games/items.csv"),),
        recbole=(),
        connections=(games, replace(games, domain="films", interactions="SELECT * FROM log WHERE user_id = 'u1'")),
    )
    prepare(config)
    recorded = json.loads(Path("named/run.json").read_text())["inputs"]
    assert {(entry["path"], entry["sha256"]) for entry in read_manifest("named")["sources"]} <= recorded.items()
    assert recorded["duckdb://shop.db/games/interactions"] != recorded["duckdb://shop.db/films/interactions"]
    prepare(config)
    append("tokenizer/ev.csv", "\n")()
    with pytest.raises(InputChanged, match="other input: tokenizer/ev.csv changed. Choose"):
        prepare(config)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .future.infer_string. option")  # set by Ibis
def test_a_sqlite_file_that_is_being_written_cannot_be_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (games,) = CONFIG.connections
    lite = replace(games, url="sqlite://shop.sqlite")
    config = replace(CONFIG, output_dir="lite", recbole=(), connections=(lite,))
    with closing(sqlite3.connect("shop.sqlite")) as connection:
        connection.execute("PRAGMA journal_mode = wal")
        with connection:
            connection.execute("CREATE TABLE log (user_id, item_id, timestamp)")
            rows = [line.split(",") for line in log().splitlines()]
            connection.executemany("INSERT INTO log VALUES (?, ?, ?)", [(u, i, int(time)) for u, i, time in rows])
            connection.execute("CREATE TABLE items (item_id, title)")
            connection.executemany("INSERT INTO items VALUES (?, ?)", [t.split(",") for t in titles().splitlines()])
    prepare(config)
    prepare(config)
    assert "cannot be seen" not in capsys.readouterr().err
    with closing(sqlite3.connect("shop.sqlite")) as connection:
        with connection:
            connection.execute("DELETE FROM items WHERE item_id = 'i5'")
        prepare(config)
        assert "hash of a SQLite file then and of a SQLite file with changes in shop.sqlite-wal now" in (
            capsys.readouterr().err
        )
    with pytest.raises(InputChanged, match="games/interactions in sqlite://shop.sqlite changed; games/items in"):
        prepare(config)


def small(**settings: Any) -> PrepareConfig:
    return replace(CONFIG, output_dir="small", recbole=(), connections=(), tokenizer="tiny", **settings)


@pytest.mark.slow
def test_an_unfinished_folder_is_begun_anew(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prepare that failed left its tables; they are those of the log before."""
    with pytest.raises(DataError, match="lower min_history"):
        prepare(small(min_history=EVENTS))
    append("logs/a.csv", "".join(f"u0,i{n},{1_600_000_000 + n}\n" for n in (1, 3, 5)))()
    with pytest.raises(InputChanged, match="small.incomplete was begun from other input: logs/a.csv changed. Every"):
        prepare(small(min_history=EVENTS, partition="0/2"))
    prepare(small(min_history=EVENTS))
    assert read_manifest("small")["domains"]["toys"]["num_events"] == USERS * EVENTS + 3
    assert "begun from other input and is begun anew: logs/a.csv changed" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_that_changes_while_it_is_read_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cprec.data import build

    def build_and_change(*arguments: Any, **settings: Any) -> None:
        build_tables(*arguments, **settings)
        append("logs/b.csv", "\n")()

    build_tables = build.build_tables
    monkeypatch.setattr(build, "build_tables", build_and_change)
    with pytest.raises(DataError, match="logs/b.csv was changed while it was read: run the command again"):
        stage.prepare(small())
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert prepare(small()) == Path("small")


def test_the_files_of_a_public_data_set_are_found_as_it_reads_them(tmp_path: Path) -> None:
    source = PublicSource(format="movielens-1m", folder=str(tmp_path))
    assert files_of(source) == {"interactions": [], "items": []}
    (tmp_path / "ml-1m").mkdir()
    (tmp_path / "ml-1m/ratings.dat").touch()
    (tmp_path / "movies.dat").touch()
    assert files_of(source) == {"interactions": [tmp_path / "ml-1m/ratings.dat"], "items": [tmp_path / "movies.dat"]}


# ---- hashes that are noted -------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read to hash them, while the clock stands an hour ahead of what is written now."""
    read: list[str] = []

    def told(path: Path | str) -> str:
        read.append(Path(path).name)
        return file_sha256(path)

    monkeypatch.setattr(provenance, "file_sha256", told)
    now = provenance.time.time_ns() + 3_600 * 10**9
    monkeypatch.setattr(provenance.time, "time_ns", lambda: now)
    return read


def test_files_that_were_not_touched_are_not_read_again(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "a").write_text("abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"

    def of() -> str:
        hashes = FileHashes(tmp_path)
        found = hashes.of(tmp_path / "a")
        hashes.save()
        return found

    assert (of(), of(), reads) == (sha256, sha256, ["a"])
    os.utime(tmp_path / "a")
    assert (of(), of(), reads) == (sha256, sha256, ["a", "a"])
    time = os.stat(tmp_path / "a").st_mtime_ns
    (tmp_path / "a").write_text("abd")
    os.utime(tmp_path / "a", ns=(time, time))
    assert of() != sha256 and len(reads) == 3


def test_a_file_that_is_being_written_is_read_again(tmp_path: Path) -> None:
    """Written within the last two seconds, or in a future that this machine's clock does not know."""
    (tmp_path / "a").write_text("abc")
    hashes = FileHashes(tmp_path)
    hashes.of(tmp_path / "a")
    hashes.save()
    assert (tmp_path / "hashes.json").read_text() == "{}\n"


def test_hashes_are_found_where_none_can_be_noted(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "a").write_text("abc")
    hashes = FileHashes(tmp_path / "missing")
    hashes.of(tmp_path / "a")
    hashes.save()
    assert not (tmp_path / "missing").exists()
    (tmp_path / "hashes.json").mkdir()  # it cannot be replaced by a file
    hashes = FileHashes(tmp_path)
    hashes.of(tmp_path / "a")
    hashes.save()
    assert reads == ["a", "a"] and not list(tmp_path.glob("*.tmp"))


def test_differences_are_those_of_names_and_hashes() -> None:
    assert differences({}, {}) == differences({"a": "1"}, {"a": "1"}) == []


# ---- the whole road --------------------------------------------------------------------------------------------------


def test_a_run_names_what_was_made_from_changed_input(here: Path) -> None:
    from cprec.recipe import Recipe
    from cprec.run import run
    from cprec.train.config import FinetuneConfig, PretrainConfig

    recipe = Recipe(
        name="test",
        description="a test",
        prepare=CONFIG,
        pretrain=PretrainConfig(data="data", output_dir="pretrained"),
        finetune=FinetuneConfig(data="data", output_dir="tuned", domain="toys"),
        evaluate=EvaluateConfig(data="data", output_dir="evaluated"),
    )
    append("logs/a.csv", "\n")()
    with pytest.raises(InputChanged, match="delete data to prepare it anew$"):
        run(recipe)
    for name in ("pretrained", "tuned"):
        Path(name).mkdir()
    with pytest.raises(InputChanged, match="prepare it anew. Delete what was made from it, too: pretrained, tuned$"):
        run(recipe)
