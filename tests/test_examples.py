"""The example of a ranker by features; those of the README are run by test_docs.py."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cprec import lineup
from cprec.data.build import build_dataset
from cprec.data.config import Rules, SplitSpec, SyntheticConfig
from cprec.data.dataset import finish_part, read_split
from cprec.data.sources.memory import MemorySource
from cprec.data.sources.synthetic import SyntheticWorld
from cprec.data.splits import Split, make_split
from cprec.lineup import settings_of
from cprec.recommender import Recommender
from cprec.schema import TEST, VALIDATION

EXAMPLE = Path(__file__).parents[1] / "examples" / "rerank_with_features.py"
ROW = "transition graph (titles)"
SHOWN = re.compile(
    rf"{re.escape(ROW)}: (\d+) lists to learn from, (\d+) to judge by\n"
    r"NDCG@10 (.*) before, (.*) after\ndifference (.*), 95 % interval (.*) to (.*)\n"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of kitchen in a small generated world, with its split."""
    world = SyntheticWorld(SyntheticConfig(num_market_users=600, num_library_users=1, items_per_domain=100))
    source = MemorySource("kitchen", "market", *world.tables()["kitchen"])
    folder = build_dataset([source], tmp_path_factory.mktemp("examples") / "data", Rules(k_core=0))
    finish_part(folder, 0, lambda *log: make_split(*log, SplitSpec()))
    manifest = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(manifest | {"split": asdict(SplitSpec())}))
    return folder


def run(data: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, str(data), "kitchen"])
    return runpy.run_path(str(EXAMPLE), run_name="__main__")


def shown(capsys: pytest.CaptureFixture[str]) -> list[float]:
    match = SHOWN.fullmatch(capsys.readouterr().out)
    assert match is not None
    return [float(number) for number in match.groups()]


class ByOneFeature:
    """In place of LightGBM: scores are one of the features, and what is given to learn from is kept."""

    def __init__(self, feature: str) -> None:
        self.feature = feature

    def Dataset(self, table: np.ndarray, label: np.ndarray, group: Sequence[int], feature_name: list[str]) -> Any:
        self.table, self.label, self.group, self.names = table, label, group, feature_name

    def train(self, parameters: dict[str, Any], learnt: Any) -> Any:
        assert parameters["objective"] == "lambdarank"
        return SimpleNamespace(predict=lambda table: table[:, self.names.index(self.feature)])


@pytest.mark.parametrize("feature", ["score", "popularity"])
def test_lists_are_put_in_the_order_of_what_was_learnt(
    feature: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranker = ByOneFeature(feature)
    monkeypatch.setitem(sys.modules, "lightgbm", ranker)  # type: ignore[arg-type]
    names = run(data, monkeypatch)
    num_lists, num_queries, before, after, gain, low, high = shown(capsys)
    split = read_split(data)
    assert num_lists == len(ranker.group) == ranker.label.sum() <= split.events(VALIDATION).sum()
    assert num_queries == split.events(TEST).sum() and 0 < before < 1
    ends = np.cumsum(ranker.group)
    assert len(ranker.table) == ends[-1] and np.isfinite(ranker.table).all()
    assert all(part.sum() == 1 for part in np.split(ranker.label, ends[:-1])), "one item of a list came"
    for ranking, other in zip(names["before"], names["after"], strict=True):
        assert sorted(ranking.item_ids) == sorted(other.item_ids)
        assert list(other.scores) == sorted(other.scores, reverse=True)
    if feature == "score":
        assert (gain, low, high) == (0, 0, 0) and before == after
    else:
        assert after == pytest.approx(before + gain, abs=2e-4) and low < gain < high and gain != 0


def test_features_are_those_of_training_events(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted event by event, of the test list with the greatest number of features that are not 0."""
    monkeypatch.setitem(sys.modules, "lightgbm", ByOneFeature("score"))  # type: ignore[arg-type]
    names = run(data, monkeypatch)
    split, catalogue = names["split"], names["split"].catalogue
    log = split.train
    tables = [names["features"].of(query, ranking) for query, ranking, _ in names["lists"][TEST]]
    chosen = int(np.argmax([np.count_nonzero(table) for table in tables]))
    query, ranking, _ = names["lists"][TEST][chosen]
    row_of = {str(item): row for row, item in enumerate(catalogue.item_id)}
    kind, brand = catalogue.categories, catalogue.brand
    past = [row_of[event.item_id] for event in query.history]
    pairs = [
        (kind[a], kind[b])
        for a, b, same in zip(log.item, log.item[1:], log.user == np.append(log.user[1:], -1), strict=False)
        if same
    ]
    for place, (item, score) in enumerate(zip(ranking.item_ids, ranking.scores, strict=True)):
        mine = row_of[item]
        from_last = [after for before, after in pairs if before == kind[past[-1]]]
        idle = (log.time.max() - log.time[log.item == mine].max()) / names["DAY"]
        expected = [score, place, (log.item == mine).sum(), idle]
        expected += [np.mean([of[row] == of[mine] for row in past]) for of in (brand, kind)]
        expected += [from_last.count(kind[mine]) / len(from_last)]
        assert tables[chosen][place].tolist() == pytest.approx(expected)


def test_the_row_is_made_without_validation_events(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt_from = []

    def make(split: Split, domain: str) -> Recommender:
        learnt_from.append(split)
        return settings_of(ROW).make(split, domain)

    monkeypatch.setitem(sys.modules, "lightgbm", ByOneFeature("score"))  # type: ignore[arg-type]
    monkeypatch.setattr(lineup, "settings_of", lambda row: SimpleNamespace(make=make))
    run(data, monkeypatch)
    (split,) = learnt_from
    assert np.array_equal(split.part, read_split(data).part) and not split.validates


def test_features_help_where_they_say_more_than_scores(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lightgbm", reason="the example needs LightGBM: pip install lightgbm")
    run(data, monkeypatch)
    *_, gain, low, _ = shown(capsys)
    assert gain > 0 and low > 0
