"""Trained rows are opened as they were evaluated; what was changed since is refused, and nothing is trained."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import cprec
from cprec import serving
from cprec.data.build import build_dataset
from cprec.data.catalogue import Catalogue
from cprec.data.config import Rules, SplitSpec
from cprec.data.dataset import finish_part, read_split
from cprec.data.sources.memory import MemorySource
from cprec.data.splits import make_split
from cprec.entrants import baseline_entrants, baselines_folder
from cprec.errors import ConfigError, CPRecError, DataError
from cprec.evaluate.config import EvaluateConfig
from cprec.rank.system import SystemRecommender
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item
from cprec.scoring import ScoringRecommender, StoredRecommender
from cprec.serve.config import ServeConfig
from cprec.serve.parts import model_sha256
from cprec.systems.recipes.llm2rec import LLM2RecRecommender
from cprec.trained import Trained, open_trained

SMALL: dict[str, Any] = {"hidden_size": 8, "max_length": 4, "num_epochs": 1, "min_steps": 0}
CODES: dict[str, Any] = {"hidden_size": 8, "max_length": 4, "num_epochs": 0.2, "num_layers": 1, "num_codes": 4}


def history(*names: str) -> tuple[Item, ...]:
    return tuple(Item("cups", name) for name in names)


QUERY = RankingQuery("q", "cups", history("i1", "i2"), exclude=frozenset({"i1", "i2"}))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """An evaluation of SASRec with two seeds, and of TIGER, of which three rows have been trained."""
    folder = tmp_path_factory.mktemp("trained")
    events = [(f"u{user}", f"i{(user + step) % 12}", step) for user in range(40) for step in range(6)]
    log = pa.table(list(zip(*events, strict=True)), ["user_id", "item_id", "timestamp"])
    names = [f"i{number}" for number in range(12)]
    words = [f"{('red', 'blue', 'green')[n % 3]} {('cup', 'mug')[n % 2]} {n}" for n in range(12)]
    source = MemorySource("cups", "shop", pa.table([names, words], ["item_id", "title"]), log)
    build_dataset([source], folder / "data", Rules(k_core=0))
    finish_part(folder / "data", 0, lambda *log: make_split(*log, SplitSpec()))
    manifest = json.loads((folder / "data" / "dataset.json").read_text())
    (folder / "data" / "dataset.json").write_text(json.dumps(manifest | {"split": {"method": "leave-one-out"}}))
    settings = {"SASRec": SMALL, "TIGER": CODES}
    config = EvaluateConfig(
        data=str(folder / "data"),
        output_dir=str(folder / "out"),
        baselines=tuple(settings),
        seeds=(3, 4),
        settings=settings,
    )
    for entrant in baseline_entrants(config, read_split(config.data), "cups")[:3]:
        entrant.open()
    return config


def copy_of(config: EvaluateConfig, name: str, to: Path) -> Path:
    """A copy of a row's folder that a test may change."""
    return Path(shutil.copytree(baselines_folder(config.output_dir, "cups") / name, to / name))


def test_it_is_the_row_of_the_first_seed(evaluated: EvaluateConfig, tmp_path: Path) -> None:
    folder = copy_of(evaluated, "sasrec", tmp_path)  # it may be moved
    opened = cprec.Recommender.from_pretrained(folder)
    assert isinstance(opened, SystemRecommender)
    first, second, *_ = baseline_entrants(evaluated, read_split(evaluated.data), "cups")
    rankings = [entrant.open().recommender.rank([QUERY], 3)[0] for entrant in (first, second)]
    assert opened.rank([QUERY], 3)[0].scores == rankings[0].scores != rankings[1].scores
    found = opened.recommend(["i1", "green mug 5"], k=3)
    asked = replace(QUERY, history=history("i1", "i5"), exclude=frozenset({"i1", "i5"}))
    assert [one.score for one in found] == list(opened.rank([asked], 3)[0].scores)
    assert found[0].title == opened.catalogue.title[opened.catalogue.find("cups", [found[0].item_id])[0]]
    assert (opened.name, opened.way, opened.max_history, opened.weights) == ("SASRec", "vectors", 4, {"SASRec": 1.0})
    assert cprec.Recommender.from_pretrained(folder, name="mine").name == "mine"


