"""Malformed input, case by case: which rows are set aside, where they stand and why, or which error names the fix."""

from __future__ import annotations

import bz2
import gzip
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.data.build import build_dataset
from cprec.data.config import Rules, TableSource
from cprec.data.dataset import read_manifest
from cprec.data.judging import EMPTIED
from cprec.errors import ConfigError, DataError

T = 1_406_116_800  # 2014-07-23T12:00:00Z
HEAD = b"user_id,item_id,timestamp\n"
GOOD = b"".join(b"g%d,i1,%d\n" % (n, T + n) for n in range(12))
"""Twelve good events, so that a bad one is no majority."""
GOOD_MS = re.sub(rb",(\d{10})\n", rb",\g<1>000\n", GOOD)
ITEMS = b"item_id,title\ni1,Ball\ni2,Doll\ni3,Kite\n"

FEW = "malformed row: missing columns"
MANY = "malformed row: too many columns"
OPEN = "malformed row: quote is not closed"
AFTER = "malformed row: text after a closing quote"
ENCODING = "malformed row: invalid encoding"
LONG = "malformed row: line size over maximum"
NO_JSON = "malformed row: no JSON object"
KEY_TWICE = "malformed row: a key occurs twice"
BAD_TIME = "timestamp cannot be read"
RANGE = "timestamp before 1970 or after 2099"
EARLY = "timestamp before March 1973, which auto takes for none"
AMONG = "timestamp in seconds among milliseconds"
COARSER = "timestamp in a coarser unit among microseconds"


@dataclass(frozen=True)
class Case:
    """A log, and either what becomes of its rows or, if `error` is set, what the error says."""

    name: str
    log: bytes | Mapping[str, bytes | None]
    """The file `file`, or several files by name; None is a folder."""
    rejected: Mapping[int | str, str] = field(default_factory=dict)
    """Reasons by line of the log, or by 'FILE LINE'."""
    kept: tuple[str, ...] = ()
    """Users of the rows kept, sorted, besides g0, g1, ..., all of whose rows are."""
    error: str = ""
    file: str = "log.csv"
    items: bytes | None = ITEMS
    items_file: str = "items.csv"
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_good: int = 12
    lines_are_rows: bool = True
    """False where a row has more or fewer lines than one, so that lines cannot be counted instead."""
    alone: bool = False
    """Whether its files cannot stand beside those of other cases in one log: their times or columns are of another
    kind."""

    @property
    def files(self) -> Mapping[str, bytes | None]:
        """The log's files by name."""
        return self.log if isinstance(self.log, Mapping) else {self.file: self.log}

    @property
    def is_shared(self) -> bool:
        """Whether its files are read together with those of other cases."""
        return not (self.error or self.settings or self.alone) and (self.items, self.items_file) == (ITEMS, "items.csv")


def rows(*lines: str, head: bytes = HEAD) -> bytes:
    """A log of these lines, then the good ones."""
    return head + "".join(f"{line}\n" for line in lines).encode() + GOOD


def column(name: str, *values: str) -> bytes:
    """The good log with one more column, its first values given."""
    good = GOOD.decode().splitlines()
    more = [f"{line},{value}" for line, value in zip(good, [*values, *[""] * 12], strict=False)]
    return f"user_id,item_id,timestamp,{name}\n".encode() + "".join(f"{line}\n" for line in more).encode()


def timed(*times: object) -> bytes:
    """A log of users g0, g1, ... at these times."""
    return HEAD + "".join(f"g{n},i1,{time}\n" for n, time in enumerate(times)).encode()


def record(**values: Any) -> str:
    return json.dumps({"user_id": "a", "item_id": "i1", "timestamp": T} | values)


def json_lines(*lines: str) -> bytes:
    """Good objects in lines 1 to 12, then these lines."""
    return "".join(f"{line}\n" for line in [*(record(user_id=f"g{n}") for n in range(12)), *lines]).encode()


def as_json(name: str, *lines: str, **expected: Any) -> Case:
    return Case(f"JSON: {name}", json_lines(*lines), file="log.jsonl", **expected)


def parquet(rows: int = 12, **columns: Any) -> bytes:
    """A good log with some columns replaced."""
    times = [T + n for n in range(rows)]
    good = {"user_id": [f"g{n}" for n in range(rows)], "item_id": ["i1"] * rows, "timestamp": times}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(good | columns), sink)
    return sink.getvalue().to_pybytes()


