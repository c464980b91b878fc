"""Entrants that are asked in parts: the same rankings from one process and from several; what a kill costs."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cprec.errors import ConfigError, CPRecError
from cprec.evaluate import asking
from cprec.evaluate.asking import Entrant, saved_rankings
from cprec.evaluate.config import EvaluateConfig
from cprec.evaluate.questions import Protocol, Questions
from cprec.evaluate.rankings import SavedRankings, rankings_path
from cprec.evaluate.results import CANDIDATES_UNIFORM, FULL, GENERATED, NEW_ITEMS, FoundOfExact
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.settings import resolve

NUM_QUERIES, BATCH = 50, 16
ASKED = {"k": 3, "max_queries": 0, "seed": 0, "num_candidates": 2, "questions": {}, "data": "hash"}

RECOMMENDER = '''
"""A recommender whose scores depend on all queries of a batch, as the last digits of a model's do."""
import os, signal, zlib
from pathlib import Path
from cprec.evaluate.asking import Opened
from cprec.recommender import Proof, Ranking

class Batched:
    name = "batched"

    def __init__(self, log):
        self.log = log

    def rank(self, queries, k, mode="full"):
        proof = Proof(gap=1 / 3, expanded=7) if mode == "full" and queries[0].candidates is None else None
        batch = " ".join([mode, *(query.query_id for query in queries)])
        with open(self.log, "a") as log:
            log.write(f"{mode} {queries[0].query_id} {len(queries)}\\n")
        score = zlib.crc32(batch.encode()) / 7
        return [Ranking(q.query_id, ("i1", "i2"), (score, score / 3), proof) for q in queries]

