"""Blending: who is right gets the weight, what is written is what is read, and what was changed is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest

from cprec import lineup
from cprec.baselines.item_values import ItemValuesRecommender
from cprec.blend import Entries, _earlier, best_setting, choose, climb, made_parts
from cprec.data.build import build_dataset
from cprec.data.catalogue import Catalogue
from cprec.data.config import Rules, SplitSpec, SyntheticConfig
from cprec.data.dataset import read_dataset
from cprec.data.queries import ranking_queries
from cprec.data.sources.memory import MemorySource
from cprec.data.sources.synthetic import SyntheticWorld
from cprec.data.splits import Split, make_split
from cprec.entrants import baseline_entrants, baselines_folder
from cprec.errors import ConfigError, CPRecError, DataError, ModelError, Unsuitable
from cprec.evaluate.config import EvaluateConfig
from cprec.rank.blend import KINDS, Blend, BlendedParts, Part, check_parts, read_blend, write_blend
from cprec.rank.blend_file import Setting, read_about
from cprec.rank.config import BlendConfig, RankConfig
from cprec.rank.why import effects_of
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import SPLITS, VALIDATION, Item
from cprec.scoring import StoredRecommender
from cprec.search.priors import PriorSource

N = 24


def catalogue_of(num_items: int, more: Sequence[str] = ()) -> Catalogue:
    ids = [f"i{number:02}" for number in range(num_items)] + list(more)
    return Catalogue.from_tables({"books": pa.table({"item_id": ids, "title": [f"title {name}" for name in ids]})})


def with_new(title: str) -> Catalogue:
    """One with all items, after "a new one" of this title."""
    of_old = ITEMS.titles_of("books")
    ids = ["a new one", *ITEMS.item_id.tolist()]
    return Catalogue.from_tables({"books": pa.table({"item_id": ids, "title": [title, *of_old]})})


ITEMS = catalogue_of(N)


class Table(StoredRecommender):
    """Scores by the query's number; with a blend, the whole sum, as a language model would rank by it."""

    blend: PriorSource | None = None
    head_QN: np.ndarray | None = None
    """Of a model: the log-probabilities by its item head."""

    def __init__(self, name: str, table_QN: np.ndarray, scale: Literal["share", "logit"] = "share") -> None:
        self.name, self.catalogue, self.table_QN = name, ITEMS, table_QN
        self.scale = scale  # type: ignore[misc]

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        scores_QN = self.table_QN[[int(query.query_id) for query in queries]]
        if self.blend is None:
            return scores_QN
        priors = self.blend.priors(domain, queries)
        scores_QN = priors.weight * scores_QN + priors.values_UN
        return scores_QN + priors.item_head * self.item_log_probs(domain, queries) if priors.item_head else scores_QN

    def rank(self, queries: Sequence[RankingQuery], k: int, mode: str | None = None) -> list[Ranking]:
        return Table("head", self.head_QN).rank(queries, k) if mode == "vectors" else super().rank(queries, k)

    def has_item_head(self, domain: str) -> bool:
        return self.head_QN is not None

    def item_log_probs(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        assert self.head_QN is not None
        return self.head_QN[[int(query.query_id) for query in queries]]

    def arrays(self) -> dict[str, np.ndarray]:
        return {"table": self.table_QN}

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.table_QN = arrays["table"]


def asked(number: int, *history: str) -> RankingQuery:
    return RankingQuery(query_id=str(number), domain="books", history=tuple(Item("books", name) for name in history))


# ---- the choice ------------------------------------------------------------------------------------------------------

QUERIES = [asked(number) for number in range(70)]
TARGET_Q = np.random.default_rng(3).integers(N, size=70)
IS_TARGET_QN = np.arange(N) == TARGET_Q[:, None]
NOISE_QN = np.random.default_rng(4).random((70, N))
SAME_GROUP_QN = np.arange(N) // 6 == TARGET_Q[:, None] // 6
SAME_PLACE_QN = np.arange(N) % 6 == TARGET_Q[:, None] % 6
"""An item is its group and its place in it: who knows one of them has four to six items left."""


UP_N = np.arange(N) / (N - 1)
"""The places of the items by a column that rises with their ids."""


def chosen(model_QN: np.ndarray, part_QN: np.ndarray, head_QN: np.ndarray | None = None) -> dict[str, Setting]:
    model: Any = Table("model", np.log(model_QN))
    model.head_QN = None if head_QN is None else np.log(head_QN)
    questions = (QUERIES, [f"i{row:02}" for row in TARGET_Q])
    return choose(model, "books", {"part": Table("part", part_QN)}, questions, 100)


def test_a_model_that_is_right_needs_no_part() -> None:
    found = chosen(0.9 * IS_TARGET_QN + 0.001, NOISE_QN)
    assert found["blend"].ndcg == found["model_alone"].ndcg == 1
    assert found["without_model"].ndcg < 0.5
    assert found["blend"].model > 0


def test_a_part_that_is_right_needs_no_model() -> None:
    found = chosen(NOISE_QN + 0.001, 7.0 * IS_TARGET_QN)
    assert found["blend"].ndcg == found["without_model"].ndcg == 1
    assert found["model_alone"].ndcg < 0.5
    assert found["without_model"].model == 0 < found["without_model"].parts["part"][0]


def test_two_that_know_a_half_each_know_all_together() -> None:
    found = chosen(SAME_GROUP_QN + 0.01, 3.0 * SAME_PLACE_QN)
    assert found["blend"].ndcg == 1
    gain = 1 / np.log2(np.arange(2, 12))
    assert found["model_alone"].ndcg == pytest.approx(gain[:6].mean())  # six tie, in any order
    assert found["without_model"].ndcg == pytest.approx(gain[:4].mean())
    assert found["blend"].model > 0 and found["blend"].parts["part"][0] > 0
    assert found == chosen(SAME_GROUP_QN + 0.01, 3.0 * SAME_PLACE_QN)


def test_the_item_head_is_a_part_of_its_own() -> None:
    """The model knows the group, the part the place, and the head the group or nothing."""
    found = chosen(SAME_GROUP_QN + 0.01, 3.0 * SAME_PLACE_QN, SAME_GROUP_QN + 0.01)
    assert found["vectors"].model == 0 < found["vectors"].item_head and found["vectors"].ndcg == 1
    assert found["blend"].ndcg == 1 and found["head_alone"].ndcg == found["model_alone"].ndcg < 1
    useless = chosen(SAME_GROUP_QN + 0.01, 3.0 * SAME_PLACE_QN, NOISE_QN + 0.001)
    assert useless["blend"].ndcg == 1 > useless["vectors"].ndcg
    without = chosen(SAME_GROUP_QN + 0.01, 3.0 * SAME_PLACE_QN)
    assert without["without_model"] == useless["without_model"] and "vectors" not in without
    assert without["without_model"].item_head == useless["without_model"].item_head == 0


def test_weights_that_are_fixed_are_added_to_what_is_chosen() -> None:
    """Each in proportion to what is chosen, which stays as it was; and what it costs is seen."""
    model: Any = Table("model", np.log(SAME_GROUP_QN + 0.01))
    parts = {
        "part": Table("part", 3.0 * SAME_PLACE_QN),
        "margin": ItemValuesRecommender("margin", ITEMS, "books", UP_N),
    }
    questions = (QUERIES, [f"i{row:02}" for row in TARGET_Q])
    before = choose(model, "books", {"part": parts["part"]}, questions, 100)
    found = choose(model, "books", parts, questions, 100, fixed={"margin": 9.0})
    for name in ("blend", "without_model"):
        (chosen, floor), model_weight = before[name].parts["part"], before[name].model
        assert found[name].model == model_weight and found[name].parts["part"] == (chosen, floor)
        assert found[name].parts["margin"][0] == pytest.approx(9.0 * (chosen + model_weight))
    assert found["by_validation"].parts == {**before["blend"].parts, "margin": (0.0, 0.01)}
    assert found["by_validation"].ndcg == before["blend"].ndcg == 1 > found["blend"].ndcg
    assert found["model_alone"].ndcg == before["model_alone"].ndcg and "by_validation" not in before


def test_the_search_goes_on_until_no_single_number_helps() -> None:
    grids = [range(5), range(5)]
    assert climb(lambda point: -abs(point[0] - 3) - abs(point[1] - point[0]) / 2, grids, (0, 0)) == (3, 3)
    assert climb(lambda point: 0.0, grids, (1, 2)) == (1, 2)


def test_weights_that_are_all_zero_are_never_chosen() -> None:
    """Here any order is as bad as any other, and the zeros come first in every grid."""
    zeros = np.zeros(3)
    nothing = Entries(np.zeros(3, int), zeros.astype(bool), zeros, zeros, {"part": zeros + 1}, zeros == 0, 1)
    for head_weights in ((0.0,), (0.0, 1.0)):
        found = best_setting(nothing, (0.0, 1.0), head_weights)
        assert any((found.model, found.item_head, found.parts["part"][0]))
    assert best_setting(nothing, (0.0,), (0.0,)).parts["part"][0] > 0


def test_weights_are_chosen_by_deeper_lists_than_are_judged() -> None:
    """The part has the two targets at ranks 10 and 90, the head has both at 11: NDCG@10 would choose the part."""
    place = np.arange(100)

    def ranks(of_target: int) -> np.ndarray:
        """Item 0 is the target; the others stand in their order."""
        return np.where(place == 0, of_target, place + (place >= of_target))

    part, head = np.concatenate([ranks(10), ranks(90)]), np.concatenate([ranks(11), ranks(11)])
    query, zeros = np.repeat([0, 1], 100), np.zeros(200)
    is_target, all_of_parts = np.tile(place == 0, 2), query >= 0
    entries = Entries(query, is_target, zeros, -1.0 * head, {"part": np.exp(-part / 20)}, all_of_parts, 2)
    found = best_setting(entries, (0.0,), (0.0, 1.0))
    assert (found.item_head, found.parts["part"][0]) == (1.0, 0.0)
    assert found.ndcg == 0 < entries.ndcg(Setting(0.0, {"part": (1.0, 0.01)}, 0.0), 10)


def test_queries_whose_target_does_not_compete_count_as_misses() -> None:
    """The first and the last of three; the target of the second is first by the part, second by the head."""
    query, zeros = np.array([0, 0, 1, 1, 2]), np.zeros(5)
    is_target, head, of_parts = query == 5, np.array([1.0, 0, 0, 1, 0]), query >= 0
    is_target[2] = True
    entries = Entries(query, is_target, zeros, head, {"part": 0.5 + is_target}, of_parts, 3)
    for setting, expected in (
        (Setting(0.0, {"part": (1.0, 0.1)}, 0.0), 1 / 3),
        (Setting(0.0, {"part": (0.0, 0.1)}, 0.0, item_head=1.0), 1 / np.log2(3) / 3),
    ):
        assert entries.ndcg(setting, 10) == entries.that_can_score().ndcg(setting, 10) == pytest.approx(expected)
    assert entries.that_can_score().query_N.tolist() == [1, 1]


# ---- the blend -------------------------------------------------------------------------------------------------------


def blend_of(*parts: Part, weight: float = 1.0) -> Blend:
    return Blend("books", ITEMS, ITEMS, parts, weight)


def row(*scores: float) -> np.ndarray:
    return np.array([[*scores, *[0.0] * (N - len(scores))]])


def test_priors_by_hand() -> None:
    walk = Part("walk", Table("walk", row(4, 2, 0, -3)), weight=2.0, floor=0.1)
    logits = Part("logits", Table("logits", np.log(row(1, 4, 2)[:, :] + 1e-9), "logit"), weight=0.5, floor=0.01)
    priors = blend_of(walk, logits, weight=3.0).priors("books", [asked(0)])
    expected = 2 * np.log([1, 0.5, 0.1, 0.1]) + 0.5 * np.log([0.25, 1, 0.5, 0.01])
    np.testing.assert_allclose(priors.values_UN[0, :4], expected)
    assert priors.weight == 3 and priors.values_UN.shape == (1, N)


def test_what_moves_all_items_alike_is_the_effect_of_none() -> None:
    """The best score and the weight of a part that says the same of all items change what no item is worth."""
    table_QN = np.concatenate([row(4, 2), row(8, 4), np.ones((1, N))])
    walk = Part("walk", Table("walk", table_QN), weight=2.0, floor=0.1)
    blend = blend_of(walk, weight=0.0)
    priors = blend.priors_of_parts("books", QUERIES[:3])
    one, doubled, alike = effects_of(blend.weights, priors, [1, 1, 1], priors["walk"][:, 1].tolist(), N)
    average = (1 + 0.5 + 0.1 * (N - 2)) / N
    assert one == doubled == {"walk": pytest.approx(2 * math.log(0.5 / average))} and alike == {"walk": 0}


def test_where_a_part_says_nothing_all_items_have_the_floor() -> None:
    part = Part("walk", Table("walk", np.zeros((1, N))), weight=2.0, floor=0.1)
    np.testing.assert_allclose(blend_of(part).priors("books", [asked(0)]).values_UN, 2 * math.log(0.1))
    assert BlendedParts(blend_of(part)).rank([asked(0)], 5)[0].item_ids == ()


def test_without_the_model_the_parts_rank_by_their_sum() -> None:
    parts = Part("a", Table("a", row(1, 4, 2)), 1.0, 0.1), Part("b", Table("b", row(8, 1, 4)), 1.0, 0.1)
    (ranking,) = BlendedParts(blend_of(*parts, weight=0.0)).rank([asked(0)], 3)
    assert ranking.item_ids == ("i00", "i02", "i01")
    np.testing.assert_allclose(np.exp(ranking.scores), [1 / 4, 1 / 4, 1 / 8])


def test_an_item_that_came_after_has_the_least_prior_where_no_title_is_like_its_own() -> None:
    class Strict(Table):
        def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
            assert [item.item_id for query in queries for item in query.history] == ["i03"]
            return super().scores(domain, queries)

    before = blend_of(Part("walk", Strict("walk", row(4, 2)), weight=2.0, floor=0.1))
    after = before.with_catalogue(with_new("nothing like them"))
    known = before.priors("books", [asked(0, "i03")]).values_UN
    np.testing.assert_allclose(after.priors("books", [asked(0, "i03", "a new one")]).values_UN[:, 1:], known)
    assert after.priors("books", [asked(0, "i03")]).values_UN[0, 0] == pytest.approx(2 * math.log(0.1))
    with pytest.raises(ConfigError, match="'games'"):
        before.priors("games", [asked(0)])


def test_a_part_that_reads_no_titles_is_guessed_by_the_items_with_similar_ones() -> None:
    """The new one is called as i01 is, and like i02 by nothing but a word that all titles have."""
    parts = (
        Part("walk", Table("walk", row(4, 2, 1)), 2.0, 0.1),
        Part("sasrec", Table("sasrec", UP_N[None], "logit"), 1.0, 0.01),
    )
    after = blend_of(*parts).with_catalogue(with_new("title i01"))
    priors = after.priors_of_parts("books", [asked(0)])
    assert priors["walk"][0, 0] == pytest.approx(2 * math.log(0.5))
    assert priors["sasrec"][0, 0] == pytest.approx(priors["sasrec"][0, 2])


def test_a_new_item_between_two_has_the_mean_of_what_is_said_of_them() -> None:
    """Its title has a word of each; both words stand in one title of the catalogue, so they weigh the same."""
    after = blend_of(Part("walk", Table("walk", row(4, 2)), 2.0, 0.1)).with_catalogue(with_new("i00 i01"))
    assert after.priors("books", [asked(0)]).values_UN[0, 0] == pytest.approx(2 * math.log((1 + 0.5) / 2))


def test_a_part_that_reads_titles_knows_an_item_that_came_after() -> None:
    """It is called as i03 is, and stands first."""
    walk = Part("walk", Table("walk", row(4, 2)), weight=1.0, floor=0.1)
    titles = Part("titles", lineup.settings_of("titles").make(split_of(ITEMS), "books"), weight=2.0, floor=0.1)
    after = blend_of(walk, titles).with_catalogue(with_new("title i03"))
    for history in (["i03"], ["a new one"]):
        parts = after.priors_of_parts("books", [asked(0, *history)])
        np.testing.assert_allclose(parts["titles"][0, [0, 4]], 0, atol=1e-9)
        np.testing.assert_allclose(parts["titles"][0, [1, 2, 3, *range(5, N + 1)]], 2 * math.log(0.1))
        np.testing.assert_allclose(parts["walk"][0, :4], np.log([0.1, 1, 0.5, 0.1]))


@pytest.mark.parametrize("floor", [0.01, 0.9])
def test_of_a_column_an_item_that_came_after_has_the_least_value(floor: float) -> None:
    before = blend_of(Part("margin", ItemValuesRecommender("margin", ITEMS, "books", UP_N), 0.5, floor), weight=0.0)
    expected = 0.5 * np.maximum(UP_N - 1, math.log(floor))
    np.testing.assert_allclose(before.priors("books", [asked(0)]).values_UN[0], expected)
    after = before.with_catalogue(catalogue_of(N, more=["a new one"])).priors("books", [asked(0)]).values_UN[0]
    np.testing.assert_allclose(after, [expected[0], *expected])


def split_of(catalogue: Catalogue) -> Any:
    """Titles are read from the catalogue alone."""
    return type("Split", (), {"catalogue": catalogue})()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_refused(wrong: float) -> None:
    with pytest.raises(ModelError, match="walk has scores that are not finite"):
        blend_of(Part("walk", Table("walk", row(1, wrong)), 1.0, 0.1)).priors("books", [asked(0)])


@pytest.mark.parametrize(("weight", "floor"), [(-1, 0.1), (math.nan, 0.1), (math.inf, 0.1), (1, 0), (1, 1.5)])
def test_numbers_that_mean_nothing_are_refused(weight: float, floor: float) -> None:
    with pytest.raises(ConfigError, match="walk: weight="):
        Part("walk", Table("walk", row(1)), weight, floor)
    with pytest.raises(ConfigError, match="all weights of the blend are zero"):
        blend_of(weight=0.0)
    with pytest.raises(ConfigError, match="the weight -1 of the model"):
        blend_of(weight=-1)
    with pytest.raises(ConfigError, match="the weight nan of the item head"):
        replace(blend_of(), item_head=math.nan)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("TIGER",), "a blend cannot hold 'TIGER'; it can hold popularity, .*EASE"),
        (("EASE", "EASE"), "all different"),
        ((), "give one or more"),
    ],
)
def test_parts_that_cannot_be_stored_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parts(names)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"fixed": {"margin": 0.3}}, "fixed: 'margin' is none of the parts and columns, EASE, titles"),
        ({"fixed": {"EASE": 0}}, "fixed.EASE=0 must be a number above 0"),
        ({"fixed": {"EASE": math.inf}}, "fixed.EASE=inf must be a number above 0"),
        ({"fixed": {"EASE": 1, "titles": 2}, "columns": {"margin": "m.csv"}}, "leave at least one of the parts"),
    ],
)
def test_fixed_weights_that_mean_nothing_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlendConfig(parts=("EASE", "titles"), **wrong)


