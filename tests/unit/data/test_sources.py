from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.data import text_files
from cprec.data.build import LOADERS
from cprec.data.config import RecBoleSource, TableFiles, TableSource
from cprec.data.engine import connect
from cprec.data.sources.memory import MemorySource
from cprec.errors import ConfigError, DataError

Write = Callable[[str, str], str]

ITEMS = "item_id,title\ni1,Red Ball\ni2,Blue Ball\n007,Doll\n"
NOON = 1_406_116_800  # 2014-07-23T12:00:00Z


def load(source: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Any]:
    """(interactions, items, the source's tables) as rows in source order."""
    with connect() as engine:
        tables = LOADERS[type(source)](engine, source)
        log = engine.to_arrow(tables.interactions.order_by("sequence")).to_pylist()
        items = engine.to_arrow(tables.items.order_by("sequence")).to_pylist()
        malformed = [row for _, table in tables.malformed for row in engine.to_arrow(table).to_pylist()]
        return log, items, (tables, malformed)


def times(source: Any) -> list[int | None]:
    return [row["timestamp"] for row in load(source)[0]]


def table_source(write: Write, log: str, items: str = ITEMS, **settings: Any) -> TableSource:
    return TableSource(domain="toys", interactions=write("log.csv", log), items=write("items.csv", items), **settings)


def test_csv_keeps_ids_as_given_and_tells_lines(write: Write) -> None:
    log, items, _ = load(
        table_source(write, f'user_id,item_id,timestamp,rating\n01,007,{NOON},5\n"a, b",i1,{NOON + 1},\n')
    )
    assert [(row["user_id"], row["item_id"], row["timestamp"], row["rating"], row["line"]) for row in log] == [
        ("01", "007", NOON, 5.0, 2),
        ("a, b", "i1", NOON + 1, None, 3),
    ]
    assert [(row["item_id"], row["title"], row["brand"]) for row in items][-1] == ("007", "Doll", None)


def test_columns_are_found_by_usual_names_or_mapped(write: Write) -> None:
    log, _, (tables, _) = load(
        table_source(write, f"userId,Product,when\nu,i1,{NOON}\n", columns={"item_id": "Product", "timestamp": "when"},
                     items="Product,Name\ni1,Ball\n")
    )  # fmt: skip
    assert log[0]["user_id"] == "u" and log[0]["item_id"] == "i1" and log[0]["timestamp"] == NOON
    assert tables.columns["items"] == {"item_id": "Product", "title": "Name"}


