"""Systems that are stored as arrays: read again they score alike, and what does not fit is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cprec.data.catalogue import Catalogue
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.systems.recipes.sasrec import CausalRecommender, CausalSettings, SASRec
from cprec.systems.recipes.title_sasrec import TitleSASRec, TitleSASRecRecommender
from cprec.systems.signals import TrainingSequences

TINY: dict[str, Any] = {"hidden_size": 8, "num_blocks": 1, "num_heads": 2, "num_epochs": 1, "min_steps": 0}


SETTINGS = {
    "SASRec": SASRec(**TINY),
    "two tables": SASRec(**TINY, tied=False),
    "two networks of two tables": SASRec(**TINY, tied=False, num_networks=2),
    "SASRec (titles)": TitleSASRec(**TINY, text_size=12),
    "three networks": TitleSASRec(**TINY, text_size=12, num_networks=3),
}


@pytest.fixture(scope="module", params=SETTINGS.values(), ids=SETTINGS.keys())
def made(request: pytest.FixtureRequest, split: Split) -> CausalRecommender:
    settings: CausalSettings = request.param
    recommender = settings.make(split, "ring")
    assert isinstance(recommender, CausalRecommender)
    return recommender


def test_stored_and_read_it_scores_alike(made: CausalRecommender) -> None:
    """Through a file without pickled objects."""
    file = io.BytesIO()
    np.savez(file, **made.arrays())  # type: ignore[arg-type]
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        again = type(made).from_arrays(dict(arrays), made.catalogue)
    assert (again.settings, again.name, again.domain) == (made.settings, made.name, made.domain)
    histories = [(), ("i03",), tuple(f"i{n % 12:02}" for n in range(70))]
    queries = [RankingQuery(str(n), "ring", tuple(Item("ring", i) for i in ids)) for n, ids in enumerate(histories)]
    assert np.array_equal(again.scores("ring", queries), made.scores("ring", queries))


def test_what_was_stored_without_the_names_of_settings_is_read_as_it_was(split: Split) -> None:
    """The default of another version is not what a network was made with, nor what it is to be refitted with."""
    earlier = {"block": "pre_norm", "attention_dropout": 0.0, "beta2": 0.95, "sorted_batches": 32}
    made = TitleSASRec(**TINY, text_size=6, **earlier).make(split, "ring")
    assert isinstance(made, CausalRecommender)
    arrays = made.arrays()
    named = {name: value for name, value in json.loads(str(arrays["settings"])).items() if name not in earlier}
    again = type(made).from_arrays(arrays | {"settings": np.array(json.dumps(named))}, made.catalogue)
    assert again.settings == made.settings
    query = RankingQuery("q", "ring", (Item("ring", "i03"), Item("ring", "i04")))
    assert np.array_equal(again.scores("ring", [query]), made.scores("ring", [query]))


def test_what_does_not_fit_is_refused(made: CausalRecommender) -> None:
    arrays = made.arrays()
    table = pa.table({"item_id": ["a"], "title": ["thing"]})
    with pytest.raises(ValueError, match="12 vectors for the 1 items of 'ring'"):
        type(made).from_arrays(arrays, Catalogue.from_tables({"ring": table}))
    name = next(name for name in arrays if name.endswith("encoder.position.weight"))
    with pytest.raises(ValueError, match=r"(?s)weights of another model: .*encoder\.position\.weight"):
        type(made).from_arrays(arrays | {name: arrays[name][:-1]}, made.catalogue)
    del arrays[name]
    with pytest.raises(ValueError, match="weights of another model"):
        type(made).from_arrays(arrays, made.catalogue)


def test_an_item_that_came_after_is_what_its_title_says(made: CausalRecommender) -> None:
    """Called as i03 is and like no other item, it is read and scored as that, first in the order of ids as it is."""
    titles = made.catalogue.titles_of("ring")
    table = pa.table({"item_id": [*(f"i{n:02}" for n in range(12)), "a new one"], "title": [*titles, titles[3]]})
    more = Catalogue.from_tables({"ring": table})
    if not isinstance(made, TitleSASRecRecommender):
        assert made.with_catalogue(more) is None
        return
    queries = [
        RankingQuery("q", "ring", tuple(Item("ring", name) for name in history))
        for history in (["i05", "i06"], ["i05", "i03"], ["i05", "a new one"])
    ]
    assert made.with_catalogue(made.catalogue) is not None and "_space" not in vars(made), "no item came to be told"
    after, scores_QN = made.with_catalogue(more), made.scores("ring", queries[:2])
    assert after is not None and after.scores("ring", queries[:2])[:, 1:] == pytest.approx(scores_QN, abs=1e-6)
    assert after.scores("ring", queries[:2])[:, 0] == pytest.approx(scores_QN[:, 3], abs=1e-5)
    assert after.scores("ring", queries[2:])[0, 1:] == pytest.approx(scores_QN[1], abs=1e-5)
    back = after.with_catalogue(made.catalogue)
    assert back is not None and back.scores("ring", queries[:2]) == pytest.approx(scores_QN, abs=1e-6)


def test_an_item_that_came_after_has_the_directions_of_training(made: CausalRecommender) -> None:
    """Another machine may find directions of equal strength turned; the network reads those that it has learnt."""
    if not isinstance(made, TitleSASRecRecommender):
        return
    arrays, size = made.arrays(), made.arrays()["vectors"].shape[1]
    turn_FF = np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))[0].astype(np.float32)
    for name in [name for name in arrays if name == "vectors" or name.endswith("adapter.0.weight")]:
        arrays[name] = arrays[name] @ turn_FF
    ids, titles = made.catalogue.item_id.tolist(), made.catalogue.titles_of("ring")
    more = Catalogue.from_tables({"ring": pa.table([[*ids, "z"], [*titles, titles[3]]], ["item_id", "title"])})
    after = made.from_arrays(arrays, made.catalogue).with_catalogue(more)
    query = RankingQuery("q", "ring", (Item("ring", "i05"), Item("ring", "i06")))
    assert after is not None
    scores_N = after.scores("ring", [query])[0]
    assert scores_N[:-1] == pytest.approx(made.scores("ring", [query])[0], abs=1e-4)
    assert scores_N[-1] == pytest.approx(scores_N[3], abs=1e-4)


def test_of_an_item_that_came_after_a_file_of_vectors_says_nothing(data: TrainingSequences, circle: str) -> None:
    settings = TitleSASRec(**TINY, vectors=circle)
    made = settings.recommender(data, settings.model(settings.frozen(data)))
    assert made.with_catalogue(made.catalogue) is None


def test_scores_of_networks_are_averaged(split: Split) -> None:
    """Each is that of a seed, and no two seeds share one."""
    settings = [SASRec(**TINY, num_networks=number) for number in (1, 2)]
    ones = [settings[0].make(split, "ring", seed=seed) for seed in range(4)]
    pairs = [settings[1].make(split, "ring", seed=seed) for seed in range(2)]
    queries = [RankingQuery(str(n), "ring", (Item("ring", f"i{n:02}"), Item("ring", "i07"))) for n in range(5)]
    scores = [one.scores("ring", queries) for one in ones]
    for pair, (first, second) in zip(pairs, (scores[:2], scores[2:]), strict=True):
        assert pair.scores("ring", queries) == pytest.approx((first + second) / 2, abs=1e-5)
    assert abs(scores[0] - scores[1]).max() > 1e-3
    with pytest.raises(ConfigError, match="num_networks=0 must be above 0"):
        TitleSASRec(num_networks=0)


def test_words_are_as_long_as_what_a_language_model_gives_and_a_file_is_as_it_is(
    data: TrainingSequences, tmp_path: Path
) -> None:
    np.savez(tmp_path / "given.npz", item_id=np.array(data.item_ids), vectors=np.full((data.num_items, 2), 0.5))
    words, given = TitleSASRec(text_size=6), TitleSASRec(vectors=str(tmp_path / "given.npz"))
    assert np.linalg.norm(words.frozen(data), axis=1) == pytest.approx(np.full(data.num_items, 5.0), abs=1e-5)
    assert (given.frozen(data) == 0.5).all()


def test_few_sequences_are_read_more_often(data: TrainingSequences) -> None:
    """One pass of the ring is one step; a setting of more passes than the steps need stays."""
    settings = [{"min_steps": 300}, {"min_steps": 300, "num_epochs": 400}, {"min_steps": 0}]
    made = [TitleSASRec(**TINY | changed, text_size=6) for changed in settings]
    assert [each.stages(data, 0)[0].stream.num_steps for each in made] == [300, 400, 1]
