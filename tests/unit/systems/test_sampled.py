"""The softmax over a sample of the items: that over all of them where all are drawn, and right on average where not."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from cprec.batch import IGNORE
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.systems.items import MASK, PADDING
from cprec.systems.recipes.sasrec import WIDE, SASRec
from cprec.systems.sampled import SampledItemsLoss, _places
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, WeightedTerms
from cprec.train.loss import linear_cross_entropy

SMALL: dict[str, Any] = {"hidden_size": 16, "dropout": 0.0, "num_blocks": 1, "num_heads": 2, "batch_size": 16}


def trainable(settings: SASRec, data: TrainingSequences) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    (stage,) = settings.stages(data, seed=0)
    return stage.trainable, {name: torch.from_numpy(array) for name, array in stage.stream.batch(0).rows.items()}


def test_where_all_items_are_drawn_it_is_the_softmax_over_all(
    data: TrainingSequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cprec.systems.terms.distributed.use_bf16", lambda *_: False)
    monkeypatch.setattr(SASRec, "LARGE", 0)
    found = []
    for num_drawn, kind in ((0, WeightedTerms), (data.num_items, SampledItemsLoss)):
        loss, rows = trainable(replace(WIDE, **SMALL, sampled_items=num_drawn), data)
        assert type(loss) is kind
        value = loss.losses(rows)[NEXT_ITEM]
        value.backward()
        found.append((value.detach(), [parameter.grad for parameter in loss.module.parameters()]))
    (whole, whole_grads), (sampled, sampled_grads) = found
    torch.testing.assert_close(sampled, whole)
    for one, other in zip(sampled_grads, whole_grads, strict=True):
        torch.testing.assert_close(one, other)


@functools.cache
def share_of_a_repeat(num_drawn: int) -> float:
    """How probable the item of the latest event is to come again, on average, where three in ten events repeat the one
    before."""
    generator, num_items = np.random.default_rng(0), 200
    sequences = []
    for _ in range(800):
        one = [int(generator.integers(num_items))]
        while len(one) < 8:
            one.append(one[-1] if generator.random() < 0.3 else int(generator.integers(num_items)))
        sequences.append(one)
    ids = [f"{n:03}" for n in range(num_items)]
    catalogue = Catalogue.from_tables({"shop": pa.table({"item_id": ids, "title": ids})})
    data = TrainingSequences(catalogue, "shop", Ragged.of(sequences), tuple(f"u{n}" for n in range(800)))
    asked = generator.integers(num_items, size=(200, 4))
    settings = replace(WIDE, **SMALL | {"hidden_size": 32, "batch_size": 64}, num_epochs=12, sampled_items=num_drawn)
    torch.manual_seed(0)
    (stage,) = settings.stages(data, seed=0)
    optimizer = torch.optim.AdamW(stage.trainable.module.parameters(), lr=1e-2)
    for batch in stage.stream:  # type: ignore[attr-defined]
        optimizer.zero_grad()
        rows = {name: torch.from_numpy(array) for name, array in batch.rows.items()}
        (stage.trainable.losses(rows)[NEXT_ITEM] / batch.num_tokens).backward()
        optimizer.step()
    recommender = settings.recommender(data, stage.trainable.module)
    share_QV = recommender.score_histories(Ragged.of(asked.tolist()), [""] * 200).softmax(1).numpy()
    return float(share_QV[np.arange(200), asked[:, -1]].mean())


@pytest.mark.slow
@pytest.mark.parametrize("num_drawn", [10, 40])
def test_an_item_that_comes_again_is_as_probable_as_over_all_items(
    num_drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SASRec, "LARGE", 0)
    over_all = share_of_a_repeat(0)
    assert over_all == pytest.approx(0.3, abs=0.06)
    assert share_of_a_repeat(num_drawn) == pytest.approx(over_all, abs=0.06)


def test_the_loss_by_hand(data: TrainingSequences) -> None:
    """Position by position over its own sample: what was drawn, what other rows hold, and the target."""
    loss, rows = trainable(replace(WIDE, **SMALL | {"batch_size": 4}), data)
    model, num_items, num_drawn = loss.module, data.num_items, 2
    sampled = SampledItemsLoss(model, data.sequences, num_items, num_drawn, torch.float32)
    rows = {name: array[:, :4].contiguous() for name, array in rows.items()}
    torch.manual_seed(5)
    drawn = set(torch.randperm(num_items)[:num_drawn].tolist())
    torch.manual_seed(5)
    found = sampled.losses(rows)[NEXT_ITEM]

    items, targets = rows["items"], rows["targets"]
    held = [set(items[r].tolist() + targets[r].tolist()) - {IGNORE, num_items} for r in range(len(items))]
    counts = np.bincount(data.sequences.values, minlength=num_items)
    num_events = (int((targets != IGNORE).sum()) + len(items)) * (1 - 1 / len(items))
    chance = 1 - (1 - num_drawn / num_items) * (1 - counts / counts.sum()) ** num_events
    vectors = model.vectors()
    states, target = model.states(vectors, rows)
    score = (states @ vectors.items_VD.T).detach()
    expected, narrowed = 0.0, 0
    for n, row in enumerate((targets != IGNORE).nonzero()[:, 0].tolist()):
        others = set().union(*(held[r] for r in range(len(held)) if r != row))
        support = sorted(drawn | others | {int(target[n])})
        narrowed += len(support) < len(drawn | others | held[row])
        log_chance = torch.from_numpy(np.log(chance[support]))
        expected += float((score[n, support] - log_chance).logsumexp(0) - score[n, target[n]])
    assert narrowed, "some rows hold what nothing else brings"
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


def test_a_rows_own_items_are_left_out_unless_drawn_or_in_another_row(data: TrainingSequences) -> None:
    model = replace(WIDE, **SMALL).model(np.empty((data.num_items, 0)))
    loss = SampledItemsLoss(model, data.sequences, data.num_items, 2, torch.float32)
    padding, num_kept = 6, 6
    items = torch.tensor([[0, 1, padding], [1, 2, 3]])
    targets = torch.tensor([[1, 5, IGNORE], [2, 3, 4]])
    own, is_own = loss._own({"items": items, "targets": targets}, torch.tensor([3]), num_kept)
    assert own.tolist() == [[0, 1, 0, 5], [1, 2, 3, 4]]
    # 1 is in both rows, 3 was drawn, and the third place of the first row is padding.
    assert is_own.tolist() == [[True, False, False, True], [False, True, False, True]]


def test_items_are_their_places_in_a_sample() -> None:
    kept, num_items = torch.tensor([2, 5, 9]), 20
    items = torch.tensor([[9, 2, num_items + PADDING], [5, num_items + MASK, IGNORE]])
    assert _places(items, kept, num_items).tolist() == [[2, 0, 3], [1, 3 + MASK, IGNORE]]


def test_a_bias_is_added_to_the_logits() -> None:
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True), torch.randn(7)
    target = torch.tensor([0, 6, 3, 3, 1])
    loss = linear_cross_entropy(hidden, weight, target, torch.float32, bias)
    plain = F.cross_entropy(hidden @ weight.T + bias, target, reduction="sum")
    torch.testing.assert_close(loss, plain)
    for mine, expected in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, expected)


def test_it_learns_what_comes_next(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SASRec, "LARGE", 1)
    settings = replace(WIDE, **SMALL, learning_rate=1e-2, num_epochs=8, sampled_items=3)
    recommender = settings.make(split, "ring", folder=tmp_path)
    queries = split.queries("ring", "test", max_history=50)
    users = [f"p/{split.interactions.user_id[row]}" for row in queries.user]
    better, _ = recommender.target_ranks(queries.history, queries.target, users=users, exclude_seen=True)
    assert (better == 0).mean() > 0.8


def test_what_is_left_out_has_no_share() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    target, left_out = torch.randint(7, (300,)), torch.randint(7, (300, 3))
    loss = linear_cross_entropy(hidden, weight, target, torch.float32, None, left_out)
    logits, rows = hidden @ weight.T, torch.arange(300)
    mask = torch.zeros(300, 7, dtype=torch.bool).scatter(1, left_out, True)
    mask[rows, target] = False
    plain = F.cross_entropy(logits.masked_fill(mask, -torch.inf), target, reduction="sum")
    torch.testing.assert_close(loss, plain)
    for mine, expected in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(mine, expected)


def test_small_catalogues_are_whole(data: TrainingSequences) -> None:
    settings = replace(WIDE, **SMALL, sampled_items=data.num_items // SASRec.LARGE)
    assert type(trainable(settings, data)[0]) is WeightedTerms
    assert type(trainable(replace(settings, sampled_items=1), data)[0]) is SampledItemsLoss
    other = replace(settings, sampled_items=1, objective="bce", num_negatives=1)
    assert type(trainable(other, data)[0]) is WeightedTerms, "it draws its own"
    with pytest.raises(ConfigError, match="sampled_items=-1"):
        replace(settings, sampled_items=-1)