@pytest.mark.parametrize("suffix", [".tsv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, write: Write, suffix: str) -> None:
    rows = [("u1", "i1", NOON), ("u2", "i2", NOON + 1)]
    path = tmp_path / f"log{suffix}"
    if suffix == ".parquet":
        user, item, time = (list(column) for column in zip(*rows, strict=True))
        pq.write_table(pa.table({"user_id": user, "item_id": item, "timestamp": time}), path)
    else:
        if "json" in suffix:
            text = "".join(f'{{"user_id": "{u}", "item_id": "{i}", "timestamp": {t}}}\n' for u, i, t in rows)
        else:
            separator = "\t" if suffix == ".tsv" else ","
            text = "".join(separator.join(map(str, r)) + "\n" for r in [("user_id", "item_id", "timestamp"), *rows])
        data = text.encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    source = TableSource(domain="toys", interactions=str(path), items=write("items.csv", ITEMS))
    log, _, _ = load(source)
    assert [(row["user_id"], row["item_id"], row["timestamp"]) for row in log] == rows
    first_line = 1 if suffix == ".parquet" or "json" in suffix else 2
    assert [row["line"] for row in log] == [first_line, first_line + 1]


def test_patterns_and_several_files_are_read_in_order(tmp_path: Path, write: Write) -> None:
    for name, user in (("part-1.csv", "b"), ("part-0.csv", "a"), ("last.csv", "c")):
        write(name, f"user_id,item_id,timestamp\n{user},i1,{NOON}\n")
    source = TableSource(
        domain="toys",
        interactions=(str(tmp_path / "part-*.csv"), str(tmp_path / "last.csv")),
        items=write("items.csv", ITEMS),
    )
    log, _, _ = load(source)
    assert [row["user_id"] for row in log] == ["a", "b", "c"]
    assert [Path(row["file"]).name for row in log] == ["part-0.csv", "part-1.csv", "last.csv"]
    assert [row["line"] for row in log] == [2, 2, 2]


def test_malformed_rows_are_set_aside_with_their_lines(write: Write) -> None:
    text = f"user_id,item_id,timestamp\nu1,i1,{NOON}\nu2,i1\nu3,i1,{NOON}\nu4,i1,{NOON},extra,extra\nu5,i2,{NOON}\n"
    log, _, (_, malformed) = load(table_source(write, text))
    assert [(row["user_id"], row["line"]) for row in log] == [("u1", 2), ("u3", 4), ("u5", 6)]
    assert [(row["line"], row["reason"], row["row"]) for row in malformed] == [
        (3, "malformed row: missing columns", "u2,i1"),
        (5, "malformed row: too many columns", f"u4,i1,{NOON},extra,extra"),
    ]


def test_lines_that_are_no_json_objects_are_set_aside(tmp_path: Path, write: Write) -> None:
    log_file = write("log.jsonl", '{"user_id": 1, "item_id": "i1", "timestamp": 1406116800}\n{"user_id": \n[1]\n'
                     '{"user_id": "u", "item_id": "i1", "timestamp": null}\n')  # fmt: skip
    log, _, (_, malformed) = load(TableSource(domain="toys", interactions=log_file, items=write("items.csv", ITEMS)))
    assert [(row["user_id"], row["timestamp"], row["line"]) for row in log] == [("1", NOON, 1), ("u", None, 4)]
    assert [(row["line"], row["reason"]) for row in malformed] == [
        (2, "malformed row: no JSON object"),
        (3, "malformed row: no JSON object"),
    ]


def test_lists_of_text_are_joined(tmp_path: Path, write: Write) -> None:
    items = write(
        "items.jsonl", '{"asin": "i1", "title": "Ball", "category": ["Toys", "Balls"], "price": "$1,299.50"}\n'
    )
    log = write("log.csv", f"user_id,item_id,timestamp\nu,i1,{NOON}\n")
    row = load(TableSource(domain="toys", interactions=log, items=items))[1][0]
    assert row["categories"] == "Toys, Balls"
    assert row["price"] == 1299.5
    pq.write_table(
        pa.table({"item_id": ["i1"], "title": ["Ball"], "categories": [["Toys", "Balls"]]}), tmp_path / "i.parquet"
    )
    row = load(TableSource(domain="toys", interactions=log, items=str(tmp_path / "i.parquet")))[1][0]
    assert row["categories"] == "Toys, Balls"


def test_the_log_may_hold_the_titles(write: Write) -> None:
    text = f"user_id,item_id,title,timestamp\nu,i1,,{NOON}\nu,i1,Ball,{NOON}\nu,i2,Doll,{NOON}\nv,i1,Ball,{NOON}\n"
    log, items, _ = load(TableSource(domain="toys", interactions=write("log.csv", text)))
    assert len(log) == 4
    assert [(row["item_id"], row["title"], row["line"]) for row in items] == [("i1", "Ball", 3), ("i2", "Doll", 4)]


@pytest.mark.parametrize(
    ("timestamps", "value", "seconds"),
    [
        ("auto", str(NOON), NOON),
        ("auto", f"{NOON}.75", NOON),
        ("auto", f"{NOON}123", NOON),
        ("auto", "2014-07-23", NOON - 12 * 3600),
        ("auto", "2014-07-23 12:00:00", NOON),
        ("auto", "2014-07-23T12:00:00Z", NOON),
        ("auto", "2014-07-23T14:00:00+02:00", NOON),
        ("auto", "2061-07-23T12:00:00", 2_889_345_600),
        ("seconds", "12", 12),
        ("seconds", "-86400", -86400),
        ("milliseconds", "1500", 1),
        ("iso", "1969-12-31T23:59:59", -1),
        ("order", "3", 3),
        ("seconds", "nan", None),
        ("seconds", "inf", None),
        ("seconds", "2014-07-23", None),
        ("iso", "07 23, 2014", None),
        ("iso", "1406116800", None),
    ],
)
def test_timestamps(write: Write, timestamps: Any, value: str, seconds: int | None) -> None:
    text = f"user_id,item_id,timestamp\nu,i1,{value!r}\n".replace("'", '"')
    assert times(table_source(write, text, timestamps=timestamps)) == [seconds]


@pytest.mark.parametrize(
    "kind", [pa.timestamp("ms"), pa.timestamp("us", "UTC"), pa.timestamp("ns", "Europe/Berlin"), pa.date32()]
)
def test_timestamps_of_parquet_columns(tmp_path: Path, write: Write, kind: pa.DataType) -> None:
    moment = datetime(2014, 7, 23, 12, tzinfo=None if kind in (pa.timestamp("ms"), pa.date32()) else UTC)
    value = pa.array([moment.date() if kind == pa.date32() else moment], kind)
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["i1"], "timestamp": value}), tmp_path / "log.parquet")
    source = TableSource(domain="toys", interactions=str(tmp_path / "log.parquet"), items=write("items.csv", ITEMS))
    assert times(source) == [NOON - 12 * 3600 if kind == pa.date32() else NOON]


