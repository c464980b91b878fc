"""Items that share their codes, items that come later, versions of codes, and what is said of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, InputChanged, UnknownItemError, Unsuitable
from cprec.models import tiny_model
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.systems.code_report import code_report
from cprec.systems.codes import END, FIRST_CODE, Collisions, ItemCodes, Kind, fitted, spread_out, told_apart
from cprec.systems.generator import CodeRecommender, decoder
from cprec.systems.quantise import residual_codes
from cprec.systems.recipes.tiger import TIGER
from cprec.systems.signals import TrainingSequences
from cprec.systems.vectors import text_vectors

each_rule = pytest.mark.parametrize("rule", get_args(Collisions))


def coded(vectors: np.ndarray, rule: Collisions, num_levels: int = 2, num_codes: int = 4) -> ItemCodes:
    quantiser = fitted("residual k-means", vectors, num_levels, num_codes, seed=0)
    return ItemCodes.coded(quantiser, vectors, num_codes, rule)


def rows(codes: ItemCodes) -> list[tuple[int, ...]]:
    return [tuple(codes.sequences[item].tolist()) for item in range(len(codes.sequences))]


# ---- items that share their codes ------------------------------------------------------------------------------------


def test_no_two_items_share_all_codes_where_there_are_enough() -> None:
    generator = np.random.default_rng(0)
    own = np.column_stack([generator.integers(0, 12, 60), generator.integers(0, 3, 60)])  # five of twelve, on average
    distances = generator.random((60, 16))
    distances[np.arange(60), own[:, 1]] /= 100
    found = told_apart(own, distances)
    assert len(np.unique(own, axis=0)) < 40
    assert len(np.unique(found, axis=0)) == 60
    assert np.array_equal(found[:, 0], own[:, 0])
    _, group, sizes = np.unique(own, axis=0, return_inverse=True, return_counts=True)
    for number, size in enumerate(sizes):
        mine = np.flatnonzero(group == number)
        kept = mine[(found[mine] == own[mine]).all(1)]
        nearest = mine[distances[mine, own[mine, 1]].argmin()]
        assert kept.tolist() == [nearest], "the nearest of each group, so that an item alone stays, too"
        assert size == 1 or len(mine) > len(kept)


def test_more_items_than_codes_are_spread_evenly() -> None:
    distances = np.random.default_rng(0).random((8, 3))
    for rule in (told_apart, spread_out):
        found = rule(np.zeros((8, 2), dtype=np.int64), distances)
        assert sorted(np.bincount(found[:, 1]).tolist()) == [2, 3, 3]


def test_spreading_codes_loses_no_more_in_sum_than_exchanging_those_that_are_taken() -> None:
    generator, none = np.random.default_rng(0), np.empty((0, 1), dtype=np.int64)
    ratios = []
    for _ in range(40):
        distances = np.square(generator.normal(size=(12, 1)) - 2 * generator.normal(size=16))
        own = distances.argmin(1)[:, None]
        lost = [distances[np.arange(12), rule(own, distances, none)[:, 0]].sum() for rule in (told_apart, spread_out)]
        best = distances[linear_sum_assignment(distances)].sum()
        assert best <= lost[1] + 1e-9
        assert len(set(spread_out(own, distances)[:, 0].tolist())) == 12
        ratios.append([each / best for each in lost])
    moved, spread = np.mean(ratios, axis=0)
    assert spread < 1.3 < 1.9 < moved, "beside the least that is possible"


def test_codes_that_are_made_with_a_rule_are_moved_by_it() -> None:
    """Of vectors for which the two rules choose differently."""
    vectors = np.random.default_rng(1).normal(size=(12, 2))
    quantiser = fitted("residual k-means", vectors, 2, 4, seed=0)
    own = quantiser.encode(vectors)
    distances = quantiser.last_distances(vectors, own)
    assert not np.array_equal(spread_out(own, distances), told_apart(own, distances))
    reassigned, spread = (ItemCodes.coded(quantiser, vectors, 4, rule) for rule in ("reassign", "sinkhorn"))
    assert np.array_equal(reassigned.code_NL, told_apart(own, distances))
    assert np.array_equal(spread.code_NL, spread_out(own, distances))


def test_spread_codes_are_near_ones_and_free() -> None:
    distances = np.tile([[5.0, 0.0, 9.0, 1.0, 2.0]], (3, 1))
    alike = np.array([[4, 1]] * 3)
    assert sorted(spread_out(alike, distances)[:, 1].tolist()) == [1, 3, 4], "the three nearest"
    known = np.array([[4, 1], [4, 3], [2, 4]])
    assert sorted(spread_out(alike, distances, known)[:, 1].tolist()) == [0, 2, 4], "1 and 3 are taken"
    apart = np.array([[4, 1], [4, 0], [2, 1]])
    assert np.array_equal(spread_out(apart, distances), apart), "where nothing collides nothing moves"


def test_known_codes_are_taken() -> None:
    known = np.array([[0, 0], [0, 1], [1, 2]])
    distances = np.array([[0.0, 1, 2], [0, 1, 2], [0, 1, 2]])
    assert told_apart(np.array([[0, 0], [0, 0], [1, 0]]), distances, known).tolist() == [[0, 0], [0, 2], [1, 0]]


def test_what_tells_equal_items_apart_does_not_follow_the_catalogue() -> None:
    """Its order may be that of whole histories: then counting on would lead to held-out items."""
    further = [row[-2] for row in rows(coded(np.repeat([[0.0], [9.0]], 200, axis=0), "count", num_levels=1))]
    last = told_apart(np.zeros((200, 1), dtype=np.int64), np.tile(np.arange(200.0), (200, 1)))[:, 0]
    for numbers in (further[:200], further[200:], last):
        steps = np.diff(numbers)
        assert (steps == 1).mean() < 0.05 and abs((steps > 0).mean() - 0.5) < 0.15


def test_what_each_rule_makes_of_duplicates() -> None:
    vectors = np.array([[0.0], [0], [0], [8], [9]])
    sequences = {rule: coded(vectors, rule, num_codes=3) for rule in get_args(Collisions)}
    counted, moved, spread, shared = (rows(sequences[rule]) for rule in ("count", "reassign", "sinkhorn", "share"))
    assert [len(row) for row in counted] == [4, 4, 4, 3, 3] and len(set(counted)) == 5
    for each in (moved, spread):
        assert [len(row) for row in each] == [3] * 5 and len(set(each)) == 5
    assert shared[0] == shared[1] == shared[2] and len(set(shared)) == 3
    assert [(each.num_collisions, each.num_moved) for each in sequences.values()] == [(3, 0), (0, 2), (0, 2), (3, 0)]
    first = FIRST_CODE + 2 * 3
    assert [each.vocabulary_size for each in sequences.values()] == [first + 3, first, first, first]
    assert all(row[-1] == END for row in (*counted, *moved, *spread, *shared))


def test_where_there_are_too_few_codes_a_further_one_tells_items_apart() -> None:
    codes = coded(np.array([[0.0]] * 4 + [[9.0]]), "reassign", num_codes=2)
    assert codes.num_moved == 2 and codes.num_collisions == 4
    assert len(set(rows(codes))) == 5 and sorted(map(len, rows(codes))) == [3, 4, 4, 4, 4]


@each_rule
def test_items_that_are_all_alike_are_refused(rule: Collisions) -> None:
    with pytest.raises(Unsuitable, match="all 9 items have the same codes, which therefore say nothing"):
        coded(np.full((9, 3), 0.3), rule)
    assert len(rows(coded(np.ones((1, 3)), rule))) == 1  # one item needs no telling apart


# ---- items that come later -------------------------------------------------------------------------------------------


@each_rule
def test_a_catalogue_that_doubles_keeps_its_codes(rule: Collisions) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(40, 3)).round(1)
    vectors[1:9:2] = vectors[:8:2]
    codes = coded(vectors, rule)
    grown = codes.with_items(np.concatenate([vectors[:20], generator.normal(size=(20, 3))]))
    assert rows(grown)[:40] == rows(codes)
    assert np.array_equal(grown.code_NL[:40], codes.code_NL)
    assert (grown.version, grown.vocabulary_size) == (codes.version, codes.vocabulary_size)
    assert grown.longest <= codes.longest and grown.sequences.values.max() < codes.vocabulary_size
    assert len(rows(grown)) == len(grown.code_NL) == 80
    if rule == "share":
        assert rows(grown)[40:60] == rows(codes)[:20]


def test_a_new_item_takes_the_first_further_code_that_is_free_and_then_shares() -> None:
    vectors = np.array([[0.0], [0], [5], [9]])
    codes = coded(vectors, "count", num_levels=1, num_codes=3)
    zero, five = rows(codes)[0][0], rows(codes)[2][0]
    first, second = FIRST_CODE + 3, FIRST_CODE + 4
    assert rows(codes)[:3] == [(zero, second, END), (zero, first, END), (five, END)]
    grown = codes.with_items(np.array([[0.1], [0.2], [5], [5], [5]]))
    ends = [(zero, first, END), (zero, first, END), (five, first, END), (five, second, END), (five, END)]
    assert rows(grown)[4:] == ends
    assert grown.num_collisions == 8


def test_with_reassigned_codes_a_new_item_takes_the_nearest_free_one() -> None:
    codes = coded(np.array([[0.0], [1], [2], [100], [101], [102]]), "reassign", num_codes=4)
    grown = codes.with_items(np.array([[1.0]]))
    assert rows(codes)[1][0] == rows(grown)[-1][0] and len(set(rows(grown))) == 7
    full = coded(np.array([[0.0], [1], [2], [9]]), "reassign", num_levels=1, num_codes=4)
    # All codes are taken, and no further one was learnt: items share, in the codes that fewest have.
    assert rows(full.with_items(np.array([[1.1], [1.2]])))[4:] == rows(full)[1:3]


NUM_ITEMS = 12


def catalogue(num_items: int, step: int = 2) -> Catalogue:
    """Items of every second number; later ones stand between them."""
    titles = [f"{('red', 'green', 'blue')[n % 3]} {('shoe', 'lamp', 'cup', 'tea')[n % 4]}" for n in range(num_items)]
    ids = [f"i{n * step % (2 * NUM_ITEMS) + n // NUM_ITEMS:02}" for n in range(num_items)]
    return Catalogue.from_tables({"shop": pa.table({"item_id": ids, "title": titles})})


@pytest.fixture(scope="module")
def data() -> TrainingSequences:
    generator = np.random.default_rng(0)
    sequences = Ragged.of([generator.integers(0, NUM_ITEMS, size).tolist() for size in (5, 2, 9, 1, 7, 12, 12)])
    return TrainingSequences(catalogue(NUM_ITEMS), "shop", sequences, tuple(f"p/u{n}" for n in range(7)))


def settings(**changes: Any) -> TIGER:
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "num_levels": 2, "num_codes": 4, "text_size": 4}
    return TIGER(**{**sizes, **changes})


def recommender(data: TrainingSequences, codes: ItemCodes) -> tuple[CodeRecommender, Any]:
    net = tiny_model(codes.vocabulary_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                parameter *= 8  # far from uniform
    net.eval()
    return CodeRecommender("codes", data, codes, net, max_length=5, beam_width=3, max_nodes=2000), net


def log_prob(net: Any, codes: ItemCodes, history: list[int], item: int) -> float:
    """An item's log-probability by one pass over everything, shared among the items of its sequence."""
    prompt = codes.prompts(Ragged.of([history])).values.tolist()
    ids = torch.tensor([[*prompt, *codes.sequences[item].tolist()]])
    with torch.inference_mode():
        logp = net(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    total = sum(logp[place - 1, ids[0, place]].double() for place in range(len(prompt), ids.shape[1]))
    return float(total) - float(np.log(rows(codes).count(rows(codes)[item])))


@each_rule
def test_items_that_come_after_training_are_ranked_at_once(data: TrainingSequences, rule: Collisions) -> None:
    codes = settings(collisions=rule).codes(data, seed=0)
    before, net = recommender(data, codes)
    larger = catalogue(2 * NUM_ITEMS)
    after = before.with_items(larger)
    assert larger.item_id.tolist() == [f"i{n:02}" for n in range(24)]
    grown = after._codes
    assert rows(grown)[::2] == rows(codes) and grown.version == codes.version
    query = RankingQuery("q", "shop", (Item("shop", "i02"), Item("shop", "i07")))  # one of each
    (ranking,) = after.rank([query], 24, "exact")
    scores = {f"i{item:02}": log_prob(net, grown, [2, 7], item) for item in range(24)}
    assert dict(zip(ranking.item_ids, ranking.scores, strict=True)) == pytest.approx(scores, abs=1e-4)
    (ranking,) = before.rank([replace(query, history=query.history[:1])], 24, "exact")
    assert set(ranking.item_ids) == set(catalogue(NUM_ITEMS).item_id.tolist()), "the first one stays as it was"


def test_a_title_has_the_vector_that_it_had_in_training(data: TrainingSequences) -> None:
    made = settings()
    again = made.vectors_of_new(data, "text", data.item_ids, data.titles)
    assert again == pytest.approx(made.vectors_of(data, "text"), abs=1e-6)
    assert not made.vectors_of_new(data, "text", ["x"], ["a word that no title has"]).any()


def test_what_new_items_cannot_have_is_said(data: TrainingSequences) -> None:
    codes = settings(of="collaborative").codes(data, seed=0)
    with pytest.raises(ConfigError, match="codes of training events cannot be given to 12 new items, which have none"):
        recommender(data, codes)[0].with_items(catalogue(2 * NUM_ITEMS))
    made, _ = recommender(data, settings().codes(data, seed=0))
    with pytest.raises(UnknownItemError, match="'i22'"):
        made.with_items(catalogue(NUM_ITEMS - 1))
    with pytest.raises(ConfigError, match="these codes are not made of vectors alone, so new items cannot get any"):
        recommender(data, ItemCodes.of(codes.code_NL, 4))[0].with_items(catalogue(2 * NUM_ITEMS))


# ---- versions --------------------------------------------------------------------------------------------------------


def test_a_version_says_what_tokens_mean() -> None:
    code_NL = np.array([[0, 1], [1, 0], [0, 1]])
    version = ItemCodes.of(code_NL, 2).version
    assert len(version) == 16 and ItemCodes.of(code_NL, 2).version == version
    others = [ItemCodes.of(code_NL, 3), ItemCodes.of(code_NL[[0, 2, 1]], 2), ItemCodes.of(code_NL, 2, "share")]
    assert len({version, *(other.version for other in others)}) == 4


def test_a_model_is_refused_with_codes_that_it_has_not_learnt(data: TrainingSequences) -> None:
    made = settings()
    codes, others = made.codes(data, seed=0), settings(collisions="share").codes(data, seed=0)
    sizes = {"max_length": 20, "dropout": 0.0, "hidden_size": 8, "num_layers": 1, "num_heads": 1}
    model = decoder(codes, **sizes)
    made.code_recommender(data, codes, model)
    message = f"learnt codes of version {codes.version}, and these are of version {others.version}"
    with pytest.raises(InputChanged, match=message):
        made.code_recommender(data, others, model)
    fresh = decoder(replace(codes, version="0123456789abcdef"), **sizes)
    fresh.load_state_dict(model.state_dict())  # the version comes with the weights
    assert made.code_recommender(data, codes, fresh).num_parameters == model.num_parameters()


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_the_report_is_that_of_counts_by_hand() -> None:
    table = pa.table(
        {"item_id": list("abcd"), "title": list("abcd"), "categories": ["tea", "tea", "mug", "mug"]},
    )
    sequences = Ragged.of([[0, 1, 0], [2, 3], [1, 2]])  # pairs 0-1, 1-0, 2-3, 1-2
    world = TrainingSequences(Catalogue.from_tables({"shop": table}), "shop", sequences, ("p/a", "p/b", "p/c"))
    report = code_report(ItemCodes.of(np.array([[0, 0], [0, 1], [3, 1], [3, 1]]), 4), world)
    first, second = report.levels
    assert (first.used, first.bits, first.most_bits, first.category) == (0.5, 1, 2, 1)
    assert (first.together, first.together_by_chance) == (0.75, 0.75 * 0.5 + 0.25 * 0.5)
    # Codes 0, 1, 1, 1: of one bit of category they leave none for 0, and log2(3) - 2/3 for the others.
    assert second.category == pytest.approx(1 - 0.75 * (np.log2(3) - 2 / 3))
    assert second.together == 0.5 and second.together_by_chance == pytest.approx(0.25 * 0.25 + 0.75 * 0.75)
    assert str(report).splitlines()[0] == "of 4 items 2 share all their codes and get one more"
    assert "codes in use 50 / 50 %, entropy 1.0 / 0.8 of 2.0 bits; 75 / 50 % of transitions stay within" in str(report)
    assert report.table().splitlines()[2].startswith("| 1 | 0.500 | 1.00 | 0.500 | 0.750 | 0.500 | 1.000 | ")


def test_the_report_of_items_without_categories_or_transitions() -> None:
    table = pa.table({"item_id": list("ab"), "title": list("ab")})
    world = TrainingSequences(Catalogue.from_tables({"shop": table}), "shop", Ragged.of([[0, 0]]), ("p/a",))
    report = code_report(ItemCodes.of(np.zeros((2, 1), dtype=np.int64), 1, "share"), world)
    assert report.levels[0].category is None and report.levels[0].together == 0
    assert "category" not in str(report) + report.table()
    assert str(report).splitlines()[0] == "of 2 items 2 share all their codes and their probability"
    assert "entropy 0.0 of 0.0 bits" in str(report)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of": "images"}, "of='images' must be one of text, collaborative"),
        ({"quantiser": "rq"}, "quantiser='rq' must be one of residual k-means, autoencoder, product, scalar"),
        ({"collisions": "ignore"}, "collisions='ignore' must be one of count, reassign, sinkhorn, share"),
        ({"of": "collaborative", "vectors": "v.npz"}, "vectors=v.npz are not read where codes are of='collaborative'"),
    ],
)
def test_settings_name_what_they_accept(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_the_defaults_are_residual_codes_of_titles_with_a_further_one_where_needed(data: TrainingSequences) -> None:
    made = settings(num_levels=3)
    expected = ItemCodes.of(
        residual_codes(text_vectors(data.titles, 4), num_levels=3, num_codes=4, seed=6), num_codes=4
    )
    assert rows(made.codes(data, seed=6)) == rows(expected)


def test_codes_over_several_kinds_of_vectors_are_those_of_each(data: TrainingSequences) -> None:
    made = settings(collisions="share")
    each = [made.codes_of(data, 0, [kind]).code_NL for kind in ("text", "collaborative")]
    both = made.codes_of(data, 0, ["text", "collaborative"])
    assert np.array_equal(both.code_NL, np.concatenate(each, axis=1))
    assert both.longest == 5 and both.vocabulary_size == FIRST_CODE + 4 * 4


@pytest.mark.slow
@pytest.mark.parametrize("quantiser", ["autoencoder", "product", "scalar"])
def test_a_system_learns_codes_of_any_kind(split: Split, tmp_path: Path, quantiser: Kind) -> None:
    small = {"hidden_size": 16, "num_epochs": 0.5, "batch_size": 16, "max_length": 8, "beam_width": 4}
    made = settings(**small, quantiser=quantiser, of="collaborative", collisions="share")
    ranker = made.make(split, "ring", folder=tmp_path)
    (ranking,) = ranker.rank([RankingQuery("q", "ring", (Item("ring", "i03"),))], 20)
    assert sum(np.exp(ranking.scores)) < 1 and len(ranking.item_ids) == 12
