"""Tuning: the same budget for all, defaults first, and a run that was stopped goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from cprec import tune as tuning
from cprec.baselines.config import TuneConfig
from cprec.baselines.item_knn import ItemKNN
from cprec.baselines.popularity import Popularity, PopularityRecommender
from cprec.choices import Choice, OneOf, Real, Whole
from cprec.data.build import build_dataset
from cprec.data.config import Rules, SplitSpec, SyntheticConfig
from cprec.data.dataset import finish_part
from cprec.data.sources.memory import MemorySource
from cprec.data.sources.synthetic import SyntheticWorld
from cprec.data.splits import Split, make_split
from cprec.errors import ConfigError, Unsuitable
from cprec.recommender import Ranking, RankingQuery
from cprec.tune import mean_ndcg, read_results, tune, validation_queries

optuna = pytest.importorskip("optuna")


@dataclass(frozen=True, kw_only=True)
class Shifted:
    """Popularity by position, best when every field is as it should be: a law that tuning can find."""

    a: float = 0.0
    b: int = 1
    c: str = "x"
    fixed: float = 0.0

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "a": Real(low=0, high=1),
        "b": Whole(low=1, high=3),
        "c": OneOf(values=("x", "y")),
        "fixed": Real(low=1, high=2),
    }
    MADE: ClassVar[list[Shifted]] = []

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> PopularityRecommender:
        assert folder is not None and folder.is_dir()
        self.MADE.append(self)
        if self.c == "y" and self.b == 3:
            raise ConfigError("y does not go with 3")
        return PopularityRecommender(split)


class MakesNothing(Shifted):
    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> PopularityRecommender:
        raise Unsuitable(f"cannot be made of {domain}")


def law(recommender: object, queries: object, targets: object) -> float:
    """In place of NDCG: the closer a is to 0.7 the better, and y is better than x."""
    last = Shifted.MADE[-1]
    return 1 - abs(last.a - 0.7) - 0.5 * (last.c == "x")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = SyntheticWorld(SyntheticConfig(num_market_users=60, num_library_users=1, items_per_domain=20))
    sources = [MemorySource(domain, "market", *world.tables()[domain]) for domain in ("garden", "kitchen")]
    folder = tmp_path_factory.mktemp("tune") / "data"
    build_dataset(sources, folder, Rules(k_core=0))
    finish_part(folder, 0, lambda *log: make_split(*log, SplitSpec()))
    manifest = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(manifest | {"split": {"method": "leave-one-out"}}))
    return folder


@pytest.fixture(autouse=True)
def forget() -> None:
    Shifted.MADE.clear()


def config_of(data: Path, tmp_path: Path, **changed: object) -> TuneConfig:
    fields = {"data": str(data), "output": str(tmp_path / "tuned.json"), "domains": ("kitchen",), "trials": 12}
    return TuneConfig(**(fields | changed))


def test_the_law_is_found_and_the_defaults_come_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "mean_ndcg", law)
    config = config_of(data, tmp_path, trials=25)
    found = tune(config, {"shifted": Shifted()})["kitchen"]["shifted"]
    tried = list(Shifted.MADE)
    assert tried[0] == Shifted() and found["defaults"] == pytest.approx(1 - 0.7 - 0.5)
    assert len(tried) == found["trials"] == 25
    assert any(settings.c == "y" and settings.b == 3 for settings in tried), "a trial that fails is passed over"
    assert {settings.fixed for settings in tried} == {0.0}, "its range does not hold the value, so it is not searched"
    best = Shifted(**found["settings"])
    assert best in tried and best.c == "y" and abs(best.a - 0.7) < 0.2
    assert found["ndcg@10"] == pytest.approx(1 - abs(best.a - 0.7))
    assert json.loads(Path(config.output).read_text()) == {"kitchen": {"shifted": found}}


def test_the_seed_decides_what_is_tried(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "mean_ndcg", law)
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        tune(config_of(data, tmp_path, output=str(tmp_path / str(number)), seed=seed), {"shifted": Shifted()})
        runs.append(list(Shifted.MADE))
        Shifted.MADE.clear()
    assert runs[0] == runs[1] != runs[2]


def test_a_run_that_was_stopped_goes_on_and_a_new_budget_starts_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "mean_ndcg", law)
    config = config_of(data, tmp_path, trials=4)
    first = tune(config, {"one": Shifted()})
    assert len(Shifted.MADE) == 4
    both = tune(config, {"one": Shifted(), "two": Shifted()})
    assert len(Shifted.MADE) == 8 and both["kitchen"]["one"] == first["kitchen"]["one"]
    tune(config_of(data, tmp_path, trials=5), {"one": Shifted()})
    assert len(Shifted.MADE) == 13
    tune(config_of(data, tmp_path, trials=5), {"one": Shifted(a=0.25)})
    assert len(Shifted.MADE) == 18, "what is tuned from other defaults is tuned anew"
    assert set(read_results(config.output)["kitchen"]) == {"one", "two"}


def test_time_ends_the_search_after_the_first_trial(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter(range(0, 1000, 7))
    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: float(next(times))))  # its own alone
    found = tune(config_of(data, tmp_path, seconds=20.0), {"shifted": Shifted()})["kitchen"]["shifted"]
    assert found["trials"] == 3  # begun at 0; looked at 7 and at 14 and went on, at 21 stopped
    Shifted.MADE.clear()
    found = tune(config_of(data, tmp_path, seconds=1.0), {"shifted": Shifted()})["kitchen"]["shifted"]
    assert found["trials"] == len(Shifted.MADE) == 1


def test_what_has_nothing_to_tune_is_made_once_and_what_cannot_be_made_says_why(data: Path, tmp_path: Path) -> None:
    results = tune(config_of(data, tmp_path), {"popularity": Popularity(), "unfit": MakesNothing()})["kitchen"]
    assert results["popularity"]["trials"] == 1 and results["popularity"]["settings"] == {}
    assert results["popularity"]["ndcg@10"] == results["popularity"]["defaults"] > 0
    assert results["unfit"]["unfit"] == "cannot be made of kitchen"


def test_a_real_baseline_is_tuned_in_every_domain(data: Path, tmp_path: Path) -> None:
    results = tune(config_of(data, tmp_path, domains=(), trials=3), {"ItemKNN": ItemKNN()})
    assert set(results) == {"garden", "kitchen"}
    for found in results.values():
        assert found["ItemKNN"]["ndcg@10"] >= found["ItemKNN"]["defaults"] > 0
        ItemKNN(**found["ItemKNN"]["settings"])


def test_queries_are_of_validation_and_a_seeded_sample(data: Path) -> None:
    from cprec.data.dataset import read_split

    split = read_split(data)
    queries, targets = validation_queries(split, "kitchen", 0, 0)
    assert len(queries) == len(targets) > 40
    assert all("/validation" in query.query_id and query.history for query in queries)
    assert all(query.exclude == {item.item_id for item in query.history} for query in queries)
    some, of_some = validation_queries(split, "kitchen", 10, 0)
    assert len(some) == 10 and some == validation_queries(split, "kitchen", 10, 0)[0]
    assert some != validation_queries(split, "kitchen", 10, 1)[0]
    target_of = dict(zip([query.query_id for query in queries], targets, strict=True))
    assert [target_of[query.query_id] for query in some] == of_some


def test_ndcg_counts_ties_with_their_expected_value() -> None:
    """Second: 1 / log2(3); first or second: the mean of 1 and that; not there: 0."""

    class Fixed:
        name = "fixed"

        def rank(self, queries: list[RankingQuery], k: int) -> list[Ranking]:
            scores = [(2.0, 1.0), (1.0, 1.0), (2.0, 1.0)]
            return [Ranking(query.query_id, ("i", "j"), pair) for query, pair in zip(queries, scores, strict=True)]

    queries = [RankingQuery(str(number), "a", ()) for number in range(3)]
    second = 1 / np.log2(3)
    assert mean_ndcg(Fixed(), queries, ["j", "j", "elsewhere"]) == pytest.approx((second + (1 + second) / 2) / 3)


def test_errors_say_what_to_do(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, message in (
        ({"trials": 0}, "trials=0"),
        ({"seconds": 0.0}, "seconds=0.0"),
        ({"max_queries": -1}, "max_queries=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_of(data, tmp_path, **wrong)
    with pytest.raises(ConfigError, match="there is no 'nothing'"):
        tune(config_of(data, tmp_path, baselines=("nothing",)))
    (tmp_path / "tuned.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="no results of tuning"):
        tune(config_of(data, tmp_path), {"popularity": Popularity()})
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'cprec\[tune\]'"):
        tune(config_of(data, tmp_path))
