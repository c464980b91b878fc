"""Codes and then a vector, read and predicted by one decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from cprec.batch import IGNORE
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.systems.cascade import NEXT_VECTOR, CascadeRecommender, Cells, CodesAndVectors
from cprec.systems.codes import BEGIN, END, ItemCodes
from cprec.systems.generator import CodeRecommender
from cprec.systems.items import FrozenTable
from cprec.systems.recipes.cobra import COBRA, CODES, VECTORS
from cprec.systems.recipes.tiger import TIGER, CodeSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.text.stream import NEXT_TOKEN

NUM_ITEMS = 40
SMALL: dict[str, Any] = {
    **{"hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_length": 5, "text_size": 12, "dropout": 0.1},
    **{"num_levels": 2, "num_codes": 4, "beam_width": 3, "batch_size": 4, "num_epochs": 2},
}


@pytest.fixture(scope="module")
def data() -> TrainingSequences:
    generator = np.random.default_rng(0)
    colour, thing = ("red", "green", "blue"), ("shoe", "lamp", "cup", "tea")
    titles = [f"{colour[n % 3]} {thing[n % 4]} {n // 7}" for n in range(NUM_ITEMS)]
    table = pa.table({"item_id": [f"i{n:02}" for n in range(NUM_ITEMS)], "title": titles})
    sequences = Ragged.of([generator.integers(0, NUM_ITEMS, size).tolist() for size in (5, 2, 9, 1, 7)])
    users = tuple(f"p/u{n}" for n in range(5))
    return TrainingSequences(Catalogue.from_tables({"shop": table}), "shop", sequences, users)


def stage_of(settings: CodeSettings, data: TrainingSequences) -> Stage:
    torch.manual_seed(0)
    (stage,) = settings.stages(data, 0)
    return stage


def query(*history: int, **changes: Any) -> RankingQuery:
    items = tuple(Item("shop", f"i{item:02}") for item in history)
    return RankingQuery(**{"query_id": "q", "domain": "shop", "history": items} | changes)


# ---- what is read and learnt -----------------------------------------------------------------------------------------


def test_rows_say_which_item_each_end_is_of(data: TrainingSequences) -> None:
    settings = COBRA(**SMALL)
    stage = stage_of(settings, data)
    codes = settings.codes(data, 0)
    end_of = codes.vocabulary_size
    batch = stage.stream.batch(0)
    ids, targets, vectors = (batch.rows[name] for name in ("input_ids", "targets", "vectors"))
    for row in range(batch.num_rows):
        length = int((targets[row] != IGNORE).sum())
        items = vectors[row][vectors[row] != IGNORE].tolist()
        whole = [BEGIN, *(token for item in items for token in codes.sequences[item])]
        assert np.where(ids[row, :length] >= end_of, END, ids[row, :length]).tolist() == whole[:-1]
        assert targets[row, :length].tolist() == whole[1:]
        # All but the last vector are read, where they were predicted one token before.
        read = ids[row, :length][ids[row, :length] >= end_of] - end_of
        assert read.tolist() == items[:-1]
        assert (targets[row, vectors[row] != IGNORE] == END).all()
    assert batch.counts[NEXT_VECTOR] == (vectors != IGNORE).sum()


def test_what_is_read_and_how_far_off_a_vector_is_by_hand(data: TrainingSequences) -> None:
    stage = stage_of(COBRA(**SMALL | {"cosine_scale": 2.0, "vector_weight": 3.0}), data)
    loss: Any = stage.trainable
    items = FrozenTable(np.array([[2.0, 0], [0, 5], [-3, 0]]), nn.Identity(), num_special=0)
    rows = nn.Embedding(6, 2)
    with torch.no_grad():
        rows.weight[:] = torch.arange(12).view(6, 2)
    read = CodesAndVectors(rows, items, reads_vectors=True)
    # END has the row (2, 3); the tokens 6 and 8 are those of the items 0 and 2.
    assert read(torch.tensor([[5, 6, END, 8]])).tolist() == [[[10, 11], [4, 3], [2, 3], [-1, 3]]]
    assert CodesAndVectors(rows, items, reads_vectors=False)(torch.tensor([6, 8])).tolist() == [[2, 3], [2, 3]]
    loss.module.get_input_embeddings().directions = read.directions
    loss._hidden = lambda *_: torch.tensor([[[7.0, 0], [1, 1], [0, 4]]])
    loss._of_tokens = lambda *_: torch.zeros(())
    arrays = {"input_ids": 0, "position_ids": 0, "targets": 0, "vectors": torch.tensor([[0, IGNORE, 0]])}
    # The cosines with the three items are 1, 0, -1 and 0, 1, 0, the target is the first one, and logits are twice them.
    expected = -np.log(np.exp(2) / (np.exp(2) + 1 + np.exp(-2))) - np.log(1 / (2 + np.exp(2)))
    assert loss.losses(arrays)[NEXT_VECTOR].item() == pytest.approx(3 * expected, rel=1e-5)


def losses(stage: Stage) -> list[dict[str, float]]:
    """Of the first three steps."""
    optimizer = torch.optim.AdamW(stage.trainable.module.parameters(), lr=1e-2)
    stage.trainable.module.train()
    torch.manual_seed(1)
    found = []
    for step in range(3):
        rows = {name: torch.from_numpy(array) for name, array in stage.stream.batch(step).rows.items()}
        terms = stage.trainable.losses(rows)
        optimizer.zero_grad()
        torch.stack([*terms.values()]).sum().backward()
        optimizer.step()
        found.append({name: term.item() for name, term in terms.items()})
    return found


@dataclass(frozen=True, kw_only=True)
class SharedTIGER(TIGER):
    """TIGER whose items share their codes."""

    def codes(self, data: TrainingSequences, seed: int) -> ItemCodes:
        return COBRA(**SMALL).codes(data, seed)


def test_without_vectors_it_learns_and_ranks_as_tiger_does(data: TrainingSequences) -> None:
    backbone, alone = stage_of(SharedTIGER(**SMALL), data), stage_of(replace(CODES, **SMALL), data)
    expected = losses(backbone)
    assert losses(alone) == expected
    assert losses(stage_of(COBRA(**SMALL, vector_weight=0.0), data)) != expected
    unread = losses(stage_of(COBRA(**SMALL, reads_vectors=False), data))
    assert unread[0][NEXT_TOKEN] == expected[0][NEXT_TOKEN] and set(unread[0]) == {NEXT_TOKEN, NEXT_VECTOR}
    asked = [query(3, 17, 5), query(8, exclude=frozenset({"i11", "i02"})), query(candidates=("i30", "i01"))]
    first, second = backbone.recommender(), alone.recommender()
    assert isinstance(first, CodeRecommender) and isinstance(second, CascadeRecommender)
    for one, other in zip(first.rank(asked, 7, "exact"), second.rank(asked, 7, "exact"), strict=True):
        scores = [dict(zip(ranking.item_ids, ranking.scores, strict=True)) for ranking in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_with_one_code_for_all_items_their_order_is_that_of_cosines(data: TrainingSequences) -> None:
    settings = replace(VECTORS, **{**SMALL, "num_levels": 1, "num_codes": 1})
    stage = stage_of(settings, data)
    model: Any = stage.trainable.module.eval()
    (ranking,) = stage.recommender().rank([query(3, 17)], NUM_ITEMS)
    end_of = settings.codes(data, 0).vocabulary_size
    ids = torch.tensor([[BEGIN, 3, end_of + 3, 3, end_of + 17, 3]])
    with torch.inference_mode():
        state_D = model.transformer(input_ids=ids).last_hidden_state[0, -1]
        cosines = nn.functional.cosine_similarity(model.transformer.wte.items.vectors(), state_D, dim=1)
    assert ranking.item_ids == tuple(f"i{item:02}" for item in cosines.argsort(descending=True).tolist())


# ---- rankings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def codes(data: TrainingSequences) -> ItemCodes:
    return COBRA(**SMALL).codes(data, 0)


@pytest.fixture(scope="module")
def model(data: TrainingSequences) -> Any:
    net: Any = stage_of(COBRA(**SMALL), data).trainable.module
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                parameter *= 12  # far from uniform
    return net.eval()


def recommender_of(
    data: TrainingSequences, codes: ItemCodes, model: Any, code_scale: float, cosine_scale: float
) -> CascadeRecommender:
    scales = {"code_scale": code_scale, "cosine_scale": cosine_scale}
    limits = {"max_length": 5, "beam_width": 4, "max_nodes": 2000}
    return CascadeRecommender("cascade", data, codes, model, **scales, **limits)


def one_by_one(model: Any, codes: ItemCodes, history: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each item, by a pass over everything: the log-probabilities of its codes and END, [N, L + 1], the cosine with
    its vector, and which items have the same codes."""
    num_tokens, read = codes.vocabulary_size, [BEGIN]
    for item in history[-5:]:
        read += [*codes.sequences[item][:-1].tolist(), num_tokens + item]
    own_NL = codes.sequences.values.reshape(NUM_ITEMS, -1)
    ids = torch.from_numpy(np.column_stack([np.tile(read, (NUM_ITEMS, 1)), own_NL[:, :-1]]))
    hidden = model.transformer(input_ids=ids).last_hidden_state[:, len(read) - 1 :]
    log_prob = model.lm_head(hidden).log_softmax(-1).gather(2, torch.from_numpy(own_NL)[:, :, None]).squeeze(2)
    cosine = (nn.functional.normalize(hidden[:, -1], dim=1) * model.transformer.wte.directions()).sum(1)
    return log_prob.numpy(), cosine.numpy(), (own_NL[:, None] == own_NL).all(2)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("history", "code_scale", "cosine_scale"),
    [([], 1.0, 3.0), ([3], 0.3, 16.0), ([3, 17, 5, 39, 0, 8, 21], 1.0, 16.0)],
)
def test_exact_rankings_are_those_of_scoring_every_item(
    data: TrainingSequences, codes: ItemCodes, model: Any, history: list[int], code_scale: float, cosine_scale: float
) -> None:
    recommender = recommender_of(data, codes, model, code_scale, cosine_scale)
    log_prob, cosine, same = one_by_one(model, codes, history)
    weight = np.exp(cosine_scale * cosine)
    scores = {f"i{i:02}": code_scale * log_prob[i].sum() + np.log(weight[i] / weight[same[i]].sum()) for i in range(40)}
    best = sorted(scores, key=lambda item: -scores[item])
    gone = frozenset({best[0], best[3]})
    kept = [item for item in best if item not in gone]
    (ranking,) = recommender.rank([query(*history, exclude=gone)], 5, "exact")
    assert list(ranking.item_ids) == kept[:5]
    assert ranking.scores == pytest.approx([scores[item] for item in kept[:5]], abs=1e-4)
    assert ranking.proof is not None and ranking.proof.exact
    (beside,) = recommender.rank([query(*history, uncounted=gone, allow=frozenset(best[:20]))], 5, "exact")
    assert list(beside.item_ids) == best[:7]
    (given,) = recommender.rank([query(*history, candidates=("i01", "i09", "i30"))], 1)
    assert dict(zip(given.item_ids, given.scores, strict=True)) == pytest.approx(
        {item: scores[item] for item in ("i01", "i09", "i30")}, abs=1e-4
    )


