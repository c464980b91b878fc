"""A data folder in the forms of other libraries: the same split, the same text, nothing held out."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from cprec import cli
from cprec.data.dataset import read_split
from cprec.data.sources.synthetic import SyntheticConfig
from cprec.errors import ConfigError, DataError
from cprec.provenance import file_sha256
from cprec.text.export import FORMS, export, read_frame
from cprec.text.prepare import PrepareConfig, prepare
from cprec.text.shards import open_shards
from cprec.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = PrepareConfig(
        output_dir=str(tmp_path_factory.mktemp("export") / "data"),
        synthetic=SyntheticConfig(num_market_users=60, num_library_users=40, items_per_domain=60),
        target_domains=("books",),
        vocabulary_size=512,
        k_core=0,
        min_events=3,
        min_history=1,
        workers=1,
    )
    return prepare(config)


def tsv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_recbole_has_the_log_and_the_split(data: Path, tmp_path: Path) -> None:
    folder = export(data, "recbole", tmp_path / "out", ["books"])
    split = read_split(data)
    catalogue, log = split.catalogue, split.interactions
    of_domain = catalogue.domain[log.item] == catalogue.domain_index("books")
    for name, part in (("train", "train"), ("valid", "validation"), ("test", "test")):
        mask = of_domain & split.events(part)
        rows = tsv(folder / "books" / f"books.{name}.inter")
        assert list(rows[0]) == ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]
        found = [(row["user_id:token"], row["item_id:token"], int(row["timestamp:float"])) for row in rows]
        expected = zip(log.user_id[log.user[mask]], catalogue.item_id[log.item[mask]], log.timestamp[mask], strict=True)
        assert sorted(found) == sorted((u, i, int(t)) for u, i, t in expected)
    assert len(tsv(folder / "books" / "books.inter")) == of_domain.sum()
    titles = {row["item_id:token"]: row["title:token_seq"] for row in tsv(folder / "books" / "books.item")}
    rows_of = catalogue.rows_of("books")
    assert titles == dict(zip(catalogue.item_id[rows_of], catalogue.title[rows_of], strict=True))


@pytest.mark.parametrize(
    ("form", "columns"),
    [
        ("rectools", ["user_id", "item_id", "weight", "datetime"]),
        ("replay", ["query_id", "item_id", "rating", "timestamp"]),
    ],
)
def test_frames_have_the_names_of_the_libraries(data: Path, tmp_path: Path, form: str, columns: list[str]) -> None:
    folder = export(data, form, tmp_path / "out")
    split = read_split(data)
    for part in ("train", "validation", "test"):
        frame = pd.read_parquet(folder / "books" / f"{part}.parquet")
        assert list(frame.columns) == columns
        pd.testing.assert_frame_equal(frame, read_frame(data, form, "books", part))
    total = sum(pq.read_metadata(path).num_rows for path in folder.glob("*/[tv]*.parquet"))
    assert total == len(split.interactions)
    moment = frame[columns[-1]]
    if form == "rectools":
        moment = moment.astype("datetime64[s]").astype("int64")
    assert set(moment) <= set(split.interactions.timestamp.tolist())
    assert (frame[columns[2]] == 1.0).all(), "an event without a rating weighs 1"


def test_text_is_what_our_training_reads(data: Path, tmp_path: Path) -> None:
    folder = export(data, "text", tmp_path / "out")
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    shards = open_shards(data / "shards" / "train")
    texts = lines(folder / "text.jsonl")
    assert len(texts) == len(shards)
    for row in range(0, len(shards), 37):
        ids = tokenizer(texts[row]["text"], add_special_tokens=False)["input_ids"]
        assert [*ids, tokenizer.eos_token_id] == shards.rows[row].tolist()
    examples = open_shards(data / "examples" / "books" / "train")
    pairs = lines(folder / "completions_books.jsonl")
    assert len(pairs) == len(examples)
    for row in range(0, len(examples), 11):
        text = f"{pairs[row]['prompt']}{pairs[row]['completion']}"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [*ids, tokenizer.eos_token_id] == examples.rows[row].tolist()
        assert str(pairs[row]["prompt"]).endswith("\nNext:")


def test_messages_are_chats_of_training_examples_only(data: Path, tmp_path: Path) -> None:
    folder = export(data, "messages", tmp_path / "out")
    chats = lines(folder / "messages_books.jsonl")
    split = read_split(data)
    titles = set(split.catalogue.title[split.catalogue.rows_of("books")])
    first = chats[0]["messages"]
    assert isinstance(first, list) and [entry["role"] for entry in first] == ["user", "assistant"]
    answers = [chat["messages"][1]["content"] for chat in chats]  # type: ignore[index]
    assert set(answers) <= titles
    assert len(chats) == len(open_shards(data / "examples" / "books" / "train")), "none of validation and test"
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["cprec_messages_books"]["file_name"] == "messages_books.jsonl"


def test_what_was_written_is_told(data: Path, tmp_path: Path) -> None:
    for form in FORMS:
        folder = export(data, form, tmp_path / form, ["books"])
        about = json.loads((folder / "export.json").read_text())
        written = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert set(about["files"]) == written - {"export.json"}
        assert all(file_sha256(folder / name) == sha256 for name, sha256 in about["files"].items())
        assert about["certificate_sha256"] == file_sha256(data / "certificate.json")


def test_what_cannot_be_exported_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="form='csv': expected recbole, rectools"):
        export(data, "csv", tmp_path / "out")
    with pytest.raises(ConfigError, match="there is no domain 'cars'; the data has"):
        export(data, "recbole", tmp_path / "out", ["cars"])
    with pytest.raises(DataError, match="is no data folder"):
        export(tmp_path, "recbole", tmp_path / "out")
    export(data, "recbole", tmp_path / "out", ["books"])
    with pytest.raises(ConfigError, match="out is there already"):
        export(data, "recbole", tmp_path / "out")
    table = pq.ParquetFile(data / "items" / "domain=books" / "part-0.parquet").read()
    other = tmp_path / "other"
    shutil.copytree(data, other)
    bad = table.set_column(0, "item_id", [[f"{value}\t" for value in table["item_id"].to_pylist()]])
    pq.write_table(bad, other / "items" / "domain=books" / "part-0.parquet")
    with pytest.raises(DataError, match=r"books.item: item_id '.*\\t' holds a tab"):
        export(other, "recbole", tmp_path / "third", ["books"])
    assert not (tmp_path / "third").exists()


def test_the_command_line_exports(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(data), "recbole", str(tmp_path / "out"), "--domain", "books", "toys"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["books", "export.json", "toys"]
    assert cli.main(["export", str(data), "nothing", str(tmp_path / "none")]) == 2
    assert "expected recbole" in capsys.readouterr().err