def as_parquet(name: str, rows: int = 12, expected: Mapping[str, Any] | None = None, **columns: Any) -> Case:
    return Case(f"Parquet: {name}", parquet(rows, **columns), file="log.parquet", **(expected or {}))


@dataclass(frozen=True)
class Line:
    """One row of a log or of items among good ones; `reason` is None where it is kept."""

    name: str
    text: str
    reason: str | None
    user: str = "a"
    """Whose event is kept."""


ROWS = [
    # ---- taken apart
    Line("too few fields", "a,i1", FEW),
    Line("too many fields", f"a,i1,{T},9", MANY),
    Line("an empty field too many", f"a,i1,{T},", MANY),
    Line("a line of blanks", "   ", FEW),
    Line("text after a closing quote", f'"a"b,i1,{T}', AFTER),
    Line("quotes escaped by backslashes", f'"a \\"b\\"",i1,{T}', AFTER),
    Line("a quote within a field is a character", f'a"b,i1,{T}', None, 'a"b'),
    Line("doubled quotes are one", f'"a ""b""",i1,{T}', None, 'a "b"'),
    Line("separators in quotes", f'"a,b",i1,{T}', None, "a,b"),
    Line("newlines in quotes", f'"a\n\nb",i1,{T}', None, "a\n\nb"),
    Line("a row after two empty lines", f"\n\na,i1,{T}", None),
    Line("a line of 10 MB", "x" * 10_000_000, LONG),
    Line("a carriage return alone is no end of a line", f"a\rb,i1,{T}", None, "a\rb"),
    # ---- ids
    Line("no user", f",i1,{T}", "no user id"),
    Line("no item", f"a,,{T}", "no item id"),
    Line("blanks for an item", f"a,  ,{T}", "no item id"),
    Line("an unknown item", f"a,i99,{T}", "item is not in the items table"),
    Line("NUL stays as given", f"a\0b,i1,{T}", None, "a\0b"),
    Line("blanks around an id stay as given", f" g0 ,i1,{T}", None, " g0 "),
    Line("a Cyrillic letter is another", f"g\u0430,i1,{T}", None, "g\u0430"),
    Line("a composed letter is one", f"\u00e9,i1,{T}", None, "\u00e9"),
    Line("and a decomposed letter another", f"e\u0301,i1,{T}", None, "e\u0301"),
    Line("zeros before a number are kept", f"007,i1,{T}", None, "007"),
    Line("zeros behind a number too", f"7.0,i1,{T}", None, "7.0"),
    # ---- times
    Line("no time", "a,i1,", BAD_TIME),
    Line("a time in words", "a,i1,soon", BAD_TIME),
    Line("a date among seconds", "a,i1,2014-07-23", BAD_TIME),
    Line("NaN as a time", "a,i1,nan", BAD_TIME),
    Line("infinity as a time", "a,i1,-inf", BAD_TIME),
    Line("a number too large for any time", "a,i1,1e300", BAD_TIME),
    Line("a time with separators", 'a,i1,"1,406,116,800"', BAD_TIME),
    Line("a negative time", f"a,i1,-{T}", RANGE),
    Line("the last second of 2099", "a,i1,4102444799", None),
    Line("the first second of 2100", "a,i1,4102444800", RANGE),
    Line("milliseconds among seconds", f"a,i1,{T}000", RANGE),
    Line("nanoseconds among seconds", f"a,i1,{T}000000000", RANGE),
    Line("0 for an unknown time", "a,i1,0", EARLY),
    Line("a fraction of a second", f"a,i1,{T}.75", None),
]  # fmt: skip

