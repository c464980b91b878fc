"""The same data folders come out of Spark and of DuckDB, row for row."""

from __future__ import annotations

import json
import random
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cprec.data.build import build_dataset
from cprec.data.config import Rules, TableSource
from cprec.data.engine import SparkEngine, connect
from cprec.errors import ConfigError, DataError
from cprec.text.config import PrepareConfig
from cprec.text.prepare import prepare

pytestmark = [
    pytest.mark.spark,
    pytest.mark.skipif(
        find_spec("pyspark") is None or shutil.which("java") is None,
        reason="needs PySpark (pip install 'cprec[spark]') and Java 17",
    ),
]

SPARK = "spark://local[2]"


def assert_equal_folders(first: Path, second: Path) -> None:
    for name in ("items", "interactions", "rejected.parquet"):
        one, other = pq.read_table(first / name), pq.read_table(second / name)
        assert one.to_pylist() == other.to_pylist(), name
    one, other = (json.loads((folder / "dataset.json").read_text()) for folder in (first, second))
    assert one == other


def dirty_log(folder: Path, seed: int) -> tuple[str, str]:
    """A log with everything that a rule looks at."""
    generator = random.Random(seed)
    times = [
        *range(1_406_116_800, 1_406_116_820),
        *(f"1406116802.{n:03}" for n in range(0, 40, 2)),
        "",
        "soon",
        " 1406116800",
        "1e9",
        "nan",
        "99999999999",
        "-1",
    ]
    lines = ["user_id,item_id,timestamp,rating,position"]
    for _ in range(600):
        user = generator.choice(["", " ", "ann", "bob", "Ann", "ann ", "007", "7", "élan", *map(str, range(20))])
        item = generator.choice(["", "x9", *(f"i{n}" for n in range(12))])
        rating = generator.choice(["", "4", "4.5", "good", "1e1"])
        position = generator.choice(["", "1", "2", "1.5", "9007199254740993", "x"])
        lines.append(f"{user},{item},{generator.choice(times)},{rating},{position}")
    lines.append("cut,short")
    (folder / "log.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "items.jsonl").write_text(
        "".join(
            json.dumps({"item_id": f"i{n}", "title": title, "category": ["a", "b &amp; c"], "price": price}) + "\n"
            for n, (title, price) in enumerate(
                [
                    ("Ball", "$4.99"), ("  Doll\t1 ", None), ("...", "x"), ("Kite &amp; Co", "1,000.50"), ("Ball", ""),
                    ("\u00dcber", "£3"), (None, 2), ("e\u0301lan", 2.5), ("187", -1), ("A", 0), ("B", 0), ("C", 0),
                    ("D", 0),
                ]
            )
        )
        + '{"item_id": "i0", "title": "Cube"}\n{"item_id": "", "title": "Nothing"}\nnope\n'
    )  # fmt: skip
    return str(folder / "log.csv"), str(folder / "items.jsonl")


@pytest.mark.parametrize("tie_order", ["source", "item_id", "shuffle"])
def test_dirty_logs_give_the_same_tables(tmp_path: Path, tie_order: Any) -> None:
    sources = []
    for number, domain in enumerate(("books", "toys")):
        (tmp_path / domain).mkdir()
        log, items = dirty_log(tmp_path / domain, number)
        sources.append(
            TableSource(
                domain=domain, interactions=log, items=items, columns={"order": "position"}, timestamps="seconds"
            )
        )
    for name, engine in (("duckdb", "duckdb"), ("spark", SPARK)):
        build_dataset(
            sources,
            tmp_path / name,
            Rules(k_core=3, k_core_scope="pooled" if tie_order == "source" else "domain", tie_order=tie_order),
            engine=engine,
            num_parts=2,
        )
    assert_equal_folders(tmp_path / "duckdb", tmp_path / "spark")