class Dying(Batched):
    def rank(self, queries, k, mode="full"):
        if (mode, queries[0].query_id) == ("generate", "q48") and not os.path.exists(f"{self.log}.died"):
            Path(f"{self.log}.died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().rank(queries, k, mode)

class Broken(Batched):
    def rank(self, queries, k, mode="full"):
        return [Ranking(query.query_id, ("i1",), (float("nan"),)) for query in queries]

def opened(kind, log):
    made = globals()[kind](log)
    modes = {name: lambda queries, k, name=name: made.rank(queries, k, name) for name in ("exact", "generate")}
    return Opened(recommender=made, modes=modes, cost={"num_parameters": 3})
'''

MakeEntrant = Callable[..., Entrant]


@pytest.fixture
def entrant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeEntrant:
    """Makes an entrant that other processes can open; it notes each batch that it is asked in `asked.txt`."""
    (tmp_path / "recommenders_in_parts.py").write_text(RECOMMENDER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "recommenders_in_parts", raising=False)
    monkeypatch.setattr(asking, "BATCH", BATCH)

    def make(kind: str = "Batched", **fields: Any) -> Entrant:
        opened = importlib.import_module("recommenders_in_parts").opened
        opens = partial(opened, kind, str(tmp_path / "asked.txt"))
        return Entrant(**{"name": "A model", "kind": "model", "open": opens, "num_places": lambda: 2} | fields)

    return make


@pytest.fixture(scope="module")
def protocols() -> list[Protocol]:
    queries = [
        RankingQuery(f"q{n}", "books", (Item("books", "i0"),), uncounted=frozenset({"i2"})) for n in range(NUM_QUERIES)
    ]
    questions = Questions(
        domain="books",
        queries=queries,
        target=["i1"] * NUM_QUERIES,
        user=[query.query_id for query in queries],
        candidates={"uniform": [("i1", "i2")] * NUM_QUERIES},
        new_items=frozenset({"i1"}),
    )
    found = questions.protocols(generate=True)
    assert {protocol.name for protocol in found} == {FULL, CANDIDATES_UNIFORM, NEW_ITEMS, GENERATED}
    return found


def content(saved: dict[str, SavedRankings]) -> dict[str, Any]:
    """All but the seconds."""
    return {name: (one.table.to_pydict(), one.answers, one.cost, one.found_of_exact) for name, one in saved.items()}


def asked(folder: Path) -> list[str]:
    path = folder / "asked.txt"
    lines = sorted(path.read_text().splitlines())
    path.unlink()
    return lines


def save(entrant: Entrant, protocols: list[Protocol], folder: Path, processes: Any = 1) -> dict[str, SavedRankings]:
    (folder / "books").mkdir(parents=True, exist_ok=True)
    return saved_rankings(entrant, protocols, ASKED, str(folder), "books", processes)


@pytest.mark.parametrize(
    "processes", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_parts_by_any_number_of_processes_give_what_is_saved_without_parts(
    entrant: MakeEntrant, protocols: list[Protocol], tmp_path: Path, processes: int
) -> None:
    """Scores depend on the batch here, so other batches would show."""
    whole = save(entrant(num_places=None, beam=True), protocols, tmp_path / "whole")
    batches = asked(tmp_path)
    assert len(batches) == 4 * 4 + 1, "four batches a protocol, and the sample of the beam"
    assert whole[FULL].found_of_exact == FoundOfExact(share=1.0, num_queries=NUM_QUERIES)
    assert {name for name, one in whole.items() if one.found_of_exact} == {FULL}
    parts = save(entrant(beam=True), protocols, tmp_path, processes)
    assert content(parts) == content(whole) and asked(tmp_path) == batches
    files = {path.name for path in (tmp_path / "books").iterdir()}
    assert files == {rankings_path("", "", "A model", p.name).name for p in protocols}, "no parts are left"


@pytest.mark.slow
def test_a_killed_process_loses_its_batch_alone(
    entrant: MakeEntrant, protocols: list[Protocol], tmp_path: Path
) -> None:
    with pytest.raises(CPRecError, match=r"-9 while ranking books with A model .*fewer.*the same command goes on"):
        save(entrant("Dying"), protocols, tmp_path, 2)
    there = asked(tmp_path)
    parts = list((tmp_path / "books" / "a-model.parts").glob("*.json"))
    assert 7 <= len(parts) < 16, "it has written the seven before its last, and the other process its own"
    assert len(there) - len(parts) in (0, 1), "but for one that the other was busy with when it was stopped"
    assert not list((tmp_path / "books").glob("*.parquet"))
    found = save(entrant("Dying"), protocols, tmp_path, 1)
    assert len(asked(tmp_path)) == 16 - len(parts), "what was written is not asked again"
    assert content(found) == content(save(entrant(num_places=None), protocols, tmp_path / "whole"))


def interrupted(entrant: Entrant, protocols: list[Protocol], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leaves all parts and no rankings; returns the folder of the parts."""

    def stop(path: Path, rankings: SavedRankings) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(asking, "write_rankings", stop)
        save(entrant, protocols, folder)
    return folder / "books" / "a-model.parts"


def test_parts_are_used_again_only_for_the_same_questions_and_recommender(
    entrant: MakeEntrant, protocols: list[Protocol], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for changed, changes in (({}, {}), ({"k": 4}, {}), ({}, {"identity": {"model": "2"}})):
        interrupted(entrant(), protocols, tmp_path, monkeypatch)
        assert len(asked(tmp_path)) == 16
        made = saved_rankings(entrant(**changes), protocols, ASKED | changed, str(tmp_path), "books")
        assert len(made) == 4
        if changed or changes:
            assert len(asked(tmp_path)) == 16
        else:
            assert not (tmp_path / "asked.txt").exists()
        for path in (tmp_path / "books").glob("*.parquet"):
            path.unlink()


def test_parts_of_other_batches_and_damaged_ones_are_made_again(
    entrant: MakeEntrant,
    protocols: list[Protocol],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = interrupted(entrant(), protocols, tmp_path, monkeypatch)
    asked(tmp_path)
    (folder / f"{FULL}-0001.json").write_text('{"answers": ')
    other = json.loads((folder / f"{FULL}-0002.json").read_text())
    (folder / f"{FULL}-0002.json").write_text(json.dumps(other | {"rankings": other["rankings"][1:]}))
    save(entrant(), protocols, tmp_path)
    assert asked(tmp_path) == ["full q16 16", "full q32 16"]
    told = capsys.readouterr().err
    assert f"{FULL}-0001.json cannot be read" in told and "14 of 16 parts are there already" in told


def test_a_score_that_is_not_finite_is_named_and_not_kept(
    entrant: MakeEntrant, protocols: list[Protocol], tmp_path: Path
) -> None:
    with pytest.raises(CPRecError, match="batched gave query 'q0' a score that is not finite"):
        save(entrant("Broken"), protocols, tmp_path)
    assert [path.name for path in (tmp_path / "books" / "a-model.parts").iterdir()] == ["job.pickle"]


def test_auto_takes_as_many_processes_as_there_are_places(
    entrant: MakeEntrant, protocols: list[Protocol], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []
    run_parts = asking.run_parts

    def one(function: str, folder: Path, parts: list[int], workers: int, description: str, **options: Any) -> Any:
        taken.append(workers)
        assert math.fsum(options["sizes"].values()) == 4 * NUM_QUERIES and options["unit"] == "queries"
        return run_parts(function, folder, parts, 1, description, **options)

    monkeypatch.setattr(asking, "run_parts", one)
    for number in ("auto", 3, 1):
        save(entrant(num_places=lambda: 7), protocols, tmp_path / str(number), number)
    assert taken == [7, 3, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0", "num_processes=0 must be at least 1, or auto"),
        ("-2", "num_processes=-2"),
        ("many", "num_processes=many: expected a whole"),
    ],
)
def test_impossible_numbers_of_processes_are_refused(value: str, message: str) -> None:
    config = EvaluateConfig(data="d", output_dir="o")
    assert resolve(config, ["num_processes=auto"]) == replace(config, num_processes="auto")
    with pytest.raises(ConfigError, match=message):
        resolve(config, [f"num_processes={value}"])
