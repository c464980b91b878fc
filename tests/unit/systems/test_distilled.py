"""SLMRec: a shallow model that learns from a deep one, and the shared parts that it is made of."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.systems.dot_product import SequenceModel
from cprec.systems.encoders import Layers, SelfAttention
from cprec.systems.recipes.sasrec import WIDE, SASRec
from cprec.systems.recipes.slmrec import SLMRec
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import Distillation, MiddleHeads, next_item

pytestmark = pytest.mark.usefixtures("in_fp32")
SMALL: dict[str, Any] = {"hidden_size": 16, "batch_size": 16, "max_length": 6, "num_heads": 2, "num_epochs": 1}
SLMREC = SLMRec(**SMALL, dropout=0.3, teacher_blocks=4)


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)


def stages_of(settings: SLMRec | SASRec, data: TrainingSequences) -> Sequence[Stage]:
    torch.manual_seed(0)
    return settings.stages(data, 3)


def rows_of(stage: Stage) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in stage.stream.batch(0).rows.items()}


def losses(stage: Stage, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return dict(stage.trainable.losses(rows))


# ---- shared parts ----------------------------------------------------------------------------------------------------


def test_states_are_drawn_by_direction_and_distance_and_scores_by_their_divergence() -> None:
    """Two states of one target. The first, (1, 0), stands at right angles to (0, 2), at the distance of root 5; the
    second, (3, 4), has the direction of (6, 8), at the distance of 5. Its scores of two items are 3 and 4, the other
    model's 3 and 0."""
    hidden, given = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 2.0], [6.0, 8.0]]])
    items, given_items = torch.eye(2), torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    trained = lambda rows: (given, given_items)  # noqa: E731
    weights = {"direction": 2.0, "distance": 0.1, "scores": 0.0}
    moved = 2 * 1 + 0.1 * (5**0.5 + 5)
    found = Distillation(trained, **weights)(hidden, {}, items)
    torch.testing.assert_close(found, torch.tensor(moved))
    mine, theirs = torch.tensor(-1.0).sigmoid(), torch.tensor(3.0).sigmoid()  # the chance of the first item
    divergence = theirs * (theirs / mine).log() + (1 - theirs) * ((1 - theirs) / (1 - mine)).log()
    found = Distillation(trained, **weights | {"scores": 0.5})(hidden, {}, items)
    torch.testing.assert_close(found, moved + 0.5 * divergence)


