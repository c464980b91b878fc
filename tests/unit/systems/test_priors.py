"""Human priors: groups of items, heads of which only a target's own learns, rankings that ask nothing of targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cprec.batch import IGNORE
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.systems import fit as fitting
from cprec.systems.encoders import SelfAttention
from cprec.systems.items import IdTable
from cprec.systems.priors import HeadModel, OwnHeads, by_category, by_popularity, by_title
from cprec.systems.recipes.human_priors import HORIZON, HumanPriors
from cprec.systems.signals import TrainingSequences

pytestmark = pytest.mark.usefixtures("in_fp32")
SMALL: dict[str, Any] = {"hidden_size": 16, "batch_size": 16, "max_length": 6, "num_heads": 2, "num_epochs": 1}
PRIORS = HumanPriors(**SMALL, prior="popularity", num_groups=3)


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)


def model_of(groups: list[int], *, num_stretches: int = 1, temperature: float = 0.0, size: int = 4) -> HeadModel:
    torch.manual_seed(0)
    encoder = SelfAttention(size, max_length=5, num_blocks=1, num_heads=1, dropout=0.0, causal=True)
    items = IdTable(len(groups), size)
    return HeadModel(items, encoder, np.array(groups), num_stretches, temperature)


def with_heads(model: HeadModel) -> HeadModel:
    """Heads that are told apart."""
    for parameter in model.heads.parameters():
        torch.nn.init.normal_(parameter)
    return model


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_titles_are_grouped_by_their_vectors() -> None:
    near = np.array([[1, 0], [0, 1], [0.9, 0.1], [0.1, 0.9], [1, 0.1]], dtype=np.float32)
    first, second, *others = by_title(near, 2, seed=0).tolist()
    assert first != second and others == [first, second, first]


def test_popular_items_stand_in_the_first_groups(data: TrainingSequences) -> None:
    counts = np.bincount(data.sequences.values, minlength=data.num_items)
    group = PRIORS.groups(data, 0)
    assert np.bincount(group).tolist() == [4, 4, 4]
    assert counts[group == 0].min() >= counts[group == 1].max() >= counts[group == 2].min()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: by_category(["", ""], 2), "prior='category' needs categories of items, and here no item has any"),
        (lambda: by_category(["tea", "", "tea"], 3), "num_groups=3 with prior='category', but there are only 2 categ"),
        (lambda: by_popularity(np.ones(2), 3), "num_groups=3, but there are only 2 items: give at most 2"),
        (lambda: by_title(np.eye(2, dtype=np.float32), 3, 0), "num_groups=3, but there are only 2 items"),
        (lambda: by_title(np.ones((4, 2), dtype=np.float32), 2, 0), "prior='titles', but titles make only 1 groups"),
    ],
)
def test_more_groups_than_there_are_is_refused(make: Callable[[], np.ndarray], message: str) -> None:
    with pytest.raises(Unsuitable, match=message):
        make()


def test_what_cannot_be_grouped_is_refused_before_training(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "train", None)
    with pytest.raises(Unsuitable, match="needs categories of items"):
        HumanPriors(**SMALL).make(split, "ring")
    two = np.array(["tea", "mug"] * 6, dtype=object)
    with pytest.raises(Unsuitable, match="num_groups=8 with prior='category', but there are only 2 categories"):
        HumanPriors(**SMALL).make(replace(split, catalogue=replace(split.catalogue, categories=two)), "ring")
    same = np.array(["thing"] * 12, dtype=object)
    with pytest.raises(Unsuitable, match="titles, and those of domain 'ring' have no word that tells"):
        HumanPriors(**SMALL, prior="titles").make(
            replace(split, catalogue=replace(split.catalogue, title=same)), "ring"
        )


def test_other_categories_are_other_data(split: Split, data: TrainingSequences) -> None:
    catalogue = replace(split.catalogue, categories=np.array(["tea", "mug"] * 6, dtype=object))
    assert TrainingSequences.of(replace(split, catalogue=catalogue), "ring").digest() != data.digest()


# ---- heads -----------------------------------------------------------------------------------------------------------


def test_an_item_has_the_score_of_the_best_head_of_its_own_group() -> None:
    """Heads add what SiLU leaves of their biases, which is 0 of 0 and 20 of 20. The state is (1, 2), the item vectors
    are (1, 0), (0, 1), (1, 1). Group 0 has items 0 and 2, in the first stretch with (20, 0) more, in the second with
    (0, 20); group 1 has item 1, in the first stretch with nothing more, in the second with (20, 20)."""
    model = model_of([0, 1, 0], num_stretches=2, size=2)
    for head, bias in zip(model.heads, ([20.0, 0.0], [0.0, 20.0], [0.0, 0.0], [20.0, 20.0]), strict=True):
        assert isinstance(head, torch.nn.Linear)
        head.bias.data = torch.tensor(bias)
    items, state = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    heads = torch.stack([torch.stack([model.head(g, s, state) for s in (0, 1)], 1) for g in (0, 1)], 1)
    found = model.products(heads, items, torch.empty(1, 3))
    torch.testing.assert_close(found, torch.tensor([[21.0, 22.0, 23.0]]), atol=1e-4, rtol=0)
    cosine = model_of([0, 1, 0], temperature=0.5, size=2)
    torch.testing.assert_close(cosine.head(0, 0, torch.tensor([[3.0, 4.0]])), torch.tensor([[1.2, 1.6]]))
    torch.testing.assert_close(cosine.vectors().items_VD.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize(("groups", "num_stretches"), [([0, 2, 1, 0, 2], 2), ([0, 0, 0, 0, 0], 1)])
@torch.no_grad()
def test_before_training_all_heads_score_as_the_state_does(groups: list[int], num_stretches: int) -> None:
    model = model_of(groups, num_stretches=num_stretches)
    rows = {"items": torch.tensor([[0, 1, 4], [3, 5, 5]])}
    vectors = model.vectors()
    state = model.encoder.last(model.items.vectors(rows["items"]), torch.tensor([3, 1]))
    found = model.products(model.encode(vectors, rows), vectors.items_VD, torch.empty(2, 5))
    torch.testing.assert_close(found, state @ vectors.items_VD.T)


def test_a_target_is_learnt_by_its_own_head_among_its_own_group() -> None:
    """The loss written out, target by target: three events ahead, of which the third has the second head."""
    groups, pad, discount = [0, 2, 1, 0, 2, 2], 6, 0.5
    model = with_heads(model_of(groups, num_stretches=3, temperature=0.2))
    targets = torch.tensor([[1, 3, 4, 5], [2, 0, IGNORE, IGNORE]])
    rows = {"items": torch.tensor([[0, 1, 3, 4], [5, 2, pad, pad]]), "targets": targets}
    vectors = model.vectors()
    states, _ = model.states(vectors, rows)
    found, expected = OwnHeads(model, 3, discount)(states, rows, vectors.items_VD), torch.tensor(0.0)
    for number, (row, place) in enumerate((targets != IGNORE).nonzero().tolist()):
        for ahead in range(3):
            if place + ahead >= 4 or (target := int(targets[row, place + ahead])) == IGNORE:
                continue
            group, state = groups[target], states[number]
            head = model.heads[group * 3 + ahead]
            moved = F.normalize(state + F.silu(head(state)), dim=0)
            members = [item for item in range(6) if groups[item] == group]
            cosines = F.normalize(model.items.vectors()[members], dim=1) @ moved
            loss = F.cross_entropy(cosines / 0.2, torch.tensor(members.index(target)))
            expected = expected + discount**ahead / (1 + discount + discount**2) * loss
    torch.testing.assert_close(found, expected)


def test_heads_of_other_groups_and_items_of_other_groups_learn_nothing() -> None:
    model = with_heads(model_of([0, 1, 1, 0]))
    rows = {"items": torch.tensor([[0, 3, 0]]), "targets": torch.tensor([[3, 0, 3]])}
    vectors = model.vectors()
    states, _ = model.states(vectors, rows)
    OwnHeads(model, 1, 1.0)(states, rows, vectors.items_VD).backward()
    own, other = (head.weight.grad for head in model.heads)
    assert own is not None and own.abs().sum() > 0 and other is None
    gradient = model.items.table.weight.grad  # type: ignore[union-attr, operator]
    assert gradient[[1, 2]].eq(0).all() and gradient[[0, 3]].ne(0).any(1).all()


def test_rows_without_a_target_cost_nothing() -> None:
    model = model_of([0, 1, 0])
    rows = {"items": torch.full((2, 3), 3), "targets": torch.full((2, 3), IGNORE)}
    vectors = model.vectors()
    loss = OwnHeads(model, 2, 0.9)(model.states(vectors, rows)[0], rows, vectors.items_VD)
    loss.backward()
    assert loss == 0


# ---- rankings --------------------------------------------------------------------------------------------------------


def test_a_ranking_is_told_nothing_of_the_target(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of all possible targets come from one list of scores, which is made of the history alone."""
    recommender: Any = PRIORS.make(split, "ring")
    asked: list[Mapping[str, torch.Tensor]] = []
    encode = HeadModel.encode
    monkeypatch.setattr(
        HeadModel, "encode", lambda self, vectors, rows: asked.append(rows) or encode(self, vectors, rows)
    )
    histories, users = Ragged.of([[0, 1, 2], [5], [7, 8]]), [""] * 3
    scores = recommender.score_histories(histories, users).numpy()
    for target in range(scores.shape[1]):
        better, tied = recommender.target_ranks(histories, np.full(3, target), users=users, exclude_seen=False)
        assert better.tolist() == (scores > scores[:, [target]]).sum(1).tolist()
        assert tied.tolist() == [1, 1, 1]
    assert len(asked) == 1 + scores.shape[1]
    for rows in asked:
        assert set(rows) == {"items", "users"}
        assert sorted(row[row < 12].tolist() for row in rows["items"]) == [[0, 1, 2], [5], [7, 8]]