OBJECTS = [
    Line("no JSON", "nope", NO_JSON),
    Line("single quotes", "{'user_id': 'a'}", NO_JSON),
    Line("an object cut short", record()[:-20], NO_JSON),
    Line("two objects in a line", record() + record(), NO_JSON),
    Line("a list", "[1, 2]", NO_JSON),
    Line("a text", '"text"', NO_JSON),
    Line("null", "null", NO_JSON),
    Line("half a character", record(user_id="\ud800"), NO_JSON),
    Line("a raw tab in text", record().replace('"a"', '"a\tb"'), NO_JSON),
    Line("a line of 10 MB", record(x="y" * 10_000_000), LONG),
    Line("a key twice", record()[:-1] + ', "user_id": "b"}', KEY_TWICE),
    Line("a null as id", record(user_id=None), "no user id"),
    Line("a missing key", '{"item_id": "i1"}', "no user id"),
    Line("an object as id", record(user_id={"$oid": "a"}), "no user id"),
    Line("a list as id", record(user_id=["a", "b"]), "no user id"),
    Line("NaN as id", record(user_id=math.nan), "no user id"),
    Line("an object as time", record(timestamp={"$date": T}), BAD_TIME),
    Line("a time as text", record(timestamp=str(T)), None),
    Line("a whole number as id", record(user_id=12345), None, "12345"),
    Line("the same with a point", record(user_id=12345.0), None, "12345"),
    Line("the same with an exponent", record().replace('"a"', "1e3"), None, "1000"),
    Line("a number that no float holds", record(user_id=2**53 + 1), None, "9007199254740993"),
    Line("a number that no integer holds", record(user_id=10**30), None, "1" + "0" * 30),
    Line("a truth value as id", record(user_id=True), None, "true"),
    Line("NUL in an id", record(user_id="a\0b"), None, "a\0b"),
    Line("a comma at the end", record()[:-1] + ",}", None),
    Line("100,000 lists in one another", record(x=0).replace("0}", "[" * 100_000 + "]" * 100_000 + "}"), None),
    Line("a number of 5,000 digits", record(x=0).replace("0}", "9" * 5_000 + "}"), None),
    Line("an object after two empty lines", "\n  \n" + record(), None),
]  # fmt: skip

TITLES = [
    Line("another title of the same item", "i1,Cube", "item id occurs before with another title"),
    Line("the same title again", "i1, Ball.", "item id occurs before"),
    Line("no id", ",Top", "no item id"),
    Line("no title", "i4,", "title without a word"),
    Line("a title of tags and dots", "i5,<b>...</b>", EMPTIED),
    Line("a title of 20,000 characters", "i6," + "x" * 20_000, "title of more than 10,000 characters"),
    Line("a title of 10 MB", "i7," + "x" * 10_000_000, LONG),
    Line("a title of nested entities", "i8,&" + "amp;" * 1000 + "lt;b>Ball", None),
    Line("a title of an item given without one", "i4,Car", None),
    Line("NUL in a title", "i9,Ba\0ll", None),
]  # fmt: skip


def places(lines: list[Line], first: int) -> list[int]:
    """The line of a file where the last line of each text stands, or its first where quotes span several."""
    found, here = [], first
    for line in lines:
        breaks = line.text.count("\n")
        found.append(here + (0 if line.text.startswith('"') else breaks))
        here += breaks + 1
    return found


@pytest.mark.parametrize(
    ("file", "head", "lines", "good"),
    [
        ("log.csv", "user_id,item_id,timestamp\n", ROWS, GOOD.decode()),
        ("log.jsonl", "", OBJECTS, "".join(record(user_id=f"g{n}") + "\n" for n in range(12))),
        ("items.csv", "item_id,title\n", TITLES, "i1,Ball\ni2,Doll\ni3,Kite\n"),
    ],
)
def test_each_bad_row_is_set_aside_alone(tmp_path: Path, file: str, head: str, lines: list[Line], good: str) -> None:
    good_lines = good.count("\n")
    text = head + good + "".join(f"{line.text}\n" for line in lines)
    is_log = file.startswith("log")
    case = Case(
        "",
        text.encode() if is_log else HEAD + GOOD,
        file=file if is_log else "log.csv",
        items=ITEMS if is_log else text.encode(),
    )
    folder = build(case, tmp_path)
    by_place = dict(zip(places(lines, head.count("\n") + good_lines + 1), lines, strict=True))
    found = pq.read_table(folder / "rejected.parquet").to_pylist()
    reasons = {by_place[row["line"]].name: row["reason"] for row in found}
    assert reasons == {line.name: line.reason for line in lines if line.reason}
    assert len(found) == len(reasons)
    about = read_manifest(folder)["domains"]["toys"]
    assert sum(about["rejected"].values()) == len(found)
    kept = [line for line in lines if line.reason is None]
    if is_log:
        users = pq.read_table(folder / "interactions")["user_id"].to_pylist()
        assert sorted(users) == sorted([*(f"g{n}" for n in range(good_lines)), *(line.user for line in kept)])
        num_malformed = sum(reason.startswith("malformed") for reason in reasons.values())
        assert about["counts"][0]["events"] + num_malformed == good_lines + len(lines), (
            "every row was read or set aside"
        )
    else:
        assert about["num_items"] == good_lines + len(kept)