@pytest.mark.parametrize("name", ["EASE", "popularity", "language model", "item head", "query"])
def test_columns_have_names_of_their_own(name: str) -> None:
    with pytest.raises(ConfigError, match=f"columns: '{name}' is the name of another part"):
        check_parts(["titles"], ["margin", name])


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    world = SyntheticWorld(SyntheticConfig(num_market_users=60, num_library_users=1, items_per_domain=20))
    sources = [MemorySource(domain, "market", *world.tables()[domain]) for domain in ("garden", "kitchen")]
    folder = tmp_path_factory.mktemp("blend") / "data"
    build_dataset(sources, folder, Rules(k_core=0))
    return make_split(*read_dataset(folder), SplitSpec())


@pytest.fixture
def model(split: Split, tmp_path: Path) -> Path:
    """What a model folder has beside its weights."""
    split.catalogue.write(tmp_path)
    (tmp_path / "cprec.json").write_text("{}")
    return tmp_path


TINY = {"hidden_size": 8, "num_blocks": 1, "num_heads": 2, "num_epochs": 1, "min_steps": 0}
"""Settings of the parts that are trained."""


def written(model: Path, split: Split, *names: str) -> tuple[Blend, list[RankingQuery]]:
    """A blend of all names alike, written beside a model, and queries to ask it."""
    parts: dict[str, Any] = {
        name: lineup.settings_of(name, TINY if lineup.is_trained(name) else None).make(split, "kitchen")
        for name in names
    }
    setting = Setting(0.0, {name: (0.5, 0.01) for name in names}, 0.25)
    write_blend(model, "kitchen", parts, {"blend": setting, "without_model": setting}, {"asked": {}})
    queries, _ = ranking_queries(split, split.queries("kitchen", VALIDATION, max_history=20))
    return Blend.of(setting, "kitchen", parts, split.catalogue), queries[:20]


