"""The item head: what it makes of titles, its training, its files and its rankings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.entrants import model_entrants
from cprec.errors import ConfigError, DataError
from cprec.evaluate.config import EvaluateConfig
from cprec.item_head import Directions, ItemHead, load_heads, made_from, save_heads, seconds_to_train, title_states
from cprec.models import tiny_model
from cprec.rank.blend import Blend, write_blend
from cprec.rank.blend_file import Setting
from cprec.rank.by_values import ByValues
from cprec.rank.llm import LLMRecommender
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item
from cprec.search.priors import Priors
from cprec.systems.recipes.title_sasrec import ROWS, TitleSASRec
from cprec.systems.signals import TrainingSequences
from cprec.text.encoding import PromptEncoder

SMALL = TitleSASRec(
    hidden_size=8, num_heads=2, num_blocks=1, batch_size=16, num_epochs=20, min_steps=0, learning_rate=0.02
)


@pytest.fixture
def catalogue() -> Catalogue:
    titles = ["red book 1", "blue book", "green book 2 3", "red"]
    table = pa.table({"item_id": ["a", "b", "c", "d"], "title": titles})
    return Catalogue.from_tables({"books": table, "games": table})


@pytest.fixture
def model(make_model: Callable[..., Any]) -> Any:
    return make_model().eval()


@pytest.fixture(params=[1, 2], ids=["one network", "two networks"])
def head(request: pytest.FixtureRequest, model: Any, tokenizer: Any, catalogue: Catalogue) -> ItemHead:
    """A head with weights drawn at random."""
    settings = replace(SMALL, num_networks=request.param)
    states_NF = title_states(model, PromptEncoder(tokenizer, catalogue).titles(np.arange(4, 8)))
    directions = Directions.of(states_NF)
    vectors_NK = directions.project(states_NF)
    torch.manual_seed(0)
    network = settings.model(vectors_NK)
    for name, weights in network.named_parameters():
        if name.endswith(ROWS):
            torch.nn.init.normal_(weights)
    nobody = TrainingSequences(catalogue, "games", Ragged.of([]), ())
    return ItemHead(directions, settings.recommender(nobody, network))


# ---- what a model makes of titles ------------------------------------------------------------------------------------


def test_states_are_means_over_a_titles_own_tokens(tokenizer: Any) -> None:
    """Before and after the first of three blocks, whatever titles are read beside it."""
    model = tiny_model(len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2).eval()
    titles = Ragged.of([[5, 6, 7], [], [8], [9, 5]])
    found = title_states(model, titles)
    for row in (0, 2, 3):
        with torch.inference_mode():
            every = model(torch.tensor([titles[row].tolist()]), output_hidden_states=True).hidden_states
        means = [every[depth][0].mean(0) for depth in (0, 1)]
        expected = torch.cat([mean / mean.norm() for mean in means])
        assert found[row] == pytest.approx(expected.numpy(), abs=0.02), "bf16 where there is that"
    assert not found[1].any(), "a title without tokens"


def test_directions_tell_titles_apart_and_leave_noise_small() -> None:
    states = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32) * [3, 2, 1, 1, 1e-4, 0] + 7
    states = states.astype(np.float32)
    projected = Directions.of(states, most=5).project(states)
    assert projected.mean(0) == pytest.approx(0, abs=1e-4)
    assert np.cov(projected, rowvar=False) == pytest.approx(
        np.diag(np.cov(projected, rowvar=False).diagonal()), abs=1e-4
    )
    assert projected.std(0)[:4] == pytest.approx(0.3, rel=0.01) and projected.std(0)[4] < 0.001


# ---- a head ----------------------------------------------------------------------------------------------------------


def test_a_head_learns_what_follows_what(ring: Split, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """And is the same again from what is finished."""
    domain = ring.catalogue.domains[0]
    encoder = PromptEncoder(tokenizer, ring.catalogue)

    def read(rows: np.ndarray) -> np.ndarray:
        return title_states(model, encoder.titles(rows))

    heads = [ItemHead.train(ring, domain, read, settings=SMALL, seed=0, folder=tmp_path / "head") for _ in range(2)]
    record = json.loads(next((tmp_path / "head").rglob("stage-1/system.json")).read_text())
    num_items = len(ring.catalogue.rows_of(domain))
    assert record["best"] > 0.9, "after item n comes item n + 1"
    query = RankingQuery("q", domain, (Item(domain, ring.catalogue.item_id[0]),))
    one, other = (head.log_probs([query], np.ones(num_items, dtype=bool)) for head in heads)
    assert np.array_equal(one, other)


def test_the_time_of_training_can_be_told_before(ring: Split) -> None:
    assert seconds_to_train(ring, ring.catalogue.domains[0], 0) > 0


def test_shares_sum_to_one_over_the_items_in_stock(head: ItemHead) -> None:
    every, some = np.ones(4, dtype=bool), np.array([True, True, False, True])
    whole, part = (head.log_probs([games("a"), games()], stock) for stock in (every, some))
    assert np.exp(whole).sum(1) == pytest.approx(1) and np.exp(part[:, some]).sum(1) == pytest.approx(1)
    assert whole - part == pytest.approx(np.tile((whole - part)[:, :1], 4)), "a withdrawn item is measured alike"


def test_items_come_and_go(head: ItemHead, model: Any, tokenizer: Any) -> None:
    """Those that stay keep what they have, a new one has what its title says, and one with another title both."""
    titles = {"0": "blue 1", "b": "blue book", "c": "red", "d": "red"}
    table = pa.table({"item_id": list(titles), "title": list(titles.values())})
    other = Catalogue.from_tables({"books": table, "games": table})
    encoder = PromptEncoder(tokenizer, other)
    read: list[list[int]] = []

    def states(rows: np.ndarray) -> np.ndarray:
        read.append(rows.tolist())
        return title_states(model, encoder.titles(rows))

    later = head.over(other, states)
    assert read == [[4, 6]], "the new item, and the one whose title changed"
    arrays, earlier = later.recommender.arrays(), head.recommender.arrays()
    names = [name for name in arrays if name.endswith(ROWS)]
    assert len(names) == head.recommender.settings.num_networks  # type: ignore[attr-defined]
    for name in names:
        assert not arrays[name][0].any() and np.array_equal(arrays[name][1:], earlier[name][1:])
    assert arrays["vectors"][2] == pytest.approx(earlier["vectors"][3], abs=1e-5), "the same title"
    every = np.ones(4, dtype=bool)
    one, changed = head.log_probs([games("b")], every)[0], later.log_probs([games("b")], every)[0]
    assert changed[1] - changed[3] == pytest.approx(one[1] - one[3], abs=1e-5)


def test_a_saved_head_is_the_same(head: ItemHead, catalogue: Catalogue, tmp_path: Path) -> None:
    (tmp_path / "cprec.json").write_text("{}")
    save_heads(tmp_path, {"games": head}, {"seed": 0})
    every, query = np.ones(4, dtype=bool), games("a", "b")
    again = load_heads(tmp_path, catalogue)
    assert list(again) == ["games"] and not again["games"].serves_any_domain
    assert np.array_equal(again["games"].log_probs([query], every), head.log_probs([query], every))
    assert made_from(tmp_path) == {"seed": 0}
    assert not load_heads(tmp_path / "elsewhere", catalogue) and not made_from(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda folder: (folder / "cprec.json").write_text('{"other": 1}'), "another model"),
        (lambda folder: (folder / "item_head" / "head.json").unlink(), r"head\.json"),
        (lambda folder: (folder / "item_head" / "head.safetensors").write_bytes(b"x" * 9), "cannot be used"),
    ],
)
def test_a_head_that_was_altered_is_refused(
    head: ItemHead, catalogue: Catalogue, tmp_path: Path, change: Callable[[Path], Any], what: str
) -> None:
    (tmp_path / "cprec.json").write_text("{}")
    save_heads(tmp_path, {"games": head}, {"seed": 0})
    change(tmp_path)
    with pytest.raises(DataError, match=what):
        load_heads(tmp_path, catalogue)


def test_what_has_no_head_is_refused(model: Any, tokenizer: Any, catalogue: Catalogue) -> None:
    with pytest.raises(ConfigError, match=r"has none: train it with item_head=true"):
        LLMRecommender(model, tokenizer, catalogue, domain="games").rank([games()], 1, "vectors")


# ---- a part of a blend -----------------------------------------------------------------------------------------------


class Margins:
    """A source of priors: what is known of each item, whoever asks; and the weights of the model's two readouts."""

    def __init__(self, catalogue: Catalogue, weight: float, item_head: float) -> None:
        self.catalogue, self.weight, self.item_head = catalogue, weight, item_head

    def priors(self, domain: str, queries: Sequence[RankingQuery]) -> Priors:
        ids = self.catalogue.item_id[self.catalogue.rows_of(domain)]
        values = [float(ord(item) % 3) for item in ids]
        return Priors(np.tile(values, (len(queries), 1)), self.weight, self.item_head)

    def with_catalogue(self, catalogue: Catalogue) -> Margins:
        return Margins(catalogue, self.weight, self.item_head)