def test_what_is_asked_wrongly(evaluated: EvaluateConfig) -> None:
    folder = baselines_folder(evaluated.output_dir, "cups") / "sasrec"
    with pytest.raises(ConfigError, match="has no option 'beam_width'; it has name and data"):
        cprec.Recommender.from_pretrained(folder, beam_width=3)
    opened = open_trained(folder)
    with pytest.raises(ConfigError, match="SASRec reads histories, not queries in words"):
        opened.recommend(["i1"], k=1, query="mug")
    with pytest.raises(ConfigError, match="was made for domain 'cups' and is asked about 'hats'"):
        opened.rank([replace(QUERY, domain="hats")], 1)
    with pytest.raises(ConfigError, match="holds no finished model of CPRec"):
        cprec.Recommender.from_pretrained(folder.parent)


def test_data_may_move_but_not_change(evaluated: EvaluateConfig, tmp_path: Path) -> None:
    folder, data = copy_of(evaluated, "sasrec", tmp_path), tmp_path / "elsewhere"
    shutil.copytree(evaluated.data, data)
    Trained.write(replace(Trained.read(folder), data="gone"), folder)
    with pytest.raises(ConfigError, match=r"data folder gone, which is not here.* copy that folder to .*sasrec/data"):
        open_trained(folder)
    expected = open_trained(folder, data=str(data)).rank([QUERY], 5)
    shutil.copytree(data, folder / "data")
    assert open_trained(folder).rank([QUERY], 5) == expected
    manifest = folder / "data" / "dataset.json"
    manifest.write_text(manifest.read_text() + " ")
    with pytest.raises(DataError, match=r"other data than .* holds \(dataset.json changed\): evaluate it again"):
        open_trained(folder)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "damaged": (
        lambda folder: (folder / "trained.json").write_text("{"),
        r"trained.json is damaged .*remove the saved rankings",
    ),
    "field": (lambda folder: edit(folder, more=1), "trained.json is damaged"),
    "version": (lambda folder: edit(folder, schema_version=9), "has schema version 9, this program reads 1"),
    "code": (lambda folder: edit(folder, code="0"), "another version of the code of SASRec: evaluate it again"),
    "row": (lambda folder: edit(folder, name="SASRecs"), "another version of the code of SASRecs"),
    "settings": (lambda folder: edit(folder, settings={**SMALL, "hidden_size": 16}), "nothing is trained here"),
    "seed": (lambda folder: edit(folder, seed=5), "nothing is trained here"),
    "weights": (lambda folder: [append(path) for path in folder.rglob("best.*")], "is not what training wrote"),
    "no weights": (lambda folder: [path.unlink() for path in folder.rglob("best.*")], "is gone, or is not"),
    "no stage": (lambda folder: [shutil.rmtree(path) for path in folder.rglob("stage-1")], "nothing is trained here"),
}


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "trained.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_refused(evaluated: EvaluateConfig, change: str, tmp_path: Path) -> None:
    folder = copy_of(evaluated, "sasrec", tmp_path)
    CHANGES[change][0](folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "hashes.json"}
    with pytest.raises(CPRecError, match=CHANGES[change][1]):
        open_trained(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "hashes.json"} == before


def test_items_come_where_codes_can_be_made_and_go_everywhere(evaluated: EvaluateConfig) -> None:
    folder = baselines_folder(evaluated.output_dir, "cups")
    sasrec, tiger = open_trained(folder / "sasrec"), open_trained(folder / "tiger")
    assert tiger.way is None and tiger.rank([QUERY], 3, "exact")[0].proof is not None
    titles = dict(zip(tiger.catalogue.item_id.tolist(), tiger.catalogue.title.tolist(), strict=True))
    more = catalogue_of(titles | {"i12": "red cup 12"})
    assert "i12" in tiger.with_items(more, {}).rank([QUERY], 20)[0].item_ids
    assert "i12" not in tiger.rank([QUERY], 20)[0].item_ids, "the engine before stays as it is"
    with pytest.raises(ConfigError, match="SASRec ranks the items that it was trained on alone, and 'i12' is none"):
        sasrec.with_items(more, {})
    for engine in (sasrec, tiger):
        best = engine.rank([QUERY], 1)[0].item_ids[0]
        without = engine.with_items(catalogue_of(titles), {"cups": frozenset({best})})
        assert set(without.rank([QUERY], 20)[0].item_ids) == set(titles) - {best, "i1", "i2"}
        asked = replace(QUERY, candidates=(best,), exclude=frozenset())
        assert without.rank([asked], 1)[0].item_ids == (best,), "as a candidate it still has its score"
        assert best not in [one.item_id for one in without.recommend(["i1"], k=5)]
        with pytest.raises(ConfigError, match="has learnt title, brand and categories of item 'i3'"):
            engine.with_items(catalogue_of(titles | {"i3": "a hat"}), {})


