"""Codes that are filled in, in an order that the model chooses, and the systems that are made of this."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from cprec.batch import IGNORE
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import TEST, Item
from cprec.systems import fit as fitting
from cprec.systems.batches import Passes
from cprec.systems.cloze import ClozeLoss, ClozeStream, CodeCloze, CodeTable, least_sure
from cprec.systems.items import IdTable
from cprec.systems.paths import PRUNED, Found, Order, PathRecommender, Search
from cprec.systems.recipes.mdgr import MDGR
from cprec.systems.recipes.reg4rec import REG4Rec
from cprec.systems.recipes.sasrec import WIDE
from cprec.systems.settings import SystemSettings
from cprec.systems.signals import TrainingSequences

SMALL: dict[str, Any] = {"hidden_size": 16, "dropout": 0.3, "learning_rate": 1e-2, "batch_size": 16, "anneal": 0.3}
SMALL |= {"num_epochs": 1, "num_blocks": 1, "num_heads": 2, "max_length": 8}


# ---- a model by hand -------------------------------------------------------------------------------------------------

UNKNOWN = 9
CHANCES = {
    (UNKNOWN, UNKNOWN): ([0.9, 0.1], [0.6, 0.4]),
    (0, UNKNOWN): ([0, 0], [0.2, 0.8]),
    (1, UNKNOWN): ([0, 0], [0.5, 0.5]),
    (UNKNOWN, 0): ([0.3, 0.7], [0, 0]),
    (UNKNOWN, 1): ([0.99, 0.01], [0, 0]),
}
"""The chances of both codes in each of two places, by what is known of the two. First, the code of the first place is
the surer one."""


class ByHand:
    """Stands in for a `CodeCloze` with two places of two codes."""

    def __init__(self, codes: list[list[int]]) -> None:
        alike = torch.tensor([codes.count(own) for own in codes])
        self.items = SimpleNamespace(code_VL=torch.tensor(codes), num_codes=2, alike_V=alike)

    def log_probs(self, states: torch.Tensor, code_NL: torch.Tensor, masked_NL: torch.Tensor) -> torch.Tensor:
        known = torch.where(masked_NL, UNKNOWN, code_NL).tolist()
        return torch.tensor([CHANCES[first, second] for first, second in known]).log()


def scores_by_hand(order: Order, codes: list[list[int]]) -> list[float]:
    search = Search(cast(Any, ByHand(codes)), order, torch.zeros(1, 1), torch.ones(1, len(codes), dtype=torch.bool))
    return search.run(len(codes), 10, exact=True).scores_UV[0].exp().tolist()


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (Order(warm_up=0, at_once=1), [0.9 * 0.2, 0.9 * 0.8, 0.1 * 0.5 / 2, 0.1 * 0.5 / 2]),
        (Order(warm_up=1, at_once=2), [0.9 * 0.2, 0.9 * 0.8, 0.1 * 0.5 / 2, 0.1 * 0.5 / 2]),
        (Order(warm_up=0, at_once=2), [0.9 * 0.6, 0.9 * 0.4, 0.1 * 0.4 / 2, 0.1 * 0.4 / 2]),
        # Asked for by the other code, the least probable code of each has a chance of 0.2, 0.8 and 0.01.
        (Order(warm_up=0, at_once=1, least_agreement=0.3), [0.9 * 0.2, 0.9 * 0.8, 0, 0]),
        (Order(warm_up=0, at_once=1, least_agreement=0.5), [0, 0.9 * 0.8, 0, 0]),
        (Order(warm_up=0, at_once=1, least_agreement=0.01), [0.9 * 0.2, 0.9 * 0.8, 0.1 * 0.5 / 2, 0.1 * 0.5 / 2]),
    ],
)
def test_the_surest_code_comes_first_and_the_others_know_it(order: Order, expected: list[float]) -> None:
    """The last two items have the same codes, so that each has half of their probability."""
    assert scores_by_hand(order, [[0, 0], [0, 1], [1, 1], [1, 1]]) == pytest.approx(expected)


def test_in_training_the_least_sure_codes_are_masked() -> None:
    model = cast(Any, ByHand([[0, 0]]))
    assert least_sure(model, torch.zeros(2, 1), torch.tensor([1, 2])).tolist() == [[False, True], [True, True]]


# ---- the search ------------------------------------------------------------------------------------------------------


def cloze(code_VL: np.ndarray, num_codes: int, num_blocks: int = 1, scale: float = 8.0) -> CodeCloze:
    """A network far from uniform."""
    torch.manual_seed(0)
    num_levels = code_VL.shape[1]
    settings = MDGR(hidden_size=8, num_heads=2, num_blocks=1, num_decoder_blocks=num_blocks, max_length=6)
    rows, encoder = settings.parts(num_levels * num_codes)
    model = CodeCloze(CodeTable(rows, code_VL, num_codes), encoder, settings.decoder(num_levels)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= scale if parameter.ndim == 2 else 1
    return model


def log_prob(model: CodeCloze, order: Order, state_D: torch.Tensor, codes: list[int]) -> float:
    """The log-probability of some codes along their path, one after the other."""
    masked, score = [True] * len(codes), 0.0
    while any(masked):
        num = 1 if masked.count(False) < order.warm_up else order.at_once
        log_LK = model.log_probs(state_D[None], torch.tensor([codes]), torch.tensor([masked]))[0]
        left = [place for place in range(len(codes)) if masked[place]]
        for place in sorted(left, key=lambda place: -float(log_LK[place].max()))[:num]:
            score += float(log_LK[place, codes[place]].double())
            masked[place] = False
    return score


ORDERS = [Order(warm_up=0, at_once=1), Order(warm_up=1, at_once=2), Order(warm_up=0, at_once=3)]


@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_the_probabilities_of_all_combinations_sum_to_one(order: Order) -> None:
    code_VL = np.array(list(itertools.product(range(3), repeat=3)))
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    search = Search(cloze(code_VL, 3), order, states, torch.ones(5, 27, dtype=torch.bool))
    total_U = search.run(27, 1, exact=True).scores_UV.exp().sum(1)
    torch.testing.assert_close(total_U, torch.ones(5).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_exact_lists_and_wide_beams_are_those_of_all_items_scored_one_by_one(order: Order) -> None:
    generator = np.random.default_rng(0)
    code_VL = generator.integers(0, 4, (30, 3))
    code_VL[7] = code_VL[20]
    model, permitted = cloze(code_VL, 4), torch.from_numpy(generator.random((4, 30)) < 0.8)
    states = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    alike_V = np.array([(code_VL == codes).all(1).sum() for codes in code_VL])
    every_UV = torch.tensor([[log_prob(model, order, state, codes) for codes in code_VL.tolist()] for state in states])
    every_UV = (every_UV.double() - torch.from_numpy(alike_V).log()).masked_fill(~permitted, -torch.inf)

    def run(k: int, width: int, *, exact: bool, max_nodes: int | None = None) -> Found:
        return Search(model, order, states, permitted).run(k, width, exact=exact, max_nodes=max_nodes)

    for k in (1, 3, 5, 8, 12):
        best = every_UV.topk(k).values
        for found in (run(k, 1, exact=True), run(k, 3, exact=True), run(k, 1000, exact=False)):
            top = found.scores_UV.topk(k)
            assert found.gap_U.tolist() == [0] * 4
            torch.testing.assert_close(top.values, best, rtol=0, atol=1e-5)
            torch.testing.assert_close(every_UV.gather(1, top.indices), best, rtol=0, atol=1e-5)
    narrow = run(5, 1, exact=False)
    missed_U = narrow.scores_UV.topk(5).values[:, -1] < every_UV.topk(5).values[:, -1] - 1e-4
    if order.warm_up or order.at_once == 1:
        assert missed_U.any() and (narrow.gap_U[missed_U] > 0).all(), "a beam that misses items says so"
        assert (run(5, 1, exact=True, max_nodes=2).gap_U > 0).any()
    everything = run(30, 1000, exact=False).scores_UV
    seen = everything > -torch.inf
    torch.testing.assert_close(everything[seen], every_UV[seen], rtol=0, atol=1e-5)


def test_a_decoder_reads_known_codes_on_both_sides_and_no_masked_one() -> None:
    model = cloze(np.zeros((1, 3), dtype=np.int64), 4, scale=2.0)
    state = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))

    def asked(codes: list[int], masked: list[bool]) -> torch.Tensor:
        with torch.no_grad():
            return model.log_probs(state, torch.tensor([codes]), torch.tensor([masked]))[0, 1]

    middle = [False, True, False]
    assert torch.equal(asked([0, 1, 2], middle), asked([0, 3, 2], middle))
    assert not torch.allclose(asked([0, 1, 2], middle), asked([1, 1, 2], middle))
    assert not torch.allclose(asked([0, 1, 2], middle), asked([0, 1, 3], middle))
    assert not torch.allclose(asked([0, 1, 2], middle), asked([0, 1, 2], [True] * 3))


# ---- items and rows --------------------------------------------------------------------------------------------------


def test_an_item_is_the_sum_of_the_rows_of_its_codes() -> None:
    table = CodeTable(IdTable(4, 1), np.array([[0, 1], [1, 0], [1, 1]]), num_codes=2)
    with torch.no_grad():
        table.rows.table.weight.copy_(torch.tensor([[1.0], [2], [10], [20], [7], [8]]))
    assert table.vectors().tolist() == [[21], [12], [22], [7], [8]]
    assert table.vectors(torch.tensor([[4, 0]])).tolist() == [[[8], [21]]]
    assert table.rows_LKD().tolist() == [[[1], [2]], [[10], [20]]]
    assert table.alike_V.tolist() == [1, 1, 1]
    assert CodeTable(IdTable(4, 1), np.array([[0, 1], [1, 1], [0, 1]]), num_codes=2).alike_V.tolist() == [2, 1, 2]


def stream_of(data: TrainingSequences, num_levels: int, growth: float) -> ClozeStream:
    passes = Passes(batch_size=16, num_epochs=4, seed=0)
    return ClozeStream(data, 8, passes, num_levels=num_levels, growth=growth)


def test_more_codes_are_masked_from_step_to_step(data: TrainingSequences) -> None:
    stream = stream_of(data, 4, growth=0.5)
    nums = []
    for step in range(stream.num_steps):
        batch = stream.batch(step)
        masked, is_target = batch.rows["masked"], batch.rows["targets"] != IGNORE
        assert not masked[~is_target].any()
        assert batch.counts == {"next_item": masked.sum()}
        assert np.array_equal(masked, stream.batch(step).rows["masked"])
        nums.append(masked[is_target].sum(1))
    assert (nums[0] == 1).all()
    for step, num in enumerate(nums):
        most = 1 + 3 * min(1, step / (stream.num_steps / 2))
        assert num.min() >= 1 and num.max() <= np.ceil(most)
    late = np.concatenate(nums[stream.num_steps // 2 :])
    assert np.bincount(late, minlength=5)[1:] / len(late) == pytest.approx([0.25] * 4, abs=0.05)
    places = np.concatenate([stream.batch(step).rows["masked"].reshape(-1, 4) for step in range(stream.num_steps)])
    assert places.sum(0) / places.sum() == pytest.approx([0.25] * 4, abs=0.03)


def test_without_growth_any_number_is_masked_from_the_first_step(data: TrainingSequences) -> None:
    masked = stream_of(data, 3, growth=0.0).batch(0).rows["masked"]
    assert set(masked.sum(2).ravel().tolist()) == {0, 1, 2, 3}
    only = stream_of(data, 1, growth=0.5).batch(0).rows
    assert np.array_equal(only["masked"][..., 0], only["targets"] != IGNORE), "one code is always masked"


# ---- losses ----------------------------------------------------------------------------------------------------------


def first_step(settings: MDGR, data: TrainingSequences) -> tuple[ClozeLoss, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    (stage,) = settings.stages(data, 0)
    assert isinstance(stage.trainable, ClozeLoss)
    return stage.trainable, {name: torch.from_numpy(array) for name, array in stage.stream.batch(0).rows.items()}


@pytest.mark.parametrize("num_levels", [1, 2])
def test_a_loss_is_the_softmax_of_masked_codes(num_levels: int, circle: str, data: TrainingSequences) -> None:
    settings = MDGR(**SMALL | {"dropout": 0.0}, num_levels=num_levels, num_codes=5, vectors=circle, growth=0.0)
    loss, rows = first_step(settings, data)
    (found,) = loss.losses(rows).values()
    states_ND, target_N = loss.module.states(rows)
    masked_NL, code_NL = rows["masked"][rows["targets"] != IGNORE], loss.module.items.code_VL[target_N]
    log_NLK = loss.module.log_probs(states_ND, code_NL, masked_NL)
    own_NL = log_NLK.gather(2, code_NL[..., None])[..., 0]
    assert found.item() == pytest.approx(-own_NL[masked_NL].sum().item(), rel=1e-3), "products may be in bf16"
    assert masked_NL.all() == (num_levels == 1)


def test_rows_without_targets_cost_nothing(circle: str, data: TrainingSequences) -> None:
    codes: dict[str, Any] = {"num_levels": 2, "num_codes": 5, "vectors": circle}
    for settings in (MDGR(**SMALL, **codes), REG4Rec(**SMALL, **codes)):
        loss, rows = first_step(settings, data)
        blank = rows | {"targets": torch.full_like(rows["targets"], IGNORE)}
        (found,) = loss.losses(blank).values()
        assert found.item() == 0


def logged(settings: SystemSettings, split: Split, folder: Path) -> list[float]:
    settings.make(split, "ring", folder=folder)
    (log,) = folder.glob("*/*/log.jsonl")
    return [line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]


def one_code_each(settings: MDGR, data: TrainingSequences, seed: int) -> np.ndarray:
    return np.arange(data.num_items)[:, None]


def test_with_one_code_for_each_item_and_no_decoder_it_learns_as_sasrec_does(
    split: Split, data: TrainingSequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "VALIDATIONS", 1)
    monkeypatch.setattr(MDGR, "codes", one_code_each)
    settings = MDGR(**SMALL, num_codes=data.num_items, num_decoder_blocks=0, growth=0.0)
    losses = logged(settings, split, tmp_path / "mdgr")
    assert losses == logged(replace(WIDE, **SMALL), split, tmp_path / "sasrec") and len(losses) > 2, "to the digit"
    query = RankingQuery("q", "ring", tuple(Item("ring", item) for item in data.item_ids[3:6]))
    mine, control = (
        made.rank([query], data.num_items)[0]
        for made in (settings.make(split, "ring", folder=tmp_path / "mdgr"), replace(WIDE, **SMALL).make(split, "ring"))
    )
    assert mine.item_ids == control.item_ids
    expected = torch.tensor(control.scores).double().log_softmax(0).tolist()
    assert mine.scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_reg4rec_with_random_masks_learns_as_mdgr_does(
    circle: str, split: Split, data: TrainingSequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "VALIDATIONS", 1)
    shared: dict[str, Any] = {**SMALL, "num_levels": 2, "num_codes": 5, "vectors": circle, "growth": 0.0}
    plain = logged(MDGR(**shared), split, tmp_path / "mdgr")
    assert logged(REG4Rec(**shared, guided=False), split, tmp_path / "reg4rec") == plain, "to the digit"
    still = shared | {"dropout": 0.0}
    (random_loss, rows), (guided_loss, _) = (first_step(REG4Rec(**still, guided=on), data) for on in (False, True))
    assert random_loss.losses(rows) != guided_loss.losses(rows)


# ---- rankings --------------------------------------------------------------------------------------------------------


def recommender_of(data: TrainingSequences, order: Order, num_levels: int = 3) -> PathRecommender:
    code_VL = np.random.default_rng(3).integers(0, 3, (data.num_items, num_levels))
    limits = {"max_length": 6, "beam_width": 3, "max_nodes": 2000}
    return PathRecommender("paths", data, cloze(code_VL, 3), order, **limits)


def query(data: TrainingSequences, *history: int, **changes: Any) -> RankingQuery:
    items = tuple(Item("ring", data.item_ids[item]) for item in history)
    return RankingQuery(**{"query_id": "q", "domain": "ring", "history": items} | changes)


def by_item(ranking: Ranking) -> Mapping[str, float]:
    return dict(zip(ranking.item_ids, ranking.scores, strict=True))


def test_lists_candidates_and_ranks_of_targets_have_one_score(data: TrainingSequences) -> None:
    recommender, ids = recommender_of(data, ORDERS[1]), tuple(data.item_ids)
    (every,) = recommender.rank([query(data, 1, 2)], len(ids), "exact")
    assert every.proof is not None and every.proof.exact and len(every.item_ids) == len(ids)
    (given,) = recommender.rank([query(data, 1, 2, candidates=ids)], 1)
    assert by_item(given) == pytest.approx(by_item(every), abs=1e-5) and given.proof is None
    (best,) = recommender.rank([query(data, 1, 2, exclude=frozenset(every.item_ids[:2]))], 4, "exact")
    assert best.item_ids[:4] == every.item_ids[2:6]
    (beam,) = recommender.rank([query(data, 1, 2, exclude=frozenset({ids[1], ids[2]}))], 10, "beam")
    targets = np.array([ids.index(beam.item_ids[2]), 2])
    histories = Ragged.of([[1, 2], [1, 2]])
    better, tied = recommender.target_ranks(histories, targets, users=["", ""], exclude_seen=True)
    assert (better[0] < 3, tied[0] > 0, tied[1]) == (True, True, 0), "a seen target is a miss"
    assert better[0] == sum(score > beam.scores[2] for score in beam.scores)


def test_items_whose_codes_disagree_are_not_returned_and_stand_last_among_candidates(data: TrainingSequences) -> None:
    ids = tuple(data.item_ids)
    plain = recommender_of(data, Order(warm_up=0, at_once=1))
    pruning = recommender_of(data, Order(warm_up=0, at_once=1, least_agreement=0.9))
    (every,), (kept,) = (each.rank([query(data, 1, 2)], len(ids), "exact") for each in (plain, pruning))
    assert 0 < len(kept.item_ids) < len(every.item_ids)
    assert by_item(kept) == {item: by_item(every)[item] for item in kept.item_ids}
    (given,) = pruning.rank([query(data, 1, 2, candidates=ids)], 1)
    assert given.item_ids[: len(kept.item_ids)] == kept.item_ids
    assert set(given.scores[len(kept.item_ids) :]) == {PRUNED} and set(given.item_ids) == set(ids)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [MDGR(num_levels=2, num_codes=4), REG4Rec(num_levels=2, num_codes=4)])
def test_learns_what_comes_next(settings: MDGR, circle: str, split: Split) -> None:
    learning = replace(settings, **SMALL | {"dropout": 0.0, "num_epochs": 6}, vectors=circle, beam_width=8)
    recommender = learning.make(split, "ring")
    assert recommender.name == type(settings).__name__
    queries = split.queries("ring", TEST, max_history=50)
    better, tied = recommender.target_ranks(
        queries.history, queries.target, users=[""] * len(queries), exclude_seen=True
    )
    assert (better + (tied - 1) / 2).mean() < 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_levels": 0}, "num_levels=0 must be above 0"),
        ({"at_once": 0}, "at_once=0 must be above 0"),
        ({"warm_up": -1}, "warm_up=-1 must not be below 0"),
        ({"growth": 1.5}, "growth=1.5 must lie in 0..1"),
        ({"least_agreement": -0.1}, "least_agreement=-0.1 must not be below 0"),
    ],
)
def test_bad_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        REG4Rec(**wrong)