@pytest.fixture
def opened(head: ItemHead, model: Any, tokenizer: Any, catalogue: Catalogue) -> Callable[..., LLMRecommender]:
    """The model with its head; given weights, blended."""

    def opened(weight: float | None = None, item_head: float = 0.0, **options: Any) -> LLMRecommender:
        made = LLMRecommender(model, tokenizer, catalogue, domain="games", item_heads={"games": head}, **options)
        made.blend = None if weight is None else Margins(catalogue, weight, item_head)
        return made

    return opened


def games(*history: str, **changes: Any) -> RankingQuery:
    return RankingQuery("q", "games", tuple(Item("games", name) for name in history), **changes)


ASKED = [
    games("a", "c", exclude=frozenset("a")),
    games("b", uncounted=frozenset("bd")),
    games(allow=frozenset("bc")),
    games("d", candidates=("c", "a")),
]


def ids_and_scores(rankings: Sequence[Ranking]) -> list[dict[str, float]]:
    return [dict(zip(one.item_ids, one.scores, strict=True)) for one in rankings]


@pytest.mark.parametrize(
    ("weight", "item_head", "mode"),
    [
        (0.7, 1.5, "exact"),
        (0.7, 1.5, "beam"),
        (1.0, 0.0, "exact"),
        (0.0, 0.8, "beam"),
        (0.0, 0.0, "exact"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((1.0, 0.0, "beam"), (0.0, 0.8, "exact"), (0.0, 0.0, "beam"))
        ),
    ],
)
def test_scores_are_the_sum_of_both_readouts_and_the_priors(
    opened: Callable[..., LLMRecommender], weight: float, item_head: float, mode: str
) -> None:
    """By brute force; after items came and went, too."""
    alone, blended = opened(mode=mode), opened(weight, item_head, mode=mode)
    table = pa.table({"item_id": ["0", "b", "c", "d"], "title": ["blue 1", "blue book", "green book 2 3", "red"]})
    other, later = (
        Catalogue.from_tables({"books": table, "games": table}),
        [games("c"), games("b", exclude=frozenset("c"))],
    )
    withdrawn = {"games": frozenset("d")}
    for one, both, asked in (
        (alone, blended, ASKED),
        (alone.with_items(other, withdrawn), blended.with_items(other, withdrawn), later),
    ):
        ids = one.catalogue.item_id[one.catalogue.rows_of("games")]
        for query, found in zip(asked, ids_and_scores(both.rank(asked, 4)), strict=True):
            every = tuple(item for item in ids if item in found)
            log_prob = ids_and_scores(one.rank([games(*(i.item_id for i in query.history), candidates=every)], 4))[0]
            of_head = dict(zip(ids, one.item_log_probs("games", [query])[0], strict=True))
            expected = {item: weight * log_prob[item] + item_head * of_head[item] + ord(item) % 3 for item in every}
            assert found == pytest.approx(expected, abs=1e-5)
            gone = one.withdrawn.get("games", frozenset()) if query.candidates is None else frozenset()
            reach = set(query.candidates or ids) - query.exclude - gone
            assert set(found) == reach & (query.allow or reach)
            assert list(found.values()) == sorted(found.values(), reverse=True)
    first = blended.rank(ASKED[:2], 1)
    for ranking, every in zip(first, ids_and_scores(blended.rank(ASKED[:2], 4)), strict=True):
        assert ranking.item_ids[0] == next(iter(every)) and ranking.proof is not None
        assert ranking.proof.exact or mode == "beam"