BYTES = [
    Case("gzip cut short", gzip.compress(HEAD + GOOD * 500)[:-20], file="log.csv.gz",
         error=r"log\.csv\.gz ends in the middle of its compressed data: it is incomplete; fetch it again"),
    Case("gzip with a broken middle", gzip.compress(HEAD + GOOD)[:30] + b"\0" * 60, file="log.csv.gz",
         error=r"log\.csv\.gz: its compressed data are damaged .*fetch it again"),
    Case("gzip with a wrong checksum", gzip.compress(HEAD + GOOD)[:-8] + b"\1" * 8, file="log.csv.gz",
         error=r"log\.csv\.gz: its compressed data are damaged .*fetch it again"),
    Case("gzip with something behind it", gzip.compress(HEAD + GOOD) + b"more", file="log.csv.gz",
         error=r"log\.csv\.gz: its compressed data are damaged"),
    Case("gzip in two pieces is one file", gzip.compress(HEAD) + gzip.compress(GOOD), file="log.csv.gz"),
    Case("gzip of nothing", gzip.compress(b""), file="log.csv.gz", error="the first line is empty, and should name"),
    Case("gzip without its suffix", gzip.compress(HEAD + GOOD),
         error=r"log\.csv is compressed with gzip.*\.gz: rename"),
    Case("a suffix without gzip", HEAD + GOOD, file="log.csv.gz", error=r"is named \.gz but is not .*gzip: rename it"),
    Case("Parquet named csv", parquet(), error=r"log\.csv is not text but Parquet: give it the suffix of what it is"),
    Case("csv named parquet", HEAD + GOOD, file="log.parquet",
         error=r"log\.parquet.*no Parquet file: write or fetch it"),
    Case("zip named csv", b"PK\x03\x04" + b"\0" * 60, error="is not text but a zip archive: .*or unpack it"),
    Case("bzip2 named csv", bz2.compress(HEAD + GOOD), error="is not text but bzip2"),
    Case("UTF-16", (HEAD + GOOD).decode().encode("utf-16"), error="is UTF-16 or UTF-32: save it as UTF-8"),
    Case("UTF-16 without a mark", (HEAD + GOOD).decode().encode("utf-16-le"), error="is UTF-16 or UTF-32"),
    Case("UTF-32", (HEAD + GOOD).decode().encode("utf-32"), error="is UTF-16 or UTF-32"),
    Case("a byte order mark", b"\xef\xbb\xbf" + HEAD + GOOD),
    Case("a byte order mark in the second file", {"a.csv": HEAD + GOOD, "b.csv": b"\xef\xbb\xbf" + timed(T)},
         num_good=13),
    Case("Latin-1 among UTF-8", rows(f"zoë,i1,{T}") + f"café,i1,{T}\n".encode("latin-1"), {15: ENCODING}, ("zoë",)),
    Case("a file in Latin-1", rows() + b"\xe9,i1,1406116800\n" * 13,
         error=r"log\.csv is not UTF-8: 13 rows, as line 14, cannot be read. Save it as UTF-8, with `iconv"),
    Case("NUL in a title is cleaned away", rows(), items=ITEMS.replace(b"Ball", b"Ba\0ll")),
    Case("a tail of NUL after a crash", HEAD + GOOD + b"\0" * 4096, {14: FEW}),
    Case("Windows line ends", (HEAD + GOOD).replace(b"\n", b"\r\n")),
    Case("old Macintosh line ends", (HEAD + GOOD).replace(b"\n", b"\r"), lines_are_rows=False),
    Case("two kinds of line ends", HEAD + GOOD.replace(b"\n", b"\r\n", 3) + b",i1,1\n", {14: "no user id"},
         settings={"timestamps": "seconds"}),
    Case("an empty file", b"", error=r"log\.csv is empty \(interactions of domain 'toys'\)"),
    Case("a header and no rows", HEAD, error="the interactions of domain 'toys' have no rows"),
    Case("items without rows", rows(), items=b"item_id,title\n", error="the items of domain 'toys' have no rows"),
    Case("an unknown suffix", HEAD + GOOD, file="log.xlsx", error=r"\.xlsx is not known; accepted are"),
    Case("a folder named as a file", {"x.csv": None}, settings={"interactions": "*.csv"}, error=r"x\.csv is a folder"),
]  # fmt: skip

