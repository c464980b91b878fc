"""Attention that knows the time between events, a head that ranks, and SynerGen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.systems import fit as fitting
from cprec.systems.encoders import SelfAttention, turned
from cprec.systems.recipes.sasrec import SASRec
from cprec.systems.recipes.synergen import SynerGen, TwoTasks
from cprec.systems.settings import SystemSettings
from cprec.systems.signals import DAY, Gaps, TrainingSequences, padded
from cprec.systems.terms import objective_loss

SMALL: dict[str, Any] = {"hidden_size": 8, "num_blocks": 2, "num_heads": 2, "batch_size": 16, "num_epochs": 3}
OFF: dict[str, Any] = {"ranking_weight": 0.0, "time_angles": False}


def test_products_of_turned_vectors_depend_on_the_time_between_them() -> None:
    torch.manual_seed(0)
    query, key, time = torch.randn(5, 6), torch.randn(5, 6), torch.rand(2, 5, 1) * 40

    def products(shift: float) -> list[float]:
        found: list[float] = (turned(query, time[0] + shift) * turned(key, time[1] + shift)).sum(1).tolist()
        return found

    assert products(0) == pytest.approx(products(123), abs=1e-3)
    assert products(0) != pytest.approx((query * key).sum(1).tolist(), abs=1e-1)
    assert torch.equal(turned(query, torch.zeros(5, 1)), query)
    # Pairs of four numbers are 0 and 2, and 1 and 3, which turn at 1 and at 1 / 100.
    found = turned(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[50.0]]))
    assert found.tolist()[0] == pytest.approx([np.cos(50), np.cos(0.5), np.sin(50), np.sin(0.5)], abs=1e-4)


@pytest.mark.parametrize("block", ["pre_norm", "query_norm"])
def test_states_know_the_time_between_events_and_no_more_of_it(block: Any) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"max_length": 6, "num_blocks": 2, "num_heads": 2, "dropout": 0.0, "causal": True}
    encoder = SelfAttention(8, **sizes, block=block, time_angles=True).eval()
    plain = SelfAttention(8, **sizes, block=block).eval()
    plain.load_state_dict(encoder.state_dict())
    items, lengths = torch.randn(3, 5, 8), torch.tensor([5, 3, 1])

    def states(gaps: list[float]) -> torch.Tensor:
        given = torch.tensor(gaps).expand(3, 5)[:, :, None]
        return encoder(torch.cat([items, given], dim=2), lengths)

    apart, later = states([0.0, 1.0, 2.0, 0.5, 9.0]), states([7.0, 1.0, 2.0, 0.5, 9.0])
    assert torch.allclose(apart, later, atol=1e-4), "when a row began says nothing"
    assert torch.allclose(states([0.0] * 5), plain(items, lengths), atol=1e-5)
    moved = states([0.0, 1.0, 2.0, 4.0, 9.0])
    assert torch.allclose(apart[:, :3], moved[:, :3]) and not torch.allclose(apart[:, 3], moved[:, 3], atol=1e-3)
    with_gaps = torch.cat([items, torch.tensor([0.0, 1.0, 2.0, 0.5, 9.0]).expand(3, 5)[:, :, None]], dim=2)
    last = apart[torch.arange(3), lengths - 1]
    assert torch.allclose(encoder.last(with_gaps, lengths), last, atol=1e-5)


def test_linear_gaps_are_in_typical_ones(data: TrainingSequences) -> None:
    times = (np.array([0, 2, 2, 10, 90, 5, 9]) * DAY).astype(np.int64)
    made = replace(data, sequences=Ragged.of([[3, 5, 3, 1], [7], [2, 4]]), users=("u", "v", "w"), times=times)
    gaps = Gaps(made, linear=True)
    assert gaps.training.values.tolist() == [0, 0.5, 0, 2, 0, 0, 1], "of 2, 8 and 4 days 4 are typical"
    known = gaps.of(Ragged.of([[3, 5], [1, 9], [4]]), ["u", "u", "stranger"])
    assert known.values.tolist() == [0, 0.5, 2, 1, 1], "what is not known is typical; of two times the last counts"
    order = Gaps(replace(made, times=np.array([0, 1, 2, 3, 0, 0, 1])), linear=True)
    assert order.training.values.tolist() == [0, 1, 1, 1, 0, 0, 1], "an order alone makes positions"
    at_once = Gaps(replace(made, times=np.zeros(7, dtype=np.int64)), linear=True)
    assert not at_once.training.values.any()


def test_the_head_learns_both_losses_and_is_mixed_in(data: TrainingSequences) -> None:
    settings = SynerGen(**SMALL, ranking_share=0.25, dropout=0.0)
    (stage,) = settings.stages(data, 0)
    batch = stage.stream.batch(0)
    rows = {name: torch.from_numpy(array) for name, array in batch.rows.items()}
    assert list(stage.trainable.losses(rows)) == list(batch.counts) == ["next_item", "ranking"]
    model: Any = stage.trainable.module
    assert isinstance(model, TwoTasks)
    hidden, targets, items = torch.randn(4, 8), torch.tensor([1, 5, 0, 5]), torch.randn(9, 8)
    torch.manual_seed(3)
    found = model.ranking(6)(hidden, targets, items)
    torch.manual_seed(3)
    each = [objective_loss(kind, model.head(hidden), items, targets, num_negatives=6) for kind in ("bce", "bpr")]
    assert found.item() == pytest.approx(sum(each).item() / 2)
    recommender: Any = settings.recommender(data, model)
    some = data.sequences.take(np.arange(4))
    with torch.inference_mode():
        mixed = recommender.encode(some, data.users[:4])
        model._share = 0.0
        plain = recommender.encode(some, data.users[:4])
        assert torch.allclose(mixed, 0.75 * plain + 0.25 * model.head(plain), atol=1e-6)
    strangers = recommender.encode(some, ["p/nobody"] * 4)
    assert not strangers.isnan().any() and strangers.shape == plain.shape


def test_training_and_rankings_read_typical_gaps_up_to_each_event(data: TrainingSequences) -> None:
    """Never the time of what is predicted."""
    settings = SynerGen(**SMALL, max_length=50)
    (stage,) = settings.stages(data, 0)
    gaps, batch = Gaps(data, linear=True), stage.stream.batch(0)
    users = np.flatnonzero(data.sequences.lengths > 1)[batch.examples]
    for user, found in zip(users, batch.rows["gaps"], strict=True):
        expected = gaps.training[user][:-1]
        assert found[: len(expected)].tolist() == expected.tolist()
    model: Any = stage.trainable.module
    recommender: Any = settings.recommender(data, model)
    histories, names = data.sequences.take(np.arange(3)), data.users[:3]
    rows = {"items": padded(histories, data.num_items)[0], "gaps": padded(gaps.of(histories, names), 0)[0]}
    with torch.inference_mode():
        by_hand = model.encode(model.vectors(), {name: torch.from_numpy(array) for name, array in rows.items()})
        assert torch.allclose(recommender.encode(histories, names), by_hand, atol=1e-6)


def losses(settings: SystemSettings, split: Split, folder: Path) -> list[float]:
    settings.make(split, "ring", seed=4, folder=folder)
    (log,) = folder.glob("*/*/log.jsonl")
    return [line["loss"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]


def test_without_its_own_parts_it_learns_as_sasrec_does(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "VALIDATIONS", 1)
    same = {name: getattr(SynerGen(), name) for name in ("block", "dropout", "attention_dropout", "learning_rate")}
    same |= {name: getattr(SynerGen(), name) for name in ("beta2", "sorted_batches")}
    control = losses(SASRec(**SMALL, **same, min_steps=0), split, tmp_path / "sasrec")
    assert losses(SynerGen(**SMALL, **OFF), split, tmp_path / "alone") == control and len(control) > 4, "to the digit"
    turned_by_time = losses(SynerGen(**SMALL, ranking_weight=0.0), split, tmp_path / "angles")
    assert turned_by_time != control and turned_by_time == pytest.approx(control, rel=0.1)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"ranking_share": 2}, r"ranking_share=2 must lie in 0..1"),
        ({"hidden_size": 12}, "hidden_size=12 over num_heads=4 is odd, and angles turn pairs"),
        ({"ranking_negatives": 0}, "ranking_negatives=0 must be above 0"),
        ({"ranking_weight": -1}, "ranking_weight=-1 must not be below 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        SynerGen(**changed)