def test_a_batch_is_answered_as_singly(data: TrainingSequences, codes: ItemCodes, model: Any) -> None:
    recommender = recommender_of(data, codes, model, 1.0, 3.0)
    for asked in (
        [query(item, candidates=("i07", "i03")) for item in (2, 31, 5)],  # of one cell
        [query(3, 2), query(5, allow=frozenset({"i03", "i29", "i07"})), query(31, uncounted=frozenset({"i02"}))],
    ):
        for one, ranking in zip(asked, recommender.rank(asked, 4), strict=True):
            (alone,) = recommender.rank([one], 4)
            assert dict(zip(alone.item_ids, alone.scores, strict=True)) == pytest.approx(
                dict(zip(ranking.item_ids, ranking.scores, strict=True)), abs=1e-4
            )


@torch.inference_mode()
def test_a_beam_has_the_order_of_beam_fusion(data: TrainingSequences, codes: ItemCodes, model: Any) -> None:
    recommender = recommender_of(data, codes, model, 0.9, 3.0)
    (ranking,) = recommender.rank([query(3, 17)], 3, "beam")
    log_prob, cosine, same = one_by_one(model, codes, [3, 17])
    # One item of each of the four cells whose codes are likeliest, before END is read.
    cells = np.argsort(-log_prob[:, :-1].sum(1), kind="stable")
    firsts = [item for item in cells if item == np.flatnonzero(same[item])[0]][:4]
    of_cell = np.exp(0.9 * log_prob[firsts].sum(1))
    of_cell /= of_cell.sum()
    fused = {}
    for first, share in zip(firsts, of_cell, strict=True):
        weight = np.exp(3 * cosine[same[first]])
        of_items = zip(np.flatnonzero(same[first]).tolist(), weight / weight.sum(), strict=True)
        fused |= {f"i{item:02}": share * part for item, part in of_items}
    best = sorted(fused, key=lambda item: -fused[item])[:3]
    assert list(ranking.item_ids) == best
    assert np.diff(ranking.scores) == pytest.approx(np.diff(np.log([fused[item] for item in best])), abs=1e-4)
    (exact,) = recommender.rank([query(3, 17)], 3, "exact")
    assert exact.proof is not None and ranking.proof is not None and exact.proof.expanded > ranking.proof.expanded
    assert exact.item_ids == ranking.item_ids or ranking.proof.gap > 0