def test_vectors_with_a_blend_is_the_blend_without_log_p(opened: Callable[..., LLMRecommender]) -> None:
    blended = opened(0.0, 0.8)
    assert blended.rank(ASKED, 2, "vectors") == blended.rank(ASKED, 2)
    with pytest.raises(ConfigError, match=r"gives log P the weight 0.5: open the model with mode='vectors'"):
        opened(0.5, 0.8).rank(ASKED, 2, "vectors")


def test_a_blend_that_is_read_gives_the_lists_that_it_was_written_for(
    head: ItemHead,
    model: Any,
    tokenizer: Any,
    catalogue: Catalogue,
    opened: Callable[..., LLMRecommender],
    write_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """For reading titles and for `vectors`, each by its own numbers; without the head it is refused."""
    write_model(tmp_path, model, tokenizer, catalogue, domain="games")
    save_heads(tmp_path, {"games": head}, {"seed": 0})
    settings = {
        "blend": Setting(0.7, {}, 0.5, item_head=1.5),
        "vectors": Setting(0.0, {}, 0.4, item_head=0.8),
        "without_model": Setting(0.0, {}, 0.3),
    }
    write_blend(tmp_path, "games", {}, settings, {"asked": {}})
    made = opened()
    for mode in ("auto", "vectors"):
        made.blend = Blend.of(settings["vectors" if mode == "vectors" else "blend"], "games", {}, catalogue)
        read = LLMRecommender.from_pretrained(tmp_path, mode=mode, bf16=False)
        for one, other in zip(read.rank(ASKED, 2), made.rank(ASKED, 2), strict=True):
            assert one.item_ids == other.item_ids and one.scores == pytest.approx(other.scores, abs=1e-5)
    shutil.rmtree(tmp_path / "item_head")
    with pytest.raises(ConfigError, match="chosen for another model"):
        LLMRecommender.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"mode=vectors needs an item head for domain 'games', and .* has none"):
        LLMRecommender.from_pretrained(tmp_path, mode="vectors")


