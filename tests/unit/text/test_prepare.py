"""Preparation in parts, processes and partitions gives one and the same folder; domains do not touch each other."""

from __future__ import annotations

import importlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cprec.data import build
from cprec.data.config import Rules, Sources, SplitSpec, TableSource
from cprec.data.dataset import read_manifest, read_split, slot_of
from cprec.data.interactions import SECOND
from cprec.errors import ConfigError, DataError
from cprec.provenance import to_dict
from cprec.text import documents
from cprec.text.certificate import audit
from cprec.text.config import DocumentRules, PrepareConfig
from cprec.text.export import export
from cprec.text.prepare import prepare
from cprec.text.shards import open_shards
from cprec.text.tokenizer import load_tokenizer

DAY = 86_400
START = 1_406_073_600


def write_domain(folder: Path, domain: str, seed: int, *, num_users: int = 60, more: int = 0, **settings: Any) -> Any:
    """A domain of CSV files: about eight events a user, some at the same time."""
    generator = random.Random(f"{domain}{seed}")
    lines = ["user_id,item_id,timestamp"]
    for user in range(num_users):
        for _ in range(generator.randint(4, 12)):
            lines.append(f"u{user},{domain[0]}{generator.randrange(25)},{START + DAY * generator.randrange(300)}")
    lines += [f"v{n % 40},{domain[0]}{n % 25},{START + DAY * (n % 300)}" for n in range(more)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{domain}.csv").write_text("\n".join(lines) + "\n")
    titles = "".join(f"{domain[0]}{n},The {domain} number {n}\n" for n in range(25))
    (folder / f"{domain}_items.csv").write_text(f"item_id,title\n{titles}")
    return TableSource(
        domain=domain,
        platform="shop",
        interactions=str(folder / f"{domain}.csv"),
        items=str(folder / f"{domain}_items.csv"),
        **{"timestamps": "seconds", **settings},
    )


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory, tables_once: None) -> tuple[TableSource, ...]:
    folder = tmp_path_factory.mktemp("logs")
    users = {"books": 20, "games": 60, "toys": 60}  # books is unseen: who is tested in it is left out of the others
    return tuple(write_domain(folder, domain, 1, num_users=count) for domain, count in users.items())


def config_of(folder: Path, tables: tuple[TableSource, ...]) -> PrepareConfig:
    return PrepareConfig(
        output_dir=str(folder),
        tables=tables,
        target_domains=("books", "toys"),
        pretrain_domains=("games", "toys"),
        k_core=3,
        min_events=2,
        min_history=1,
        vocabulary_size=400,
        heldout_share=0.1,
        workers=1,
    )


@pytest.fixture
def config(tmp_path: Path, tables: tuple[TableSource, ...]) -> PrepareConfig:
    return config_of(tmp_path / "whole", tables)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tables: tuple[TableSource, ...]) -> Path:
    """The data folder of `config`, made once; `whole` is a copy of it."""
    return prepare(config_of(tmp_path_factory.mktemp("made") / "whole", tables))


@pytest.fixture
def whole(made: Path, config: PrepareConfig) -> Path:
    """The data folder of `config`."""
    return Path(shutil.copytree(made, config.output_dir))


def test_the_settings_are_those_of_three_records_and_no_name_is_in_two(config: PrepareConfig) -> None:
    names = [{field.name for field in fields(record)} for record in (Sources, Rules, DocumentRules)]
    assert len(set().union(*names)) == sum(map(len, names)) < len(fields(PrepareConfig))
    assert config.document_rules() == DocumentRules(**{name: getattr(config, name) for name in names[2]})
    for wrong in ({"tables": ()}, {"k_core": -1}, {"min_events": 1}):  # each record checks its own
        with pytest.raises(ConfigError):
            replace(config, **wrong)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but run.json, which names the settings of the run, and but for its hash in the certificate; and but
    hashes.json, which notes the times of the input's files."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    found = {name: path.read_bytes() for name, path in sorted(files.items()) if name not in ("run.json", "hashes.json")}
    certificate = json.loads(found["certificate.json"])
    certificate["files"].pop("run.json", None)
    return found | {"certificate.json": json.dumps(certificate).encode()}


