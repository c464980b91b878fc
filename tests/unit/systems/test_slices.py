"""Items as codes without an order, all predicted at once."""

from __future__ import annotations

from dataclasses import replace
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
from cprec.systems.dot_product import DotProductRecommender
from cprec.systems.encoders import SelfAttention
from cprec.systems.quantise import Scalar
from cprec.systems.recipes.recgpt import RecGPT
from cprec.systems.signals import TrainingSequences
from cprec.systems.slices import SliceEncoder, SliceModel, SliceTable
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.vectors import text_vectors

SMALL: dict[str, Any] = {
    **{"hidden_size": 8, "num_blocks": 2, "num_heads": 2, "max_length": 4, "text_size": 10, "dropout": 0.0},
    **{"num_slices": 3, "steps": (2, 2), "batch_size": 4, "num_epochs": 1},
}


@pytest.fixture(scope="module")
def data() -> TrainingSequences:
    """Of two domains with titles of the same words, the first one."""
    generator = np.random.default_rng(0)
    colour, thing = ("red", "green", "blue"), ("shoe", "lamp", "cup", "tea")
    tables = {
        domain: pa.table(
            {
                "item_id": [f"{domain[0]}{n:02}" for n in range(size)],
                "title": [f"{colour[n * step % 3]} {thing[n % 4]} {n // 7}" for n in range(size)],
            }
        )
        for domain, size, step in (("shop", 30, 1), ("market", 20, 2))
    }
    sequences = Ragged.of([generator.integers(0, 30, size).tolist() for size in (5, 2, 9, 1, 7)])
    return TrainingSequences(Catalogue.from_tables(tables), "shop", sequences, tuple(f"p/u{n}" for n in range(5)))


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in bf16, on any machine."""
    monkeypatch.setattr("cprec.systems.slices.product_dtype", lambda: torch.float32)


@pytest.fixture(scope="module")
def settings() -> RecGPT:
    return RecGPT(**SMALL)


@pytest.fixture(scope="module")
def stage(data: TrainingSequences, settings: RecGPT) -> Stage:
    torch.manual_seed(0)
    (made,) = settings.stages(data, 0)
    with torch.no_grad():
        for parameter in made.trainable.module.parameters():
            if parameter.ndim == 2:
                parameter *= 4  # far from uniform
    return made


@pytest.fixture(scope="module")
def model(stage: Stage) -> SliceModel:
    found = stage.trainable.module.eval()
    assert isinstance(found, SliceModel)
    return found


def query(domain: str, *history: int, **changes: Any) -> RankingQuery:
    items = tuple(Item(domain, f"{domain[0]}{item:02}") for item in history)
    return RankingQuery(**{"query_id": "q", "domain": domain, "history": items} | changes)


def encoder_of(num_slices: int, *, causal: bool) -> SelfAttention:
    torch.manual_seed(1)
    sizes = {"max_length": 4 * num_slices, "num_blocks": 2, "num_heads": 2, "dropout": 0.0}
    return SelfAttention(8, **sizes, causal=causal).eval()  # type: ignore[arg-type]


# ---- what tokens are and read ----------------------------------------------------------------------------------------


def test_a_token_by_hand() -> None:
    table = SliceTable(np.array([[1, 0], [0, 2]]), np.array([[5.0, 1, 2], [6, 3, 4]]), num_codes=3, size=2)
    table.norm_row, table.norm_slice = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        table.rows.weight[:] = torch.arange(12).view(6, 2)
        table.map.weight[:] = torch.tensor([[1.0, 0], [0, 100]])
    # The slices are the first two numbers and the last; the rows of the second slice's codes begin at the fourth.
    assert table.vectors(torch.tensor([1])).tolist() == [[0 + 6, 1 + 300, 10 + 4, 11 + 0]]
    assert table.vectors().shape == (4, 4)
    assert table.code_rows().tolist() == [[2, 3, 6, 7], [0, 1, 10, 11]]


def test_tokens_read_their_own_item_and_all_before_it() -> None:
    encoder = SliceEncoder(encoder_of(3, causal=False), 3)
    inputs, lengths = torch.randn(1, 4, 24), torch.tensor([4])
    before = encoder(inputs, lengths)
    changed = inputs.clone()
    changed[0, 2, 16:] *= torch.arange(8)  # the last token of the third item
    moved = (encoder(changed, lengths) - before).abs().view(4, 3, 8).amax(2) > 1e-6
    assert moved.tolist() == [[False] * 3, [False] * 3, [True] * 3, [True] * 3]
    assert torch.equal(encoder.last(inputs, lengths), before[:, 3])


def test_with_one_slice_it_is_causal_attention() -> None:
    inputs, lengths = torch.randn(2, 4, 8), torch.tensor([4, 2])
    # The encoder makes its inputs larger, where tokens are of norms.
    expected = encoder_of(1, causal=True)(inputs * 8**-0.5, lengths)
    found = SliceEncoder(encoder_of(1, causal=False), 1)(inputs, lengths)
    assert torch.allclose(found[0], expected[0], atol=1e-6) and torch.allclose(found[1, :2], expected[1, :2], atol=1e-6)


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_scores_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    table = SliceTable(np.array([[0, 1], [1, 0], [0, 1]]), np.zeros((3, 2)), num_codes=2, size=1)
    model = SliceModel(table, SliceEncoder(encoder_of(2, causal=False), 2))
    with torch.no_grad():
        # With states of 1 the chances of codes are 1/4 and 3/4 in the first slice, 1/5 and 4/5 in the second.
        table.rows.weight[:] = torch.tensor([[0.0], [np.log(3)], [0], [np.log(4)]])
        monkeypatch.setattr(model, "_last", lambda *_: torch.ones(1, 2))
        vectors = model.vectors()
        products = model.encode(vectors, {}) @ vectors.items_VD.T
        loss = model.loss(torch.ones(2, 2), torch.tensor([0, 1]), vectors.items_VD)
    chances = [1 / 4 * 4 / 5, 3 / 4 * 1 / 5, 1 / 4 * 4 / 5]
    assert products.exp()[0].tolist() == pytest.approx(chances)
    assert loss.item() == pytest.approx(-np.log(chances[0]) - np.log(chances[1]))


@pytest.mark.parametrize("history", [[], [3], [3, 17, 5, 29, 0, 8, 21]])
def test_scores_are_sums_of_the_log_probabilities_of_codes(
    data: TrainingSequences, settings: RecGPT, model: SliceModel, history: list[int]
) -> None:
    code_VL = settings.codes(data, settings.frozen(data))
    items = torch.tensor([history[-4:] or [30]])
    with torch.inference_mode():
        vectors = model.vectors()
        hidden = model.encoder(nn.functional.embedding(items, vectors.inputs), torch.tensor([len(history[-4:])]))
        rows = model.items.rows.weight.view(3, 4, 8)
        logp = [(hidden[0, -1].view(3, 8)[level] @ rows[level].T).log_softmax(0) for level in range(3)]
    scores = {f"s{n:02}": sum(logp[level][code_VL[n, level]].item() for level in range(3)) for n in range(30)}
    (ranking,) = DotProductRecommender("slices", data, model, 4).rank([query("shop", *history)], 30)
    assert dict(zip(ranking.item_ids, ranking.scores, strict=True)) == pytest.approx(scores, abs=1e-5)
    same = [(a, b) for a in range(30) for b in range(a) if (code_VL[a] == code_VL[b]).all()]
    assert same and all(scores[f"s{a:02}"] == scores[f"s{b:02}"] for a, b in same)


def test_all_codes_of_the_next_item_are_learnt(stage: Stage, model: SliceModel) -> None:
    rows = {name: torch.from_numpy(array) for name, array in stage.stream.batch(0).rows.items()}
    num_R = (rows["targets"] != IGNORE).sum(1)
    is_last_RT = torch.arange(rows["targets"].shape[1]) == num_R[:, None] - 1
    with torch.no_grad():
        vectors = model.vectors()
        # The whole row is the history of its last target.
        encoded_RD = model.encode(vectors, rows)
        expected = -(encoded_RD * vectors.items_VD[rows["targets"][is_last_RT]]).sum()
        (found,) = stage.trainable.losses({**rows, "targets": rows["targets"].where(is_last_RT, IGNORE)}).values()
        (every,) = stage.trainable.losses(rows).values()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert every > found and list(stage.stream.batch(0).counts) == [NEXT_ITEM]


# ---- other items -----------------------------------------------------------------------------------------------------


def test_another_domain_in_the_same_space_is_ranked_without_training(data: TrainingSequences, settings: RecGPT) -> None:
    both = text_vectors([str(title) for title in data.catalogue.title], 10)
    codes = Scalar.of(both.astype(np.float64), 3, (2, 2)).encode(both)
    other = replace(data, domain="market", sequences=Ragged.of([]), users=())
    mine, theirs = (each.catalogue.rows_of(each.domain) for each in (data, other))
    torch.manual_seed(0)
    trained = SliceModel(SliceTable(codes[mine], both[mine], 4, 8), SliceEncoder(encoder_of(3, causal=False), 3))
    here = settings.recommender(data, trained)
    there = settings.recommender(other, trained.over(codes[theirs], both[theirs]))
    # Items of the second domain that have the titles of some of the first have their scores after the same titles.
    titles = data.catalogue.title
    twin_of = {n: m for n in range(20) for m in range(30) if titles[mine[m]] == titles[theirs[n]]}
    assert 3 < len(twin_of) < 20
    first, second = list(twin_of)[:2]
    (one,) = here.rank([query("shop", twin_of[first], twin_of[second])], 30)
    (another,) = there.rank([query("market", first, second)], 20)
    assert set(another.item_ids) == {f"m{n:02}" for n in range(20)}
    scores, known = (dict(zip(each.item_ids, each.scores, strict=True)) for each in (another, one))
    for n, m in twin_of.items():
        assert scores[f"m{n:02}"] == pytest.approx(known[f"s{m:02}"], abs=1e-5)


def test_settings_that_mean_nothing_are_refused(data: TrainingSequences) -> None:
    with pytest.raises(ConfigError, match=r"steps=\(1, 1\) must be numbers above 0, one of them above 1"):
        RecGPT(steps=(1, 1))
    with pytest.raises(ConfigError, match="num_slices=12, but vectors have 10 numbers: lower num_slices"):
        replace(RecGPT(**SMALL), num_slices=12).stages(data, 0)
