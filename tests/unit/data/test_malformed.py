"""Malformed input, case by case: which rows are set aside with which reason, or which error names the fix."""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.data.build import build_dataset
from cprec.data.dataset import read_manifest
from cprec.data.sources.tables import TableSource
from cprec.errors import DataError

HEAD = b"user_id,item_id,timestamp\n"
T = 1_406_116_800
GOOD = b"".join(b"g%d,i1,%d\n" % (n, T + n) for n in range(12))
"""Twelve good events, so that a bad one is no majority."""
ITEMS = b"item_id,title\ni1,Ball\ni2,Doll\ni3,Kite\n"


@dataclass(frozen=True)
class Case:
    """Files by name; then either what `rejected` must hold as (line, reason), or what the error must say."""

    name: str
    log: bytes = HEAD + GOOD
    items: bytes = ITEMS
    rejected: tuple[tuple[int, str], ...] = ()
    error: str = ""
    kept: int = 12
    log_name: str = "log.csv"
    items_name: str = "items.csv"
    settings: Mapping[str, Any] = field(default_factory=dict)


def rows(*lines: str) -> bytes:
    """A log of these lines, then the good ones."""
    return HEAD + "".join(f"{line}\n" for line in lines).encode() + GOOD


def json_log(*lines: str) -> bytes:
    good = [f'{{"user_id": "g{n}", "item_id": "i1", "timestamp": {T + n}}}' for n in range(12)]
    return "".join(f"{line}\n" for line in [*good, *lines]).encode()