def catalogue_of(titles: dict[str, str]) -> Catalogue:
    return Catalogue.from_tables({"cups": pa.table({"item_id": list(titles), "title": list(titles.values())})})


class Scored(ScoringRecommender):
    """Scores the three items 2, 1 and 0."""

    name, domain, max_length, scale = "scored", "cups", 2, "logit"

    def __init__(self) -> None:
        self.catalogue = catalogue_of({"i0": "a", "i1": "b", "i2": "c"})

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        return np.tile([2.0, 1.0, 0.0], (len(queries), 1))


class Titled(Scored, StoredRecommender):
    """Knows new items by their titles: all items score their places."""

    def arrays(self) -> dict[str, np.ndarray]:
        return {}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        pass

    def with_catalogue(self, catalogue: Catalogue) -> Titled:
        return self._over(catalogue)

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        return np.tile(np.arange(len(self.catalogue.rows_of(domain)), dtype=float), (len(queries), 1))


class OfLanguageModel(Titled, LLM2RecRecommender):
    """Has vectors that only its language model could make of new titles."""

    with_catalogue = LLM2RecRecommender.with_catalogue  # type: ignore[assignment]


def test_new_items_are_ranked_where_titles_say_what_they_are() -> None:
    more = catalogue_of({"i0": "a", "i1": "b", "i2": "c", "i3": "d"})
    query = RankingQuery("", "cups", history("i3"))
    assert SystemRecommender(Titled(), "mine").with_items(more, {}).rank([query], 2)[0].item_ids == ("i3", "i2")
    with pytest.raises(ConfigError, match="LLM2Rec ranks the items that it was trained on alone, and 'i3' is none"):
        SystemRecommender(OfLanguageModel(), "LLM2Rec").with_items(more, {})


def test_effects_are_logs_of_how_often_an_average_item() -> None:
    system = SystemRecommender(Scored(), "mine")
    query = RankingQuery("", "cups", history("i0", "i1", "i2"), candidates=("i0",))
    assert [item.item_id for item in system.shown(query)] == ["i1", "i2"]
    ((name, effect),) = system.effects([query], system.rank([query], 1))[0].items()
    assert name == "mine" and effect == pytest.approx(2 - math.log((math.e**2 + math.e + 1) / 3))

    class Written:
        """Gives each item its probability alone."""

        name, domain, max_length, catalogue = "written", "cups", 2, Scored().catalogue

    effects = SystemRecommender(Written(), "w").effects([query], [Ranking("", ("i0",), (math.log(0.5),))])
    assert effects == [{"w": pytest.approx(math.log(0.5 * 3))}]


def test_rows_are_served_by_their_names_with_what_stands_in(evaluated: EvaluateConfig, tmp_path: Path) -> None:
    folder = baselines_folder(evaluated.output_dir, "cups")
    config = ServeConfig(models=(str(folder / "sasrec"), f"{folder / 'tiger'}/"))
    engines = serving.open_engines(config)
    assert [engine.name for engine in engines] == ["SASRec", "TIGER"]
    assert [each.name for each in serving.stand_ins(config, engines[0].catalogue)] == ["transition graph", "popularity"]
    with pytest.raises(ConfigError, match=r"engine=vllm, and .*sasrec is a trained row"):
        serving.open_engines(replace(config, engine="vllm"))
    mine, other = copy_of(evaluated, "sasrec", tmp_path), str(folder / "sasrec")
    assert [engine.name for engine in serving.open_engines(replace(config, models=(str(mine), other)))] == [
        str(mine),
        other,
    ]
    before = model_sha256(str(mine))
    edit(mine, seed=4)
    assert model_sha256(str(mine)) != before, "lists of a file that were made by another row are not used again"