def test_scores_by_hand(data: TrainingSequences, codes: ItemCodes, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recommender = recommender_of(data, codes, model, 2.0, float(np.log(3)))
    cells = Cells(np.zeros((2, 2), dtype=np.int64), np.array([1, 0, 1]), Ragged.of([[1], [0, 2]]))
    recommender._cells, recommender._item_ND = cells, torch.tensor([[1.0, 0], [0.6, 0.8], [0, 1]])
    # Two cells of chances 1/2 and 1/4, and states that ask for (0, 1) and (1, 0).
    read = np.log([1 / 2, 1 / 4]), torch.tensor([[0.0, 7], [2, 0]])
    monkeypatch.setattr(Cells, "read", lambda *_: read)
    ((first, second, third),) = recommender._of_cells(None, [np.array([0, 1])])  # type: ignore[arg-type]
    # The cosines of the second cell's items are 1 and 0, their weights 3 and 1; alone in a cell an item has all of it.
    assert np.exp([first, second, third]) == pytest.approx([3 / 4 / 16, 1 / 4, 1 / 4 / 16])


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"vector_weight=-1 must not be below 0"):
        COBRA(vector_weight=-1)
    with pytest.raises(ConfigError, match=r"cosine_scale=0 must be above 0"):
        COBRA(cosine_scale=0)