DELIMITED = [
    Case("a quote never closed costs one line", rows(f'"a,i1,{T}', f",i1,{T}"), {2: OPEN, 3: "no user id"}),
    Case("a quote closed far away", rows(f'"a,i1,{T}') + b'"b",i1,1406116800\n', {2: AFTER}, ("b",)),
    Case("quotes as ordinary characters", rows(f'"a,i1,{T}'), kept=('"a',), settings={"quote": ""}),
    Case("newlines in quotes of a bad row", rows('"a\nb",i1'), {2: FEW, 3: FEW}),
    Case("no end of the last line", (HEAD + GOOD)[:-1]),
    Case("a note for Excel", b"sep=;\n" + HEAD + GOOD,
         error=r"the first line, 'sep=;', is a note for Excel: delete it, and set interactions.separator=\";\""),
    Case("no header", GOOD, error="where a file has no header, say what its 3 columns are, in order, as int"),
    Case("another separator", (HEAD + GOOD).replace(b",", b";"),
         error='a semicolon separates .*: set interactions.separator=";"'),
    Case("a separator of two characters", (rows(f"a,i1,{T},", "b")).replace(b",", b"::"), {2: MANY, 3: FEW},
         settings={"separator": "::"}, items=ITEMS.replace(b",", b"::")),
    Case("every row longer than the header", HEAD + GOOD.replace(b"\n", b",\n"),
         error=r"12 of 12 rows .* cannot be taken apart .* line 2 \(malformed row: too many columns\).*separator"),
    Case("a column twice", HEAD.replace(b"\n", b",user_id\n") + GOOD, error="the header names user_id twice"),
    Case("a column twice but for its case", HEAD.replace(b"\n", b",User_ID\n") + GOOD,
         error="the header names User_ID and user_id; give each column a name of its own"),
    Case("a column without a name", HEAD.replace(b"\n", b",\n") + GOOD, error="column 4 of the header .* has no name"),
    Case("an empty first line", b"\n" + HEAD + GOOD,
         error=r"log\.csv: the first line is empty, and should name the col"),
    Case("a newline in the header", b'user_id,"item\nid",timestamp\n' + GOOD,
         error="header .* a quote that is not closed"),
    Case("no such column", b"who,what,timestamp\na,i1,1\n",
         error=r"no column for user_id .*Map it: interactions\.columns\.user_id=COL"),
    Case("columns with names of ours", HEAD.replace(b"\n", b",sequence,problem,source_file,line_in_file\n")
         + GOOD.replace(b"\n", b",1,bad,f,7\n")),
    Case("a column missing in the second file", {"a.csv": HEAD + GOOD, "b.csv": b"user_id,item_id\na,i1\n"},
         error=r"b\.csv has no column timestamp, which .*a\.csv has; it has user_id, item_id"),
    Case("another order of columns in the second file",
         {"a.csv": HEAD + GOOD, "b.csv": f"timestamp,user_id,item_id\n{T},a,i1\n".encode()}, kept=("a",)),
    Case("a file named twice counts once", {"a.csv": HEAD + GOOD}, settings={"interactions": ("a.csv", "a*.csv")}),
]  # fmt: skip