def test_auto_takes_no_positions_for_times(write: Write) -> None:
    source = table_source(write, "user_id,item_id,timestamp\nu,i1,0\nu,i2,1\nu,007,2\n")
    with pytest.raises(DataError, match=r"values of timestamp \(domain 'toys'\) are around 1: .* timestamps=order"):
        load(source)


def test_recbole_atomic_files(write: Write) -> None:
    prefix = write("ml.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\n196\t242\t3\t881250949\n")
    write("ml.item", 'item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n'
          '242\t"Kolya" again\t1996\tComedy\n')  # fmt: skip
    log, items, (tables, _) = load(RecBoleSource(domain="movies", prefix=prefix.removesuffix(".inter")))
    assert (log[0]["user_id"], log[0]["item_id"], log[0]["timestamp"], log[0]["rating"]) == ("196", "242", 881250949, 3)
    assert (items[0]["title"], items[0]["categories"]) == ('"Kolya" again', "Comedy"), "quotes are ordinary characters"
    assert tables.has_times


def test_recbole_without_times_is_in_order(write: Write) -> None:
    prefix = write("x.inter", "user_id:token\titem_id:token\nu\ta\nu\tb\n").removesuffix(".inter")
    write("x.item", "item_id:token\ttitle:token_seq\na\tA\nb\tB\n")
    log, _, (tables, _) = load(RecBoleSource(domain="movies", prefix=prefix))
    assert not tables.has_times
    assert log[0]["timestamp"] < log[1]["timestamp"]


def test_tables_in_memory() -> None:
    items = pa.table({"item_id": ["a"], "title": ["A"]})
    log = pa.table({"user_id": ["u", "v"], "item_id": ["a", "a"], "timestamp": [5, 6]})
    rows, _, (tables, _) = load(MemorySource("toys", "shop", items, log))
    assert [(row["user_id"], row["timestamp"], row["line"]) for row in rows] == [("u", 5, 1), ("v", 6, 2)]
    again = load(MemorySource("toys", "shop", items, pa.concat_tables([log.slice(0, 1), log.slice(1, 1)])))[2][0]
    assert tables.hashes == again.hashes and len(set(tables.hashes.values())) == 2


# ---- what can be wrong with the input --------------------------------------------------------------------------------


def test_a_missing_file_is_named_with_similar_ones(write: Write, tmp_path: Path) -> None:
    write("ratings.csv", "x")
    with pytest.raises(
        DataError, match=r"rating.csv does not exist \(interactions of domain 'toys'\); .* has ratings.csv"
    ):
        load(TableSource(domain="toys", interactions=str(tmp_path / "rating.csv"), items=write("items.csv", ITEMS)))
    with pytest.raises(DataError, match="there is no folder"):
        load(TableSource(domain="toys", interactions=str(tmp_path / "no" / "log.csv")))