def test_every_part_that_is_offered_is_read_as_it_was_written(model: Path, split: Split) -> None:
    """All at once; transition graphs of several kinds keep their kind."""
    before, queries = written(model, split, *KINDS)
    after = read_blend(model, Catalogue.read(model))
    for was, now in zip(before.parts, after.parts, strict=True):
        assert (was.recommender.name, was.weight, was.floor) == (now.recommender.name, now.weight, now.floor)
        assert was.recommender.rank(queries, 10) == now.recommender.rank(queries, 10)
    assert BlendedParts(before).rank(queries, 10) == BlendedParts(after).rank(queries, 10)


def test_columns_of_any_names_are_read_as_they_were_written(model: Path, split: Split) -> None:
    names = ("margin", "Margin", "ease", "../Marge (€)")
    place_N = np.linspace(0, 1, len(split.catalogue.rows_of("kitchen")))
    parts = {
        name: ItemValuesRecommender(name, split.catalogue, "kitchen", place_N**k) for k, name in enumerate(names, 1)
    }
    setting = Setting(0.0, {name: (0.5, 0.01) for name in names}, 0.25)
    write_blend(model, "kitchen", parts, {"blend": setting, "without_model": setting}, {"asked": {}})
    again = read_blend(model, Catalogue.read(model))
    asked_one = [RankingQuery("q", "kitchen", ())]
    before = Blend.of(setting, "kitchen", parts, split.catalogue).priors_of_parts("kitchen", asked_one)
    after = again.priors_of_parts("kitchen", asked_one)
    assert list(before) == list(after) == list(names)
    assert all(np.array_equal(before[name], after[name]) for name in names)
    (model / "blend" / "column-margin.npz").write_bytes(b"other")
    with pytest.raises(DataError, match="column-margin.npz is not the file that"):
        read_blend(model, Catalogue.read(model))


