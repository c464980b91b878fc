"""The order of events is that of the times given, to the microsecond, in whatever form a source gives them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.data.build import build_dataset
from cprec.data.config import ConnectionSource, Rules, SplitSpec, TableSource
from cprec.data.dataset import read_dataset, read_manifest, read_split
from cprec.data.interactions import SECOND
from cprec.data.sequences import build_sequences
from cprec.data.sources.memory import MemorySource
from cprec.data.splits import make_split
from cprec.text.export import export, read_frame

START = 1_577_836_800 * SECOND  # 2020-01-01
SEED = random.Random(3)
MOMENTS = [START + SEED.randrange(3 * SECOND) for _ in range(40)]
"""Microseconds since 1970, in no order, most of them in a second that has others."""
BERLIN = timezone(timedelta(hours=1))


def moment(time: int, zone: timezone = UTC) -> datetime:
    return datetime.fromtimestamp(0, zone) + timedelta(microseconds=time)


def naive(time: int) -> datetime:
    return moment(time).replace(tzinfo=None)


@dataclass(frozen=True)
class Form:
    """How a source writes times: what it writes, of which Arrow type in Parquet, and what is left of a time."""

    file: str
    write: Callable[[int], Any]
    type: pa.DataType | None = None
    left: Callable[[int], int] = int
    """Microseconds since 1970 that can be known from it."""
    timestamps: str = "auto"


def milliseconds(time: int) -> int:
    return time // 1000 * 1000


def days(time: int) -> int:
    return time // (86_400 * SECOND) * 86_400 * SECOND


FORMS = {
    "text: seconds": Form("csv", lambda t: f"{t // SECOND}.{t % SECOND:06}"),
    "text: tenths of seconds": Form("csv", lambda t: f"{t // 100_000 / 10}", left=lambda t: t // 100_000 * 100_000),
    "text: milliseconds": Form("csv", lambda t: t // 1000, left=milliseconds),
    "text: milliseconds with fractions": Form("csv", lambda t: Decimal(t) / 1000),
    "text: microseconds": Form("csv", lambda t: t),
    "text: nanoseconds": Form("csv", lambda t: t * 1000 + 999),
    "text: ISO": Form("csv", lambda t: moment(t).isoformat()),
    "text: ISO, no zone, a space": Form("csv", lambda t: naive(t).isoformat(" ")),
    "text: ISO, another zone": Form("csv", lambda t: moment(t, BERLIN).isoformat()),
    "text: ISO, milliseconds, Z": Form(
        "csv", lambda t: naive(t).isoformat(timespec="milliseconds") + "Z", left=milliseconds
    ),
    "text: dots": Form("csv", lambda t: f"{naive(t):%d.%m.%Y %H:%M:%S.%f}"),
    "text: dots, days": Form("csv", lambda t: f"{naive(t).day}.{naive(t).month}.{naive(t).year}", left=days),
    "text: ISO, nanoseconds": Form("csv", lambda t: naive(t).isoformat(timespec="microseconds") + "999Z"),
    "JSON: floats": Form("jsonl", lambda t: t / SECOND),
    "JSON: milliseconds": Form("jsonl", lambda t: t // 1000, left=milliseconds),
    "JSON: ISO": Form("jsonl", lambda t: moment(t).isoformat()),
    "Parquet: floats": Form("parquet", lambda t: t / SECOND, pa.float64()),
    "Parquet: decimals": Form("parquet", lambda t: Decimal(t) / SECOND, pa.decimal128(20, 6)),
    "Parquet: milliseconds": Form("parquet", lambda t: t // 1000, pa.int64(), milliseconds),
    "Parquet: microseconds": Form("parquet", lambda t: t, pa.int64()),
    "Parquet: nanoseconds": Form("parquet", lambda t: t * 1000 + 999, pa.int64()),
    "Parquet: nanoseconds, named": Form("parquet", lambda t: t * 1000, pa.int64(), timestamps="nanoseconds"),
    "Parquet: nanoseconds as floats": Form(
        "parquet", lambda t: t * 1000.0, pa.float64(), lambda t: int(t * 1000.0) // 1000
    ),
    "Parquet: timestamps in ms": Form("parquet", lambda t: t // 1000, pa.timestamp("ms"), milliseconds),
    "Parquet: timestamps in us": Form("parquet", lambda t: t, pa.timestamp("us")),
    "Parquet: timestamps in us, zone": Form("parquet", lambda t: t, pa.timestamp("us", "Europe/Berlin")),
    "Parquet: timestamps in ns": Form("parquet", lambda t: t * 1000 + 400, pa.timestamp("ns")),
    "Parquet: timestamps in ns, zone": Form("parquet", lambda t: t * 1000 + 400, pa.timestamp("ns", "UTC")),
    "DuckDB: TIMESTAMP_MS": Form("db", lambda t: naive(milliseconds(t)), left=milliseconds),
    "DuckDB: TIMESTAMP": Form("db", naive),
    "DuckDB: TIMESTAMP_NS": Form("db", naive),
    "DuckDB: TIMESTAMPTZ": Form("db", moment),
    "DuckDB: DECIMAL(20,6)": Form("db", lambda t: Decimal(t) / SECOND),
    "positions: seconds": Form("csv", lambda t: f"{t // SECOND}.{t % SECOND:06}", timestamps="order"),
    "positions: nanoseconds": Form("csv", lambda t: t * 1000, timestamps="order"),
}


def source_of(folder: Path, name: str, form: Form) -> TableSource | ConnectionSource:
    """A user's events at `MOMENTS` in some form; item n is that of the n-th."""
    domain = "".join(sign if sign.isalnum() else "_" for sign in name)
    log, items = folder / f"{domain}.{form.file}", folder / "items.csv"
    items.write_text("item_id,title\n" + "".join(f"{n},Title {n}\n" for n in range(len(MOMENTS))))
    values = [form.write(time) for time in MOMENTS]
    if form.file == "csv":
        log.write_text("user_id,item_id,timestamp\n" + "".join(f"u,{n},{value}\n" for n, value in enumerate(values)))
    elif form.file == "jsonl":
        rows = [{"user_id": "u", "item_id": str(n), "timestamp": value} for n, value in enumerate(values)]
        log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form.file == "parquet":
        ids = [str(n) for n in range(len(values))]
        columns = {"user_id": ["u"] * len(values), "item_id": ids, "timestamp": pa.array(values, form.type)}
        pq.write_table(pa.table(columns), log)
    else:
        kind = name.partition(": ")[2]
        with duckdb.connect(str(log)) as connection:
            connection.execute("SET TimeZone = 'UTC'")
            connection.execute(f"CREATE TABLE log (user_id TEXT, item_id TEXT, timestamp {kind})")
            connection.executemany("INSERT INTO log VALUES ('u', ?, ?)", list(enumerate(values)))
            connection.execute(f"CREATE TABLE items AS FROM '{items}'")
        return ConnectionSource(domain=domain, url=f"duckdb://{log}", interactions="log", items="items")
    return TableSource(
        domain=domain,
        interactions=str(log),
        items=str(items),
        timestamps=form.timestamps,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def every_form(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[int], list[int]]]:
    """Of each form what was read: the numbers of the events in order, and their times."""
    folder = tmp_path_factory.mktemp("times")
    sources = {name: source_of(folder, name, form) for name, form in FORMS.items()}
    data = build_dataset(list(sources.values()), folder / "data", Rules(k_core=0))
    catalogue, log, _ = read_dataset(data)
    found = {}
    for name, source in sources.items():
        mask = catalogue.domain[log.item] == catalogue.domain_index(source.domain)
        found[name] = [int(item) for item in catalogue.item_id[log.item[mask]]], log.time[mask].tolist()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_the_order_is_that_of_the_given_times(name: str, every_form: Any) -> None:
    form, (numbers, times) = FORMS[name], every_form[name]
    known = [form.left(time) for time in MOMENTS]
    assert numbers == sorted(range(len(MOMENTS)), key=lambda n: known[n]), "Python's sort keeps the order of equals"
    if not name.startswith("positions"):
        assert times == sorted(known)


