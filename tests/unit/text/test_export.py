"""A data folder in the forms of other libraries: the same split, the same text, no test event."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec import cli
from cprec.data import build
from cprec.data.config import RecBoleSource, Rules, SplitSpec, SyntheticConfig, TableSource
from cprec.data.dataset import read_split
from cprec.data.interactions import SECOND
from cprec.errors import ConfigError, DataError, LeakageError
from cprec.provenance import file_sha256
from cprec.schema import CONTEXT, SPLITS, TEST, TRAIN, VALIDATION
from cprec.text import export as exports
from cprec.text.config import PrepareConfig
from cprec.text.export import FORMATS, FRAMES, MAX_LIST, export, read_frame
from cprec.text.prepare import prepare
from cprec.text.shards import open_shards
from cprec.text.tokenizer import load_tokenizer

DAY = 86_400
PARTS = {"train": TRAIN, "valid": VALIDATION, "test": TEST}


@pytest.fixture(scope="module")
def data(write_world: Callable[..., tuple[TableSource, ...]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Domains of two platforms, in several parts, split by leave-one-out."""
    folder = tmp_path_factory.mktemp("export")
    world = SyntheticConfig(num_market_users=25, num_library_users=40, items_per_domain=40)
    config = PrepareConfig(
        output_dir=str(folder / "data"),
        tables=write_world(folder, world, "beauty", "books", "toys"),
        target_domains=("books",),
        vocabulary_size=512,
        k_core=0,
        min_events=3,
        min_history=1,
        heldout_share=0.1,
        workers=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PART_EVENTS", 400)
        return prepare(config)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One domain split at two dates, with unseen users, some ratings, long histories, and titles cut in a letter."""
    folder = tmp_path_factory.mktemp("shop")
    generator = random.Random(0)
    lines = ["user_id,item_id,timestamp,rating"]
    for user in range(20):
        for day in sorted(generator.sample(range(400), 60 if user < 2 else 10)):
            lines.append(f"u{user},i{generator.randrange(30)},{1_400_000_000 + DAY * day},{'4' if day % 2 else ''}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    titles = [f"i{number},Чай чёрный листовой № {number}" for number in range(30)]
    (folder / "items.csv").write_text("item_id,title\n" + "\n".join(titles) + "\n", encoding="utf-8")
    source = TableSource(domain="tea", interactions=str(folder / "log.csv"), items=str(folder / "items.csv"))
    return prepare(
        PrepareConfig(
            output_dir=str(folder / "data"),
            tables=(source,),
            target_domains=("tea",),
            vocabulary_size=260,
            max_title_tokens=9,
            k_core=0,
            min_events=3,
            min_history=1,
            drop_consecutive_repeats=False,
            split=SplitSpec(method="global-time", unseen_user_share=0.3),
            workers=1,
        )
    )


@pytest.fixture
def changed(data: Path, tmp_path: Path) -> Path:
    """A copy of the data folder, to change."""
    return Path(shutil.copytree(data, tmp_path / "changed"))


def tsv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def events(data: Path, domain: str, part: str | None = None) -> list[tuple[str, str, int]]:
    """User, item and time of the events of a domain, and of one part of the split."""
    split = read_split(data)
    catalogue, log = split.catalogue, split.interactions
    mask = catalogue.domain[log.item] == catalogue.domain_index(domain)
    if part:
        mask &= split.events(part)
    rows = zip(log.user_id[log.user[mask]], catalogue.item_id[log.item[mask]], log.time[mask] // SECOND, strict=True)
    return [(user, item, int(time)) for user, item, time in rows]


# ---- RecBole ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_recbole_has_the_log_and_the_split(data: Path, tmp_path: Path) -> None:
    assert len(list(data.glob("interactions/domain=books/*.parquet"))) > 1
    folder = export(data, "recbole", tmp_path / "out")
    for domain in ("books", "toys"):
        for suffix, part in {"": None, **{f".{name}": part for name, part in PARTS.items()}}.items():
            rows = tsv(folder / domain / f"{domain}{suffix}.inter")
            assert list(rows[0]) == ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
            found = [(row["user_id:token"], row["item_id:token"], int(row["timestamp:float"])) for row in rows]
            assert found == events(data, domain, part)
    catalogue = read_split(data).catalogue
    titles = {row["item_id:token"]: row["title:token_seq"] for row in tsv(folder / "books" / "books.item")}
    rows_of = catalogue.rows_of("books")
    assert titles == dict(zip(catalogue.item_id[rows_of], catalogue.title[rows_of], strict=True))


def test_our_own_reader_reads_the_atomic_files(data: Path, tmp_path: Path) -> None:
    folder = export(data, "recbole", tmp_path / "out", ["books"])
    source = RecBoleSource(domain="books", platform="library", prefix=str(folder / "books" / "books"))
    again = build.build_dataset([source], tmp_path / "again", Rules(k_core=0))
    read = pa.concat_tables([pq.ParquetFile(path).read() for path in sorted(again.glob("interactions/*/*.parquet"))])
    names = ("user_id", "item_id", "timestamp")
    assert sorted(zip(*(read[name].to_pylist() for name in names), strict=True)) == sorted(events(data, "books"))


@pytest.mark.parametrize(("where", "domain"), [("data", "books"), ("shop", "tea")])
def test_recbole_sequential_has_the_histories_of_our_queries(
    where: str, domain: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "LIST_BATCH", 7)
    data = request.getfixturevalue(where)
    folder = export(data, "recbole-sequential", tmp_path / "out", [domain])
    split = read_split(data)
    log, ids = split.interactions, split.catalogue.item_id
    longest = 0
    for name in ("valid", "test"):
        queries = split.queries(domain, PARTS[name], max_history=MAX_LIST)
        expected = [
            (log.user_id[user], " ".join(ids[queries.history[row]]), ids[queries.target[row]])
            for row, user in enumerate(queries.user)
        ]
        rows = tsv(folder / domain / f"{domain}.{name}.inter")
        assert [tuple(row.values()) for row in rows] == expected
        longest = max(longest, *(row["item_id_list:token_seq"].count(" ") + 1 for row in rows))
    assert (longest == MAX_LIST) == (where == "shop")
    train = tsv(folder / domain / f"{domain}.train.inter")
    assert list(train[0]) == ["user_id:token", "item_id_list:token_seq", "item_id:token"]
    num_users = len({user for user, _, _ in events(data, domain, TRAIN)})
    assert len(train) == len(events(data, domain, TRAIN)) - num_users, "all but each user's first"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a\tb", r"books.item: item_id 'a\\tb' holds a tab, a quote or an end of line"),
        ("a\nb", r"books.item: item_id 'a\\nb' holds a tab, a quote or an end of line"),
        ('a"b', r"books.item: item_id 'a\"b' holds a tab, a quote or an end of line"),
        ("NA", "books.item: item_id 'NA', which RecBole reads as no id at all"),
    ],
)
def test_what_atomic_files_cannot_hold_is_named(value: str, message: str, changed: Path, tmp_path: Path) -> None:
    path = changed / "items" / "domain=books" / "part-0.parquet"
    table = pq.ParquetFile(path).read()
    ids = [value, *table["item_id"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index("item_id"), "item_id", [ids]), path)
    with pytest.raises(DataError, match=message):
        export(changed, "recbole", tmp_path / "out", ["books"])
    assert not (tmp_path / "out").exists()


def test_an_item_id_with_a_space_has_no_place_in_a_history(changed: Path, tmp_path: Path) -> None:
    path = changed / "interactions" / "domain=books" / "part-0.parquet"
    table = pq.ParquetFile(path).read()
    ids = ["one two", *table["item_id"].to_pylist()[1:]]
    pq.write_table(table.set_column(table.column_names.index("item_id"), "item_id", [ids]), path)
    with pytest.raises(DataError, match="item_id 'one two' holds a space"):
        export(changed, "recbole-sequential", tmp_path / "out", ["books"])


# ---- data frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "columns"),
    [
        ("rectools", ["user_id", "item_id", "weight", "datetime"]),
        ("replay", ["query_id", "item_id", "rating", "timestamp"]),
    ],
)
def test_frames_have_the_names_of_the_libraries(data: Path, tmp_path: Path, format: str, columns: list[str]) -> None:
    folder = export(data, format, tmp_path / "out", ["books"])
    assert sorted(path.stem for path in (folder / "books").iterdir()) == ["items", "test", "train", "validation"]
    for part in PARTS.values():
        frame = pd.read_parquet(folder / "books" / f"{part}.parquet")
        assert list(frame.columns) == columns
        pd.testing.assert_frame_equal(frame, read_frame(data, format, "books", part))
        seconds = frame[columns[3]]
        if format == "rectools":
            seconds = seconds.astype("datetime64[s]").astype("int64")
        assert list(zip(frame.iloc[:, 0], frame.iloc[:, 1], seconds, strict=True)) == events(data, "books", part)
        assert (frame[columns[2]] == 1.0).all(), "an event without a rating weighs 1"
    items = pd.read_parquet(folder / "books" / "items.parquet")
    assert list(items.columns) == ["item_id", "title", "brand", "categories", "price"]
    pd.testing.assert_frame_equal(items, read_frame(data, format, "books", "items"))


def test_events_before_those_held_out_of_unseen_users_are_apart(shop: Path, tmp_path: Path) -> None:
    folder = export(shop, "replay", tmp_path / "out")
    rows = {part: pq.read_metadata(folder / "tea" / f"{part}.parquet").num_rows for part in SPLITS}
    assert rows == {part: len(events(shop, "tea", part)) for part in SPLITS}
    assert rows[CONTEXT] > 0


def test_ratings_that_some_events_lack_are_counted(shop: Path, data: Path, tmp_path: Path) -> None:
    about = json.loads((export(shop, "rectools", tmp_path / "shop") / "export.json").read_text())
    weights = pd.concat([read_frame(shop, "rectools", "tea", part)["weight"] for part in SPLITS])
    assert set(weights) == {1.0, 4.0}
    assert about["num_without_rating"] == {"tea": (weights == 1.0).sum()}
    about = json.loads((export(data, "rectools", tmp_path / "data") / "export.json").read_text())
    assert "num_without_rating" not in about, "there are no ratings at all"


def test_a_part_without_events_is_an_empty_frame(changed: Path, tmp_path: Path) -> None:
    for path in (changed / "interactions" / "domain=books").glob("*.parquet"):
        table = pq.ParquetFile(path).read()
        parts = [[TRAIN if part == VALIDATION else part for part in table["split"].to_pylist()]]
        pq.write_table(table.set_column(table.column_names.index("split"), "split", parts), path)
    for format, name in (("rectools", "validation.parquet"), ("recbole", "books.valid.inter")):
        folder = export(changed, format, tmp_path / format, ["books"])
        assert (folder / "books" / name).is_file()
        assert json.loads((folder / "export.json").read_text())["rows"][f"books/{name}"] == 0
    frame = pd.read_parquet(tmp_path / "rectools" / "books" / "validation.parquet")
    assert list(frame.columns) == list(FRAMES["rectools"].values()) and not len(frame)
    pd.testing.assert_frame_equal(frame, read_frame(changed, "rectools", "books", VALIDATION))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recbole", "books", "train"), "format='recbole': expected rectools, replay"),
        (("replay", "cars", "train"), "there is no domain 'cars'; the data has beauty, books"),
        (("replay", "books", "valid"), "part='valid': expected train, validation, test, context, items"),
    ],
)
def test_a_frame_that_is_not_there_is_named(data: Path, arguments: tuple[str, str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_frame(data, *arguments)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_text_is_what_our_training_reads(data: Path, tmp_path: Path) -> None:
    folder = export(data, "text", tmp_path / "out")
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    written = {
        "text": "shards/train",
        "text_heldout": "shards/heldout",
        "completions_books": "examples/books/train",
        "completions_books_validation": "examples/books/validation",
    }
    for name, where in written.items():
        shards, entries = open_shards(data / where), lines(folder / f"{name}.jsonl")
        assert len(entries) == len(shards) > 0
        for row, entry in enumerate(entries):
            text = entry["text"] if "text" in entry else entry["prompt"] + entry["completion"]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert [*ids, tokenizer.eos_token_id] == shards.rows[row].tolist()
            if "prompt" in entry:
                ids = tokenizer(entry["prompt"], add_special_tokens=False)["input_ids"]
                assert len(ids) == shards.column("target_start")[row]
                assert entry["prompt"].endswith("\nNext:")
    again = json.loads((folder / "export.json").read_text())["tokenised_again"]
    assert again.keys() == {f"{name}.jsonl" for name in written}
    assert all(found["checked"] == found["equal"] > 0 for found in again.values())


def test_text_that_gives_other_tokens_is_counted(shop: Path, tmp_path: Path) -> None:
    about = json.loads((export(shop, "text", tmp_path / "out") / "export.json").read_text())
    found = about["tokenised_again"]["text.jsonl"]
    assert found["equal"] < found["checked"], "titles that end inside a letter"


MARKS = [
    "<|im_end|>",
    "[INST]",
    "<start_of_turn>",
    "<|start_header_id|>",
    "<｜end▁of▁sentence｜>",
    "[/INST]",
    "<image>",
]


@pytest.mark.slow
def test_marks_of_chat_templates_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One title has a mark: as many documents are counted as hold it, the same way in every format of text."""
    titles = [f"Chess set {n}" for n in range(6)] + ["The [REC] <3 | a|b> film", "Mug <|im_end|> \u8336"]
    items = pa.table({"item_id": [f"i{n}" for n in range(8)], "title": titles})
    events = [(f"u{user}", f"i{(user + n) % 8}", 1_400_000_000 + n) for user in range(16) for n in range(6)]
    log = pa.table(dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*events, strict=True)), strict=True)))
    pq.write_table(items, tmp_path / "items.parquet")
    pq.write_table(log, tmp_path / "log.parquet")
    source = TableSource(
        domain="toys", interactions=str(tmp_path / "log.parquet"), items=str(tmp_path / "items.parquet")
    )
    config = PrepareConfig(
        output_dir=str(tmp_path / "data"),
        tables=(source,),
        target_domains=("toys",),
        vocabulary_size=300,
        k_core=0,
        min_events=2,
        min_history=1,
        workers=1,
    )
    data = prepare(config)
    monkey = pytest.MonkeyPatch()
    monkey.setenv("CPREC_PROGRESS", "plain")
    for format in ("messages", "text"):
        folder = export(data, format, tmp_path / format)
        found = json.loads((folder / "export.json").read_text())["special_marks"]
        assert found == {
            path.name: path.read_text(encoding="utf-8").count("\n")
            - sum("<|im_end|>" not in line for line in path.read_text(encoding="utf-8").splitlines())
            for path in folder.glob("*.jsonl")
        }
        assert sum(found.values()) > 0
        assert "hold a mark of chat templates, as '<|im_end|>'" in capsys.readouterr().err
    monkey.undo()


