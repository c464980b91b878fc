"""Files of histories: whatever stops it and whatever is in them, each user is there once in the end."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock
from huggingface_hub import constants

from cprec import provenance
from cprec.data.catalogue import Catalogue
from cprec.errors import ConfigError, DataError, InputChanged
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item
from cprec.serve import histories, lists, parts
from cprec.serve.config import RecommendConfig
from cprec.serve.parts import write_part
from cprec.serve.recommend import recommend_file

USERS = [f"user, {number}" for number in range(23)]
ITEMS = [f"i{number}" for number in range(6)] + ["7", "9", "None", " spaced "]


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


class Ascending:
    """Ranks the items of `shop` as the catalogue has them; a score says how many events the history has."""

    name, domain, max_history, cache = "ascending", "shop", 10, None
    withdrawn: Mapping[str, frozenset[str]] = {}
    item_fields: tuple[str, ...] = ("title",)

    def __init__(self, killed_at: int = 1 << 30) -> None:
        def table(ids: Sequence[str]) -> pa.Table:
            return pa.table({"item_id": sorted(ids), "title": [f"Tea, {name}" for name in sorted(ids)]})

        self.catalogue = Catalogue.from_tables({"other": table(["o1"]), "shop": table(ITEMS)})
        self.asked: list[tuple[Item, ...]] = []
        self._killed_at = killed_at

    def rank(self, queries: Sequence[RankingQuery], k: int, mode: Any = None, stop: Any = None) -> list[Ranking]:
        self.asked += [query.history for query in queries]
        if len(self.asked) > self._killed_at:
            raise Killed
        out = []
        for query in queries:
            ids = [name for name in self.catalogue.arrow_ids("shop").to_pylist() if name not in query.exclude][:k]
            out.append(Ranking("", tuple(ids), tuple(-place - len(query.history) / 7 for place in range(len(ids)))))
        return out

    def shown(self, query: RankingQuery) -> tuple[Item, ...]:
        return tuple(item for item in query.history if item.domain == "shop")

    def with_items(self, *_: Any) -> Any:
        raise NotImplementedError

    recommend = with_items


class Popular(Ascending):
    """The last items are the popular ones."""

    def rank(self, queries: Sequence[RankingQuery], k: int, mode: Any = None, stop: Any = None) -> list[Ranking]:
        ids = self.catalogue.arrow_ids("shop").to_pylist()[::-1][:k]
        return [Ranking("", tuple(ids), tuple(range(k, 0, -1))[: len(ids)]) for _ in queries]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "USERS_AT_ONCE", 4)
    monkeypatch.setattr(lists, "ROW_GROUP", 8)


def write(path: Path, rows: Sequence[tuple[Any, Any]]) -> Path:
    if path.suffix == ".parquet":
        users, histories = zip(*rows, strict=True)
        pq.write_table(pa.table({"user_id": users, "history": histories}), path, row_group_size=3)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"user_id": user, "history": history}) + "\n" for user, history in rows))
    else:
        lines = [f'"{user}",{"|".join(history)}' for user, history in rows]
        path.write_text("\n".join(["user_id,history", *lines]) + "\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row | {"rank": int(row["rank"]), "score": float(row["score"])} for row in csv.DictReader(file)]
    assert all(list(row) == ["user_id", "rank", "item_id", "title", "score", "source"] for row in rows)
    return rows


def lists_of(path: Path) -> dict[str, tuple[str, list[str]]]:
    """Of each user the source and the items."""
    found: dict[str, tuple[str, list[str]]] = {}
    for row in read(path):
        found.setdefault(row["user_id"], (row["source"], []))[1].append(row["item_id"])
    return found


def rejected(output: Path) -> list[tuple[str, ...]]:
    with open(f"{output}.rejected.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "line", "user_id", "item_id", "reason"]
    return [tuple(row[1:]) for row in rows]


def recommend(config: RecommendConfig, recommender: Any, popular: Any = None) -> None:
    """Answer a file in this process."""

    def open_model(_: str) -> Any:
        return recommender, popular

    recommend_file(config, lambda folder, _, missing: [write_part(folder, part, open_model) for part in missing])


def config(source: Path, output: Path, **settings: Any) -> RecommendConfig:
    return RecommendConfig(**{"model": "m", "input": str(source), "output": str(output), "k": 2} | settings)


HISTORIES = [["i0", f"i{number % 6}", *["i1"] * number] for number in range(23)]
EXPECTED = [
    (user, rank, item)
    for user, history in zip(USERS, HISTORIES, strict=True)
    for rank, item in enumerate([name for name in sorted(ITEMS) if name not in history][:2], 1)
]


@pytest.fixture(params=[".csv", ".jsonl", ".parquet"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / f"histories{request.param}", list(zip(USERS, HISTORIES, strict=True)))


@pytest.mark.parametrize(
    ("suffix", "killed_at"),
    [
        *((".csv", killed_at) for killed_at in (0, 3, 9, 21)),
        *((suffix, 9) for suffix in (".jsonl", ".parquet")),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in itertools.product((".jsonl", ".parquet"), (0, 3, 21))
        ),
    ],
)
def test_a_run_killed_goes_on_where_it_was(source: Path, suffix: str, killed_at: int, tmp_path: Path) -> None:
    output, whole = tmp_path / f"recs{suffix}", tmp_path / f"whole{suffix}"
    with pytest.raises(Killed):
        recommend(config(source, output), Ascending(killed_at))
    assert not output.exists()
    again = Ascending()
    recommend(config(source, output), again)
    assert [(row["user_id"], row["rank"], row["item_id"]) for row in read(output)] == EXPECTED
    assert len(again.asked) == len(USERS) - killed_at // 4 * 4  # what was whole is not asked again
    assert {path.name for path in tmp_path.iterdir()} == {source.name, output.name}
    recommend(config(source, whole), Ascending())
    assert read(whole) == read(output)


def test_a_mended_file_asks_for_changed_users_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"u{number}", [f"i{number % 5}"] * (1 + number // 5)) for number in range(20)]
    broken = [*rows[:9], ("u9", ["i0", "gone"]), *rows[10:]]
    source, output = tmp_path / "in.csv", tmp_path / "out.csv"
    recommend(config(write(source, broken), output), Ascending())
    assert rejected(output) == [("11", "u9", "gone", "item is not in the catalogue")]
    assert lists_of(output)["u9"] == ("model", [" spaced ", "7"])
    told = " ".join(capsys.readouterr().err.split())
    assert "out.csv.rejected.csv lists what was left out (item is not in the catalogue: 1)" in told
    again = Ascending()
    recommend(config(write(source, [("new", ["i5", "i4"]), *rows]), output), again)
    assert [[item.item_id for item in history] for history in again.asked] == [["i5", "i4"]] + [["i4"] * 2]
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", "out.csv"}  # nothing was left out
    recommend(config(source, tmp_path / "whole.csv"), Ascending())
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_equal_histories_of_a_part_are_ranked_once_and_answered_each(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", [(f"u{number}", ["i0"]) for number in range(10)])
    recommender = Ascending()
    recommend(config(source, tmp_path / "out.csv"), recommender)
    assert len(recommender.asked) == 3
    assert lists_of(tmp_path / "out.csv") == {f"u{number}": ("model", [" spaced ", "7"]) for number in range(10)}


def test_lists_of_another_model_or_other_settings_are_made_anew(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"1")
    source = write(tmp_path / "in.csv", [("a", ["i0"]), ("b", ["i1", "gone"])])
    output = tmp_path / "out.csv"

    def num_asked(**settings: Any) -> int:
        recommender = Ascending()
        recommend(config(source, output, model=str(model), **settings), recommender)
        return len(recommender.asked)

    assert [num_asked(), num_asked(), num_asked(k=3), num_asked(k=3, exclude_seen=False)] == [2, 0, 2, 2]
    (model / "model.safetensors").write_bytes(b"2")
    assert num_asked() == 2
    (part,) = Path(f"{output}.lists").glob("part-*")
    part.write_bytes(b"no table" * 99)
    with pytest.raises(DataError, match=r"part-0000000.parquet cannot be used .*remove it, and run the command again"):
        num_asked()
    part.unlink()
    assert [num_asked(), num_asked()] == [2, 0]
    with FileLock(tmp_path / ".out.csv.lock"), pytest.raises(DataError, match="out.csv: another command writes it"):
        num_asked()


def test_lists_are_of_the_files_that_decide_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hub = tmp_path / "model", tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))

    def made(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return parts.model_sha256(str(model))

    commits = ["c" * 40, "d" * 40]
    for commit in commits:
        made(f"hub/models--someone--base/snapshots/{commit}/config.json", "{}")
    adapter = "model/adapter_config.json"
    decide = [
        made(adapter, '{"base_model_name_or_path": null}'),
        made(adapter, '{"base_model_name_or_path": "someone/base"}'),
        *(made("hub/models--someone--base/refs/main", commit) for commit in commits),
        made("model/adapter_model.safetensors", "1"),
        made("model/tokenizer.json", "{}"),
        made("model/cprec.json", "{}"),
        made("model/blend.json", "{}"),
        made("model/items/domain=shop/part-0.parquet", "1"),
    ]
    assert len(set(decide)) == len(decide)
    for name in ("hashes.json", "run.json", "log.jsonl"):
        assert made(f"model/{name}", "[]") == decide[-1]
    monkeypatch.chdir(tmp_path)
    of_none = made(adapter, '{"base_model_name_or_path": null}')
    assert made("config.json", "of the working folder, which is no base") == of_none


def test_weights_that_were_not_touched_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, read = tmp_path / "model.safetensors", []
    weights.write_bytes(b"1")
    monkeypatch.setattr(provenance, "_COARSE_CLOCK", -(10**12))
    monkeypatch.setattr(provenance, "file_sha256", lambda path: read.append(path) or "hash")
    for _ in range(2):
        parts.model_sha256(str(tmp_path))
    assert read == [weights]


def test_the_folder_of_the_output_is_made(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.csv", [("a", ["i0"])]), tmp_path / "no" / "such" / "out.csv"
    recommend(config(source, output), Ascending())
    assert list(lists_of(output)) == ["a"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_one_user_stops_no_batch(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = [name for name in sorted(ITEMS) if name not in ("i0", "i1")]
    rows = [
        ("a", ["i0", "gone", "i1"]),
        ("b", sorted(ITEMS)[2:]),  # two items are left
        ("c", sorted(ITEMS)),  # none is
        ("d", []),
        ("e", ["gone"]),
        ("f", ["o1"]),  # of another domain: the model reads nothing of it
        ("a", ["i1"]),
    ]
    source, output = write(tmp_path / f"in{suffix}", rows), tmp_path / "out.jsonl"
    recommend(config(source, output, k=3), Ascending(), Popular())
    popular = ("popularity", sorted(ITEMS)[::-1][:3])
    assert lists_of(output) == {
        "a": ("model", [*left[:3], *[name for name in sorted(ITEMS) if name != "i1"][:3]]),
        "b": ("model", sorted(ITEMS)[:2]),
        **dict.fromkeys("def", popular),
    }
    line = 1 + (suffix == ".csv")
    unknown = "item is not in the catalogue"
    assert rejected(output) == [
        (str(line), "a", "gone", unknown),
        (str(line + 2), "c", "", "no item is left outside the history"),
        (str(line + 4), "e", "gone", unknown),
    ]
    told = " ".join(capsys.readouterr().err.split())
    assert "up to 3 recommendations for each of 6 users, 3 of them popular items, for want of a history" in told
    assert "shorter lists, since fewer items are left: 1" in told
    assert "rows with the user_id of a row before, and a list of their own: 1" in told
    with pytest.raises(DataError, match=rf"line {line}, user 'a': {unknown}: 'gone' \(strict stops"):
        recommend(config(source, tmp_path / "strict.csv", strict=True), Ascending(), Popular())
    assert not (tmp_path / "strict.csv").exists()


def test_without_popularity_a_history_that_says_nothing_has_no_list(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.csv", [("a", ["i0"]), ("b", [])]), tmp_path / "out.csv"
    recommend(config(source, output), Ascending())
    assert list(lists_of(output)) == ["a"]
    ((line, user, item, reason),) = rejected(output)
    assert (line, user, item) == ("3", "b", "") and "the model has no popularity.parquet" in reason


def test_a_file_of_which_nothing_is_known_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", [("a", ["x"]), ("b", ["y", "z"])])
    with pytest.raises(DataError, match=r"none of its 3 events is an item of this model's catalogue, as 'x' in line 2"):
        recommend(config(source, tmp_path / "out.csv"), Ascending(), Popular())
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv"}


# ---- forms -----------------------------------------------------------------------------------------------------------

ITEM_LISTS: list[tuple[Any, list[str]]] = [
    (pa.array([["9", None, "i1"]]), ["9", "i1"]),
    (pa.array([[9, None, 7]]), ["9", "7"]),
    (pa.array([[9.0, None, 7.0]]), ["9", "7"]),
    (pa.array([[float("nan"), 7.0]]), ["7"]),
    (pa.array([[9, 7]], pa.list_(pa.uint8(), 2)), ["9", "7"]),
    (pa.array([[Decimal("9.00")]]), ["9"]),
    (pa.array([["9", "i1"]], pa.large_list(pa.large_string())), ["9", "i1"]),
    (pa.array([["9", "i1"]], pa.list_(pa.string_view())), ["9", "i1"]),
    (pa.array([["9", "i1"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))), ["9", "i1"]),
    (pa.array(["9|i1"]).dictionary_encode(), ["9", "i1"]),
    (pa.array(["9||i1|"], pa.large_string()), ["9", "i1"]),
    (pa.array([9]), ["9"]),
    (pa.array([None], pa.list_(pa.string())), []),
]


@pytest.mark.parametrize(("column", "events"), ITEM_LISTS, ids=lambda value: str(getattr(value, "type", "")))
@pytest.mark.parametrize(
    ("user", "name"),
    [(pa.array([1.0]), "1"), (pa.array([2**60 + 1]), str(2**60 + 1)), (pa.array(["01"]).dictionary_encode(), "01")],
    ids=["float", "int", "text"],
)
def test_parquet_columns_of_any_type(column: Any, events: list[str], user: Any, name: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"history": column, "user_id": user, "k": [5]}), tmp_path / "in.parquet")
    recommender, output = Ascending(), tmp_path / "out.csv"
    recommend(config(tmp_path / "in.parquet", output), recommender, Popular())
    assert [[item.item_id for item in history] for history in recommender.asked] == ([events] if events else [])
    assert list(lists_of(output)) == [name]


@pytest.mark.parametrize(
    ("cell", "events"),
    [
        ("i1|i0", ["i1", "i0"]),
        (" i1 | 9 |", ["i1", "9"]),
        ('" spaced |tea, I1"', [" spaced ", "i1"]),
        ('"[""i1"", 9, 7.0, null]"', ["i1", "9", "7"]),
        ("\"['i1', 'i0']\"", ["i1", "i0"]),
        ("None", ["None"]),
    ],
)
def test_cells_of_csv(cell: str, events: list[str], tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(f"\ufeffuser_id,x,history\r\na,0,{cell}\r\n".encode())
    recommender = Ascending()
    recommend(config(tmp_path / "in.csv", tmp_path / "out.csv"), recommender)
    assert [[item.item_id for item in history] for history in recommender.asked] == [events]


def test_json_that_is_odd(tmp_path: Path) -> None:
    lines = [
        '{"user_id": 12345678901234567890, "history": [9, 7.0, NaN, null, true, {"item_id": "i1"}]}',
        "",
        '{"history": ["i1"]}',
        '{"user_id": "b"}',
        '{"user_id": "c", "history": "i1|i2", "history": "i3"}',
        '{"user_id": "d", ',
        '["e"]',
        '{"user_id": null, "history": ["i1"]}',
        '{"user_id": "f", "history": {"i1": 1}}',
    ]
    (tmp_path / "in.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    output = tmp_path / "out.csv"
    recommender = Ascending()
    recommend(config(tmp_path / "in.jsonl", output), recommender, Popular())
    assert [[item.item_id for item in history] for history in recommender.asked] == [["9", "7"]]
    assert {user: source for user, (source, _) in lists_of(output).items()} == {
        "12345678901234567890": "model",
        "b": "popularity",
    }
    found = {(line, reason) for line, _, _, reason in rejected(output)}
    assert found == {
        ("1", "no item id"),
        ("1", "item is not in the catalogue"),  # 'true', as the readers of logs have it
        ("1", "neither an id nor a title"),
        ("3", "no user id"),
        ("5", "malformed row: a key occurs twice"),
        ("6", "malformed row: no JSON object"),
        ("7", "malformed row: no JSON object"),
        ("8", "no user id"),
        ("9", "history is no list"),
    }


def test_malformed_rows_of_csv_are_left_out(tmp_path: Path) -> None:
    long = "i1|" * 100_000  # longer than a field that Python's csv takes
    text = f'user_id,history\na,i1,i2\nb\nc,{long}\n,i1\nd,"i1\n'
    (tmp_path / "in.csv").write_text(text)
    output = tmp_path / "out.csv"
    recommend(config(tmp_path / "in.csv", output), Ascending())
    assert list(lists_of(output)) == ["c"]
    assert {(line, reason) for line, _, _, reason in rejected(output)} == {
        ("2", "malformed row: too many columns"),
        ("3", "malformed row: missing columns"),
        ("4", "no item id"),
        ("5", "no user id"),
        ("6", "malformed row: quote is not closed"),
    }


def _with_struct(path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["a"], "history": [{"item": "i1"}]}), path)


def _bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("in.csv", _bytes(b"a,i001|i002\n"), r"no column user_id and none history; the header has 'a', 'i001\|i002'"),
        ("in.csv", _bytes(b"user_id;history\na;i1\n"), "none history; the header has 'user_id;history'"),
        ("in.csv", _bytes(b""), "has no header"),
        ("in.csv", _bytes(b"user_id,history,history\n"), "column history is there twice"),
        ("in.csv", _bytes("user_id,history\na,i1\n".encode("utf-16")), "is UTF-16 or UTF-32: save it as UTF-8"),
        (
            "in.jsonl",
            _bytes(b'{"user_id": 1, "items": []}\n'),
            "no column history; no object names it; the keys are 'user_id', 'items'",
        ),
        ("in.parquet", _bytes(b"user_id,history\n"), "cannot be read as Parquet"),
        ("in.parquet", _with_struct, r"column 'history' holds struct<item: string>: write user_id as text"),
    ],
)
def test_a_file_that_is_no_file_of_histories(
    name: str, make: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError, match=message):
        recommend(config(tmp_path / name, tmp_path / "out.csv"), Ascending())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(DataError, match="no.csv does not exist"):
        recommend(config(tmp_path / "no.csv", tmp_path / "out.csv"), Ascending())


def test_a_domain_is_needed(tmp_path: Path) -> None:
    source = write(tmp_path / "in.csv", [("a", ["i0"])])
    with pytest.raises(ConfigError, match="domain='films': name one of other, shop"):
        recommend(config(source, tmp_path / "out.csv", domain="films"), Ascending())


def test_no_more_than_a_batch_is_ranked_at_once(monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path) -> None:
    sizes = []
    rank = Ascending.rank
    monkeypatch.setattr(
        Ascending, "rank", lambda self, queries, k: sizes.append(len(queries)) or rank(self, queries, k)
    )
    recommend(config(source, tmp_path / "o.parquet"), Ascending())
    assert sizes == [4] * 5 + [3]
    assert pq.ParquetFile(tmp_path / "o.parquet").num_row_groups > 3


def test_a_file_without_rows_gives_one_without_rows(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("")
    for suffix in (".csv", ".jsonl", ".parquet"):
        output = tmp_path / f"out{suffix}"
        recommend(config(tmp_path / "in.jsonl", output), Ascending())
        assert read(output) == []


# ---- parts and partitions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", ["1 0", "4 0 2 1 3", "0 1 2 3 4 5 6 7 8"])
def test_partitions_in_any_order_give_what_one_run_gives(source: Path, numbers: str, tmp_path: Path) -> None:
    order = numbers.split()
    whole, output = tmp_path / "whole.parquet", tmp_path / "recs.parquet"
    one = Ascending()
    recommend(config(source, whole), one)
    asked = []
    for number in order:
        assert not output.exists(), "nothing looks complete before the last partition"
        recommender = Ascending()
        recommend(config(source, output, partition=f"{number}/{len(order)}"), recommender)
        asked += recommender.asked
    assert output.read_bytes() == whole.read_bytes()
    assert sorted(asked, key=len) == sorted(one.asked, key=len), "every user is ranked once"
    assert {path.name for path in tmp_path.iterdir()} == {source.name, whole.name, output.name}


def test_a_partition_says_what_is_left_to_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CPREC_PROGRESS", "plain")
    source, output = write(tmp_path / "in.csv", list(zip(USERS, HISTORIES, strict=True))), tmp_path / "out.csv"
    with pytest.raises(Killed):
        recommend(config(source, output, partition="1/2"), Ascending(killed_at=4))
    recommend(config(source, output, partition="1/2"), Ascending())
    told = capsys.readouterr().err
    assert "1 of 3 parts are there already" in told
    assert "partition 1/2 is written; 3 parts are left to the others" in told and not output.exists()
    recommend(config(source, output), Ascending())  # one without a partition makes what is missing
    assert [row["user_id"] for row in read(output)] == [user for user in USERS for _ in range(2)]


def test_partitions_of_other_settings_model_or_input_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"1")
    rows = list(zip(USERS, HISTORIES, strict=True))
    source, output = write(tmp_path / "in.csv", rows), tmp_path / "out.csv"

    def run(partition: str | None, **settings: Any) -> int:
        recommender = Ascending()
        recommend(config(source, output, model=str(model), partition=partition, **settings), recommender)
        return len(recommender.asked)

    assert run("0/2") == 12
    with pytest.raises(ConfigError, match=r"out.csv.lists was begun with k=2: give every partition the same settings"):
        run("1/2", k=3)
    (model / "model.safetensors").write_bytes(b"2")
    with pytest.raises(InputChanged, match=r"another model than .*/model as it is now: every partition must read the"):
        run("1/2")
    (model / "model.safetensors").write_bytes(b"1")
    write(source, rows[::-1])
    with pytest.raises(InputChanged, match=r"another input than .*in.csv as it is now.*Remove it to begin anew"):
        run("1/2")
    write(source, rows)
    assert run("1/2") == 11
    assert len(read(output)) == 2 * len(USERS)


def test_a_finished_job_may_be_followed_by_another_one_in_partitions(tmp_path: Path) -> None:
    rows = [*zip(USERS, HISTORIES, strict=True), ("x", ["gone", "i5"])]
    source, output = write(tmp_path / "in.csv", rows), tmp_path / "out.csv"
    recommend(config(source, output), Ascending())
    assert rejected(output) == [("25", "x", "gone", "item is not in the catalogue")]
    write(source, [*rows[:-1], ("x", ["i4", "i5"])])
    asked = []
    for partition in ("0/2", "1/2"):
        recommender = Ascending()
        recommend(config(source, output, partition=partition), recommender)
        asked += recommender.asked
    assert [[item.item_id for item in history] for history in asked] == [["i4", "i5"]]
    assert {path.name for path in tmp_path.iterdir()} == {"in.csv", "out.csv"}


class Meddling(Ascending):
    """Something happens while it ranks."""

    def __init__(self, happens: Callable[[], Any]) -> None:
        super().__init__()
        self._happens = happens

    def rank(self, queries: Sequence[RankingQuery], k: int, mode: Any = None, stop: Any = None) -> list[Ranking]:
        self._happens()
        return super().rank(queries, k)


def test_an_input_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.csv", [("a", ["i0"])]), tmp_path / "out.csv"
    with pytest.raises(InputChanged, match=r"in.csv changed while lists were made of it: run the command again"):
        recommend(config(source, output), Meddling(lambda: write(source, [("b", ["i0"])])))
    assert not output.exists()
    recommend(config(source, output), Ascending())
    assert list(lists_of(output)) == ["b"]


def test_a_part_that_is_made_twice_at_once_is_there_once(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.csv", list(zip(USERS, HISTORIES, strict=True))), tmp_path / "out.csv"

    def another() -> None:
        parts._opened.cache_clear()
        write_part(Path(f"{output}.lists"), 0, lambda _: (Ascending(), None))
        parts._opened.cache_clear()

    recommend(config(source, output), Meddling(another))
    assert [(row["user_id"], row["rank"], row["item_id"]) for row in read(output)] == EXPECTED


def test_a_job_that_was_replaced_meanwhile_is_not_put_together(tmp_path: Path) -> None:
    source, output = write(tmp_path / "in.csv", [("a", ["i0"])]), tmp_path / "out.csv"
    folder = Path(f"{output}.lists")

    def replace_job() -> None:
        job = json.loads((folder / "job.json").read_text())
        (folder / "job.json").write_text(json.dumps(job | {"k": 5}))

    with pytest.raises(DataError, match="was begun anew by another command"):
        recommend(config(source, output, partition="0/1"), Meddling(replace_job))
    (folder / "job.json").write_text("{")
    with pytest.raises(DataError, match=r"job.json cannot be used .*remove it, and run the command again"):
        recommend(config(source, output), Ascending())
    (folder / "job.json").unlink()
    recommend(config(source, output), Ascending())
    assert list(lists_of(output)) == ["a"]


def test_a_part_of_another_job_is_made_anew(tmp_path: Path) -> None:
    """As a worker may leave it that still ran when the job was replaced."""
    source, output = write(tmp_path / "in.csv", [("a", ["i0"])]), tmp_path / "out.csv"
    part = Path(f"{output}.lists") / "part-0000000.parquet"
    with pytest.raises(InputChanged):
        recommend(config(source, output), Meddling(lambda: write(source, [("b", ["i1"])])))
    stale = part.read_bytes()
    with pytest.raises(Killed):
        recommend(config(source, output), Ascending(killed_at=0))
    part.write_bytes(stale)
    recommend(config(source, output), Ascending())
    assert lists_of(output) == {"b": ("model", [" spaced ", "7"])}


def test_lists_of_which_no_job_is_known_are_not_used(tmp_path: Path) -> None:
    rows = [("a", ["i0", "gone"])]
    source, output = write(tmp_path / "in.csv", rows), tmp_path / "out.csv"
    recommend(config(source, output), Ascending())
    recommend(config(write(source, [*rows, ("b", ["i1"])]), output), Ascending())
    folder = Path(f"{output}.lists")
    assert (folder / "earlier.sqlite").exists()
    (folder / "job.json").unlink()
    recommender = Ascending()
    recommend(config(source, output), recommender)
    assert len(recommender.asked) == 2


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_parts_are_read_in_any_order(suffix: str, tmp_path: Path) -> None:
    source = write(tmp_path / f"in{suffix}", list(zip(USERS, HISTORIES, strict=True)))
    whole = histories.PartReader(source, len(USERS)).part(0)
    assert [row.user for row in whole] == USERS and len({row.line for row in whole}) == len(USERS)
    for order in ([0, 1, 2, 3, 4, 5], [5, 0, 3, 2, 4, 1], [1, 3, 5, 0, 2, 4]):
        reader = histories.PartReader(source, 4)
        found = {number: reader.part(number) for number in order}
        assert [row for number in range(6) for row in found[number]] == whole
    assert histories.PartReader(source, 23).part(1) == []


def test_row_groups_before_a_part_are_not_read(tmp_path: Path) -> None:
    source = write(tmp_path / "in.parquet", list(zip(USERS, HISTORIES, strict=True)))
    file = pq.ParquetFile(source)
    start = file.metadata.row_group(1).column(1).dictionary_page_offset or 4
    damaged = bytearray(source.read_bytes())
    damaged[4:start] = bytes(start - 4)  # row groups hold three users each
    source.write_bytes(damaged)
    rows = histories.PartReader(source, 3).part(2)
    assert [(row.line, row.user) for row in rows] == [(7, "user, 6"), (8, "user, 7"), (9, "user, 8")]
    with pytest.raises(OSError):
        histories.PartReader(source, 3).part(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": "2/2"}, r"partition='2/2': write i/n with i from 0 to n-1, as 0/4"),
        ({"num_processes": 0}, "num_processes=0 must be at least 1, or auto"),
        ({"engine": "dask"}, "engine='dask': only spark and spark://MASTER are known"),
        ({"engine": "spark", "partition": "0/2"}, "leave num_processes and partition away"),
        ({"engine": "spark", "num_processes": 2}, "leave num_processes and partition away"),
        ({"input": None, "history": ("a",), "partition": "0/2"}, "are for --input FILE with many histories"),
    ],
)
def test_settings_that_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(Path("in.csv"), Path("out.csv"), **settings)
