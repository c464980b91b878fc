"""Items as codes, and a recommender that ranks by them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cprec.batch import IGNORE
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.models import tiny_model
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.systems.batches import Passes
from cprec.systems.clusters import k_means
from cprec.systems.codes import BEGIN, END, FIRST_CODE, ItemCodes
from cprec.systems.generator import CodeRecommender, CodeStream
from cprec.systems.quantise import residual_codes
from cprec.systems.recipes.tiger import TIGER
from cprec.systems.signals import TrainingSequences
from cprec.systems.vectors import text_vectors

NUM_ITEMS = 40


def clustered(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Points around four centres, and where each belongs."""
    generator = np.random.default_rng(seed)
    home = generator.permutation(np.repeat(np.arange(4), 25))
    return np.eye(4)[home] * 10 + generator.normal(size=(100, 4)), home


# ---- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_k_means_leaves_no_cluster_empty(seed: int) -> None:
    points = torch.from_numpy(clustered(seed)[0])
    begin = points[np.random.default_rng(seed).choice(100, 30, replace=False)]
    centres, cluster = k_means(points, begin, 20, moves_empty=True)
    assert set(cluster.tolist()) == set(range(30))
    assert centres.shape == (30, 4)


def test_first_codes_are_the_clusters_of_a_clustered_world() -> None:
    points, home = clustered(0)
    codes = residual_codes(points, num_levels=2, num_codes=4, seed=2)
    assert len({(a, b) for a, b in zip(codes[:, 0].tolist(), home.tolist(), strict=True)}) == 4


def test_each_level_tells_more_apart_and_codes_repeat_themselves() -> None:
    points, _ = clustered(1)
    codes = residual_codes(points, num_levels=3, num_codes=8, seed=3)
    assert np.array_equal(codes, residual_codes(points, num_levels=3, num_codes=8, seed=3))
    told_apart = [len(np.unique(codes[:, :level], axis=0)) for level in (1, 2, 3)]
    assert told_apart[0] == 8 < told_apart[1] < told_apart[2] <= 100


def test_items_of_equal_codes_get_one_more_that_tells_them_apart() -> None:
    vectors = np.repeat(np.random.default_rng(0).normal(size=(5, 3)), [1, 2, 3, 1, 1], axis=0)
    codes = ItemCodes.of(residual_codes(vectors, num_levels=2, num_codes=4, seed=0), num_codes=4)
    sequences = [tuple(codes.sequences[item].tolist()) for item in range(8)]
    assert len(set(sequences)) == 8
    assert codes.num_collisions == 5
    assert [len(sequence) for sequence in sequences] == [3, 4, 4, 4, 4, 4, 3, 3]
    assert all(sequence[-1] == END and min(sequence[:-1]) >= FIRST_CODE for sequence in sequences)
    assert max(map(max, sequences)) == codes.vocabulary_size - 1


def test_fewer_items_than_codes() -> None:
    codes = ItemCodes.of(residual_codes(np.eye(3), num_levels=2, num_codes=256, seed=0), num_codes=256)
    assert codes.num_collisions == 0 and len(codes.sequences) == 3


# ---- what is learnt from ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> TrainingSequences:
    generator = np.random.default_rng(0)
    colour, thing = ("red", "green", "blue"), ("shoe", "lamp", "cup", "tea")
    titles = [f"{colour[n % 3]} {thing[n % 4]} {n // 7}" for n in range(NUM_ITEMS)]
    table = pa.table({"item_id": [f"i{n:02}" for n in range(NUM_ITEMS)], "title": titles})
    sequences = Ragged.of([generator.integers(0, NUM_ITEMS, size).tolist() for size in (5, 2, 9, 1, 7)])
    users = tuple(f"p/u{n}" for n in range(5))
    return TrainingSequences(Catalogue.from_tables({"shop": table}), "shop", sequences, users)


@pytest.fixture(scope="module")
def codes(data: TrainingSequences) -> ItemCodes:
    return ItemCodes.of(residual_codes(text_vectors(data.titles, 8), num_levels=2, num_codes=4, seed=0), num_codes=4)


def test_every_token_of_a_row_predicts_the_next(data: TrainingSequences, codes: ItemCodes) -> None:
    stream = CodeStream(data, codes, 4, Passes(batch_size=3, num_epochs=1, seed=0))
    learnt = 0
    for batch in stream:
        ids, targets = batch.rows["input_ids"], batch.rows["targets"]
        assert (ids[:, 0] == BEGIN).all()
        real = targets != IGNORE
        assert (targets[:, :-1][real[:, 1:]] == ids[:, 1:][real[:, 1:]]).all()
        assert (targets[np.arange(len(targets)), real.sum(1) - 1] == END).all()
        assert batch.counts == {"next_token": real.sum()}
        learnt += int(real.sum())
    assert learnt == stream.num_tokens