def rows(folder: Path) -> dict[str, list[Any]]:
    """What does not depend on the number of parts, as rows."""
    found: dict[str, list[Any]] = {}
    for name in ("books", "games", "toys"):
        parts = sorted(
            (folder / "interactions" / f"domain={name}").glob("part-*.parquet"),
            key=lambda path: int(path.stem.partition("-")[2]),
        )
        found[f"interactions/{name}"] = [row for path in parts for row in pq.ParquetFile(path).read().to_pylist()]
        found[f"items/{name}"] = pq.read_table(folder / "items" / f"domain={name}").to_pylist()
    for path in [*folder.glob("shards/*"), *folder.glob("examples/*/*")]:
        shards, name = open_shards(path), path.relative_to(folder).as_posix()
        found[name] = [shards.tokens.tolist(), shards.documents.to_pylist()]
    for path in folder.glob("queries/*/*.parquet"):
        found[path.relative_to(folder).as_posix()] = pq.ParquetFile(path).read().to_pylist()
    found["popularity"] = pq.read_table(folder / "popularity.parquet").to_pylist()
    return found


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[PrepareConfig], dict[str, bytes]]:
    """What one run of one process writes in parts of 300 events, made once for each configuration."""
    made: dict[str, dict[str, bytes]] = {}

    def contents_of(config: PrepareConfig) -> dict[str, bytes]:
        key = json.dumps(to_dict(replace(config, output_dir="data")))
        if key not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(build, "PART_EVENTS", 300)
                folder = prepare(replace(config, output_dir=str(tmp_path_factory.mktemp("expected") / "data")))
            assert read_manifest(folder)["num_parts"] == 4
            made[key] = contents(folder)
        return made[key]

    return contents_of


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda events: monkeypatch.setattr(build, "PART_EVENTS", events)


def whole_files(folder: Path) -> dict[str, bytes]:
    """The files that do not name parts, as bytes."""
    found = [folder / "popularity.parquet", folder / "rejected.parquet"]
    for pattern in ("items/*/*", "tokenizer/*", "shards/*/tokens.bin", "examples/*/*/tokens.bin"):
        found += folder.glob(pattern)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.slow
def test_any_number_of_parts_gives_the_same_rows(
    config: PrepareConfig, tmp_path: Path, small_parts: Callable[[int], None]
) -> None:
    expected = rows(prepare(config))
    files = whole_files(tmp_path / "whole")
    assert len(files) == 2 + 3 + 2 + 2 + 2 + 4 and len(expected["shards/train"][1]) > 100
    assert read_manifest(tmp_path / "whole")["num_parts"] == 1
    for num_parts, events in ((4, 400), (16, 100)):
        small_parts(events)
        folder = prepare(replace(config, output_dir=str(tmp_path / f"parts{num_parts}")))
        assert read_manifest(folder)["num_parts"] == num_parts
        assert rows(folder) == expected
        assert whole_files(folder) == files
        assert read_split(folder).part.tolist() == read_split(config.output_dir).part.tolist()
        assert json.loads((folder / "certificate.json").read_text())["clean"]