def test_a_part_whose_weight_is_fixed_is_not_left_out(split: Split, tmp_path: Path) -> None:
    timeless = replace(split, domains={name: replace(info, has_times=False) for name, info in split.domains.items()})
    given = (["freshness", "titles"], timeless, "kitchen", 0, tmp_path)
    assert list(made_parts(*given)[0]) == ["titles"]
    with pytest.raises(Unsuitable, match="fixed.freshness: freshness: the times of domain 'kitchen' only order"):
        made_parts(*given, fixed={"freshness": 0.3})
    with pytest.raises(Unsuitable, match="none of freshness can be made"):
        made_parts(*given, fixed={"titles": 0.3})


def test_a_row_of_the_evaluation_is_not_trained_again_for_a_blend(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = lineup.settings_of("SASRec (titles)", TINY)
    monkeypatch.setattr(lineup, "settings_of", lambda name, changed=None: tiny)
    folder = baselines_folder(str(tmp_path), "kitchen")
    made_parts(["SASRec (titles)"], split, "kitchen", 0, folder)
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    config = EvaluateConfig(data="", output_dir=str(tmp_path), baselines=("SASRec (titles)",))
    monkeypatch.setattr("cprec.entrants._note_trained", lambda *_: None)  # which needs a data folder
    (entrant,) = baseline_entrants(config, split, "kitchen")
    entrant.open()
    assert written and written == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_a_part_that_is_trained_is_kept_until_the_blend_is_written(
    model: Path, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a part that cannot be made is left out, whether it is trained or not."""
    tiny, unfinished = lineup.settings_of("SASRec (titles)", TINY), model / "blend.incomplete"
    monkeypatch.setattr(lineup, "settings_of", lambda name: tiny)
    asked = (["SASRec (titles)"], split, "kitchen", 0, unfinished)
    first, _ = made_parts(*asked)
    (record,) = unfinished.rglob("stage-1/system.json")
    written_at = record.stat().st_mtime_ns
    again, _ = made_parts(*asked)
    assert record.stat().st_mtime_ns == written_at, "it was trained once"
    same = [parts["SASRec (titles)"].arrays() for parts in (first, again)]
    assert all(np.array_equal(same[0][name], value) for name, value in same[1].items())
    setting = Setting(0.0, {"SASRec (titles)": (0.5, 0.01)}, 0.25)
    write_blend(model, "kitchen", again, {"blend": setting, "without_model": setting}, {"asked": {}})
    assert not unfinished.exists() and [path.name for path in (model / "blend").iterdir()] == ["sasrec-titles.npz"]
    nothing = replace(split, part=np.full_like(split.part, SPLITS.index(VALIDATION)))
    with pytest.raises(Unsuitable, match=r"none of SASRec \(titles\) can be made of this data"):
        made_parts(asked[0], nothing, *asked[2:])


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def alter(path: Path) -> None:
    """One weight of many."""
    with np.load(path) as stored:
        arrays = dict(stored)
    arrays["model.items.table.weight"][0, 0] += 1
    np.savez(path, **arrays)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "part altered": (lambda model: (model / "blend/ease.npz").write_bytes(b"other"), "is not the file that"),
    "weights altered": (lambda model: alter(model / "blend/sasrec.npz"), "sasrec.npz is not the file that"),
    "part gone": (lambda model: (model / "blend/ease.npz").unlink(), "ease.npz is gone"),
    "part unknown": (lambda model: change(model / "blend.json", files={}), "without a file that it knows"),
    "no JSON": (lambda model: (model / "blend.json").write_text("{"), "is damaged"),
    "no numbers": (lambda model: change(model / "blend.json", blend={"model": 1}), "is damaged"),
    "another version": (lambda model: change(model / "blend.json", schema_version=9), "schema version 9"),
    "another model": (lambda model: (model / "cprec.json").write_text("{ }"), "for another model"),
    "zeros": (
        lambda model: change(model / "blend.json", blend={"model": 0, "parts": {}, "ndcg@10": 0}),
        "all weights of the blend are zero",
    ),
    "no number": (
        lambda model: change(
            model / "blend.json", blend={"model": 1, "parts": {"EASE": {"weight": math.nan, "floor": 1}}, "ndcg@10": 0}
        ),
        "weight=nan",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_was_changed_is_refused(damage: str, model: Path, split: Split) -> None:
    written(model, split, "EASE", "SASRec")
    harm, message = DAMAGE[damage]
    harm(model)
    with pytest.raises(CPRecError, match=message) as refused:
        read_blend(model, split.catalogue)
    assert "blend.json" in str(refused.value) or "cprec blend" in str(refused.value)


def test_a_damaged_or_older_blend_is_made_anew(model: Path, split: Split) -> None:
    for damage in ("no JSON", "another version"):
        written(model, split, "EASE")
        content = read_about(model)
        assert _earlier(str(model), "kitchen", content["asked"]) == content
        DAMAGE[damage][0](model)
        assert _earlier(str(model), "kitchen", content["asked"]) is None


def test_a_blend_of_another_catalogue_is_refused(model: Path, split: Split) -> None:
    written(model, split, "EASE")
    with pytest.raises(ConfigError, match="chosen for another catalogue"):
        read_blend(model, ITEMS)
    with pytest.raises(ConfigError, match="no numbers for 'vectors'"):
        read_blend(model, split.catalogue, "vectors")
    with pytest.raises(ConfigError, match="holds no blend"):
        read_blend(model / "blend", split.catalogue)


def test_parts_that_call_themselves_alike_all_count() -> None:
    """As a baseline and its published variant do."""
    parts = (
        Part("EASE", Table("EASE", row(1, 4, 2)), 1.0, 0.1),
        Part("EASE (published)", Table("EASE", row(8, 1)), 1.0, 0.1),
    )
    values = [blend_of(*chosen).priors("books", [asked(0)]).values_UN for chosen in (parts, parts[:1], parts[1:])]
    assert np.allclose(values[0], values[1] + values[2])


def test_other_scores_than_those_of_training_suit_no_blend() -> None:
    assert (
        RankConfig().suits_blends and RankConfig(mode="beam").suits_blends and RankConfig(mode="vectors").suits_blends
    )
    for other in (RankConfig(score="mean"), RankConfig(normaliser="catalogue")):
        assert not other.suits_blends
