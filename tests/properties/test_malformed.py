"""Whatever bytes a file holds, each of its rows is kept or set aside, at its own line, and nothing else is raised."""

from __future__ import annotations

import csv
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cprec.data import delimited, text_files
from cprec.data.build import build_dataset
from cprec.data.config import Rules, TableFiles, TableSource
from cprec.data.dataset import read_manifest
from cprec.data.delimited import Form, parse_block, split_line
from cprec.data.engine import TableEngine, connect
from cprec.data.sources.numbers import NO_VALUE, Numbers, read_numbers
from cprec.errors import DataError

CONNECTION = duckdb.connect()
COLUMNS = ("x", "y")
Rows = list[tuple[int, tuple[str | None, ...]]]

pieces = [
    *(b"a", b"b,", b",", b'"', b'""', b"\n", b"\n", b"\r\n", b" ", b"::", b"\xc3\xa9", b"a,b\n", b"a,b\n", b"a,b\n"),
    *(b'"a","b"\n', b'a,"b\nc"\n', b'"a ""b""",c\n', b"a::b\n", b"\r", b"\0", b"\xe9", b"\x1f", b"\xef\xbb\xbf"),
]
texts = st.one_of(
    st.lists(st.sampled_from(pieces), max_size=20).map(b"".join),
    st.lists(st.sampled_from(pieces[:18]), max_size=20).map(b"".join),  # the usual signs only
    st.binary(max_size=60),
)


@contextmanager
def file_of(content: bytes, name: str = "file.csv") -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        yield path


def query(sql: str) -> list[tuple[Any, ...]]:
    return CONNECTION.execute(sql).fetchall()


def read_slowly(text: bytes, separator: str, quote: str) -> tuple[Rows, list[int]]:
    """The rows after a header, and the lines set aside: each row tried with one more line until it is whole, by csv."""
    # A carriage return within a line is an ordinary character, but csv would end the line there.
    whole = text.decode("utf-8", "surrogateescape")
    whole = re.sub("\r(?!\n)", "\ue000", whole if whole.endswith("\n") else whole + "\n")
    lines = [line + "\n" for line in whole.split("\n")[:-1]]
    rows: Rows = []
    bad: list[int] = []
    at = 1
    while at < len(lines):
        if lines[at] in ("\n", "\r\n"):
            at += 1
            continue
        fields, taken = _try_with_csv(lines[at:], separator, quote)
        if fields is None or len(fields) != len(COLUMNS) or re.search("[\udc80-\udcff]", "".join(fields)):
            bad.append(at + 1)
            at += 1
            continue
        rows.append((at + 1, tuple(field.replace("\ue000", "\r") or None for field in fields)))
        at += taken
    return rows, bad


def _try_with_csv(lines: list[str], separator: str, quote: str) -> tuple[list[str] | None, int]:
    for taken in range(1, len(lines) + 1):
        options: dict[str, Any] = {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE}
        text = lines[:taken]
        try:
            return next(csv.reader(text, delimiter=separator, strict=True, **options)), taken
        except csv.Error as error:
            if "unexpected end of data" not in str(error):
                return None, 1
    return None, 1


@pytest.mark.slow
@given(texts, st.sampled_from([",", "\t", ":"]), st.sampled_from(['"', '"', "'", ""]))
@settings(max_examples=200)
@example(b'x,y\n"a\r\n\r\nb",c\r\n,d\r\n', ",", '"')
@example(b'x,y\n"a,b\n"c,d\n"e"f,g\nh,i\n', ",", '"')
@example(b"x,y\na,b\r\r\n", ",", '"')
@example(b"x,y\na,b\r", ",", '"')
@example(b"\xef\xbb\xbfa,b\n", ",", '"')
def test_delimited_text_is_read_as_csv_reads_it_row_by_row(text: bytes, separator: str, quote: str) -> None:
    with file_of(b"x\n" + text.replace(b"\x1f", b"")) as path:
        rows, bad = read_slowly(path.read_bytes(), separator, quote)
        try:
            found = text_files.read_delimited(CONNECTION, path, Form(COLUMNS, separator, quote))
        except DataError as error:
            assert re.search("is not UTF-8|is UTF-16", str(error)), "the only reasons to refuse a whole file"
            return
        kept = query(f"SELECT line_in_file, x, y FROM {found[0]} ORDER BY ALL")
        aside = query(f"SELECT line_in_file FROM {found[1]} ORDER BY ALL") if found[1] else []
    assert [(line, tuple(values)) for line, *values in kept] == rows
    assert [line for (line,) in aside] == bad


