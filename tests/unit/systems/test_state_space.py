"""State-space layers: both forms of the scan, what a position may read, and the recipes over them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cprec.data.ragged import Ragged
from cprec.errors import ConfigError, Unsuitable
from cprec.systems.dot_product import SequenceModel
from cprec.systems.encoders import Encoder
from cprec.systems.hyperbolic import OnHyperboloid, ToHyperboloid, distance_scores, nearest_item
from cprec.systems.items import FrozenTable, IdTable
from cprec.systems.recipes.hmamba import HMamba
from cprec.systems.recipes.mamba4rec import Mamba4Rec
from cprec.systems.recipes.mmm4rec import MMM4Rec
from cprec.systems.recipes.sigma import SIGMA, Gated, Mixture
from cprec.systems.settings import SystemSettings
from cprec.systems.signals import DAY, Gaps, TrainingSequences, windows
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.state_space import ConvolvedGRU, PartlyBackwards, StateSpace, StateSpaceBlock, quadratic, scan
from cprec.systems.terms import next_item

SIZE = 8
SMALL: dict[str, Any] = {"hidden_size": 16, "dropout": 0.2, "batch_size": 16, "num_heads": 2, "state_size": 4}


def block() -> StateSpaceBlock:
    return StateSpaceBlock(SIZE, num_heads=2, state_size=3)


MIXERS: dict[str, Callable[[], nn.Module]] = {
    "block": block,
    "backwards": lambda: PartlyBackwards(block(), 2),
    "recurrent": lambda: ConvolvedGRU(SIZE),
    "all readings": SIGMA(hidden_size=SIZE, num_heads=2, state_size=3, kept=2).mixer,
}


def losses(stage: Stage, stream: Any = None) -> list[float]:
    """Of the first three steps of a stage, on its own stream or another."""
    optimizer = torch.optim.AdamW(stage.trainable.module.parameters(), lr=1e-2)
    stage.trainable.module.train()
    torch.manual_seed(1)
    found = []
    for step in range(3):
        rows = {name: torch.from_numpy(array) for name, array in (stream or stage.stream).batch(step).rows.items()}
        (loss,) = stage.trainable.losses(rows).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def stage_of(settings: SystemSettings, data: TrainingSequences) -> Stage:
    torch.manual_seed(0)
    (stage,) = settings.stages(data, 0)
    return stage


# ---- the scan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [scan, quadratic])
def test_a_scan_of_three_steps_by_hand(form: Any) -> None:
    """The state halves at each step: 1, then 1/2 + 2, then 5/4 + 4 * 2, which is read three times as much."""
    log_decay = torch.full((1, 3, 1), math.log(0.5))
    value = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    write, read = torch.tensor([1.0, 1.0, 2.0]).view(1, 3, 1), torch.tensor([1.0, 1.0, 3.0]).view(1, 3, 1)
    assert form(log_decay, value, write, read).flatten().tolist() == pytest.approx([1, 2.5, 27.75])


@given(
    st.integers(1, 3), st.integers(1, 50), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99)
)
@settings(max_examples=25, deadline=None)
def test_both_forms_of_the_scan_are_equal(
    rows: int, length: int, heads: int, width: int, state: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    made = -drawn(rows, length, heads).abs(), drawn(rows, length, heads, width)
    inputs = [each.requires_grad_() for each in (*made, drawn(rows, length, state), drawn(rows, length, state))]
    outs = [form(*inputs) for form in (scan, quadratic)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    weight = drawn(*outs[0].shape)
    one, other = (torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True) for out in outs)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_block_is_the_scan_of_what_it_makes_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    made, inputs, lengths = block(), torch.randn(3, 50, SIZE), torch.tensor([50, 7, 1])
    by_matrix = made(inputs, lengths)
    monkeypatch.setattr("cprec.systems.state_space.quadratic", scan)
    torch.testing.assert_close(made(inputs, lengths), by_matrix, rtol=1e-5, atol=1e-5)


def test_states_begin_with_the_published_steps_and_rates() -> None:
    made = StateSpaceBlock(64, num_heads=64, state_size=4)
    steps, rates = nn.functional.softplus(made.step.bias), made.log_rate.exp()
    assert 1e-3 <= steps.min() < 3e-3 and 3e-2 < steps.max() <= 0.1
    assert 1 <= rates.min() < 3 and 12 < rates.max() <= 16


# ---- what a position reads -------------------------------------------------------------------------------------------


def test_a_block_reads_no_later_position() -> None:
    torch.manual_seed(0)
    made, inputs, lengths = block(), torch.randn(2, 9, SIZE), torch.tensor([9, 9])
    changed = inputs.clone()
    changed[:, 5:] = torch.randn(2, 4, SIZE)
    before, after = made(inputs, lengths), made(changed, lengths)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=0, atol=0)
    assert (before[:, 5:] != after[:, 5:]).any(2).all()


def test_a_block_writes_one_input_and_reads_by_another() -> None:
    """What is written decides values and decays: where it is zero but for biases, so are they at all positions."""
    torch.manual_seed(0)
    made, lengths = block(), torch.tensor([4])
    asks, source = torch.randn(1, 4, SIZE), torch.randn(1, 4, SIZE)
    torch.testing.assert_close(made(asks, lengths, asks), made(asks, lengths))
    assert (made(asks, lengths, source) != made(asks, lengths)).any()
    other = source.clone()
    other[:, 2] += 1
    changed = (made(asks, lengths, other) != made(asks, lengths, source)).any(2)
    assert changed.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_padding_and_other_rows_change_nothing(name: str, num_layers: int) -> None:
    torch.manual_seed(0)
    encoder = StateSpace(SIZE, [MIXERS[name]() for _ in range(num_layers)], 0.5).eval()
    lengths = [1, 2, 4, 7, 12]
    inputs = torch.randn(len(lengths), 12, SIZE)
    together = encoder.last(inputs, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        alone = encoder.last(inputs[row : row + 1, :length], torch.tensor([length]))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)
    assert encoder.last(inputs, torch.zeros(5, dtype=torch.int64)).isfinite().all(), "an empty row has a state too"


def test_layers_are_added_to_their_inputs_where_there_are_several() -> None:
    inputs, lengths = torch.randn(2, 3, SIZE), torch.tensor([3, 3])
    for num_layers in (1, 2):
        encoder = StateSpace(SIZE, [Times(0)] * num_layers, 0.0)
        out = encoder(inputs, lengths)
        reads_items = (out[0] - out[1]).abs().max() > 1e-3
        assert reads_items == (num_layers > 1)


# ---- gaps and streams ------------------------------------------------------------------------------------------------


def test_a_gap_moves_the_step_by_the_weight_of_its_head() -> None:
    """No gap weighs anything before training; with a weight of 2 a gap of 0.5 is a step whose input is 1 higher."""
    torch.manual_seed(0)
    made, inputs, lengths = StateSpaceBlock(SIZE, num_heads=2, state_size=3, gaps=True), torch.randn(1, 3, SIZE), None
    gaps = torch.full((1, 3, 1), 0.5)
    plain = made(inputs, lengths)
    torch.testing.assert_close(made(inputs, lengths, gap_RT1=gaps), plain, rtol=0, atol=0)
    made.by_gap.data.fill_(2.0)
    moved = made(inputs, lengths, gap_RT1=gaps)
    assert (moved != plain).any()
    made.step.bias.data.add_(1.0)
    torch.testing.assert_close(made(inputs, lengths), moved)


def timed(data: TrainingSequences, rows: list[list[int]], days: list[float]) -> TrainingSequences:
    """Users u, v, ... with such items, at such days."""
    times = (np.array(days) * DAY).astype(np.int64)
    return replace(data, sequences=Ragged.of(rows), users=tuple("uvw"[: len(rows)]), times=times)


def test_gaps_are_standardised_logarithms_of_days(data: TrainingSequences) -> None:
    """Gaps of 0 and of e - 1 days have logarithms 0 and 1: a deviation of 1/2 from their mean."""
    e = math.e
    made = timed(data, [[3, 5, 3], [7], [2, 4]], [0, 0, e - 1, 90, 10, 10])
    expected = [0.0, -(2**-0.5), 2**0.5, 0.0, 0.0, -(2**-0.5)]
    gaps = Gaps(made)
    assert gaps.training.values.tolist() == pytest.approx(expected, abs=1e-6)
    histories = Ragged.of([[5, 3, 9], [3, 7], [2, 4], [5], []])
    known = gaps.of(histories, ["u", "v", "w", "stranger", "u"])
    assert known.values.tolist() == pytest.approx([-(2**-0.5), 2**0.5, 0, 0, 0, 0, -(2**-0.5), 0], abs=1e-6)
    assert known.offsets.tolist() == histories.offsets.tolist()
    equal = Gaps(timed(data, [[3, 5, 3], [2, 4]], [0, 1, 2, 0, 1]))
    assert not equal.training.values.any(), "equal gaps say nothing"


def test_gaps_stand_beside_the_items_that_are_read(data: TrainingSequences) -> None:
    stage = stage_of(MMM4Rec(**SMALL, max_length=5), data)
    gaps, batch = Gaps(data), stage.stream.batch(0)
    assert batch.rows["gaps"].shape == batch.rows["items"].shape and batch.rows["gaps"].dtype == np.float32
    kept, of_rows = windows(data.sequences, 5), windows(gaps.training, 5)
    for row, window in enumerate(batch.examples):
        length = len(kept[window]) - 1
        assert batch.rows["items"][row, :length].tolist() == kept[window][:-1].tolist()
        assert batch.rows["gaps"][row, :length].tolist() == of_rows[window][:-1].tolist()


def with_images(folder: Path, data: TrainingSequences) -> str:
    vectors = np.random.default_rng(0).standard_normal((data.num_items, 6))
    np.savez(folder / "images.npz", item_id=np.array(data.item_ids), vectors=vectors)
    return str(folder / "images.npz")


@pytest.mark.parametrize("has_images", [False, True])
def test_streams_read_no_later_position_and_no_padding(
    has_images: bool, data: TrainingSequences, tmp_path: Path
) -> None:
    images = with_images(tmp_path, data) if has_images else ""
    stage = stage_of(MMM4Rec(**SMALL, num_layers=2, images=images), data)
    model = stage.trainable.module.eval()
    for name, parameter in model.named_parameters():
        if name.endswith("by_gap"):
            parameter.data.fill_(1.0)
    vectors = model.vectors()
    items, gaps = torch.tensor([[1, 2, 3, 4], [5, 6, 12, 12]]), torch.randn(2, 4)
    together = model.encode(vectors, {"items": items, "gaps": gaps})
    for row, length in ((0, 4), (1, 2)):
        alone = {"items": items[row : row + 1, :length], "gaps": gaps[row : row + 1, :length]}
        torch.testing.assert_close(model.encode(vectors, alone)[0], together[row], rtol=1e-5, atol=1e-5)
        other = alone | {"gaps": alone["gaps"] + 1}
        assert (model.encode(vectors, other)[0] != together[row]).any(), "states fade by gaps"
    rows = {"items": items[:1], "gaps": gaps[:1], "targets": torch.tensor([[9, 9, 9, 9]])}
    before, _ = model.states(vectors, rows)
    after, _ = model.states(vectors, rows | {"items": torch.tensor([[1, 2, 8, 8]])})
    torch.testing.assert_close(before[:2], after[:2], rtol=0, atol=0)
    assert (before[2:] != after[2:]).any(1).all()


def test_an_item_is_scored_by_its_text_and_its_image(data: TrainingSequences, tmp_path: Path) -> None:
    """Each scaled to length one: 3/5 + 4/5 of a state along the first and the second direction."""
    model = stage_of(MMM4Rec(**SMALL, images=with_images(tmp_path, data)), data).trainable.module
    for table, start in zip(model.items.tables, ([3.0, 4.0], [0.0, 7.0]), strict=True):
        nn.init.zeros_(table.adapter.weight)
        nn.init.zeros_(table.adapter.bias)
        table.rows.data[0, :2] = torch.tensor(start)
    vectors = model.vectors()
    assert vectors.items_VD[0, :3].tolist() == pytest.approx([0.6, 1.8, 0])
    assert vectors.inputs[0, [0, 1, 16, 17]].tolist() == [3, 4, 0, 7]
    blocks = {id(layer.block) for layer in model.encoder.layers}
    assert len(blocks) == 1 and len([name for name in model.state_dict() if name.endswith("log_rate")]) == 2


# ---- readings of SIGMA -----------------------------------------------------------------------------------------------


class Times(nn.Module):
    """Gives its input a number of times."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return self.number * hidden