def test_errors_of_spark_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "log.parquet").write_bytes(b"PAR1 and then nothing")
    (tmp_path / "items.csv").write_text("item_id,title\ni,Ball\n")
    source = TableSource(domain="toys", interactions=str(tmp_path / "log.parquet"), items=str(tmp_path / "items.csv"))
    with pytest.raises(DataError, match=r"log\.parquet: "):
        build_dataset([source], tmp_path / "data", Rules(), engine=SPARK)
    with pytest.raises(ConfigError, match="expected duckdb, spark or spark://MASTER"):
        build_dataset([source], tmp_path / "data", Rules(), engine="sparks://x")


PARTS = """
import os, signal
from cprec.errors import ConfigError

def written(folder, part):
    (folder / f"part-{part}").touch()

def killed_once(folder, part):
    if part == 6 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    written(folder, part)

def refused(folder, part):
    raise ConfigError("domain='garden': name one of home")
"""


def test_parts_are_called_on_executors(tmp_path: Path) -> None:
    (tmp_path / "on_executors.py").write_text(PARTS)
    folder = tmp_path / "parts"
    folder.mkdir()

    def run(name: str, parts: list[int]) -> set[str]:
        return run_in(f"on_executors:{name}", parts)

    def run_in(function: str, parts: list[int]) -> set[str]:
        with connect(SPARK) as spark:
            assert isinstance(spark, SparkEngine)
            spark.session.sparkContext.addPyFile(str(tmp_path / "on_executors.py"))
            spark.run_parts(function, folder, parts, "counting")
        return {path.name for path in folder.glob("part-*")}

    assert run("written", [3, 1, 8]) == {"part-3", "part-1", "part-8"}
    with pytest.raises(ConfigError, match="^domain='garden': name one of home$"):
        run("refused", [0, 1])
    with pytest.raises(DataError, match="^Spark: .*No module named 'nowhere'.*: the same command goes on from what is"):
        run_in("nowhere:written", [0])
    with pytest.raises(DataError, match="^Spark: .*Python worker exited unexpectedly"):
        run("killed_once", list(range(10)))  # in a local session Spark tries nothing twice
    assert run("killed_once", list(range(10))) == {f"part-{part}" for part in range(10)}


def test_whole_preparations_of_real_domains_are_equal(real_data: Path, tmp_path: Path) -> None:
    def source(folder: str, **settings: Any) -> TableSource:
        return TableSource(
            domain=folder.partition("_")[2],
            platform=folder.partition("_")[0].rstrip("0123456789"),
            interactions=str(real_data / folder / "interactions.parquet"),
            items=str(real_data / folder / "items.parquet"),
            columns={"order": "position"},
            **settings,
        )

    for name, engine in (("duckdb", "duckdb"), ("spark", SPARK)):
        config = PrepareConfig(
            output_dir=str(tmp_path / name),
            tables=(
                source("amazon14_beauty", timestamps="seconds"),
                source("amazon18_giftcards", timestamps="seconds"),
                source("movielens_100k", timestamps="seconds"),
            ),
            target_domains=("giftcards",),
            pretrain_domains=("beauty", "100k"),
            vocabulary_size=1024,
            engine=engine,
            workers=1,
        )
        prepare(config)
    first, second = tmp_path / "duckdb", tmp_path / "spark"
    assert_equal_folders(first, second)
    certificates = [json.loads((folder / "certificate.json").read_text()) for folder in (first, second)]
    for certificate in certificates:
        # The engine writes the catalogue: its rows are the same, not its bytes. run.json names the engine.
        files = certificate["files"]
        certificate["files"] = {k: v for k, v in files.items() if k != "run.json" and not k.startswith("items/")}
    assert certificates[0] == certificates[1]
    assert certificates[0]["clean"]
    for name in ("shards/train", "shards/heldout", "examples/giftcards/train"):
        assert (first / name / "tokens.bin").read_bytes() == (second / name / "tokens.bin").read_bytes()
        assert pq.read_table(first / name / "documents.parquet").equals(
            pq.read_table(second / name / "documents.parquet")
        )