def test_gradients_of_the_divergence_are_those_of_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.train.loss.CHUNK", 3)
    generator = torch.Generator().manual_seed(0)
    hidden, items, given, given_items = (
        torch.randn(count, 4, generator=generator, requires_grad=number < 2)
        for number, count in enumerate((7, 5, 7, 5))
    )
    term = Distillation(lambda rows: (given, given_items), direction=0.0, distance=0.0, scores=2.0)
    logs = (hidden @ items.T).log_softmax(1)
    expected = 2 * F.kl_div(logs, (given @ given_items.T).log_softmax(1), log_target=True, reduction="sum")
    found = term(hidden, {}, items)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(loss, [hidden, items]) for loss in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_that_is_its_own_teacher_learns_nothing_from_it() -> None:
    hidden, items = torch.randn(3, 2, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    term = Distillation(lambda rows: (hidden.detach(), items.detach()), direction=1.0, distance=1.0, scores=1.0)
    loss = term(hidden, {}, items)
    torch.testing.assert_close(loss, torch.tensor(0.0), atol=1e-5, rtol=0)
    for gradient in torch.autograd.grad(loss, [hidden, items]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_each_state_but_the_last_predicts_through_its_own_matrix() -> None:
    heads = MiddleHeads(next_item("softmax"), num_heads=2, size=2)
    matrices = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    for head, matrix in zip(heads.heads, matrices, strict=True):
        assert isinstance(head, torch.nn.Linear)
        head.weight.data = matrix
    hidden, target = torch.tensor([[[1.0, 2.0], [3.0, 1.0], [9.0, -9.0]]]), torch.tensor([1])
    # The first state becomes (2, 1), the second (6, 3): item 1 has the lower score of two.
    expected = torch.tensor([1.0, 3.0]).exp().add(1).log().sum()
    torch.testing.assert_close(heads(hidden, target, torch.eye(2)), expected)


def test_states_in_the_middle_are_those_after_so_many_blocks() -> None:
    torch.manual_seed(0)
    encoder = SelfAttention(8, max_length=5, num_blocks=4, num_heads=2, dropout=0.0, causal=True)
    inputs, lengths = torch.randn(2, 3, 8), torch.tensor([3, 2])
    layers, hidden = Layers(encoder, [2, 4]), encoder.embed(inputs, lengths)
    states = layers(inputs, lengths)
    for block in encoder.blocks[:2]:
        hidden = block(hidden, None)
    torch.testing.assert_close(states[:, :, 0], hidden)
    torch.testing.assert_close(states[:, :, 1], encoder(inputs, lengths))
    torch.testing.assert_close(layers.last(inputs, lengths), encoder.last(inputs, lengths))


# ---- SLMRec ----------------------------------------------------------------------------------------------------------


def test_a_shallow_model_is_taught_by_the_middle_and_the_end_of_the_deep_one(data: TrainingSequences) -> None:
    """The losses written out: two blocks of four groups beside four of eight, at every position with a target."""
    first, second = stages_of(replace(SLMREC, dropout=0.0, head_weight=0.3), data)
    rows = rows_of(second)
    found = losses(second, rows)
    deep, shallow = first.trainable.module, second.trainable.module["model"]  # type: ignore[index]
    assert isinstance(deep, SequenceModel) and isinstance(shallow, SequenceModel)
    at, lengths = rows["targets"] >= 0, (rows["items"] < data.num_items).sum(1)
    states = []
    for model, encoder, half in ((deep, deep.encoder, 2), (shallow, shallow.encoder.encoder, 1)):
        assert isinstance(encoder, SelfAttention)
        hidden = encoder.embed(model.items.vectors(rows["items"]), lengths)
        for block in encoder.blocks[:half]:
            hidden = block(hidden, None)
        middle = hidden[at]
        for block in encoder.blocks[half:]:
            hidden = block(hidden, None)
        states.append(torch.stack([middle, encoder.norm(hidden)[at]]))
    theirs, mine = states
    their_items, items = (model.items.vectors()[: data.num_items] for model in (deep, shallow))
    apart = (1 - (theirs * mine).sum(2) / theirs.norm(dim=2) / mine.norm(dim=2)).sum()
    apart = apart + 0.1 * (theirs - mine).square().sum(2).sqrt().sum()
    logs = (mine[1] @ items.T).log_softmax(1)
    their_logs = (theirs[1] @ their_items.T).log_softmax(1)
    divergence = (their_logs.exp() * (their_logs - logs)).sum()
    torch.testing.assert_close(found["teacher"], apart + divergence, rtol=1e-4, atol=1e-4)
    target = rows["targets"][at]
    torch.testing.assert_close(found[NEXT_ITEM], F.cross_entropy(mine[1] @ items.T, target, reduction="sum"))
    head = second.trainable.module["heads"].heads[0]  # type: ignore[index, union-attr]
    in_the_middle = F.cross_entropy(head(mine[0]) @ items.T, target, reduction="sum")
    torch.testing.assert_close(found["heads"], 0.3 * in_the_middle)


def test_the_deep_model_stays_as_it_is_while_the_shallow_one_learns(data: TrainingSequences) -> None:
    first, second = stages_of(SLMREC, data)
    rows = rows_of(second)
    first.trainable.module.train()
    sum(losses(second, rows).values()).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in first.trainable.module.parameters())
    assert all(parameter.grad is not None for parameter in second.trainable.module.parameters())
    theirs = {id(parameter) for parameter in first.trainable.module.parameters()}
    assert not theirs & {id(parameter) for parameter in second.trainable.module.parameters()}
    assert not first.trainable.module.encoder.training, "nothing is dropped out where it teaches"  # type: ignore[union-attr]


def test_the_shallow_model_begins_as_sasrec_does_and_is_as_large(data: TrainingSequences) -> None:
    (plain,) = stages_of(replace(WIDE, **SMALL, dropout=0.3), data)
    _, second = stages_of(SLMREC, data)
    rows = rows_of(second)
    torch.testing.assert_close(losses(second, rows)[NEXT_ITEM], losses(plain, rows)[NEXT_ITEM])
    counts = [stage.recommender().num_parameters for stage in (second, plain)]
    assert counts[0] == counts[1], "neither the deep model nor the heads are ranked with"


@pytest.mark.parametrize(
    ("weights", "terms"),
    [
        ({"head_weight": 0.0}, {NEXT_ITEM, "teacher"}),
        ({"direction_weight": 0.0, "distance_weight": 0.0, "score_weight": 0.0}, {NEXT_ITEM, "heads"}),
        ({"num_groups": 1}, {NEXT_ITEM, "teacher"}),
    ],
)
def test_a_part_with_the_weight_0_is_left_out(
    weights: dict[str, Any], terms: set[str], data: TrainingSequences
) -> None:
    stages = stages_of(replace(SLMREC, **weights), data)
    assert len(stages) == 1 + ("teacher" in terms)
    assert set(losses(stages[-1], rows_of(stages[-1]))) == set(stages[-1].stream.batch(0).counts) == terms


def test_a_teacher_that_was_trained_before_teaches_again(split: Split, tmp_path: Path) -> None:
    first = SLMREC.make(split, "ring", folder=tmp_path)
    (folder,) = tmp_path.glob("*/stage-2")
    shutil.rmtree(folder)
    again, histories = SLMREC.make(split, "ring", folder=tmp_path), Ragged.of([[0, 1, 2], [5], []])
    scores = [made.score_histories(histories, [""] * 3) for made in (first, again)]  # type: ignore[attr-defined]
    torch.testing.assert_close(*scores, rtol=0, atol=0)


@pytest.mark.parametrize(("histories", "num_items"), [([[0, 0, 0, 0, 0]], 1), ([[0, 1, 2, 3, 4]], 6)])
def test_one_user_is_enough_and_so_is_one_item(
    histories: list[list[int]], num_items: int, split_of: Callable[..., Split]
) -> None:
    recommender: Any = SLMREC.make(split_of(histories, num_items), "tiny")
    scores = recommender.score_histories(Ragged.of([[0], []]), ["p/u0", ""])
    assert scores.shape == (2, num_items) and scores.isfinite().all()
    better, tied = recommender.target_ranks(Ragged.of([[0]]), np.array([0]), users=["p/u0"], exclude_seen=False)
    assert (better[0] == 0 and tied[0] == 1) or num_items > 1


def test_users_with_one_training_event_each_are_nothing_to_train_on(split_of: Callable[..., Split]) -> None:
    with pytest.raises(Unsuitable, match="nothing to train on"):
        SLMREC.make(split_of([[0, 1, 2], [1, 2, 0]], 3), "tiny")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": 10}, "num_blocks=10 must not be above teacher_blocks=8: the model that is taught has no more"),
        ({"num_blocks": 3}, "num_blocks=3 must be a multiple of num_groups=2"),
        ({"teacher_blocks": 7}, "teacher_blocks=7 must be a multiple of num_groups=2"),
        ({"num_groups": 0}, "num_groups=0 must be above 0"),
        ({"score_weight": -1.0}, "score_weight=-1.0 must not be below 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SLMRec(**settings)