@pytest.mark.slow
def test_parts_without_a_user_change_nothing(
    config: PrepareConfig, tmp_path: Path, small_parts: Callable[[int], None]
) -> None:
    few = tuple(write_domain(tmp_path / "few", domain, 2, num_users=6) for domain in ("books", "games", "toys"))
    config = replace(config, tables=few, k_core=0, pretrain_domains=(), heldout_share=0.3)
    expected = rows(prepare(config))
    small_parts(10)
    folder = prepare(replace(config, output_dir=str(tmp_path / "parts")))
    assert read_manifest(folder)["num_parts"] == 16, "for six users"
    assert rows(folder) == expected
    assert json.loads((folder / "certificate.json").read_text())["clean"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_gives_the_same_bytes(
    config: PrepareConfig, expected: Any, small_parts: Callable[[int], None], workers: int
) -> None:
    small_parts(300)
    assert contents(prepare(replace(config, workers=workers))) == expected(config)


@pytest.mark.slow
def test_any_number_of_partitions_gives_the_same_bytes(
    config: PrepareConfig, tmp_path: Path, expected: Any, small_parts: Callable[[int], None]
) -> None:
    small_parts(300)
    for name, order in (("back", (1, 0)), ("more", (4, 0, 2, 1, 3))):
        for number in order:
            assert not (tmp_path / name).exists(), "nothing looks complete before the last partition"
            prepare(replace(config, output_dir=str(tmp_path / name), partition=f"{number}/{len(order)}"))
        assert contents(tmp_path / name) == expected(config)
    assert not list(tmp_path.glob("*.incomplete")) and not list(tmp_path.glob(".*.lock"))


COMMAND_LINE = """
import sys
from cprec.data import build
from cprec.cli import main
build.PART_EVENTS = 300
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_partitions_may_run_at_once_on_the_command_line(
    config: PrepareConfig, tmp_path: Path, expected: Any, small_parts: Callable[[int], None]
) -> None:
    small_parts(300)
    settings = to_dict(replace(config, output_dir=str(tmp_path / "at_once")))
    (tmp_path / "shop.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-c", COMMAND_LINE, "prepare", str(tmp_path / "shop.yaml")]
    running = [
        subprocess.Popen([*command, f"partition={number}/2"], stderr=subprocess.PIPE, text=True) for number in range(2)
    ]
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert contents(tmp_path / "at_once") == expected(config)


@pytest.mark.slow
def test_a_killed_run_goes_on(
    config: PrepareConfig, tmp_path: Path, expected: Any, small_parts: Callable[[int], None]
) -> None:
    small_parts(300)
    settings = to_dict(replace(config, output_dir=str(tmp_path / "again")))
    (tmp_path / "shop.yaml").write_text(json.dumps(settings))
    killed = f"""
import os, signal
from cprec.text import documents

class Writer(documents._PartWriter):
    def write_queries(self, domain):
        if self.part == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        super().write_queries(domain)

documents._PartWriter = Writer
{COMMAND_LINE}"""
    arguments = ["prepare", str(tmp_path / "shop.yaml")]
    died = subprocess.run([sys.executable, "-c", killed, *arguments], stderr=subprocess.PIPE)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert not (tmp_path / "again").exists()
    parts = tmp_path / "again.incomplete" / "parts"
    assert sorted(path.name for path in parts.iterdir()) == ["part-0", "part-1", "part-2.incomplete"]
    prepare(replace(config, output_dir=str(tmp_path / "again")))
    assert contents(tmp_path / "again") == expected(config)


@pytest.mark.slow
def test_an_interrupted_run_goes_on(
    config: PrepareConfig,
    tmp_path: Path,
    expected: Any,
    small_parts: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_parts(300)
    config = replace(config, output_dir=str(tmp_path / "again"))
    real, written = documents.write_part, []

    def interrupted(folder: Path, part: int) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(part)
        return real(folder, part)

    monkeypatch.setattr(documents, "write_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert not (tmp_path / "again").exists()
    with pytest.raises(ConfigError, match="again.incomplete was begun with other settings of k_core: give every part"):
        prepare(replace(config, k_core=2, partition="0/2"))
    resumed: list[int] = []
    monkeypatch.setattr(documents, "write_part", lambda folder, part: (resumed.append(part), real(folder, part))[1])
    prepare(config)
    assert resumed and not set(resumed) & set(written), "what was written is not written again"
    assert contents(tmp_path / "again") == expected(config)


@pytest.mark.parametrize(
    "where",
    [
        "text.documents.join_shards",
        "text.prepare.audit",
        *("data.build.count_times", "text.documents._join_tables"),
        *("text.documents.write_popularity", "text.prepare.remove_parts"),
    ],
)
@pytest.mark.slow
def test_a_run_interrupted_anywhere_leaves_nothing_complete_and_goes_on(
    config: PrepareConfig, tmp_path: Path, expected: Any, small_parts: Callable[[int], None], where: str
) -> None:
    small_parts(300)
    config = replace(config, split=SplitSpec(method="global-time"), output_dir=str(tmp_path / "again"))
    calls = []

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        calls.append(arguments)
        if len(calls) == last:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    module, _, name = f"cprec.{where}".rpartition(".")
    real = getattr(importlib.import_module(module), name)
    last = 3 if name.startswith(("join", "_join")) else 1  # some shards and tables are joined then
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"cprec.{where}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    assert len(calls) == last
    assert not (tmp_path / "again").exists()
    prepare(config)
    assert contents(tmp_path / "again") == expected(config)


@pytest.mark.slow
def test_settings_changed_after_an_error_are_followed(
    config: PrepareConfig, tmp_path: Path, expected: Any, small_parts: Callable[[int], None]
) -> None:
    small_parts(300)
    config = replace(config, output_dir=str(tmp_path / "again"))
    with pytest.raises(ConfigError, match="max_document_tokens=3 has no room"):
        prepare(replace(config, max_document_tokens=3))
    prepare(config)
    assert contents(tmp_path / "again") == expected(config)


def test_a_complete_folder_is_reused_and_no_other_is_touched(
    config: PrepareConfig, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(whole)
    again = prepare(replace(config, workers=3, partition="1/2", memory_limit="1GB"))
    assert again == whole and "complete with these settings, reused" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="whole was prepared with other settings of k_core, seed: choose another"):
        prepare(replace(config, k_core=2, seed=1))
    assert contents(whole) == before
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="other exists and is not a data folder"):
        prepare(replace(config, output_dir=str(tmp_path / "other")))


def test_a_folder_made_before_tables_had_settings_of_their_own_is_reused(config: PrepareConfig, whole: Path) -> None:
    record = json.loads((whole / "run.json").read_text())
    for table in record["config"]["tables"]:
        assert table.pop("encoding"), table.pop("decimal")
    (whole / "run.json").write_text(json.dumps(record))
    before = contents(whole)
    assert contents(prepare(config)) == before


def test_a_domain_that_no_source_has_is_found_before_anything_is_read(config: PrepareConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="target_domains names toy, but the data has: books, games, toys"):
        prepare(replace(config, target_domains=("toy",)))
    assert not list(tmp_path.glob("whole*"))


@pytest.mark.parametrize("partition", ["3/3", "1", "a/b", "-1/2", "0/0"])
def test_a_partition_is_i_of_n(config: PrepareConfig, partition: str) -> None:
    with pytest.raises(ConfigError, match="write i/n with i from 0 to n-1"):
        replace(config, partition=partition)


@pytest.mark.parametrize(
    "tie_order",
    ["source", "item_id", "shuffle"],
)
@pytest.mark.slow
def test_rows_added_to_one_domain_change_nothing_in_another(
    config: PrepareConfig, tmp_path: Path, small_parts: Callable[[int], None], tie_order: Any
) -> None:
    small_parts(800)
    config = replace(config, tie_order=tie_order)
    prepare(config)
    tables = (*config.tables[:1], write_domain(tmp_path / "more", "games", 1, more=1500), config.tables[2])
    fixed = str(tmp_path / "whole" / "tokenizer")
    prepare(replace(config, output_dir=str(tmp_path / "changed"), tables=tables, tokenizer=fixed))
    sizes = [read_manifest(tmp_path / name)["num_parts"] for name in ("whole", "changed")]
    assert sizes[0] < sizes[1], "rows may move to other parts, but not to other places"
    before, after = rows(tmp_path / "whole"), rows(tmp_path / "changed")
    assert before["interactions/games"] != after["interactions/games"]
    same = [name for name in before if "games" not in name and not name.startswith(("shards", "popularity"))]
    assert len(same) == 2 * 2 + 2 * 3 + 2 * 2
    assert all(before[name] == after[name] for name in same)
    files = [whole_files(tmp_path / name) for name in ("whole", "changed")]
    untouched = [name for name in files[0] if name.startswith("examples") or "books" in name or "toys" in name]
    assert len(untouched) == 2 + 6 and all(files[0][name] == files[1][name] for name in untouched)

    def of_toys(folder: Path) -> list[Any]:
        found = []
        for name in ("train", "heldout"):
            shards = open_shards(folder / "shards" / name)
            for row in np.flatnonzero(shards.column("domain") == "toys").tolist():
                found.append((name, shards.column("user_id")[row], shards.rows[row].tolist()))
        return found

    assert of_toys(tmp_path / "whole") == of_toys(tmp_path / "changed")


@pytest.mark.slow
def test_domains_that_only_have_an_order_are_told_of_and_may_be_interleaved(
    config: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    games = replace(config.tables[1], timestamps="order")
    config = replace(config, tables=(config.tables[0], games, config.tables[2]), pretrain_domains=())
    prepare(replace(config, output_dir=str(tmp_path / "time"), target_domains=("toys",)))
    assert "games only orders each user's events" in capsys.readouterr().err
    prepare(replace(config, output_dir=str(tmp_path / "mixed"), target_domains=("toys",), mixed_order="interleave"))
    assert "only orders" not in capsys.readouterr().err

    def mixed(name: str) -> int:
        pieces = open_shards(tmp_path / name / "shards" / "train").manifest["pieces"]
        return sum(piece["num_tokens"] for piece in pieces if piece["kind"] == "mixed")

    assert mixed("mixed") > mixed("time") > 0


@pytest.mark.slow
def test_shuffled_documents_hold_the_same_events(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def documents(name: str, **changes: Any) -> dict[str, list[tuple[str, list[int]]]]:
        folder = prepare(replace(config, output_dir=str(tmp_path / name), **changes))
        opened = {part: open_shards(folder / "shards" / part) for part in ("train", "heldout")}
        return {
            part: [(str(shards.column("user_id")[row]), shards.rows[row].tolist()) for row in range(len(shards))]
            for part, shards in opened.items()
        }

    plain, mixed = documents("time"), documents("shuffled", document_order="shuffled")
    assert mixed["heldout"] == plain["heldout"]
    assert [(user, sorted(tokens)) for user, tokens in mixed["train"]] == [
        (user, sorted(tokens)) for user, tokens in plain["train"]
    ], "the same titles under the same marks"
    moved = sum(a != b for a, b in zip(plain["train"], mixed["train"], strict=True))
    assert moved > 0.8 * len(plain["train"])
    monkeypatch.setattr("cprec.data.build.PART_EVENTS", 100)
    assert documents("parts", document_order="shuffled") == mixed, "whatever the parts"


@pytest.mark.slow
def test_other_fields_of_items_are_in_every_text_and_certified(config: PrepareConfig, tmp_path: Path) -> None:
    books = config.tables[0]
    items = "".join(f"b{n},The book,house {n % 5},kind {n // 5}\n" for n in range(25))  # 25 items of one title
    (tmp_path / "items.csv").write_text(f"item_id,title,brand,categories\n{items}")
    config = replace(
        config,
        tables=(replace(books, items=str(tmp_path / "items.csv")),),
        target_domains=("books",),
        pretrain_domains=(),
        item_fields=("title", "brand", "categories"),
    )
    folder = prepare(config)
    assert json.loads((folder / "certificate.json").read_text())["clean"]
    shards, tokenizer = open_shards(folder / "shards" / "train"), load_tokenizer(str(folder / "tokenizer"))
    text = tokenizer.decode(shards.tokens)
    shown = re.findall(r" The book; house \d; kind \d(?=\n|<eos>)", text)
    assert len(shown) == text.count("The book") == shards.column("num_events").sum() and len(set(shown)) > 15
    assert shards.manifest["about"]["template"]["item_fields"] == ["title", "brand", "categories"]


@pytest.mark.slow
def test_every_document_begins_as_the_tokenizer_begins_a_text(config: PrepareConfig, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    plain = prepare(replace(config, target_domains=("toys",)))
    tokenizer = load_tokenizer(str(plain / "tokenizer"))
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer.save_pretrained(tmp_path / "base")
    settings = {"target_domains": ("toys",), "tokenizer": str(tmp_path / "base")}
    folder = prepare(replace(config, output_dir=str(tmp_path / "begun"), **settings))
    assert json.loads((folder / "certificate.json").read_text())["clean"]
    for name in ("shards/train", "shards/heldout", "examples/toys/train", "examples/toys/validation"):
        begun, before = open_shards(folder / name), open_shards(plain / name)
        assert "begin" not in before.manifest["about"] and begun.manifest["about"]["begin"] == [bos]
        assert len(begun) == len(before) > 0
        for row in range(len(begun)):
            assert begun.rows[row].tolist() == [bos, *before.rows[row].tolist()]
        assert (begun.column("target_start") == before.column("target_start") + 1).all()

    text = export(folder, "text", tmp_path / "text")
    about = json.loads((text / "export.json").read_text())["tokenised_again"]["text.jsonl"]
    assert about["equal"] == about["checked"] > 0 and "<s>" not in (text / "text.jsonl").read_text()

    # A folder from before there was the setting, when nothing stood before a text.
    record = json.loads((plain / "run.json").read_text())
    assert record["config"].pop("add_bos_token") == "auto"
    (plain / "run.json").write_text(json.dumps(record))
    assert prepare(replace(config, target_domains=("toys",))) == plain
    old = replace(config, output_dir=str(tmp_path / "begun"), **settings)
    record = json.loads((folder / "run.json").read_text())
    del record["config"]["add_bos_token"]
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"other settings of add_bos_token \(none were added; add_bos_token=false"):
        prepare(old)
    assert prepare(replace(old, add_bos_token="false")) == folder


def test_unseen_users_are_asked_but_never_learnt_from(config: PrepareConfig, tmp_path: Path) -> None:
    folder = prepare(replace(config, split=SplitSpec(unseen_user_share=0.3), pretrain_domains=()))
    split = read_split(folder)
    unseen = {str(split.interactions.user_id[user]) for user in split.interactions.user[split.events("context")]}
    assert 8 < len(unseen) < 30
    for name in ("shards/train", "shards/heldout", "examples/toys/train"):
        assert not unseen & set(open_shards(folder / name).column("user_id"))
    asked = pq.read_table(folder / "queries" / "toys" / "test.parquet").to_pylist()
    of_unseen = [row for row in asked if row["user_id"] in unseen]
    assert of_unseen and all(row["history_item"] for row in of_unseen)
    counts = pq.read_table(folder / "popularity.parquet")["num_events"].to_pylist()
    assert sum(counts) == len(split.train)
    assert json.loads((folder / "certificate.json").read_text())["clean"]


@pytest.mark.slow
def test_a_cut_in_time_is_that_of_the_whole_log(
    config: PrepareConfig, tmp_path: Path, small_parts: Callable[[int], None]
) -> None:
    spec = SplitSpec(method="global-time", validation_fraction=0.2, test_fraction=0.1)
    small_parts(100)
    folder = prepare(replace(config, split=spec))
    split = read_split(folder)
    times, parts = split.interactions.time / SECOND, split.part
    cuts = read_manifest(folder)["cuts"]
    assert ((times >= cuts["test"]) == (parts == 2)).all()
    assert (((times >= cuts["validation"]) & (times < cuts["test"])) == (parts == 1)).all()
    order = np.sort(times)
    assert (cuts["validation"], cuts["test"]) == (order[int(len(order) * 0.7)], order[int(len(order) * 0.9)])
    names = [p["name"] for p in json.loads((folder / "certificate.json").read_text())["properties"]]
    assert any("cut" in name for name in names)


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_users_stand_where_the_engine_puts_them(
    config: PrepareConfig, tmp_path: Path, small_parts: Callable[[int], None]
) -> None:
    small_parts(50)
    folder = tmp_path / "tables"
    folder.mkdir()
    build.build_tables(config.tables[:2], folder, Rules())
    num_parts = read_manifest(folder)["num_parts"]
    assert num_parts == 16
    for path in folder.glob("interactions/*/part-*.parquet"):
        part = int(path.stem.partition("-")[2])
        users = pq.ParquetFile(path).read(["user_id"])["user_id"].to_pylist()
        assert {slot_of("shop", user) * num_parts // 4096 for user in users} == {part}


def test_each_rule_reports_what_it_removed(tmp_path: Path) -> None:
    log = pa.table(
        {
            "user_id": ["a"] * 6 + ["b"] * 3,
            "item_id": ["x", "x", "x", "y", "x", "z", "x", "y", ""],
            "timestamp": [START, START, START + 1, START + 2, START + 3, START + 4, START, START + 1, START + 2],
        }
    )
    pq.write_table(log, tmp_path / "log.parquet")
    (tmp_path / "items.csv").write_text("item_id,title\nx,X\ny,Y\nz,Z\n")
    source = TableSource(domain="toys", interactions=str(tmp_path / "log.parquet"), items=str(tmp_path / "items.csv"))
    folder = build.build_dataset([source], tmp_path / "data", Rules(k_core=2))
    about = read_manifest(folder)["domains"]["toys"]
    counts = about["counts"]
    assert [(step["rule"], step.get("removed"), step["events"]) for step in counts] == [
        ("read", None, 9),
        ("usable", 1, 8),  # the event without an item
        ("without exact duplicates", 1, 7),
        ("without consecutive repeats, with enough events", 2, 5),  # a's second x, and z
    ]
    assert (counts[-1]["consecutive_repeats"], counts[-1]["too_few_events"]) == (1, 1)
    assert about["rejected"] == {"no item id": 1}


def test_a_wrong_tokenizer_is_found_before_the_log_is_read(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cprec.text.prepare._build_tables", lambda *given: pytest.fail("the log was read"))
    with pytest.raises(ConfigError, match="there is no folder 'no/such/model'"):
        prepare(replace(config, output_dir=str(tmp_path / "out"), tokenizer="no/such/model"))


def test_nothing_to_train_on_is_an_error(config: PrepareConfig, tmp_path: Path) -> None:
    for _ in range(2):  # and again, by the same command
        with pytest.raises(DataError, match="no behaviour sequence has min_events=19"):
            prepare(replace(config, min_events=19, output_dir=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_a_run_is_audited_by_its_folder(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "run" / "data")
    (tmp_path / "run" / "data" / "certificate.json").unlink()
    assert audit(tmp_path / "run", workers=1)["clean"]
    assert (tmp_path / "run" / "data" / "certificate.json").is_file()
    with pytest.raises(ConfigError, match="is not a data folder"):
        audit(tmp_path)