# ---- what follows from the order -------------------------------------------------------------------------------------


def memory(domain: str, rows: list[tuple[str, str, float]], has_times: bool = True) -> MemorySource:
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    names = sorted(set(items))
    titles = pa.table({"item_id": names, "title": names})
    log = pa.table({"user_id": users, "item_id": items, "timestamp": pa.array(times, pa.float64())})
    return MemorySource(domain, "shop", titles, log, has_times)


def test_times_of_one_second_decide_duplicates_repeats_targets_and_mixed_sequences(tmp_path: Path) -> None:
    films = [("u", "a", 7.5), ("u", "b", 7.125), ("u", "a", 7.25), ("u", "c", 7.0), ("u", "a", 7.5), ("u", "d", 7.375)]
    toys = [("u", "x", 7.0625), ("u", "y", 7.3125), ("u", "y", 7.4375)]
    data = build_dataset([memory("films", films), memory("toys", toys)], tmp_path / "data", Rules(k_core=0))
    catalogue, log, domains = read_dataset(data)
    # c, x, b, a, y, d, a: the second 'a' at 7.5 is a duplicate, the one at 7.25 is none; the second y is a repeat.
    assert catalogue.item_id[log.item].tolist() == ["c", "x", "b", "a", "y", "d", "a"]
    assert (log.time / SECOND).tolist() == [7.0, 7.0625, 7.125, 7.25, 7.3125, 7.375, 7.5]
    split = make_split(catalogue, log, domains, SplitSpec(method="last-n", num_test=2))
    queries = split.queries("films", "test", max_history=9)
    assert catalogue.item_id[queries.target].tolist() == ["d", "a"]
    assert (queries.time / SECOND).tolist() == [7.375, 7.5]
    cut = SplitSpec(
        method="global-time", validation_from="1970-01-01T00:00:07.2", test_from="1970-01-01T00:00:07.312500"
    )
    assert make_split(catalogue, log, domains, cut).part.tolist() == [0, 0, 0, 1, 2, 2, 2]
    shares = SplitSpec(method="global-time", validation_fraction=0.2, test_fraction=0.2)
    assert make_split(catalogue, log, domains, shares).part.tolist() == [0, 0, 0, 0, 1, 2, 2]
    mixed = build_sequences(split, ("films", "toys"), min_events=1, kinds=("mixed",))
    assert catalogue.item_id[log.item[mixed.event]].tolist() == ["c", "x", "b", "y"], "toys are too few to be split"


