from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.data.build import build_dataset
from cprec.data.config import RecBoleSource, Rules, SplitSpec, TableSource
from cprec.data.dataset import finish_part, read_dataset, read_manifest, read_split, slot_of, write_manifest
from cprec.data.sources.memory import MemorySource
from cprec.data.splits import Split, make_split
from cprec.errors import ConfigError, DataError
from cprec.provenance import file_sha256

Rows = Sequence[tuple[str, str, int]]


def source_of(
    rows: Rows, domain: str = "toys", platform: str = "shop", titles: dict[str, str] | None = None, **settings: Any
) -> MemorySource:
    """A domain from rows (user, item, time); every item has a title."""
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    named = titles if titles is not None else {item: f"Title of {item}" for item in items}
    return MemorySource(
        domain,
        platform,
        pa.table({"item_id": list(named), "title": pa.array(list(named.values()), pa.string())}),
        pa.table({"user_id": pa.array(users, pa.string()), "item_id": items, "timestamp": pa.array(times, pa.int64())}),
        **settings,
    )


def build(tmp_path: Path, *sources: Any, **settings: Any) -> Path:
    """`build_dataset` without a minimum of events; settings are those of `Rules`, or its own."""
    rules = {name: settings.pop(name) for name in Rules.__dataclass_fields__ if name in settings}
    return build_dataset(sources, tmp_path / "data", Rules(**{"k_core": 0} | rules), **settings)


def events(folder: Path, domain: str = "toys") -> list[tuple[str, str, int]]:
    """(user, item, time), users by id, each user's in the order of the file."""
    table = pq.read_table(folder / "interactions" / f"domain={domain}" / "part-0.parquet").to_pylist()
    rows = [(row["user_id"], row["item_id"], row["timestamp"]) for row in table]
    return sorted(rows, key=lambda row: row[0])


def rejected(folder: Path) -> list[tuple[str, int, str, str]]:
    rows = pq.read_table(folder / "rejected.parquet").to_pylist()
    return [(Path(row["file"]).name, row["line"], row["reason"], row["row"]) for row in rows]


