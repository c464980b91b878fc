"""The same file of lists, byte for byte, from one process, from several, from partitions and from Spark; also where
one was killed."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cprec import distributed, serving
from cprec.data.catalogue import Catalogue
from cprec.data.engine import SparkEngine, connect
from cprec.errors import CPRecError, DataError
from cprec.models import tiny_model
from cprec.serve import parts
from cprec.serve.config import RecommendConfig
from cprec.text.tokenizer import train_tokenizer

SPARK = "spark://local[2]"
WORDS = ("red", "blue", "small", "large", "old", "cup", "lamp", "rug", "vase", "clock")

KILLED = """
import os, signal
from cprec.serving import answer_part

def killed_once(folder, part):
    if part == {part} and not os.path.exists({died!r}):
        open({died!r}, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    answer_part(folder, part)
"""


@pytest.fixture(scope="module")
def model(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    titles = [f"{first} {second} {number % 7}" for number, first in enumerate(WORDS) for second in WORDS]
    items = pa.table({"item_id": [f"i{number:02}" for number in range(len(titles))], "title": titles})
    tokenizer = train_tokenizer([f" {title}" for title in titles], 300)
    made = tiny_model(len(tokenizer), hidden_size=32)
    catalogue = Catalogue.from_tables({"home": items})
    return write_model(tmp_path_factory.mktemp("model") / "m", made, tokenizer, catalogue, domain="home")


@pytest.fixture(scope="module")
def histories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Histories of many lengths, one with an item that nobody knows."""
    draw = np.random.default_rng(0)
    rows = [[f"i{item:02}" for item in draw.integers(0, 100, draw.integers(1, 12))] for _ in range(150)]
    rows[70][0] = "gone"
    path = tmp_path_factory.mktemp("input") / "histories.parquet"
    pq.write_table(pa.table({"user_id": [f"u{n}" for n in range(len(rows))], "history": rows}), path, row_group_size=40)
    return path


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten parts, each of them a batch; and one thread here, as workers have."""
    monkeypatch.setattr(parts, "USERS_AT_ONCE", 16)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def whole(model: Path, histories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one process writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "USERS_AT_ONCE", 16)
        torch.set_num_threads(1)
        folder = tmp_path_factory.mktemp("whole")
        serving.open_and_recommend(settings(model, histories, folder))
    return written(folder)


def settings(model: Path, histories: Path, folder: Path, **changes: Any) -> RecommendConfig:
    return RecommendConfig(
        **{"model": str(model), "input": str(histories), "output": str(folder / "recs.csv"), "k": 5} | changes
    )


def written(folder: Path) -> dict[str, bytes]:
    assert {path.name for path in folder.iterdir()} == {"recs.csv", "recs.csv.rejected.csv", "recs.csv.lists"}
    return {name: (folder / name).read_bytes() for name in ("recs.csv", "recs.csv.rejected.csv")}


@pytest.fixture
def dies_once(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Has the process that makes this part killed, once; returns the module that does so."""

    def prepare(part: int) -> Path:
        folder = tmp_path_factory.mktemp("killed")
        (folder / "kills.py").write_text(KILLED.format(part=part, died=str(folder / "died")))
        monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "kills", raising=False)
        monkeypatch.setattr(serving, "ANSWER_PART", "kills:killed_once")
        return folder / "kills.py"

    return prepare


@pytest.mark.slow
def test_several_processes_give_what_one_gives(
    model: Path, histories: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    assert whole["recs.csv"].count(b"\n") == 150 * 5 + 1 and b"gone" in whole["recs.csv.rejected.csv"]
    serving.open_and_recommend(settings(model, histories, tmp_path, num_processes=2))
    assert written(tmp_path) == whole


@pytest.mark.slow
def test_partitions_of_several_processes_give_what_one_gives(
    model: Path, histories: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for number in (1, 2, 0):
        assert not (tmp_path / "recs.csv").exists()
        changes = {"partition": f"{number}/3", "num_processes": 1 + number % 2}
        serving.open_and_recommend(settings(model, histories, tmp_path, **changes))
    assert written(tmp_path) == whole


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_doubles_nothing(
    model: Path, histories: Path, whole: dict[str, bytes], tmp_path: Path, dies_once: Callable[[int], Path]
) -> None:
    dies_once(6)
    config = settings(model, histories, tmp_path, num_processes=2)
    with pytest.raises(CPRecError, match=r"exit code -9 while recommending .*the same command goes on from what is"):
        serving.open_and_recommend(config)
    there = sorted((tmp_path / "recs.csv.lists").glob("part-*.parquet"))
    assert 3 <= len(there) < 10, "what the killed worker wrote before, at least"
    states = [path.stat().st_mtime_ns for path in there]
    serving.open_and_recommend(replace(config, num_processes=1))
    assert written(tmp_path) == whole
    assert [path.stat().st_mtime_ns for path in there] == states, "what was there is not made again"


def test_as_many_processes_as_gpus_or_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.machine, "num_cores", lambda: 5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert distributed.num_places() == 5
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.num_places() == 4
    devices = []
    for number in range(6):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        devices.append(distributed.pick_device().index)
    assert devices == [0, 1, 2, 3, 0, 1]


@pytest.mark.spark
@pytest.mark.skipif(
    find_spec("pyspark") is None or shutil.which("java") is None,
    reason="needs PySpark (pip install 'cprec[spark]') and Java 17",
)
class TestSpark:
    def test_spark_gives_what_one_process_gives(
        self, model: Path, histories: Path, whole: dict[str, bytes], tmp_path: Path
    ) -> None:
        serving.open_and_recommend(settings(model, histories, tmp_path, engine=SPARK))
        assert written(tmp_path) == whole

    def test_a_killed_worker_of_spark_loses_nothing_and_doubles_nothing(
        self,
        model: Path,
        histories: Path,
        whole: dict[str, bytes],
        tmp_path: Path,
        dies_once: Callable[[int], Path],
    ) -> None:
        module = dies_once(6)
        config = settings(model, histories, tmp_path, engine=SPARK)
        with connect(SPARK) as spark:  # the active session, which is used
            assert isinstance(spark, SparkEngine)
            spark.session.sparkContext.addPyFile(str(module))
            with pytest.raises(DataError, match="Spark: .*Python worker exited unexpectedly"):
                serving.open_and_recommend(config)  # Spark in one machine tries nothing twice
            assert 0 < len(list((tmp_path / "recs.csv.lists").glob("part-*.parquet"))) < 10
            serving.open_and_recommend(config)
        assert written(tmp_path) == whole