@pytest.mark.parametrize("settings", [PRIORS, replace(HORIZON, **SMALL)], ids=["popularity", "horizon"])
@pytest.mark.parametrize(("histories", "num_items"), [([[0, 0, 0, 0, 0]], 1), ([[0, 1, 2, 3, 4]], 6)])
def test_one_user_is_enough_and_so_is_one_item(
    settings: HumanPriors, histories: list[list[int]], num_items: int, split_of: Callable[..., Split]
) -> None:
    settings = replace(settings, num_groups=min(settings.num_groups, num_items))
    recommender: Any = settings.make(split_of(histories, num_items), "tiny")
    scores = recommender.score_histories(Ragged.of([[0], []]), ["p/u0", ""])
    assert scores.shape == (2, num_items) and scores.isfinite().all()


def test_users_with_one_training_event_each_are_nothing_to_train_on(split_of: Callable[..., Split]) -> None:
    with pytest.raises(Unsuitable, match="nothing to train on"):
        PRIORS.make(split_of([[0, 1, 2], [1, 2, 0]], 3), "tiny")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior": "price"}, "prior='price': expected category, titles, popularity"),
        ({"num_groups": 0}, "num_groups=0 must be above 0"),
        ({"horizon": 4, "num_stretches": 3}, "horizon=4 must be a multiple of num_stretches=3"),
        ({"num_stretches": 2}, "horizon=1 must be a multiple of num_stretches=2"),
        ({"temperature": -0.1}, "temperature=-0.1 must not be below 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HumanPriors(**settings)