# ---- rankings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(codes: ItemCodes) -> Any:
    net = tiny_model(codes.vocabulary_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                parameter *= 12  # far from uniform
    return net.eval()


@pytest.fixture(scope="module")
def recommender(data: TrainingSequences, codes: ItemCodes, model: Any) -> CodeRecommender:
    return CodeRecommender("codes", data, codes, model, max_length=5, beam_width=3, max_nodes=2000)


def query(*history: int, **changes: Any) -> RankingQuery:
    items = tuple(Item("shop", f"i{item:02}") for item in history)
    return RankingQuery(**{"query_id": "q", "domain": "shop", "history": items} | changes)


def log_prob(model: Any, codes: ItemCodes, history: list[int], item: int) -> float:
    """An item's log-probability by one pass over everything."""
    prompt = codes.prompts(Ragged.of([history])).values.tolist()
    ids = torch.tensor([[*prompt, *codes.sequences[item].tolist()]])
    with torch.inference_mode():
        logp = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return float(sum(logp[place - 1, ids[0, place]].double() for place in range(len(prompt), ids.shape[1])))


@pytest.mark.parametrize("history", [[], [3], [3, 17, 5, 39, 0, 8, 21]])
def test_exact_rankings_are_those_of_scoring_every_item(
    recommender: CodeRecommender, codes: ItemCodes, model: Any, history: list[int]
) -> None:
    scores = {f"i{item:02}": log_prob(model, codes, history[-5:], item) for item in range(NUM_ITEMS)}
    best = sorted(scores, key=lambda item: -scores[item])
    (ranking,) = recommender.rank([query(*history, exclude=frozenset(best[:2]))], 8, "exact")
    assert list(ranking.item_ids) == best[2:10]
    assert ranking.scores == pytest.approx([scores[item] for item in best[2:10]], abs=1e-4)
    assert ranking.proof is not None and ranking.proof.exact
    (given,) = recommender.rank([query(*history, candidates=("i01", "i09", "i30"))], 1)
    assert dict(zip(given.item_ids, given.scores, strict=True)) == pytest.approx(
        {item: scores[item] for item in ("i01", "i09", "i30")}, abs=1e-4
    )


def test_a_beam_finds_most_of_the_exact_list_and_knows_its_gap(recommender: CodeRecommender) -> None:
    asked = [query(first, second) for first in range(8) for second in (2, 31)]
    shares = []
    for exact, beam in zip(recommender.rank(asked, 10, "exact"), recommender.rank(asked, 10, "beam"), strict=True):
        assert beam.proof is not None
        shares.append(len(set(exact.item_ids) & set(beam.item_ids)) / 10)
        assert shares[-1] == 1 or beam.proof.gap > 0
    assert np.mean(shares) > 0.5


def test_beams_are_as_wide_as_asked(recommender: CodeRecommender, codes: ItemCodes) -> None:
    asked = [query(3, 2)]
    (narrow,), (wide,) = (recommender.with_beams(width).rank(asked, 1, "beam") for width in (1, NUM_ITEMS))
    assert narrow.proof is not None and wide.proof is not None
    assert narrow.proof.expanded < codes.longest < wide.proof.expanded  # one prefix at each depth, or all of them
    assert wide.item_ids == recommender.rank(asked, 1, "exact")[0].item_ids


def test_filters_are_honoured_and_a_batch_is_answered_as_singly(recommender: CodeRecommender) -> None:
    few, seen = frozenset({"i01", "i07", "i30"}), frozenset({"i02", "i03"})
    asked = [query(3, 2), query(5, allow=few), query(2, 3, uncounted=seen), query(candidates=("i01", "i07"))]
    rankings = recommender.rank(asked, 4)
    for one, ranking in zip(asked, rankings, strict=True):
        (alone,) = recommender.rank([one], 4)
        assert alone.item_ids == ranking.item_ids
        assert alone.scores == pytest.approx(ranking.scores, abs=1e-4)
    assert set(rankings[1].item_ids) == few
    (without,) = recommender.rank([query(2, 3, exclude=seen)], 4)
    assert [item for item in rankings[2].item_ids if item not in seen] == list(without.item_ids)


def test_ranks_of_targets_are_their_places_in_the_beam(recommender: CodeRecommender) -> None:
    histories = Ragged.of([[4, 7], [9]])
    (first, second) = recommender.rank([query(4, 7, exclude=frozenset({"i04", "i07"})), query(9)], 10, "beam")
    targets = np.array([int(first.item_ids[3][1:]), 9])
    better, tied = recommender.target_ranks(histories, targets, users=["", ""], exclude_seen=True)
    assert better[0] == 3 and tied.tolist() == [1, 0]  # the second one is left out, because it was seen


@pytest.mark.slow
def test_learns_what_comes_next_and_is_used_again(split: Split, tmp_path: Path) -> None:
    settings = TIGER(
        **{"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_levels": 2, "num_codes": 4, "dropout": 0.0},
        **{"learning_rate": 2e-2, "batch_size": 16, "num_epochs": 2, "beam_width": 4, "max_length": 8},
    )
    recommender = settings.make(split, "ring", folder=tmp_path)
    (log,) = tmp_path.glob("*/*/log.jsonl")
    losses = [line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    asked = [query(domain="ring", history=(Item("ring", "i03"),))]
    assert settings.make(split, "ring", folder=tmp_path).rank(asked, 5) == recommender.rank(asked, 5)


def test_another_domain_is_refused(recommender: CodeRecommender) -> None:
    with pytest.raises(ConfigError, match="codes was made for domain 'shop' and is asked about 'garden'"):
        recommender.rank([replace(query(1), domain="garden")], 5)
