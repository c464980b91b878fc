"""The softmax over a sample of the items: that over all of them where all are drawn, and right on average where not."""

from __future__ import annotations

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
from cprec.systems.fit import NEXT_ITEM, WeightedTerms
from cprec.systems.items import MASK, PADDING
from cprec.systems.recipes.sasrec import SASRec
from cprec.systems.sampled import SampledSoftmax, _places
from cprec.systems.signals import TrainingSequences
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
    monkeypatch.setattr(SASRec, "WHOLE", 0)
    found = []
    for num_drawn, kind in ((0, WeightedTerms), (data.num_items, SampledSoftmax)):
        loss, rows = trainable(SASRec(**SMALL, sampled_items=num_drawn), data)
        assert type(loss) is kind
        value = loss.losses(rows)[NEXT_ITEM]
        value.backward()
        found.append((value.detach(), [parameter.grad for parameter in loss.module.parameters()]))
    (whole, whole_grads), (sampled, sampled_grads) = found
    torch.testing.assert_close(sampled, whole)
    for one, other in zip(sampled_grads, whole_grads, strict=True):
        torch.testing.assert_close(one, other)


def test_the_sum_over_the_items_is_right_on_average(data: TrainingSequences) -> None:
    """Of samples that lack most items: popular ones, which rows bring in, do not count too much."""
    generator = np.random.default_rng(0)
    num_items, share = 400, 1 / np.arange(1, 401)
    sequences = [generator.choice(num_items, size=3, p=share / share.sum()).tolist() for _ in range(600)]
    ids = [f"{n:03}" for n in range(num_items)]
    catalogue = Catalogue.from_tables({"shop": pa.table({"item_id": ids, "title": ids})})
    world = TrainingSequences(catalogue, "shop", Ragged.of(sequences), tuple(f"u{n}" for n in range(600)))
    torch.manual_seed(1)
    model = SASRec(**SMALL).model(np.empty((num_items, 0)))
    score_V = torch.log(torch.from_numpy(share).float()) + 1  # popular items score high
    sums, of_all = [], float(score_V.exp().sum())
    sampled = SampledSoftmax(model, world, 40, torch.float32)

    def captured(states: Any, vectors: Any, target: Any, dtype: Any, log_weight_K: torch.Tensor) -> torch.Tensor:
        sums.append(float((score_V[kept[0]] + log_weight_K).exp().sum()))
        return linear_cross_entropy(states, vectors, target, dtype, log_weight_K)

    kept: list[torch.Tensor] = []
    unique = torch.Tensor.unique

    def noted(self: torch.Tensor) -> torch.Tensor:
        kept[:] = [unique(self)]
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cprec.systems.sampled.linear_cross_entropy", captured)
        patch.setattr(torch.Tensor, "unique", noted)
        for start in range(0, 600, 10):
            rows = torch.tensor(sequences[start : start + 10])
            sampled.losses({"items": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()})
    assert len(kept[0]) < num_items / 4
    assert np.mean(sums) == pytest.approx(of_all, rel=0.05)


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
    monkeypatch.setattr(SASRec, "WHOLE", 1)
    settings = SASRec(**SMALL, learning_rate=1e-2, num_epochs=8, sampled_items=3)
    recommender = settings.make(split, "ring", folder=tmp_path)
    queries = split.queries("ring", "test", max_history=50)
    users = [f"p/{split.interactions.user_id[row]}" for row in queries.user]
    better, _ = recommender.target_ranks(queries.history, queries.target, users=users, exclude_seen=True)
    assert (better == 0).mean() > 0.8


def test_small_catalogues_are_whole_and_other_losses_have_their_own_samples(data: TrainingSequences) -> None:
    settings = SASRec(**SMALL, sampled_items=data.num_items // SASRec.WHOLE)
    assert type(trainable(settings, data)[0]) is WeightedTerms
    assert type(trainable(replace(settings, sampled_items=1), data)[0]) is SampledSoftmax
    with pytest.raises(ConfigError, match="is for the softmax alone"):
        replace(settings, objective="bce", num_negatives=1)
    with pytest.raises(ConfigError, match="sampled_items=-1"):
        replace(settings, sampled_items=-1)