def test_folders_and_unknown_kinds_of_files_are_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder; for the interactions of domain 'toys' give its files"):
        load(TableSource(domain="toys", interactions=str(tmp_path)))
    with pytest.raises(
        DataError, match="suffix tells the kind of a file, and .xlsx is not known; accepted are .parquet, .csv"
    ):
        load(TableSource(domain="toys", interactions=write("log.xlsx", "x")))


def test_empty_files_are_refused(write: Write) -> None:
    with pytest.raises(DataError, match=r"log.csv is empty \(interactions of domain 'toys'\)"):
        load(table_source(write, ""))


def test_a_file_that_is_no_parquet_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match=r"log.parquet: .*[Pp]arquet"):
        load(TableSource(domain="toys", interactions=write("log.parquet", "no parquet at all, but long enough")))


def test_a_missing_column_is_named_with_those_found(write: Write) -> None:
    with pytest.raises(DataError) as raised:
        load(table_source(write, "customer,item_id,timestamp\nu,i1,1\n"))
    message = str(raised.value)
    assert "no column for user_id (looked for 'user_id' or 'user'" in message
    assert "the interactions of domain 'toys' have 'customer', 'item_id', 'timestamp'" in message
    assert "Map it: interactions.columns.user_id=COLUMN" in message
    with pytest.raises(
        DataError, match="no column for item_id .looked for 'sku'.*Map it: interactions.columns.item_id=COLUMN"
    ):
        load(table_source(write, "user_id,item_id,timestamp\nu,i1,1\n", columns={"item_id": "sku"}))


def test_a_missing_time_or_title_says_what_to_do(write: Write) -> None:
    with pytest.raises(
        DataError, match="no column for timestamp .*; or say timestamps=order if a user's rows stand in"
    ):
        load(table_source(write, "user_id,item_id\nu,i1\n"))
    with pytest.raises(DataError, match="no column for title .*; every item needs a title"):
        load(table_source(write, "user_id,item_id,timestamp\nu,i1,1\n", items="item_id,label\ni1,Ball\n"))


@pytest.mark.parametrize(("separator", "shown"), [(";", '";"'), ("\t", r'"\\t"'), ("|", '"|"'), ("::", '"::"')])
def test_a_wrong_separator_is_guessed(write: Write, separator: str, shown: str) -> None:
    text = f"user_id{separator}item_id{separator}timestamp\nu{separator}i1{separator}{NOON}\n"
    with pytest.raises(DataError, match="with a comma as separator the header is the single column") as raised:
        load(table_source(write, text))
    assert str(raised.value).endswith(f"set interactions.separator={shown}".replace("\\\\", "\\"))
    log = TableSource(
        domain="toys", interactions=write("log.csv", text), items=write("items.tsv", ITEMS), separator=separator
    )
    with pytest.raises(DataError, match="items.tsv: with .* it looks as if a comma separates the fields"):
        load(log)


def test_headers_without_names_or_with_equal_ones_are_refused(write: Write) -> None:
    with pytest.raises(DataError, match="column 1 of the header ',item_id,timestamp' has no name"):
        load(table_source(write, ",item_id,timestamp\nu,i1,1\n"))
    with pytest.raises(DataError, match="the header names item_id twice"):
        load(table_source(write, "user_id,item_id,item_id\nu,i1,1\n"))


def test_json_that_is_not_one_object_per_line_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match="line 1 is not a JSON object"):
        load(TableSource(domain="toys", interactions=write("log.json", '[{"user_id": 1},\n{"user_id": 2}]\n')))