@given(texts, st.sampled_from([",", "::", "¦"]), st.sampled_from(['"', "”", ""]), st.integers(1, 2), st.integers(1, 9))
@settings(max_examples=200)
def test_blocks_are_read_alike_however_they_are_cut(
    text: bytes, separator: str, quote: str, num_columns: int, size: int
) -> None:
    """All at once with Arrow, row by row, or in blocks of a few bytes: the same rows, the same reasons."""
    form = Form(COLUMNS[:num_columns], separator, quote)
    whole = parse_block(text, 1, form, is_last=True)
    with patch.object(delimited, "_parse_faultless", return_value=None):
        each = parse_block(text, 1, form, is_last=True)
    rest, line, rows, bad = b"", 1, [], []
    for start in range(0, len(text) or 1, size):
        rest += text[start : start + size]
        parsed = parse_block(rest, line, form, is_last=start + size >= len(text))
        rows += rows_of(parsed)
        bad += parsed.bad
        rest, line = rest[parsed.num_bytes :], line + parsed.num_lines
    assert rest == b""
    assert rows_of(whole) == rows_of(each) == rows
    assert whole.bad == each.bad == bad


def rows_of(parsed: delimited.Parsed) -> list[tuple[Any, ...]]:
    return list(zip(parsed.lines.tolist(), *(column.to_pylist() for column in parsed.columns), strict=True))


@pytest.mark.slow
@settings(max_examples=20)  # each one reads three files
@given(
    st.lists(st.sampled_from(["a,b\n", "a," + "b" * 30 + "\n", '"a\nb",c\n', '"' + "c\n" * 20, "d" * 70]), max_size=9)
)
def test_long_rows_are_set_aside_however_they_are_cut(texts: list[str]) -> None:
    """With a limit of 25 bytes."""
    limit = 25
    lines = "".join(texts).encode().split(b"\n")
    long = [number for number, line in enumerate(lines, start=2) if len(line) > limit]
    found = set()
    for size in (1, 7, 64):
        with (
            file_of(b"x,y\n" + "".join(texts).encode()) as path,
            patch.object(text_files, "BLOCK_BYTES", size),
            patch.object(text_files, "MAX_LINE", limit),
            patch.object(delimited, "MAX_LINE", limit),
        ):
            rows, bad = text_files.read_delimited(CONNECTION, path, Form(COLUMNS, ",", '"'))
            kept = query(f"SELECT * FROM {rows} ORDER BY ALL")
            aside = query(f"SELECT line_in_file, reason FROM {bad} ORDER BY ALL") if bad else []
        assert [line for line, reason in aside if reason == delimited.TOO_LONG] == long
        found.add((tuple(kept), tuple(aside)))
    assert len(found) == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
json_objects = st.dictionaries(st.sampled_from(["k", "é", "other", "a.b", "x/y~z", '"', ""]), json_values, max_size=3)
json_texts = st.one_of(
    json_objects.map(json.dumps),
    json_objects.map(lambda value: json.dumps(value, ensure_ascii=False)),
    json_values.map(json.dumps),
    st.tuples(json_objects.map(json.dumps), st.integers(0, 20)).map(lambda pair: pair[0][: -pair[1] or None]),
    st.sampled_from(["", " ", "\r", '{"k": 1, "k": 2}', '{"k": "\\u0000"}', '{"k": "\\ud800"}', '{"k": 1,}', "{}{}"]),
    st.text(max_size=10),
)
json_lines = st.lists(json_texts.map(lambda text: text.encode("utf-8", "replace").replace(b"\n", b"")), max_size=8)


@pytest.mark.slow
@given(json_lines, st.sampled_from([b"\n", b"\r\n"]))
@settings(max_examples=100)
def test_json_lines_are_kept_or_set_aside(lines: list[bytes], end: bytes) -> None:
    with file_of(b'{"k": 0}' + end + end.join(lines), "file.jsonl") as path:
        rows, bad = text_files.read_json_lines(CONNECTION, path, ["k", "é"])
        kept = dict(query(f"SELECT line_in_file, k FROM {rows}"))
        aside = [line for (line,) in query(f"SELECT line_in_file FROM {bad}")]
    lines = path_lines(b'{"k": 0}' + end + end.join(lines))
    numbers = [number for number, line in enumerate(lines, start=1) if line.strip(b" \t\r")]
    assert sorted([*kept, *aside]) == numbers
    for number in numbers:
        value = parsed_json(lines[number - 1])
        if value is not None:  # an object to Python: then the text of its value is the same
            assert number in kept, lines[number - 1]
            if not isinstance(value.get("k"), (dict, list)):
                assert kept[number] == as_text(value.get("k"))
        elif not lines[number - 1].lstrip().startswith(b"{"):
            assert number in aside


def path_lines(content: bytes) -> list[bytes]:
    return content.split(b"\n")


def parsed_json(line: bytes) -> dict[str, Any] | None:
    """The object of a line that no one could read otherwise, else None."""
    try:
        pairs = json.loads(line.decode(), object_pairs_hook=list)
        value = json.loads(line.decode())
        json.dumps(value, ensure_ascii=False).encode()  # half a character is no text
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and len(value) == len(pairs) else None