VALUES = [
    Case("a rating in words is left out, not the row", column("rating", "five", "inf", "4.5", "nan", ""), alone=True),
    # ---- times
    Case("0 where seconds are asked for", rows("a,i1,0"), kept=("a",), settings={"timestamps": "seconds"}),
    Case("seconds among milliseconds", HEAD + f"a,i1,{T}\n".encode() + GOOD_MS, {2: AMONG}, alone=True),
    Case("seconds and milliseconds", HEAD + GOOD + GOOD_MS[:50],
         error=r"log\.csv: the values of timestamp .* two formats: 12 seconds \(as '1406116800'\) and 2 milliseconds .*"
               "write all of them alike, or choose one with timestamps=seconds, which rejects"),
    Case("seconds and dates", timed(*[T] * 8, *["2014-07-23"] * 4), error="8 seconds .* and 4 iso .*as '2014-07-23'"),
    Case("seconds and dates, seconds chosen", timed(*[T] * 8, "2014-07-23"), {10: BAD_TIME}, num_good=8,
         settings={"timestamps": "seconds"}),
    Case("seconds read as milliseconds", rows(), settings={"timestamps": "milliseconds"},
         error="timestamp in seconds among milliseconds.*say timestamps=seconds"),
    Case("milliseconds among microseconds", timed(*[T * 10**6] * 11, T * 10**3), {13: COARSER}, num_good=11,
         alone=True),
    Case("milliseconds read as nanoseconds", timed(*[T * 10**3] * 3), settings={"timestamps": "nanoseconds"},
         error="timestamp in a coarser unit among nanoseconds.*say timestamps=seconds"),
    Case("positions", timed(1, 2, 3), error="If they only order a user's events, say timestamps=order"),
    Case("days as numbers", timed(20140723, 20140724),
         error="If they are dates, as '20140723' .*write them as 2014-07-23"),
    Case("the day first", timed("23/07/2014", "24/07/2014"),
         error="timestamp cannot be read: '23/07/2014'.*Accepted are"),
    Case("dates with and without a zone", timed("2014-07-23T12:00:00+02:00", "2014-07-23", "2014-07-23 10:00:00"),
         num_good=3, alone=True),
    Case("dates that are none or of no log", timed(*["2014-07-23"] * 5,
         "2014-02-30", "9999-12-31", "0001-01-01", "infinity"),
         {7: BAD_TIME, 8: RANGE, 9: RANGE, 10: BAD_TIME}, num_good=5, alone=True),
    Case("positions with many digits", timed(1, 2, 3, 2**63 - 1, 2**63, "x"), {6: BAD_TIME, 7: BAD_TIME}, num_good=4,
         settings={"timestamps": "order"}),
    # ---- items
    Case("an item twice, first without a title", rows(), {"items.csv 2": "title without a word"},
         items=b"item_id,title\ni1,\ni1,Ball\n"),
    Case("an item whose title is too long", rows(f"a,i9,{T}"),
         {2: "item has no title", "items.csv 5": "title of more than 10,000 characters"},
         items=ITEMS + b"i9," + b"x" * 20_000 + b"\n"),
    Case("an item without a title", rows(f"a,i4,{T}"), {2: "item has no title", "items.csv 5": EMPTIED},
         items=ITEMS + b"i4,<b>...</b>\n"),
    Case("titles in the log that differ", column("title", "Ball", "Bowl", *["Ball"] * 10), items=None),
]  # fmt: skip

JSON = [
    Case("JSON: the first line is none", b"nope\n" + json_lines(), {1: NO_JSON}, file="log.jsonl"),
    as_json("empty lines", "", "  ", record(user_id=""), rejected={15: "no user id"}, lines_are_rows=False),
    Case("JSON: Latin-1 among UTF-8", json_lines() + b'{"user_id": "\xe9"}\n', {13: ENCODING}, file="log.jsonl"),
    Case("JSON: a byte order mark and Windows line ends", b"\xef\xbb\xbf" + json_lines().replace(b"\n", b"\r\n"),
         file="log.jsonl"),
    Case("JSON: one list", b"[\n" + json_lines() + b"]\n", file="log.json",
         error=r"log\.json: line 1 is not a JSON object: '\['; .*one object per line: convert it, with `jq -c '\.\["),
    Case("JSON: one object over several lines", json.dumps({"user_id": "a"}, indent=1).encode(), file="log.json",
         error=r"line 1 is not a JSON object: '\{'; .* with `jq -c '\.' log\.json"),
    Case("JSON: only empty lines", b"\n\n", file="log.json", error="there is no line in it"),
    Case("JSON: keys with signs in them", json_lines().replace(b'"timestamp"', '"", "": 1, "x/y~z": 2, "*": 3, "zeit.é"'
         .replace('"", ', "").encode()), file="log.jsonl", settings={"columns": {"timestamp": "zeit.é"}}),
    Case("JSON: a title that is an object", rows(), {"items.jsonl 2": "title without a word"}, items_file="items.jsonl",
         items=b'{"item_id": "i1", "title": "Ball"}\n{"item_id": "i2", "title": {"en": "Doll"}}\n'),
]  # fmt: skip