def test_a_log_that_tests_make_in_memory_is_what_is_built(tmp_path: Path, split_of_rows: Callable[..., Split]) -> None:
    """`split_of_rows` stands in for `build_dataset` where other tests only need a log."""
    ids = [f"i{number}" for number in (10, 9, 2)]
    rows = [(f"u{user}", (user + n) % 3, n // 2) for user in range(7) for n in range(3 + user % 4)]
    folder = build(tmp_path, source_of([(user, ids[item], time) for user, item, time in rows], "tiny", "p"))
    built, made = make_split(*read_dataset(folder), SplitSpec()), split_of_rows("tiny", ids, rows)
    assert made.catalogue.item_id.tolist() == built.catalogue.item_id.tolist()
    assert (made.spec, made.domains, made.part.tolist()) == (built.spec, built.domains, built.part.tolist())
    assert made.interactions.platforms == built.interactions.platforms
    for name in ("user_platform", "user_id", "user", "item", "time", "rating"):
        one, other = getattr(made.interactions, name), getattr(built.interactions, name)
        np.testing.assert_array_equal(one, other, err_msg=name)
        assert one.dtype == other.dtype


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_the_core_is_iterated(tmp_path: Path) -> None:
    # d has one event only and goes; then z has one event left and goes; then c has one event left and goes. The rest
    # is a core: a and b with two events each on x and y.
    rows = [("a", "x", 1), ("a", "y", 2), ("b", "x", 1), ("b", "y", 2), ("c", "x", 1), ("c", "z", 2), ("d", "z", 1)]
    folder = build(tmp_path, source_of(rows), k_core=2)
    assert events(folder) == [("a", "x", 1), ("a", "y", 2), ("b", "x", 1), ("b", "y", 2)]
    about = read_manifest(folder)["domains"]["toys"]
    assert about["counts"][0] == {"rule": "read", "events": 7, "users": 4, "items": 3}
    assert about["counts"][-1]["too_few_events"] == 3
    assert (about["num_items"], about["num_users"], about["num_events"]) == (2, 2, 4)
    assert read_dataset(folder)[0].item_id.tolist() == ["x", "y"], "items outside the core leave the catalogue"


def test_without_a_core_every_item_with_a_title_stays(tmp_path: Path) -> None:
    folder = build(tmp_path, source_of([("a", "x", 1)], titles={"x": "X", "unsold": "Y"}))
    assert read_dataset(folder)[0].item_id.tolist() == ["unsold", "x"]


def test_duplicates_and_repeats(tmp_path: Path) -> None:
    rows = [("a", "x", 1), ("a", "x", 1), ("a", "y", 2), ("a", "y", 3), ("a", "x", 4)]
    folder = build(tmp_path, source_of(rows))
    assert events(folder) == [("a", "x", 1), ("a", "y", 2), ("a", "x", 4)]
    counts = read_manifest(folder)["domains"]["toys"]["counts"]
    assert [step["events"] for step in counts] == [5, 5, 4, 3]
    assert counts[-1]["consecutive_repeats"] == 1
    whole = build_dataset(
        [source_of(rows)],
        tmp_path / "whole",
        Rules(k_core=0, deduplicate=False, drop_consecutive_repeats=False),
    )
    assert len(events(whole)) == 5


def test_repeats_that_the_core_makes_go_too(tmp_path: Path) -> None:
    # Without the rare item r, a's two x follow each other; without the second x, a has two events left.
    rows = [("a", "x", 1), ("a", "r", 2), ("a", "x", 3), ("a", "y", 4), ("b", "x", 1), ("b", "y", 2)]
    folder = build(tmp_path, source_of(rows), k_core=2)
    assert events(folder) == [("a", "x", 1), ("a", "y", 4), ("b", "x", 1), ("b", "y", 2)]


TIED = [("a", "z", 5), ("a", "x", 5), ("a", "y", 5), ("a", "w", 1)]


def test_ties_in_source_order(tmp_path: Path) -> None:
    folder = build(tmp_path, source_of(TIED))
    assert [item for _, item, _ in events(folder)] == ["w", "z", "x", "y"]
    catalogue, log, _ = read_dataset(folder)
    assert catalogue.item_id[log.item].tolist() == ["w", "z", "x", "y"]


def test_ties_by_item_id(tmp_path: Path) -> None:
    folder = build(tmp_path, source_of(TIED), source_of([("a", "ya", 5)], "books"), tie_order="item_id")
    catalogue, log, _ = read_dataset(folder)
    assert catalogue.item_id[log.item].tolist() == ["w", "x", "y", "ya", "z"], "across domains too"


@pytest.mark.slow
def test_shuffled_ties_depend_on_the_seed_alone(tmp_path: Path) -> None:
    rows = [("a", f"i{n}", 5) for n in range(20)]
    other = [("a", f"j{n}", 5) for n in range(20)]

    def order(name: str, seed: int, rows: Rows = rows, books: Rows = ()) -> list[str]:
        sources = [source_of(rows), *([source_of(books, "books")] if books else [])]
        folder = build_dataset(sources, tmp_path / name, Rules(k_core=0, tie_order="shuffle"), seed=seed)
        catalogue, log, _ = read_dataset(folder)
        in_file = [item for _, item, _ in events(folder)]
        merged: list[str] = catalogue.item_id[log.item].tolist()
        assert [item for item in merged if item[0] == "i"] == in_file
        assert sorted(merged) == sorted(item for _, item, _ in [*rows, *books] if item)
        return merged

    both = order("both", 1, books=other)
    assert [item[0] for item in both] != ["j"] * 20 + ["i"] * 20, "domains are shuffled together"
    first = [item for item in both if item[0] == "i"]
    assert order("again", 1) == first
    assert order("other", 2) != first
    assert order("less", 1, rows[:10]) == [item for item in first if item in {item for _, item, _ in rows[:10]}], (
        "an event's place does not depend on the others"
    )


def test_a_mapped_order_decides_ties(tmp_path: Path) -> None:
    log = pa.table({"user_id": ["a", "a"], "item_id": ["x", "y"], "timestamp": [5, 5], "order": [2, 1]})
    items = pa.table({"item_id": ["x", "y"], "title": ["X", "Y"]})
    assert [item for _, item, _ in events(build(tmp_path, MemorySource("toys", "shop", items, log)))] == ["y", "x"]


def test_without_times_the_rows_of_a_user_count(tmp_path: Path) -> None:
    (tmp_path / "x.inter").write_text("user_id:token\titem_id:token\nu\tb\nv\ta\nu\ta\n")
    (tmp_path / "x.item").write_text("item_id:token\ttitle:token_seq\na\tA\nb\tB\n")
    folder = build(tmp_path, RecBoleSource(domain="toys", prefix=str(tmp_path / "x")))
    assert events(folder) == [("u", "b", 0), ("u", "a", 1), ("v", "a", 0)]
    assert not read_dataset(folder)[2]["toys"].has_times


@pytest.mark.slow
def test_users_of_one_platform_are_the_same_people(tmp_path: Path) -> None:
    folder = build(
        tmp_path,
        source_of([("ann", "x", 1), ("bob", "x", 2)], "toys"),
        source_of([("ann", "b", 0)], "books"),
        source_of([("ann", "f", 3)], "films", "cinema"),
    )
    catalogue, log, domains = read_dataset(folder)
    assert log.platforms == ("cinema", "shop")
    users = list(zip(log.user_platform.tolist(), log.user_id, strict=True))
    assert users == sorted(
        [(0, "ann"), (1, "ann"), (1, "bob")], key=lambda user: slot_of(log.platforms[user[0]], user[1])
    )
    found = [(*users[user], item) for user, item in zip(log.user, catalogue.item_id[log.item], strict=True)]
    assert sorted(found) == [(0, "ann", "f"), (1, "ann", "b"), (1, "ann", "x"), (1, "bob", "x")]
    assert found.index((1, "ann", "b")) + 1 == found.index((1, "ann", "x")), "in the order of time"
    assert np.isnan(log.rating).all()
    assert domains["films"].platform == "cinema"


# ---- what is written -------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_was_read(tmp_path: Path) -> None:
    log, items = tmp_path / "log.csv", tmp_path / "items.csv"
    log.write_text("user_id,item_id,timestamp,stars\nu,x,2014-07-23,4\n")
    items.write_text('item_id,title,brand,category\nx,A &amp; B,"by\nAcme"," . "\n')
    folder = build(tmp_path, TableSource(domain="toys", interactions=str(log), items=str(items)), seed=7)
    manifest = read_manifest(folder)
    assert manifest["sources"] == [
        {"domain": "toys", "table": what, "path": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for what, path in (("interactions", log), ("items", items))
    ]
    assert manifest["domains"]["toys"]["timestamps"] == "iso"
    assert manifest["domains"]["toys"]["columns"]["interactions"]["rating"] == "stars"
    assert manifest["rules"] == {
        "min_user_events": 0,
        "min_item_events": 0,
        "core_scope": "domain",
        "tie_order": "source",
        "seed": 7,
        "deduplicate": True,
        "drop_consecutive_repeats": True,
    }
    catalogue, interactions, _ = read_dataset(folder)
    assert catalogue.title.tolist() == ["A & B"]
    assert (catalogue.brand.tolist(), catalogue.categories.tolist()) == (["by Acme"], [""])
    assert interactions.rating.tolist() == [4.0]
    names = pq.read_table(folder / "interactions").column_names
    assert names == ["user_id", "item_id", "timestamp", "microsecond", "rating", "order", "domain"]
    names = pq.read_table(folder / "items").column_names
    assert names == ["item_id", "title", "brand", "categories", "description", "price", "domain"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "dataset.json",
        "interactions",
        "items",
        "rejected.parquet",
    ]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = [(f"u{n % 7}", f"i{n % 11}", n * 37 % 50) for n in range(200)]
    first = build_dataset([source_of(rows)], tmp_path / "a", Rules(k_core=2))
    second = build_dataset([source_of(rows)], tmp_path / "b", Rules(k_core=2))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in files)


def test_a_split_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [(f"u{n % 5}", f"i{n % 7}", n) for n in range(60)]
    folder = build(tmp_path, source_of(rows), source_of(rows[10:], "books"))
    with pytest.raises(DataError, match="has no split yet"):
        read_split(folder)
    spec = SplitSpec(method="global-time", test_fraction=0.2)
    for chosen in (SplitSpec(), spec):  # a second split takes the place of the first
        split = finish_part(folder, 0, lambda *log, spec=chosen: make_split(*log, spec))
        assert split is not None
        write_manifest(folder, read_manifest(folder) | {"split": asdict(chosen)})
        again = read_split(folder)
        assert again.part.tolist() == split.part.tolist()
        assert again.spec == chosen
        assert again.domains == split.domains
    table = pq.read_table(folder / "interactions" / "domain=toys" / "part-0.parquet")
    cut = min(row["timestamp"] for row in table.to_pylist() if row["split"] == "test")
    assert all((row["timestamp"] >= cut) == (row["split"] == "test") for row in table.to_pylist())
    assert not list(folder.rglob("*.tmp"))


# ---- rejected rows ---------------------------------------------------------------------------------------------------

GOOD = "".join(f"u{n},i1,{1_406_116_800 + n}\n" for n in range(20))
BAD = "user_id,item_id,timestamp\n,i1,1406116800\nu, ,1406116800\nu,i1,yesterday\nu,i9,1406116800\nu,i2,1406116800\nu\n"
ITEMS = "item_id,title\ni1,Ball\ni2,...\n,Nothing\ni1,Ball again\ni3,Kite\ni4,Top\ni5,Bear\ni6,Car\n"


def csv_source(tmp_path: Path, log: str, items: str = ITEMS, **settings: Any) -> TableSource:
    (tmp_path / "log.csv").write_text(log)
    (tmp_path / "items.csv").write_text(items)
    return TableSource(
        domain="toys", interactions=str(tmp_path / "log.csv"), items=str(tmp_path / "items.csv"), **settings
    )


def test_every_bad_row_is_kept_with_its_reason(tmp_path: Path) -> None:
    folder = build(tmp_path, csv_source(tmp_path, BAD + GOOD))
    assert rejected(folder) == [
        ("log.csv", 7, "malformed row: missing columns", "u"),
        ("items.csv", 3, "title without a word", "item_id=i2; title=...; "),
        ("items.csv", 4, "no item id", "title=Nothing; "),
        ("items.csv", 5, "item id occurs before with another title", "item_id=i1; title=Ball again; "),
        ("log.csv", 2, "no user id", "item_id=i1; timestamp=1406116800; "),
        ("log.csv", 3, "no item id", "user_id=u; item_id= ; timestamp=1406116800; "),
        ("log.csv", 4, "timestamp cannot be read", "user_id=u; item_id=i1; timestamp=yesterday; "),
        ("log.csv", 5, "item is not in the items table", "user_id=u; item_id=i9; timestamp=1406116800; "),
        ("log.csv", 6, "item has no title", "user_id=u; item_id=i2; timestamp=1406116800; "),
    ]
    about = read_manifest(folder)["domains"]["toys"]
    assert sum(about["rejected"].values()) == 9
    assert about["num_events"] == 20
    assert about["num_items"] == 5


def test_strict_stops_at_the_first_bad_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"items.csv, line 3: title without a word: item_id=i2; title=...;  \(strict"):
        build(tmp_path, csv_source(tmp_path, BAD[:-2] + GOOD), strict=True)
    items = "item_id,title\ni1,Ball\n"
    with pytest.raises(DataError, match=r"log.csv, line 2: no user id: item_id=i1"):
        build(tmp_path, csv_source(tmp_path, BAD[:-2] + GOOD, items), strict=True)
    with pytest.raises(DataError, match=r"log.csv, line 2: malformed row: missing columns: u "):
        build(tmp_path, csv_source(tmp_path, "user_id,item_id,timestamp\nu\n" + GOOD, items), strict=True)
    assert build(tmp_path, csv_source(tmp_path, "user_id,item_id,timestamp\n" + GOOD, items), strict=True)


def test_titles_that_cleaning_changed_made_equal_or_emptied_are_counted_and_shown(tmp_path: Path) -> None:
    items = (
        'item_id,title\ni1,Tom &amp; Jerry\ni2,Tom &  Jerry\ni3,<br>..\ni4,"Map<Key,Value>"\ni5,<untitled>\n'
        "i6,Ball...\ni7,Kite​\ni8,-\n"
    )
    told: list[str] = []
    folder = build(tmp_path, csv_source(tmp_path, HEAD + GOOD, items), progress=told.append)
    about = read_manifest(folder)["domains"]["toys"]
    assert about["titles"] == {
        "changed": 3,  # spaces alone are no change
        "examples": [["Tom &amp; Jerry", "Tom & Jerry"], ["Ball...", "Ball"], ["Kite\u200b", "Kite"]],
        "made_equal": 2,
    }
    assert about["rejected"] == {"title without a word": 1, "title without a word once it is cleaned": 1}
    assert about["num_items"] == 6
    assert (
        "note: toys: titles that cleaning changed: 3, as 'Tom &amp; Jerry' -> 'Tom & Jerry'; 'Ball...' -> 'Ball'; "
        "'Kite\\u200b' -> 'Kite'; items that it gave one title with others: 2"
    ) in told
    assert told[-1].endswith(
        "2 rows rejected, see rejected.parquet, of them 1 for: title without a word once it is cleaned"
    )


HEAD = "user_id,item_id,timestamp\n"


@pytest.mark.parametrize(
    ("log", "items", "message"),
    [
        (
            HEAD + '"u","i1","07 23, 2014"\n"v","i1","07 24, 2014"\n',
            ITEMS,
            r"2 of 2 rows of the interactions of domain 'toys' cannot be used, because their timestamp cannot be read: "
            r"'07 23, 2014', '07 24, 2014'. Accepted are seconds since 1970 or .* ISO dates .*timestamps=order",
        ),
        (
            HEAD + "u,x1,1406116800\nu,x2,1406116801\nu,i1,1406116802\n",
            ITEMS,
            r"2 of 3 rows .* no such item: 'x1', 'x2'. It has 'i1'.*right columns mapped to item_id in both\?",
        ),
        (
            HEAD + "u,i1,1406116800\n",
            "item_id,title\ni1,\ni2,--\ni3,Ball\n",
            r"items.csv: 2 of 3 rows of the items of domain 'toys' cannot be used, because they have no title .*"
            r"\('i1', 'i2'\).*columns.title=COLUMN",
        ),
        (
            HEAD + "u,i2,1406116800\nu,i2,1406116801\nu,i1,1406116802\n",
            ITEMS,
            r"2 of 3 rows of the interactions .* because their items have no title",
        ),
        (
            HEAD + ",i1,1406116800\n,i1,1406116801\n",
            ITEMS,
            r"because user_id is empty \(lines 2, 3\).*columns.user_id=",
        ),
        (HEAD, ITEMS, r"the interactions of domain 'toys' have no rows \(.*log.csv\)"),
        (HEAD + "u,i1,1406116800\n", "item_id,title\n", r"the items of domain 'toys' have no rows \(.*items.csv\)"),
    ],
)
def test_a_domain_that_is_mostly_bad_is_refused(tmp_path: Path, log: str, items: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build(tmp_path, csv_source(tmp_path, log, items))
    assert not (tmp_path / "data").exists()


def test_malformed_rows_count_among_the_bad_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 3 rows .* cannot be taken apart .* as line 2 .*: 'a,b,c,d'. Is the sep"):
        build(tmp_path, csv_source(tmp_path, HEAD + "a,b,c,d\ne,f,g,h\nu,i1,1406116800\n"))


def test_nothing_left_says_which_rule_took_it(tmp_path: Path) -> None:
    with pytest.raises(DataError) as raised:
        build(tmp_path, source_of([("a", "x", 1), ("b", "x", 2)]), k_core=5)
    message = str(raised.value)
    assert "nothing is left of domain 'toys' (read: 2 events; usable: 2 events" in message
    assert "lower k_core=5" in message


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, source_of([("a", "x", 1)]), progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "data.incomplete").mkdir()  # as after a kill
    (tmp_path / "data.incomplete" / "dataset.json").write_text("{}")
    folder = build(tmp_path, source_of([("a", "x", 1)]))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert len(events(folder)) == 1


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert build(tmp_path, source_of([("a", "x", 1)])), "an empty folder may be filled"
    with pytest.raises(ConfigError, match="is there already: choose another folder, or delete it"):
        build(tmp_path, source_of([("a", "x", 1)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tie_order": "random"}, "tie_order='random': expected source, item_id, shuffle"),
        ({"k_core": -1}, "k_core=-1 must be at least 0"),
        ({"k_core_scope": "user"}, "k_core_scope='user': expected domain, pooled"),
        ({"engine": "postgres"}, "engine='postgres': expected duckdb"),
        ({"memory_limit": "lots"}, "memory_limit='lots': write a size, as 8GB or 500MB"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, source_of([("a", "x", 1)]), **settings)
    with pytest.raises(ConfigError, match="domain 'toys' has more than one source"):
        build(tmp_path, source_of([("a", "x", 1)]), source_of([("a", "x", 1)]))
    with pytest.raises(ConfigError, match="no source of data"):
        build(tmp_path)


def test_folders_that_are_no_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no data folder: there is no dataset.json in it; run `cprec prepare` first"):
        read_dataset(tmp_path)
    with pytest.raises(DataError, match="nowhere does not exist: give a data folder that `cprec prepare` wrote"):
        read_dataset(tmp_path / "nowhere")
    folder = build(tmp_path, source_of([("a", "x", 1), ("a", "y", 2)]))
    path = folder / "interactions" / "domain=toys" / "part-0.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take([1, 0]), path)
    with pytest.raises(DataError, match="interactions of domain 'toys' are not sorted"):
        read_dataset(folder)
    pq.write_table(table.set_column(1, "item_id", pa.array(["x", "other"])), path)
    with pytest.raises(DataError, match="hold items that are not in its catalogue"):
        read_dataset(folder)
    manifest = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(manifest | {"schema_version": 0}))
    with pytest.raises(DataError, match="schema version 0, this program reads 2"):
        read_dataset(folder)


@pytest.mark.slow
def test_no_other_engine_is_needed(tmp_path: Path) -> None:
    blocked = ["psycopg", "psycopg2", "pyspark", "polars", "sqlalchemy", "torch", "google.cloud.bigquery", "snowflake"]
    code = f"""
import sys
for name in {blocked}:
    sys.modules[name] = None
import pyarrow as pa
from cprec.data.build import build_dataset
from cprec.data.config import Rules
from cprec.data.dataset import read_dataset
from cprec.data.sources.memory import MemorySource
items = pa.table({{"item_id": ["x"], "title": ["X"]}})
log = pa.table({{"user_id": ["a"], "item_id": ["x"], "timestamp": [1]}})
build_dataset([MemorySource("toys", "shop", items, log)], "data", Rules(k_core=0))
print(len(read_dataset("data")[1]))
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert answer.stdout.strip() == "1"


# ---- real logs -------------------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_amazon_beauty_as_published(real_data: Path, tmp_path: Path) -> None:
    source = TableSource(
        domain="beauty",
        platform="amazon",
        interactions=str(real_data / "amazon14_beauty" / "interactions.parquet"),
        items=str(real_data / "amazon14_beauty" / "items.parquet"),
    )
    folder = build_dataset([source], tmp_path / "data", Rules(k_core=5))
    about = read_manifest(folder)["domains"]["beauty"]
    assert about["counts"][0] == {"rule": "read", "events": 198_502, "users": 22_363, "items": 12_101}
    assert about["rejected"] == {"item has no title": 131, "title without a word": 7}
    catalogue, log, domains = read_dataset(folder)
    split = make_split(catalogue, log, domains, SplitSpec())
    assert split.part.tolist().count(1) == split.part.tolist().count(2) == about["num_users"]
    assert (np.bincount(log.item) >= 5).all() and (np.bincount(log.user) >= 5).all()
    # The published order of each user's events is kept.
    positions = pq.read_table(source.interactions[0]).to_pylist()
    known = {(row["user_id"], row["item_id"]): row["position"] for row in positions}
    users = log.user_id[log.user]
    order = np.array([known[pair] for pair in zip(users, catalogue.item_id[log.item], strict=True)])
    assert (np.diff(order)[users[1:] == users[:-1]] > 0).all()


@pytest.mark.real_data
def test_movielens_in_recbole_files(real_data: Path, tmp_path: Path) -> None:
    source = RecBoleSource(domain="films", prefix=str(real_data / "raw" / "recbole_ml-100k" / "ml-100k"))
    folder = build_dataset([source], tmp_path / "data", Rules(k_core=5))
    about = read_manifest(folder)["domains"]["films"]
    assert about["counts"][0] == {"rule": "read", "events": 100_000, "users": 943, "items": 1_682}
    assert about["rejected"] == {}
    catalogue, log, _ = read_dataset(folder)
    assert (np.bincount(log.item) >= 5).all()
    assert "Toy Story" in catalogue.title.tolist()
    assert np.nanmin(log.rating) == 1