def test_all_but_the_latest_events_stand_in_reverse_order_and_padding_stays() -> None:
    places = torch.arange(1.0, 7).expand(5, 6)[:, :, None]
    read = PartlyBackwards(Times(1), kept=2)(places, torch.tensor([6, 4, 3, 1, 0]))
    assert read[:, :, 0].tolist() == [
        [4, 3, 2, 1, 5, 6],
        [2, 1, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6],
    ]


def test_a_gate_by_hand() -> None:
    """With x = log 3, sigmoid(x) = 3/4: the gate is silu(x) + 2 sigmoid(x) = 3/4 log 3 + 3/2, and the block gives x."""
    gated = Gated(Times(1), 1, 0.0)
    for layer, weight in ((gated.dense, 0.0), (gated.of_silu, 1.0), (gated.of_sigmoid, 2.0)):
        layer.weight.data.fill_(weight)
        layer.bias.data.zero_()
    out = gated(torch.tensor([[[math.log(3)]]]), torch.tensor([1]))
    assert out.item() == pytest.approx(math.log(3) * (1 + 0.75 * math.log(3) + 1.5))


def test_readings_count_as_much_as_their_shares() -> None:
    """0.8 times 1 and 0.1 times 5 of 0.9 in all: 13 / 9."""
    mixture = Mixture({"forwards": Times(1), "recurrent": Times(5)}, 1)
    mixture.output.weight.data.fill_(1.0)
    mixture.output.bias.data.zero_()
    out = mixture(torch.ones(1, 1, 1), torch.tensor([1]))
    assert out.item() == pytest.approx(13 / 9)
    out.backward()
    assert mixture.log_share.grad is not None and mixture.log_share.grad.abs().min() > 0.1, "shares are learnt"