PARQUET = [
    Case("Parquet: cut short", parquet()[:-40], file="log.parquet",
         error=r"log\.parquet.*damaged.*: write or fetch it again"),
    Case("Parquet: a broken page", parquet(900)[:40] + b"\xff" * 60 + parquet(900)[100:], file="log.parquet",
         error=r"log\.parquet.*damaged"),
    Case("Parquet: text that is not UTF-8", parquet(user_id=["xxxx"] * 12).replace(b"xxxx", b"\xff\xfe\xff\xfe"),
         file="log.parquet", error=r"log\.parquet.* is not valid UTF8"),
    as_parquet("no rows", 0, {"error": "the interactions of domain 'toys' have no rows"},
               user_id=pa.array([], pa.string())),
    as_parquet("whole numbers as ids", expected={"kept": tuple(map(str, range(10, 22))), "num_good": 0},
               user_id=range(10, 22)),
    as_parquet("floats as ids", 6, {"rejected": {2: "no user id", 3: "no user id"}, "num_good": 0,
               "kept": ("1", "10000000000", "2.5", "7")}, user_id=[1.0, None, math.nan, 2.5, 1e10, 7.0]),
    as_parquet("decimals as ids", 2, {"kept": ("7", "8.50"), "num_good": 0},
               user_id=[Decimal("7.00"), Decimal("8.50")]),
    as_parquet("structs as ids", 1, {"error": "column 'user_id' holds struct.*must be text.*columns.user_id"},
               user_id=[{"a": 1}]),
    as_parquet("lists as ids", 1, {"error": "column 'user_id' holds array<string>"}, user_id=[["a"]]),
    as_parquet("bytes as ids", 1, {"error": "column 'user_id' holds binary"}, user_id=[b"a"]),
    as_parquet("missing times", expected={"rejected": {1: BAD_TIME, 2: BAD_TIME, 3: BAD_TIME}, "num_good": 9},
               timestamp=[None, math.nan, math.inf, *(float(T + n) for n in range(9))]),
    Case("Parquet: ids are numbers in one file and text in another",
         {"a.csv": HEAD + b"7,i1,1406116800\n", "b.parquet": parquet(2, user_id=[7, 8])}, kept=("7", "7", "8"),
         num_good=0),
    Case("Parquet: ids are floats in one file and whole in another",
         {"a.parquet": parquet(3, user_id=[7.0, None, math.nan]), "b.parquet": parquet(2, user_id=[7, 8])},
         {"a.parquet 2": "no user id", "a.parquet 3": "no user id"}, ("7", "7", "8"), num_good=0),
    Case("Parquet: times of two types", {"a.parquet": parquet(timestamp=[datetime(2014, 7, 23, n, tzinfo=UTC) for n in
         range(12)]), "b.csv": timed("2014-07-23T12:00:00Z")}, num_good=13, alone=True),
]  # fmt: skip

CASES = [*BYTES, *DELIMITED, *VALUES, *JSON, *PARQUET]


@pytest.mark.parametrize("case", [case for case in CASES if not case.is_shared], ids=lambda case: case.name)
def test_malformed_input_has_its_outcome(case: Case, tmp_path: Path) -> None:
    if case.error:
        with pytest.raises(DataError) as raised:
            build(case, tmp_path)
        assert re.search(case.error, str(raised.value), re.S), str(raised.value)
        assert not (tmp_path / "data").exists(), "nothing is left that looks complete"
        return
    assert_outcome(case, build(case, tmp_path))


def test_files_of_one_log_are_judged_as_if_each_were_alone(tmp_path: Path) -> None:
    """A log whose files are malformed in all ways at once: reading one takes a third of a second."""
    shared = {f"{number:02}": case for number, case in enumerate(case for case in CASES if case.is_shared)}
    assert len(shared) > 20
    files = {f"{key}-{name}": content for key, case in shared.items() for name, content in case.files.items()}
    rejected = {f"{key}-{where}": why for key, case in shared.items() for where, why in places_of(case).items()}
    kept = sorted(user for case in shared.values() for user in case.kept)
    num_good = sum(case.num_good for case in shared.values())
    folder = build(Case("", files, rejected, tuple(kept), num_good=num_good), tmp_path)
    assert_outcome(Case("", files, rejected, tuple(kept), num_good=num_good), folder)


def places_of(case: Case) -> dict[str, str]:
    """The reasons of rows that are set aside, by 'FILE LINE'."""
    return {f"{case.file} {where}" if isinstance(where, int) else where: why for where, why in case.rejected.items()}


def assert_outcome(case: Case, folder: Path) -> None:
    expected = places_of(case)
    found = pq.read_table(folder / "rejected.parquet").to_pylist()
    assert {f"{Path(row['file']).name} {row['line']}": row["reason"] for row in found} == expected
    assert len(found) == len(expected)
    kept = pq.read_table(folder / "interactions")["user_id"].to_pylist()
    assert sorted(user for user in kept if not re.fullmatch(r"g\d+", user)) == list(case.kept)
    assert len(kept) == case.num_good + len(case.kept)
    # Every row is kept, or counted where it went.
    about = read_manifest(folder)["domains"]["toys"]
    of_log = [row for row in found if not Path(row["file"]).name.startswith("items.")]
    malformed = [row for row in of_log if row["reason"].startswith("malformed")]
    num_read = about["counts"][0]["events"]
    assert num_read == len(kept) + len(of_log) - len(malformed)
    assert sum(about["rejected"].values()) == len(found)
    if isinstance(case.log, bytes) and not case.file.endswith((".parquet", ".gz")) and case.lines_are_rows:
        num_lines = len([line for line in case.log.split(b"\n") if line.strip(b"\r")])
        assert num_read + len(malformed) == num_lines - case.file.endswith(".csv")