def test_positions_with_fractions_keep_their_order(tmp_path: Path) -> None:
    rows = [("u", "a", 1.75), ("u", "b", 1.25), ("u", "c", -0.5), ("u", "d", 1.5), ("v", "a", 9.5)]
    data = build_dataset([memory("films", rows, has_times=False)], tmp_path / "data", Rules(k_core=0))
    catalogue, log, _ = read_dataset(data)
    assert catalogue.item_id[log.item[log.user == log.user[0]]].tolist() in (["c", "b", "d", "a"], ["a"])
    assert sorted(catalogue.item_id[log.item].tolist()) == ["a", "a", "b", "c", "d"]


@pytest.mark.parametrize(
    "order", [[2.5, 2.25, 2.75], [2**62 + 1, 2**62, 2**62 + 2], [naive(START + n) for n in (2, 1, 3)]]
)
def test_the_source_s_order_of_equal_times_has_all_its_digits(order: list[Any], tmp_path: Path) -> None:
    items = pa.table({"item_id": ["a", "b", "c"], "title": ["a", "b", "c"]})
    log = pa.table({"user_id": ["u"] * 3, "item_id": ["a", "b", "c"], "timestamp": [5, 5, 5], "order": order})
    source = MemorySource("films", "shop", items, log)
    catalogue, read, _ = read_dataset(build_dataset([source], tmp_path / "data", Rules(k_core=0)))
    assert catalogue.item_id[read.item].tolist() == ["b", "a", "c"]


def test_a_folder_made_before_has_whole_seconds(tmp_path: Path) -> None:
    rows = [("u", "a", 3.0), ("u", "b", 1.0), ("u", "c", 2.0)]
    data = build_dataset([memory("films", rows)], tmp_path / "data", Rules(k_core=0))
    new = read_dataset(data)[1]
    (path,) = data.glob("interactions/*/*.parquet")
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["microsecond"]), path)
    old = read_dataset(data)[1]
    assert old.time.tolist() == new.time.tolist() == [SECOND, 2 * SECOND, 3 * SECOND]


# ---- a data folder as a whole ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clicks some milliseconds apart, split by time within one second."""
    from cprec.text.config import PrepareConfig
    from cprec.text.prepare import prepare

    folder = tmp_path_factory.mktemp("shop")
    generator = random.Random(5)
    rows = [
        (f"u{user}", f"i{generator.randrange(9)}", START // 1000 + time)
        for user in range(12)
        for time in generator.sample(range(5000), 12)
    ]
    generator.shuffle(rows)
    (folder / "log.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    words = ["ember", "stone", "cedar", "ivory", "delta", "pearl", "olive", "maple", "amber"]
    (folder / "items.csv").write_text("item_id,title\n" + "".join(f"i{n},{word} {n}\n" for n, word in enumerate(words)))
    source = TableSource(
        domain="toys", platform="shop", interactions=str(folder / "log.csv"), items=str(folder / "items.csv")
    )
    return prepare(
        PrepareConfig(
            tables=(source,),
            target_domains=("toys",),
            output_dir=str(folder / "data"),
            k_core=0,
            min_events=3,
            split=SplitSpec(method="global-time"),
        )
    )


@pytest.mark.slow
def test_a_split_within_a_second_is_certified_and_exported(shop: Path, tmp_path: Path) -> None:
    assert json.loads((shop / "certificate.json").read_text())["clean"]
    split, cuts = read_split(shop), read_manifest(shop)["cuts"]
    assert cuts["test"] % 1, "a cut within a second"
    log = split.interactions
    assert ((log.time / SECOND >= cuts["test"]) == split.events("test")).all()
    ordered = np.lexsort((log.time, log.user))
    assert (ordered == np.arange(len(log))).all()
    queries = pq.read_table(shop / "queries/toys/test.parquet")
    asked = split.queries("toys", "test", max_history=50)
    times = [row["timestamp"] * SECOND + row["microsecond"] for row in queries.to_pylist()]
    assert times == asked.time.tolist()
    lines = (export(shop, "recbole", tmp_path / "recbole") / "toys" / "toys.inter").read_text().splitlines()[1:]
    assert [round(Decimal(line.split("\t")[3]) * SECOND) for line in lines] == log.time.tolist()
    train = log.time[split.events("train")]
    seconds = read_frame(shop, "replay", "toys", "train")["timestamp"]
    assert (seconds.to_numpy() * SECOND).round().astype(int).tolist() == train.tolist()
    assert read_frame(shop, "rectools", "toys", "train")["datetime"].astype("int64").tolist() == train.tolist()