def test_a_convolved_event_reads_its_neighbours_of_the_row_alone() -> None:
    reading, inputs = ConvolvedGRU(1), torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1)
    reading.near.weight.data.fill_(1.0)
    reading.near.bias.data.zero_()
    seen: list[torch.Tensor] = []
    reading.gru.register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten()))
    for length in (3, 2):
        reading(inputs, torch.tensor([length]))
    assert [each.tolist() for each in seen] == [[11, 111, 110], [11, 11, 10]]


# ---- distances -------------------------------------------------------------------------------------------------------


class Still(Encoder):
    """Gives what it reads."""

    def embed(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return inputs_RTD

    def read(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return embedded_RTD

    def read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return embedded_RTD[:, 0]


def test_a_distance_score_by_hand() -> None:
    """On a line, vectors are mapped to points as far from the origin as they are long, and distances add up: the item
    of vector 1 is 1 from the origin, 0 from itself, and 3 from the point of -2."""
    table = IdTable(1, 1, num_special=0)
    table.table.weight.data.fill_(1.0)
    item = OnHyperboloid(table).vectors()
    assert item[0].tolist() == pytest.approx([math.cosh(1), math.sinh(1)])
    states = torch.tensor([[[math.nan, 0.0]], [[math.nan, math.sinh(1)]], [[math.nan, math.sinh(-2)]]])
    points = ToHyperboloid(Still()).last(states, torch.ones(3, dtype=torch.int64))
    assert distance_scores(points @ item.T).flatten().tolist() == pytest.approx([-4, -2, -20], abs=1e-3)


def test_the_softmax_of_distances_and_its_gradients_are_those_of_plain_formulas() -> None:
    torch.manual_seed(0)
    table = IdTable(7, 3, num_special=0).double()
    states = torch.randn(5, 1, 3, dtype=torch.float64, requires_grad=True)
    targets, lengths = torch.tensor([0, 6, 2, 2, 4]), torch.ones(5, dtype=torch.int64)
    points = ToHyperboloid(Still()).last(nn.functional.pad(states, (1, 0)), lengths)
    parameters = [states, table.table.weight]
    loss = nearest_item(points, targets, OnHyperboloid(table).vectors())
    found = torch.autograd.grad(loss, parameters)
    # By a distance formula of its own: 2 asinh(|difference| / 2), the length of the difference being a Lorentz one.
    space = states[:, 0]
    vectors = table.table.weight
    mapped = vectors.norm(dim=1, keepdim=True).sinh() * vectors / vectors.norm(dim=1, keepdim=True)
    time = [(1 + each.square().sum(1)).sqrt() for each in (space, mapped)]
    squared = (space[:, None] - mapped).square().sum(2) - (time[0][:, None] - time[1]).square()
    expected = nn.functional.cross_entropy(
        -2 * (2 * torch.asinh(squared.sqrt() / 2)).square(), targets, reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, parameters))


def test_an_item_at_the_place_of_the_state_has_a_gradient() -> None:
    table = IdTable(2, 2, num_special=0)
    table.table.weight.data = torch.tensor([[0.5, 0.0], [0.0, 3.0]])
    items = OnHyperboloid(table).vectors()
    states = (items[:1].detach() * torch.tensor([-1.0, 1.0, 1.0])).requires_grad_()
    nearest_item(states, torch.tensor([0]), items).backward()
    assert table.table.weight.grad is not None and states.grad is not None
    assert table.table.weight.grad.isfinite().all() and states.grad.isfinite().all()


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_heads_must_divide_the_inner_width() -> None:
    with pytest.raises(ConfigError, match=r"num_heads=3 must divide 2 \* hidden_size=16"):
        Mamba4Rec(hidden_size=8, num_heads=3)


def test_without_distances_it_learns_as_its_backbone_does(data: TrainingSequences) -> None:
    backbone = losses(stage_of(Mamba4Rec(**SMALL), data))
    assert losses(stage_of(HMamba(**SMALL, distance=False), data)) == backbone
    assert losses(stage_of(HMamba(**SMALL), data)) != backbone


def test_without_its_readings_and_gates_it_learns_as_its_backbone_does(data: TrainingSequences) -> None:
    """On the same rows, as every prefix is one for SIGMA."""
    off = {"backwards": False, "gates": False, "recurrent": False}
    alone = stage_of(SIGMA(**SMALL, **off), data)
    backbone = losses(stage_of(Mamba4Rec(**SMALL), data), alone.stream)
    assert losses(alone) == backbone
    for name in off:
        assert losses(stage_of(SIGMA(**SMALL, **off | {name: True}, kept=1), data)) != backbone, name
    with pytest.raises(ConfigError, match="kept=-1 must be 0 or more"):
        SIGMA(kept=-1)


def test_without_rows_and_gaps_it_learns_as_a_plain_network_over_texts(data: TrainingSequences) -> None:
    """That network, from shared parts: a linear layer of the texts, then layers of `StateSpace`, which adds the inputs
    of layers where there are several."""
    settings = MMM4Rec(**SMALL, num_layers=2, own_rows=False, gaps=False)
    alone = stage_of(settings, data)
    torch.manual_seed(0)
    texts = settings.frozen(data)
    table = FrozenTable(texts, nn.Linear(texts.shape[1], 16), num_special=1)
    blocks = [settings.block(), settings.block()]
    backbone = SequenceModel(table, StateSpace(16, blocks, settings.dropout))
    backbone.load_state_dict(renamed(alone.trainable.module.state_dict()))

    def scaled(hidden_ND: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return next_item("softmax", temperature=0.8)(hidden_ND, target_N, nn.functional.normalize(weight_VD, dim=1))

    expected = losses(settings.stage(data, backbone, {NEXT_ITEM: (1.0, scaled)}, alone.stream))
    assert losses(stage_of(settings, data)) == expected
    with_rows = losses(stage_of(replace(settings, own_rows=True), data))
    with_gaps = losses(stage_of(replace(settings, gaps=True), data))
    assert with_rows[0] == expected[0] and with_rows != expected, "rows start at zero"
    assert with_gaps != expected


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a network of one stream as those of `StateSpace` over one table."""
    names = {"items.tables.0": "items", "encoder.norms.0": "encoder.norm"}
    for layer in range(2):
        names |= {f"encoder.layers.{layer}.{part}": f"encoder.{whole}.{layer}" for part, whole in PARTS.items()}
    return {
        next(new + name.removeprefix(old) for old, new in names.items() if name.startswith(old + ".")): weight
        for name, weight in weights.items()
    }


PARTS = {"block": "mixers", "after": "after"}


def test_titles_that_say_nothing_are_refused_before_training(data: TrainingSequences) -> None:
    blank = replace(data, catalogue=replace(data.catalogue, title=np.full_like(data.catalogue.title, "")))
    with pytest.raises(Unsuitable, match="MMM4Rec reads titles, and those of domain 'ring' have no word"):
        MMM4Rec(**SMALL).stages(blank, 0)


def test_rankings_have_distances_as_scores(data: TrainingSequences) -> None:
    stage = stage_of(HMamba(**SMALL), data)
    scores = stage.recommender().score_histories(Ragged.of([[1, 2, 3], [4]]), ["", ""])
    model = stage.trainable.module.eval()
    vectors = model.vectors()
    state = model.encode(vectors, {"items": torch.tensor([[1, 2, 3]])})
    torch.testing.assert_close(scores[0], distance_scores(state @ vectors.items_VD.T)[0], rtol=1e-4, atol=1e-4)
    assert (scores <= -2).all()