def build(case: Case, folder: Path) -> Path:
    for name, content in case.files.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
    if case.items is not None:
        (folder / case.items_file).write_bytes(case.items)
    settings = dict(case.settings)
    patterns = settings.pop("interactions", tuple(case.files))
    source = TableSource(
        domain="toys",
        interactions=tuple(str(folder / name) for name in ((patterns,) if isinstance(patterns, str) else patterns)),
        items=None if case.items is None else str(folder / case.items_file),
        **settings,
    )
    return build_dataset([source], folder / "data", Rules(k_core=0, drop_consecutive_repeats=False, deduplicate=False))


def test_there_are_enough_cases_and_each_has_its_own_name() -> None:
    for cases in (CASES, ROWS, OBJECTS, TITLES):
        assert len({case.name for case in cases}) == len(cases)
    assert len(CASES) + len(ROWS) + len(OBJECTS) + len(TITLES) > 100


def test_ratings_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    case = Case("", column("rating", "five", "inf", "4.5", "nan", "", " 3 "))
    folder = build(case, tmp_path)
    assert read_manifest(folder)["domains"]["toys"]["unread_ratings"] == 2
    ratings = pq.read_table(folder / "interactions", columns=["user_id", "rating"]).to_pylist()
    assert {row["user_id"]: row["rating"] for row in ratings if row["rating"] is not None} == {"g2": 4.5, "g5": 3.0}


def test_whole_numbers_keep_their_digits_as_times_and_order(tmp_path: Path) -> None:
    case = Case("", timed(2**63 - 1, 2**53 + 1, 7, -2), settings={"timestamps": "order"})
    rows = pq.read_table(build(case, tmp_path) / "interactions").to_pylist()
    assert {row["user_id"]: row["timestamp"] for row in rows} == {"g0": 2**63 - 1, "g1": 2**53 + 1, "g2": 7, "g3": -2}


@pytest.mark.parametrize(
    "settings", [{"quote": '""'}, {"separator": "\n"}, {"separator": '"'}, {"separator": ";", "quote": ";"}]
)
def test_separators_and_quotes_that_cannot_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the quote is one character or none, the separator is another"):
        TableSource(domain="toys", interactions="log.csv", **settings)


def test_what_is_kept_but_odd_is_said(tmp_path: Path) -> None:
    """Ids that a program has lost stay ids; numbers that are none are left out; both are told, with an example."""
    values = ["4,5", "85 %", "N/A", "3"]
    events = [f"g{n},i1,{T + n},{values[n % 4]}" for n in range(12)] + [f"\\N,i1,{T},", f"8e+12,i1,{T},"]
    text = "\n".join(["user_id;item_id;timestamp;rating", *(";".join(event.split(",", 3)) for event in events)])
    (tmp_path / "log.csv").write_text(text)
    (tmp_path / "items.csv").write_text("item_id;title;price\ni1;Ball;1,234\ni2;Doll;3\n")
    source = TableSource(
        domain="toys",
        interactions=str(tmp_path / "log.csv"),
        items=str(tmp_path / "items.csv"),
        separator=";",
    )
    said: list[str] = []
    folder = build_dataset([source], tmp_path / "data", Rules(k_core=0), progress=lambda line: said.append(line))
    assert [line for line in said if "note" in line] == [
        "note: toys: the comma in rating is the decimal sign, as in '4,5'",
        "note: toys: 3 values of rating are not numbers, as '85 %', and are left out",
        "note: toys: 1 values of price are another number with a decimal point than with a decimal comma, as '1,234', "
        "and are left out; say which it is: items.decimal=. or items.decimal=,",
        "note: toys: 2 events have an id such as '\\\\N', which is taken as it stands: is it a missing value, or a "
        "number that a spreadsheet has rounded?",
    ]
    about = read_manifest(folder)["domains"]["toys"]
    assert (about["unread_ratings"], about["unread_prices"], about["decimal_commas"]) == (3, 1, ["rating"])