def as_text(value: Any) -> str | None:
    return None if value is None else value if isinstance(value, str) else json.dumps(value)


fields = st.sampled_from(
    [
        "u",
        "v",
        "",
        " ",
        "i1",
        "i2",
        "1406116800",
        "1406116801",
        "2014-07-23",
        "0",
        "-1",
        "nan",
        "1e999",
        "x" * 20,
        '"u"',
    ]
)
log_rows = st.lists(st.lists(fields, min_size=1, max_size=4).map(",".join), max_size=6)


def in_style(number: float, thousands: str, point: str) -> str:
    """A number as people write it: `1234.5` with "." and "," is 1.234,50."""
    return f"{number:,.2f}".replace(",", "\0").replace(".", point).replace("\0", thousands)


prices = st.lists(st.integers(-(10**9), 10**9).map(lambda cents: cents / 100), min_size=1, max_size=12)
styles = st.sampled_from([("", "."), ("", ","), (",", "."), (".", ","), (" ", ","), ("\u202f", ","), ("'", ".")])


@pytest.mark.slow
def test_numbers_in_any_style_are_read() -> None:
    """Two decimals leave no doubt about the sign: what is written is read, also where a row is no number."""

    @settings(max_examples=15)
    @given(prices, styles, st.sampled_from(["{}", "€ {}", "{} zł", "US${}", " {} CHF "]), st.booleans())
    def holds(values: list[float], style: tuple[str, str], around: str, is_told: bool) -> None:
        texts = [around.format(in_style(value, *style)) for value in values]
        found, numbers = read(engine, [*texts, "free"], style[1] if is_told else "auto")
        assert found == [*values, None]
        assert (numbers.num_unread, numbers.unread, numbers.num_unclear) == (1, "free", 0)

    with connect() as engine:
        holds()


@pytest.mark.slow
def test_every_cell_is_a_number_or_counted() -> None:
    @settings(max_examples=15)
    @given(st.lists(st.text("0123456789.,- '€%eE", max_size=7), max_size=15), st.sampled_from(["auto", ".", ","]))
    def holds(texts: list[str], decimal: Any) -> None:
        found, numbers = read(engine, texts, decimal)
        pairs = zip(texts, found, strict=True)
        unread = [text for text, value in pairs if value is None and text.strip().lower() not in NO_VALUE]
        assert len(unread) == numbers.num_unread >= numbers.num_unclear
        assert {numbers.unread, numbers.unclear} <= {"", *unread}

    with connect() as engine:
        holds()


def read(engine: TableEngine, texts: list[str], decimal: Any) -> tuple[list[float | None], Numbers]:
    table = engine.from_arrow(pa.table({"row": range(len(texts)), "x": pa.array(texts, pa.string())}))
    numbers = read_numbers(engine, table, "x", decimal)
    values = engine.to_arrow(table.select("row", numbers.values.name("value")).order_by("row"))["value"]
    return values.to_pylist(), numbers


@pytest.mark.slow
@given(
    log_rows,
    st.sampled_from(["auto", "seconds", "milliseconds", "iso", "order"]),
    st.sampled_from(["auto", ","]),
    st.booleans(),
)
@settings(max_examples=8)
def test_a_log_is_refused_or_all_of_its_rows_are_counted(
    rows: list[str], timestamps: Any, decimal: Any, named: bool
) -> None:
    good = ["g,i1,2014-07-23" if timestamps == "iso" else "g,i1,1406116800"] * 7
    text = ("" if named else "user_id,item_id,timestamp\n") + "".join(f"{row}\n" for row in [*good, *rows])
    with file_of(text.encode(), "log.csv") as path:
        items = path.with_name("items.csv")
        items.write_text("item_id,title\ni1,Ball\n")
        own = TableFiles(path=str(path), decimal=decimal, names=("user_id", "item_id", "timestamp") if named else ())
        source = TableSource(domain="toys", interactions=own, items=str(items), timestamps=timestamps)
        try:
            folder = build_dataset([source], path.with_name("data"), Rules(k_core=0))
        except DataError as error:
            assert "log.csv" in str(error)
            return
        about = read_manifest(folder)["domains"]["toys"]
        found = pq.read_table(folder / "rejected.parquet").to_pylist()
        kept = pq.read_metadata(folder / "interactions" / "domain=toys" / "part-0.parquet").num_rows
    removed = sum(step.get("removed", 0) for step in about["counts"] if step["rule"] != "usable")
    assert sum(about["rejected"].values()) == len(found)
    assert kept + removed + len(found) == len(good) + sum(bool(row) for row in rows)


@given(st.text(max_size=30), st.sampled_from([",", "::", "\t"]), st.sampled_from(['"', ""]))
def test_a_header_is_taken_apart_or_refused(line: str, separator: str, quote: str) -> None:
    names = split_line(line, separator, quote)
    assert names is None or (names and all(isinstance(name, str) for name in names))
    if names is None:
        assert quote and quote in line