# ---- in an evaluation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "item_head"), [(None, 0.0), (0.0, 0.8), (0.0, 0.0)])
def test_a_query_is_scored_once_however_often_it_is_asked(
    opened: Callable[..., LLMRecommender], monkeypatch: pytest.MonkeyPatch, weight: float | None, item_head: float
) -> None:
    """The rankings are those of the model itself, bit for bit."""
    model = opened(weight, item_head, **({"mode": "vectors"} if weight is None else {}), batch_size=2)
    histories = ("a", "b", "cd", "", "dab")
    asked = [replace(games(*history), query_id=str(n)) for n, history in enumerate(histories)]
    full = [replace(query, uncounted=frozenset(items)) for query, items in zip(asked, histories, strict=True)]
    given = [replace(query, candidates=("c", "a", "b")) for query in asked]
    new = [replace(query, allow=frozenset("bd"), exclude=frozenset("b")) for query in asked[1::2]]
    expected = [model.rank(queries, 2) for queries in (full, given)]
    scored: list[str] = []

    def noting(recommender: LLMRecommender, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        scored.extend(query.query_id for query in queries)
        return of_model(recommender, domain, queries)

    of_model = LLMRecommender.values
    monkeypatch.setattr(LLMRecommender, "values", noting)
    kept = ByValues(model)
    assert [kept.rank(queries, 2) for queries in (full, given)] == expected
    of_full = [dict(zip(one.item_ids, one.scores, strict=True)) for one in kept.rank(full, 4)]
    for query, ranking in zip(new, kept.rank(new, 2), strict=True):
        assert dict(zip(ranking.item_ids, ranking.scores, strict=True)) == {"d": of_full[int(query.query_id)]["d"]}
    assert scored == ["0", "1", "2", "3", "4"]


def test_an_evaluation_is_told_who_scores_a_query_once(
    head: ItemHead, model: Any, tokenizer: Any, catalogue: Catalogue, write_model: Callable[..., Path], tmp_path: Path
) -> None:
    about = {"domain": "games", "trained_on": ["1"], "num_parameters": 1, "tokens": 1, "seconds": 1.0}
    write_model(tmp_path / "model", model, tokenizer, catalogue, **about)
    save_heads(tmp_path / "model", {"games": head}, {"seed": 0})
    config = EvaluateConfig(data=str(tmp_path), output_dir=str(tmp_path / "out"))
    entrants = model_entrants(config, "games", {"model": str(tmp_path / "model")})
    once = {entrant.name: entrant.open() for entrant in entrants}
    assert {name: opened.scores_once for name, opened in once.items()} == {"model": False, "model item head": True}
    expected = LLMRecommender.from_pretrained(tmp_path / "model", mode="vectors").rank(ASKED, 2)
    assert once["model item head"].recommender.rank(ASKED, 2) == expected