def test_each_table_has_its_own_settings(write: Write) -> None:
    """The item is `product` in the log and `id` in the items; separators, encodings and decimal signs differ."""
    log = write("orders.csv", f"customer|product|time|stars\nu|i1|{NOON}|4.5\n")
    items = Path(write("items.csv", ""))
    items.write_bytes("id;name;price\ni1;Töpfe;1.234\n".encode("cp1252"))
    source = TableSource(
        domain="toys",
        interactions=TableFiles(path=log, separator="|"),
        items=TableFiles(path=str(items), columns={"item_id": "id"}, separator=";", encoding="cp1252", decimal=","),
        columns={"user_id": "customer", "item_id": "product"},
    )
    rows, catalogue, _ = load(source)
    assert [(row["user_id"], row["item_id"], row["rating"]) for row in rows] == [("u", "i1", 4.5)]
    assert [(row["item_id"], row["title"], row["price"]) for row in catalogue] == [("i1", "Töpfe", 1234.0)]


def test_a_setting_of_one_table_is_the_domains_for_the_other(write: Write) -> None:
    log, items = write("log.csv", f"user_id;item_id;time\nu;a;{NOON}\n"), write("items.csv", "item_id;title\na;A\n")
    source = TableSource(domain="toys", interactions=log, items=TableFiles(path=items, decimal=","), separator=";")
    assert source.forms()["interactions"] == TableFiles(
        path=(log,), separator=";", quote='"', encoding="utf-8", decimal="auto"
    )
    assert source.forms()["items"].separator == ";"
    assert [row["title"] for row in load(source)[1]] == ["A"]


def test_the_key_of_the_right_table_is_named(write: Write) -> None:
    log = write("log.csv", f"user_id,product,time\nu,i1,{NOON}\n")
    source = TableSource(
        domain="toys", interactions=log, items=write("items.csv", ITEMS), columns={"item_id": "product"}
    )
    with pytest.raises(DataError, match=r"items.csv: no column for item_id .* Map it: items\.columns\.item_id=COLUMN"):
        load(source)


def test_a_mapped_column_that_is_not_there_is_an_error(write: Write) -> None:
    log = f"user_id,item_id,time,stars\nu,i1,{NOON},5\n"
    with pytest.raises(DataError, match=r"no column for rating \(looked for 'star'\)"):
        load(table_source(write, log, columns={"rating": "star"}))


def test_a_file_without_a_header(write: Write) -> None:
    text = f"u,i1,5,{NOON}\nv,i2,4,{NOON + 1}\n"
    names = ("user_id", "item_id", "rating", "timestamp")
    with pytest.raises(DataError) as raised:
        load(table_source(write, text))
    assert "where a file has no header, say what its 4 columns are, in order, as interactions.names=" in str(
        raised.value
    )
    assert "Map it" not in str(raised.value)
    source = table_source(write, text)
    source = replace(source, interactions=TableFiles(path=source.interactions, names=names))
    rows = load(source)[0]
    assert [(row["user_id"], row["rating"], row["line"]) for row in rows] == [("u", 5.0, 1), ("v", 4.0, 2)]


@pytest.mark.parametrize(
    ("decimal", "order", "expected"),
    [
        ("auto", ["999,5", "1.000,5", "1.234", "1.100,0", "1.050"], [0, 1, 4, 3, 2]),
        (",", ["2.345", "12"], [1, 0]),
        (".", ["1,234", "12", "9007199254740993", "9007199254740992"], [1, 0, 3, 2]),
    ],
)
def test_positions_are_read_with_the_decimal_sign_of_their_column(
    write: Write, decimal: Any, order: list[str], expected: list[int]
) -> None:
    log = write(
        "log.csv", "user_id;item_id;timestamp;order\n" + "".join(f"u;i{n};{NOON};{v}\n" for n, v in enumerate(order))
    )
    items = write("it.csv", "item_id;title\n" + "".join(f"i{n};Ball {n}\n" for n in range(len(order))))
    rows = load(TableSource(domain="toys", interactions=log, items=items, separator=";", decimal=decimal))[0]
    assert [row["item_id"] for row in sorted(rows, key=lambda row: row["position"])] == [f"i{n}" for n in expected]


@pytest.mark.parametrize("text", ["u,,5\n", "u,5,5\n"])
def test_a_header_that_looks_like_a_row_is_said_to(write: Write, text: str) -> None:
    with pytest.raises(DataError, match="That looks like a row: where a file has no header, say what its 3 columns"):
        load(table_source(write, text))