def parquet(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


PARQUET = parquet(user_id=[f"g{n}" for n in range(12)], item_id=["i1"] * 12, timestamp=[T + n for n in range(12)])

CASES = [
    # ---- bytes
    Case(
        "gzip cut short",
        gzip.compress(HEAD + GOOD * 500)[:-20],
        log_name="log.csv.gz",
        error=r"log\.csv\.gz ends in the middle of its compressed data: it is incomplete; fetch it again",
    ),
    Case(
        "gzip with a broken middle",
        gzip.compress(HEAD + GOOD)[:30] + b"\0" * 40,
        log_name="log.csv.gz",
        error="log.csv.gz",
    ),
    Case(
        "gzip without its suffix",
        gzip.compress(HEAD + GOOD),
        error=r"compressed with gzip, but its name does not end in \.gz: rename",
    ),
    Case(
        "a suffix without gzip",
        HEAD + GOOD,
        log_name="log.csv.gz",
        error=r"log\.csv\.gz is named \.gz but is not compressed.*rename it, or fetch it again",
    ),
    Case("Parquet named csv", PARQUET, error="is no text but Parquet: give it the suffix of what it is"),
    Case("csv named parquet", HEAD + GOOD, log_name="log.parquet", error=r"log\.parquet: .*[Pp]arquet"),
    Case("Parquet cut short", PARQUET[:-40], log_name="log.parquet", error=r"log\.parquet: "),
    Case("zip named csv", b"PK\x03\x04" + b"\0" * 60, error="is no text but a zip archive: .*unpack it"),
    Case("UTF-16", (HEAD + GOOD).decode().encode("utf-16"), error="is UTF-16 or UTF-32: save it as UTF-8"),
    Case("a byte order mark", b"\xef\xbb\xbf" + HEAD + GOOD),
    Case(
        "Latin-1 among UTF-8",
        rows() + "café,i1,1406116800\n".encode("latin-1"),
        rejected=((14, "malformed row: invalid encoding"),),
    ),
    Case("NUL in an id stays as given", rows() + b"a\0b,i1,1406116800\n", kept=13),
    Case("NUL in a title is cleaned", items=b"item_id,title\ni1,Ba\0ll\n"),
    Case("Windows line ends", (HEAD + GOOD).replace(b"\n", b"\r\n")),
    Case("old Mac line ends", (HEAD + GOOD).replace(b"\n", b"\r")),
    Case("two kinds of line ends", HEAD + GOOD.replace(b"\n", b"\r\n", 3)),
    Case("empty file", b"", error=r"log\.csv is empty"),
    Case("header only", HEAD, error="the interactions of domain 'toys' have no rows"),
    Case("empty items", items=b"item_id,title\n", error="the items of domain 'toys' have no rows"),
    Case("unknown suffix", HEAD + GOOD, log_name="log.xlsx", error=r"\.xlsx is not known; accepted are"),
    # ---- rows of delimited files
    Case("too few fields", rows("a,i1"), rejected=((2, "malformed row: missing columns"),)),
    Case("too many fields", rows("a,i1,1406116800,9"), rejected=((2, "malformed row: too many columns"),)),
    Case(
        "many bad rows before a good one",
        rows("a", "b", "c", ",i1,1406116800"),
        rejected=(
            (2, "malformed row: missing columns"),
            (3, "malformed row: missing columns"),
            (4, "malformed row: missing columns"),
            (5, "no user id"),
        ),
    ),
    Case(
        "text after a closing quote",
        rows('"a"b,i1,1406116800'),
        rejected=((2, "malformed row: text after a closing quote"),),
    ),
    Case(
        "a quote never closed",
        rows('"a,i1,1406116800', ",i1,1406116800"),
        rejected=((2, "malformed row: quote is not closed"), (3, "no user id")),
    ),
    Case(
        "newlines inside quotes", rows('"a\nb",i1,1406116800', ",i1,1406116800"), rejected=((4, "no user id"),), kept=13
    ),
    Case("empty lines", rows("", "", ",i1,1406116800"), rejected=((4, "no user id"),)),
    Case("a line of blanks", rows("   "), rejected=((2, "malformed row: missing columns"),)),
    Case("no line end at the end", (HEAD + GOOD)[:-1]),
    Case(
        "another separator",
        HEAD.replace(b",", b";") + GOOD.replace(b",", b";"),
        error='a semicolon separates the fields: set separator=";"',
    ),
    Case(
        "a title of 10 MB",
        items=ITEMS + b"i9," + b"x" * 10_000_000 + b"\n",
        rejected=((5, "malformed row: line size over maximum"),),
    ),
    Case("a column twice", b"user_id,item_id,timestamp,user_id\n", error="the header names user_id twice"),
    Case("a column without a name", b"user_id,item_id,timestamp,\n", error="column 4 of the header .* has no name"),
    Case(
        "no such column",
        b"who,what,timestamp\na,i1,1\n",
        error=r"no column for user_id .*Map it: columns\.user_id=COLUMN",
    ),
    # ---- values
    Case(
        "no user, no item",
        rows(",i1,1406116800", "a,,1406116800", "a,  ,1406116800"),
        rejected=((2, "no user id"), (3, "no item id"), (4, "no item id")),
    ),
    Case("unknown item", rows("a,i99,1406116800"), rejected=((2, "item is not in the items table"),)),
    Case("unreadable time", rows("a,i1,soon"), rejected=((2, "timestamp cannot be read"),)),
    Case(
        "time is NaN or infinite",
        rows("a,i1,nan", "a,i1,inf"),
        rejected=((2, "timestamp cannot be read"), (3, "timestamp cannot be read")),
    ),
    Case("negative time", rows("a,i1,-5"), rejected=((2, "timestamp before 1970 or after 2099"),)),
    Case("far-future time", rows("a,i1,99999999999"), rejected=((2, "timestamp before 1970 or after 2099"),)),
    Case(
        "milliseconds among seconds", rows("a,i1,1406116800000"), rejected=((2, "timestamp before 1970 or after 2099"),)
    ),
    Case(
        "seconds among milliseconds",
        HEAD + b"a,i1,1406116800\n" + GOOD.replace(b",14", b",1400"),
        rejected=((2, "timestamp in seconds among milliseconds"),),
    ),
    Case(
        "seconds read as milliseconds",
        settings={"timestamps": "milliseconds"},
        error="timestamp in seconds among milliseconds.*say timestamps=seconds",
    ),
    Case(
        "times that are positions",
        HEAD + b"a,i1,1\na,i2,2\n",
        error="If they only order a user's events, say timestamps=order",
    ),
    Case(
        "day first",
        HEAD + b"a,i1,23/07/2014\nb,i1,24/07/2014\n",
        error="timestamp cannot be read: '23/07/2014'.*Accepted are",
    ),
    Case(
        "dates with and without a zone",
        HEAD + b"a,i1,2014-07-23T12:00:00+02:00\nb,i1,2014-07-23\nc,i1,2014-07-23 10:00:00\n",
        kept=3,
    ),
    Case("a rating in words", HEAD.replace(b"\n", b",rating\n") + GOOD.replace(b"\n", b",five stars\n")),
    Case("ids with blanks around stay as given", rows(" g0 ,i1,1406116800"), kept=13),
    Case(
        "look-alike ids stay apart",
        rows("g\u0430,i1,1406116800", "ga,i1,1406116800", "e\u0301,i1,1406116800", "\u00e9,i1,1406116800"),
        kept=16,
    ),
    # ---- items
    Case(
        "item twice, another title",
        items=ITEMS + b"i1,Cube\n",
        rejected=((5, "item id occurs before with another title"),),
    ),
    Case("item twice, the same title", items=ITEMS + b"i1, Ball.\n", rejected=((5, "item id occurs before"),)),
    Case(
        "item twice, first without a title",
        items=b"item_id,title\ni1,\ni1,Ball\n",
        rejected=((2, "title without a word"),),
    ),
    Case(
        "item without a title",
        rows("a,i4,1406116800"),
        items=ITEMS + b"i4,...\n",
        rejected=((2, "item has no title"), (5, "title without a word")),
    ),
    Case("item without an id", items=ITEMS + b",Top\n", rejected=((5, "no item id"),)),
    # ---- JSON lines
    Case(
        "a line that is no JSON",
        json_log("nope"),
        log_name="log.jsonl",
        rejected=((13, "malformed row: no JSON object"),),
    ),
    Case(
        "JSON cut short",
        json_log('{"user_id": "a", "item'),
        log_name="log.jsonl",
        rejected=((13, "malformed row: no JSON object"),),
    ),
    Case(
        "JSON that is no object",
        json_log("[1, 2]", '"text"', "null"),
        log_name="log.jsonl",
        rejected=tuple((n, "malformed row: no JSON object") for n in (13, 14, 15)),
    ),
    Case(
        "one JSON array",
        b"[\n" + json_log() + b"]\n",
        log_name="log.json",
        error="line 1 is not a JSON object.*one object per line",
    ),
    Case(
        "JSON nulls and missing keys",
        json_log(f'{{"user_id": null, "item_id": "i1", "timestamp": {T}}}', f'{{"item_id": "i1", "timestamp": {T}}}'),
        log_name="log.jsonl",
        rejected=((13, "no user id"), (14, "no user id")),
    ),
    Case(
        "JSON numbers as ids keep their digits",
        json_log(f'{{"user_id": 12345678901234567890, "item_id": "i1", "timestamp": {T}}}'),
        log_name="log.jsonl",
        kept=13,
    ),
    Case("empty lines in JSON", json_log("", "{}"), log_name="log.jsonl", rejected=((14, "no user id"),)),
    # ---- Parquet
    Case(
        "Parquet numbers as ids",
        parquet(user_id=list(range(12)), item_id=["i1"] * 12, timestamp=[T + n for n in range(12)]),
        log_name="log.parquet",
    ),
    Case(
        "Parquet floats as ids",
        parquet(
            user_id=[1.0, None, *map(float, range(3, 13))], item_id=["i1"] * 12, timestamp=[T + n for n in range(12)]
        ),
        log_name="log.parquet",
        rejected=((2, "no user id"),),
        kept=11,
    ),
    Case(
        "Parquet missing times",
        parquet(
            user_id=[f"g{n}" for n in range(12)],
            item_id=["i1"] * 12,
            timestamp=pa.array([None, *(T + n for n in range(11))]),
        ),
        log_name="log.parquet",
        rejected=((1, "timestamp cannot be read"),),
        kept=11,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_malformed_input_has_its_outcome(case: Case, tmp_path: Path) -> None:
    (tmp_path / case.log_name).write_bytes(case.log)
    (tmp_path / case.items_name).write_bytes(case.items)
    source = TableSource(
        domain="toys",
        interactions=str(tmp_path / case.log_name),
        items=str(tmp_path / case.items_name),
        **case.settings,
    )

    def build() -> Path:
        return build_dataset(
            [source], tmp_path / "data", min_user_events=0, min_item_events=0, drop_consecutive_repeats=False
        )

    if case.error:
        with pytest.raises(DataError) as raised:
            build()
        assert re.search(case.error, str(raised.value), re.S), str(raised.value)
        assert not (tmp_path / "data").exists(), "nothing is left that looks complete"
        return
    folder = build()
    found = pq.read_table(folder / "rejected.parquet").to_pylist()
    assert sorted((row["line"], row["reason"]) for row in found) == sorted(case.rejected)
    assert all(Path(row["file"]).name in (case.log_name, case.items_name) for row in found)
    about = read_manifest(folder)["domains"]["toys"]
    assert about["num_events"] == case.kept
    # Every row is kept, or counted where it went.
    of_log = sum(row["file"].endswith(case.log_name) for row in found)
    malformed = sum(row["reason"].startswith("malformed") and row["file"].endswith(case.log_name) for row in found)
    assert about["counts"][0]["events"] + malformed == case.kept + of_log
    assert sum(about["rejected"].values()) == len(found)


def ids_of(tmp_path: Path, log: bytes, name: str) -> list[str]:
    (tmp_path / name).write_bytes(log)
    (tmp_path / "items.csv").write_bytes(ITEMS)
    source = TableSource(domain="toys", interactions=str(tmp_path / name), items=str(tmp_path / "items.csv"))
    folder = build_dataset([source], tmp_path / "data", min_user_events=0, min_item_events=0)
    table = pq.read_table(folder / "interactions" / "domain=toys" / "part-0.parquet")
    return sorted(set(table["user_id"].to_pylist()))


@pytest.mark.parametrize(
    ("name", "log", "expected"),
    [
        (
            "log.parquet",
            parquet(user_id=[1.0, 2.5, 1e15], item_id=["i1"] * 3, timestamp=[T, T + 1, T + 2]),
            ["1", "1000000000000000", "2.5"],
        ),
        (
            "log.jsonl",
            f'{{"user_id": 12345678901234567890, "item_id": "i1", "timestamp": {T}}}\n'.encode(),
            ["12345678901234567890"],
        ),
    ],
)
def test_ids_are_text_whatever_their_type(tmp_path: Path, name: str, log: bytes, expected: list[str]) -> None:
    assert ids_of(tmp_path, log, name) == expected


def test_numbers_in_one_file_and_text_in_another_are_one_user(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(HEAD + b"7,i1,1406116800\n")
    (tmp_path / "b.parquet").write_bytes(parquet(user_id=[7], item_id=["i2"], timestamp=[T]))
    (tmp_path / "items.csv").write_bytes(ITEMS)
    sources = [
        TableSource(domain=domain, interactions=str(tmp_path / name), items=str(tmp_path / "items.csv"))
        for domain, name in (("dolls", "b.parquet"), ("toys", "a.csv"))
    ]
    folder = build_dataset(sources, tmp_path / "data", min_user_events=0, min_item_events=0)
    assert pq.read_table(folder / "interactions")["user_id"].to_pylist() == ["7", "7"]


def test_ratings_that_are_no_numbers_are_counted(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"user_id,item_id,timestamp,rating\na,i1,1406116800,good\nb,i1,1406116800,4\n")
    (tmp_path / "items.csv").write_bytes(ITEMS)
    source = TableSource(domain="toys", interactions=str(tmp_path / "log.csv"), items=str(tmp_path / "items.csv"))
    folder = build_dataset([source], tmp_path / "data", min_user_events=0, min_item_events=0)
    about = read_manifest(folder)["domains"]["toys"]
    assert (about["num_events"], about["unread_ratings"]) == (2, 1)


def test_there_are_at_least_forty() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)