@pytest.mark.parametrize("mark", MARKS)
def test_marks_are_known(mark: str) -> None:
    found = exports.SPECIAL_MARK.search(f"Tea {mark} cup")
    assert found and found[0] == mark
    assert not exports.SPECIAL_MARK.search("[REC] <3 <Untitled> a|b [Blu-ray] <i>s</i> (2001)")


def test_few_documents_at_a_time_give_the_same(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = export(data, "text", tmp_path / "whole")
    monkeypatch.setattr(exports, "BATCH", 7)
    parts = export(data, "text", tmp_path / "parts")
    assert (whole / "export.json").read_bytes() == (parts / "export.json").read_bytes()


def test_chosen_domains_leave_out_all_documents_that_tell_of_others(data: Path, tmp_path: Path) -> None:
    folder = export(data, "text", tmp_path / "out", ["books", "toys"])
    shards = open_shards(data / "shards" / "train")
    number = sum(shards.column("domain") == "books") + sum(shards.column("domain") == "toys")
    texts = [entry["text"] for entry in lines(folder / "text.jsonl")]
    assert len(texts) == number > 0
    assert {text.partition("\n")[0] for text in texts} == {"Domain: books", "Domain: toys"}


def test_messages_are_chats_of_examples(data: Path, tmp_path: Path) -> None:
    folder = export(data, "messages", tmp_path / "out")
    pairs = export(data, "text", tmp_path / "text")
    titles = set(read_split(data).catalogue.title)
    for suffix in ("", "_validation"):
        chats = lines(folder / f"messages_books{suffix}.jsonl")
        asked, answers = zip(*(chat["messages"] for chat in chats), strict=True)
        assert {(a["role"], b["role"]) for a, b in zip(asked, answers, strict=True)} == {("user", "assistant")}
        assert {answer["content"] for answer in answers} <= titles
        for chat, pair in zip(chats, lines(pairs / f"completions_books{suffix}.jsonl"), strict=True):
            first, second = chat["messages"]
            assert (first["content"], f" {second['content']}") == (pair["prompt"], pair["completion"])


@pytest.mark.parametrize("format", ["messages", "text"])
def test_llama_factory_is_told_of_every_file_with_rows(data: Path, shop: Path, tmp_path: Path, format: str) -> None:
    for name, folder in (("data", data), ("shop", shop)):
        out = export(folder, format, tmp_path / name)
        info = json.loads((out / "dataset_info.json").read_text())
        assert {about["file_name"] for about in info.values()} == {
            path.name for path in out.glob("*.jsonl") if path.stat().st_size
        }
        for about in info.values():
            first = lines(out / about["file_name"])[0]
            assert set(about["columns"].values()) == set(first)
            if format == "messages":
                tags = about["tags"]
                assert about["formatting"] == "sharegpt"
                assert [set(message) for message in first["messages"]] == [{tags["role_tag"], tags["content_tag"]}] * 2
                assert [message["role"] for message in first["messages"]] == [tags["user_tag"], tags["assistant_tag"]]


def test_nothing_held_out_is_in_the_text_of_its_user(data: Path, tmp_path: Path) -> None:
    """From the log and the lines alone: no test title anywhere, no validation title but in files of that name."""
    split = read_split(data)
    log = split.interactions
    done: dict[tuple[str, str], set[str]] = {}
    for part in SPLITS:
        mask = split.events(part)
        for user, title in zip(log.user_id[log.user[mask]], split.catalogue.title[log.item[mask]], strict=True):
            done.setdefault((part, user), set()).add(title)
    files = {
        "text/text": "shards/train",
        "text/text_heldout": "shards/heldout",
        "text/completions_books": "examples/books/train",
        "text/completions_books_validation": "examples/books/validation",
        "messages/messages_books": "examples/books/train",
        "messages/messages_books_validation": "examples/books/validation",
    }
    for format in ("text", "messages"):
        export(data, format, tmp_path / format)
    assert {path.name for path in tmp_path.glob("*/*.jsonl")} == {f"{Path(name).name}.jsonl" for name in files}
    for name, where in files.items():
        users = open_shards(data / where).column("user_id")
        for user, entry in zip(users, lines(tmp_path / f"{name}.jsonl"), strict=True):
            told = set(titles_of(entry))
            allowed = done[TRAIN, user] | (done[VALIDATION, user] if name.endswith("_validation") else set())
            assert told and told <= allowed, f"{name}: {user} is told of {told - allowed}"


def titles_of(entry: dict[str, Any]) -> Iterator[str]:
    """Every title of a line of text, prompt and completion, or messages."""
    texts = [message["content"] for message in entry["messages"]] if "messages" in entry else list(entry.values())
    head, scope, *rows = "".join([texts[0], *(f" {text.strip()}" for text in texts[1:])]).split("\n")
    assert (head.partition(" ")[0], scope) == ("Domain:", "History:")
    for row in rows:
        title = row.partition(" ")[2]
        yield title.partition("] ")[2] if title.startswith("[") else title


def test_text_wants_a_certificate_that_covers_it(changed: Path, tmp_path: Path) -> None:
    path = changed / "certificate.json"
    certificate = json.loads(path.read_text())
    certificate["files"]["shards/train/tokens.bin"] = "0"
    path.write_text(json.dumps(certificate))
    with pytest.raises(LeakageError, match="shards/train was changed after it was certified"):
        export(changed, "text", tmp_path / "out")
    path.write_text(json.dumps(certificate | {"clean": False}))
    with pytest.raises(LeakageError, match="certificate.json is not clean"):
        export(changed, "messages", tmp_path / "out")
    path.unlink()
    with pytest.raises(LeakageError, match="certificate.json is missing"):
        export(changed, "messages", tmp_path / "out")
    about = json.loads((export(changed, "recbole", tmp_path / "tables") / "export.json").read_text())
    assert about["certificate_sha256"] is None


# ---- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_written_is_told(data: Path, tmp_path: Path, format: str) -> None:
    folder = export(data, format, tmp_path / "out", ["books"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left aside"
    about = json.loads((folder / "export.json").read_text())
    written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(about["sha256"]) == written - {"export.json"}
    assert all(file_sha256(folder / name) == sha256 for name, sha256 in about["sha256"].items())
    assert (about["format"], about["domains"]) == (format, ["books"])
    assert about["certificate_sha256"] == file_sha256(data / "certificate.json")
    assert about["catalogue_sha256"] == read_split(data).catalogue.digest()
    for name, number in about["rows"].items():
        path = folder / name
        if path.suffix == ".parquet":
            assert pq.read_metadata(path).num_rows == number
        else:
            assert len(path.read_bytes().splitlines()) == number + (path.suffix != ".jsonl")


def test_what_cannot_be_exported_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format='csv': expected recbole, recbole-sequential, rectools"):
        export(data, "csv", tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no domain 'cars'; the data has"):
        export(data, "recbole", tmp_path / "out", ["cars"])
    with pytest.raises(ConfigError, match="there are no examples of toys; the data has those of books"):
        export(data, "messages", tmp_path / "out", ["toys"])
    with pytest.raises(ConfigError, match="lies in the data folder"):
        export(data, "recbole", data / "shards" / "recbole")
    with pytest.raises(DataError, match="is no data folder"):
        export(tmp_path, "recbole", tmp_path / "out")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out is there already"):
        export(data, "recbole", tmp_path / "out")


def test_a_table_that_is_missing_or_broken_is_told(changed: Path, tmp_path: Path) -> None:
    path = changed / "interactions" / "domain=books" / "part-0.parquet"
    path.unlink()
    with pytest.raises(DataError, match="events of domain 'books', but its files hold"):
        export(changed, "recbole", tmp_path / "out", ["books"])
    path.write_bytes(b"no table")
    with pytest.raises(DataError, match=r"domain=books/part-0.parquet cannot be read"):
        export(changed, "recbole", tmp_path / "out", ["books"])


def test_the_command_line_exports(changed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(changed), "recbole", "--domain", "books", "toys"]) == 0
    assert sorted(path.name for path in (tmp_path / "changed-recbole").iterdir()) == ["books", "export.json", "toys"]
    assert cli.main(["export", str(changed), "text", "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "text.jsonl").is_file()
    assert cli.main(["export", str(changed), "nothing", str(tmp_path / "none")]) == 2
    assert "expected recbole" in capsys.readouterr().err