ENCODINGS = ("utf-16", "utf-16-be", "cp1252", "gb18030", "shift_jis", "UTF8", "utf-8-sig")


@pytest.mark.parametrize(
    ("suffix", "encoding"),
    [
        *((".csv", encoding) for encoding in ENCODINGS),
        *((suffix, "utf-16") for suffix in (".jsonl", ".csv.gz")),
        *(
            pytest.param(suffix, encoding, marks=pytest.mark.slow)
            for suffix in (".jsonl", ".csv.gz")
            for encoding in ENCODINGS[1:]
        ),
    ],
)
def test_other_encodings(tmp_path: Path, write: Write, suffix: str, encoding: str) -> None:
    title = {"gb18030": "苹果手机", "shift_jis": "りんご"}.get(encoding, "Töpfe")
    lines = [f'{{"item_id": "i{n}", "title": "{title} {n}"}}' if "json" in suffix else f"i{n},{title} {n}"
             for n in range(9)]  # fmt: skip
    head = [] if "json" in suffix else ["item_id,title"]
    data = "".join(f"{line}\n" for line in [*head, *lines]).encode(encoding)
    items = tmp_path / f"items{suffix}"
    items.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    log = write("log.csv", f"user_id,item_id,timestamp\nu,i1,{NOON}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK_BYTES", 7)  # characters are cut
        rows = load(TableSource(domain="toys", interactions=log, items=TableFiles(path=str(items), encoding=encoding)))[
            1
        ]
    assert [row["title"] for row in rows] == [f"{title} {n}" for n in range(9)]


def test_what_an_encoding_does_not_have_is_set_aside(tmp_path: Path, write: Write) -> None:
    items = tmp_path / "items.csv"
    items.write_bytes(b"item_id,title\ni1,Ball\ni2,Do\x81ll\ni3,Kite\n")
    log = write("log.csv", f"user_id,item_id,timestamp\nu,i1,{NOON}\n")
    source = TableSource(domain="toys", interactions=log, items=str(items), encoding="cp1252")
    _, rows, (_, malformed) = load(source)
    assert [row["item_id"] for row in rows] == ["i1", "i3"]
    assert [(row["line"], row["reason"]) for row in malformed] == [(3, "malformed row: invalid encoding")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"items": TableFiles(path="i.csv", columns={"user_id": "u"})}, "items.columns maps user_id, which is not"),
        ({"items": TableFiles(path="i.csv", separator="")}, "items.separator is empty"),
        ({"items": TableFiles(path="i.csv", separator='"')}, "items.separator='\"', items.quote='\"'"),
        ({"items": TableFiles(path=())}, "items of domain 'toys' names no file"),
        ({"items": TableFiles(path="i.csv", encoding="utf-9")}, "items.encoding='utf-9' is no encoding of text"),
        ({"encoding": "hex"}, "encoding='hex' is no encoding of text"),
        ({"decimal": "x"}, "decimal='x': expected auto, a point or a comma"),
        ({"interactions": TableFiles(path="l.csv", names=("a", "A"))}, "interactions.names=a,a: every column needs"),
        ({"domain": "Toys & Games"}, "domain='Toys & Games': use letters, digits, _ - and dots.*'Toys_Games', say"),
        ({"platform": ""}, "platform='': use letters"),
        ({"columns": {"user": "customer"}}, "columns maps user, which is not canonical; canonical columns .* user_id"),
        (
            {"timestamps": "unix"},
            "timestamps='unix': expected auto, seconds, milliseconds, microseconds, nanoseconds, iso, order",
        ),
        ({"separator": ""}, "separator is empty"),
        ({"items": ()}, "items of domain 'toys' names no file"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TableSource(**{"domain": "toys", "interactions": "log.csv", **settings})


def test_configurations_load_nothing_heavy() -> None:
    code = (
        "import sys, cprec.data.config, cprec.data.sources.files\n"
        "print([name for name in ('numpy', 'pyarrow', 'ibis', 'duckdb', 'pandas') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
