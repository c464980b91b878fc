"""Systems with latent steps: what each adds to its backbone, and controls of the same cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cprec.choices import can_be
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.systems.batches import PrefixStream
from cprec.systems.dot_product import SequenceModel, settled
from cprec.systems.encoders import LatentSteps, SelfAttention
from cprec.systems.graph import ItemGraph, Prompts
from cprec.systems.intents import Distiller, IntentSteps, Reading
from cprec.systems.recipes import igrsr, mancar, rearec
from cprec.systems.recipes.igrsr import IGRSR
from cprec.systems.recipes.latent import LatentSettings
from cprec.systems.recipes.mancar import ManCAR
from cprec.systems.recipes.rearec import ReaRec
from cprec.systems.recipes.sasrec import WIDE, SASRec
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage, WeightedTerms
from cprec.systems.terms import next_item, same_history

pytestmark = pytest.mark.usefixtures("in_fp32")
SMALL: dict[str, Any] = {"hidden_size": 16, "batch_size": 16, "max_length": 6, "dropout": 0.0}


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)


def stages_of(settings: LatentSettings | SASRec, data: TrainingSequences) -> Sequence[Stage]:
    torch.manual_seed(0)
    return settings.stages(data, 3)


def rows_of(stage: Stage, step: int = 0) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in stage.stream.batch(step).rows.items()}


def model_of(stage: Stage) -> SequenceModel:
    module = stage.trainable.module
    model = module["model"] if isinstance(module, torch.nn.ModuleDict) else module  # beside teachers
    assert isinstance(model, SequenceModel)
    return model


def states_of(stage: Stage, rows: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """States of training rows and the vectors of all items."""
    model = model_of(stage)
    vectors = model.vectors()
    return model.states(vectors, rows)[0], vectors.items_VD


def losses(trainable: Any, rows: Mapping[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(trainable.losses(rows))


# ---- what is left without steps is the backbone ----------------------------------------------------------------------

ABLATED: list[LatentSettings] = [
    ReaRec(num_steps=0),
    replace(rearec.PROGRESSIVE, num_steps=0),
    ManCAR(num_steps=0, graph_weight=0.0, num_latest=0),
    IGRSR(num_steps=0),
]


@pytest.mark.parametrize("settings", ABLATED, ids=lambda settings: type(settings).__name__)
def test_without_steps_the_losses_are_those_of_the_backbone(settings: LatentSettings, data: TrainingSequences) -> None:
    settings = replace(settings, **{**SMALL, "dropout": 0.3})
    first, second = stages_of(settings, data)
    torch.manual_seed(0)
    backbone = SequenceModel(*settings.parts(data.num_items))
    plain = WeightedTerms(backbone, {NEXT_ITEM: (1.0, next_item("softmax"))})
    prefixes = PrefixStream(data, [NEXT_ITEM], settings.max_length, settings.passes(3))
    sasrec = replace(WIDE, **{**SMALL, "dropout": 0.3}, num_heads=settings.num_heads, num_epochs=settings.first_epochs)
    (windows,) = stages_of(sasrec, data)
    for step in range(3):
        rows = {name: torch.from_numpy(array) for name, array in prefixes.batch(step).rows.items()}
        assert losses(second.trainable, rows_of(second, step)) == losses(plain, rows)
        assert losses(first.trainable, rows_of(first, step)) == losses(windows.trainable, rows_of(windows, step))


# ---- controls of the same cost ---------------------------------------------------------------------------------------


def operations(settings: LatentSettings, data: TrainingSequences) -> int:
    """Floating-point operations of the encoder for one full history."""
    model = model_of(stages_of(settings, data)[-1]).eval().requires_grad_(False)
    items = torch.arange(settings.max_length)[None] % data.num_items
    vectors = model.vectors()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode(vectors, {"items": items})
    return counter.get_total_flops()


CONTROLS: list[tuple[LatentSettings, LatentSettings]] = [
    (ReaRec(), rearec.CONTROL),
    (ManCAR(stop_below=0.0), replace(mancar.CONTROL, stop_below=0.0)),  # to stop needs products with all items
    (IGRSR(), igrsr.CONTROL),
]


@pytest.mark.parametrize(("settings", "control"), CONTROLS)
def test_a_control_has_as_many_blocks_as_come_nearest_in_operations(
    settings: LatentSettings, control: LatentSettings, data: TrainingSequences
) -> None:
    wanted, num_blocks = operations(settings, data), control.num_blocks
    gaps = {
        blocks: abs(operations(replace(control, num_blocks=blocks), data) - wanted)
        for blocks in range(num_blocks - 1, num_blocks + 2)
    }
    assert min(gaps, key=lambda blocks: gaps[blocks]) == num_blocks
    assert gaps[num_blocks] < 0.15 * wanted
    assert replace(control, num_steps=settings.num_steps, num_blocks=settings.num_blocks) == settings
    for name in ("num_steps", "num_blocks"):
        assert not can_be(control.SEARCH[name], getattr(control, name)), "tuning would undo it"


# ---- the smallest data -----------------------------------------------------------------------------------------------


SMALLEST: list[LatentSettings] = [ReaRec(), rearec.PROGRESSIVE, ManCAR(), IGRSR()]


@pytest.mark.parametrize("settings", SMALLEST, ids=["ensemble", "progressive", "ManCAR", "IGR-SR"])
@pytest.mark.parametrize(("histories", "num_items"), [([[0, 0, 0, 0, 0]], 1), ([[0, 1, 2, 3, 4]], 6)])
def test_one_user_is_enough_and_so_is_one_item(
    settings: LatentSettings, histories: list[list[int]], num_items: int, split_of: Callable[..., Split]
) -> None:
    """Scores are finite, and of one item alone nothing can be wrong: it is the first."""
    split = split_of(histories, num_items)
    settings = replace(settings, **SMALL, num_epochs=2, first_epochs=1)
    recommender = settings.make(split, "tiny")
    scores = recommender.score_histories(Ragged.of([[0], []]), ["p/u0", ""])
    assert scores.shape == (2, num_items) and scores.isfinite().all()
    better, tied = recommender.target_ranks(Ragged.of([[0]]), np.array([0]), users=["p/u0"], exclude_seen=False)
    assert (better[0] == 0 and tied[0] == 1) or num_items > 1


@pytest.mark.parametrize("settings", [ReaRec(), ManCAR(), IGRSR()], ids=lambda settings: type(settings).__name__)
def test_users_with_one_training_event_each_are_nothing_to_train_on(
    settings: LatentSettings, split_of: Callable[..., Split]
) -> None:
    with pytest.raises(Unsuitable, match="nothing to train on"):
        settings.make(split_of([[0, 1, 2], [1, 2, 0]], 3), "tiny")


# ---- ReaRec ----------------------------------------------------------------------------------------------------------


def test_noise_stands_in_the_thoughts_of_a_second_row_in_training_alone() -> None:
    torch.manual_seed(0)
    encoder = SelfAttention(8, max_length=5, num_blocks=2, num_heads=2, dropout=0.0, causal=True)
    steps, inputs, lengths = LatentSteps(encoder, 2, 8, noise=0.5), torch.randn(2, 4, 8), torch.tensor([4, 2])
    torch.manual_seed(7)
    states = steps.train().last(inputs, lengths)
    torch.manual_seed(7)
    noise = torch.randn(2, 8), torch.randn(2, 8)
    clean = steps.eval().last(inputs, lengths)
    assert states.shape == (2, 5, 8) and clean.shape == (2, 3, 8)
    torch.testing.assert_close(states[:, :3], clean)
    read = encoder.embed(inputs[1:, :2], lengths[1:])
    for number in range(2):
        thought = clean[1, number] + steps.step.weight[number] + 0.5 * noise[number][1]
        read = torch.cat([read, thought[None, None]], 1)
        torch.testing.assert_close(states[1, 3 + number], encoder.read(read, lengths[1:] + number + 1)[0, -1])


def test_earlier_states_learn_the_target_at_higher_temperatures(data: TrainingSequences) -> None:
    settings = replace(rearec.PROGRESSIVE, **SMALL, temperature=0.5, sharpening=3.0)
    stage = stages_of(settings, data)[-1]
    rows = rows_of(stage)
    found = losses(stage.trainable, rows)
    torch.manual_seed(1)
    states, items = states_of(stage, rows)
    target = rows["targets"]
    scores = states @ items.T

    def entropy(place: int, temperature: float) -> torch.Tensor:
        return F.cross_entropy(scores[:, place] / temperature, target, reduction="sum")

    torch.testing.assert_close(found[NEXT_ITEM], entropy(2, 0.5))
    torch.testing.assert_close(found["early"], (entropy(0, 0.5 * 9) + entropy(1, 0.5 * 3)) / 2)
    assert stage.stream.batch(0).whole, "rows are contrasted"
    history = {"items": rows["items"]}
    model = stage.trainable.module.eval()
    assert isinstance(model, SequenceModel)
    torch.testing.assert_close(model.encode(model.vectors(), history), states[:, 2], rtol=1e-4, atol=1e-5)


def test_a_state_is_told_from_those_of_other_histories() -> None:
    """Two histories of one pair each, at right angles: each has its partner and two others."""
    states = torch.tensor([[[5.0, 5.0], [1.0, 0.0], [2.0, 0.0]], [[5.0, 5.0], [0.0, 1.0], [0.0, 3.0]]])
    ends = torch.zeros(2), torch.zeros(4, 2)
    # The partner scores 2 and 3 (cosine: 1 and 1), the two others 0.
    expected = sum(torch.tensor([partner, 0.0, 0.0]).logsumexp(0) - partner for partner in (2.0, 3.0))
    torch.testing.assert_close(same_history(1, 1.0)(states, *ends), expected)
    cosine = 2 * (torch.tensor([2.0, 0.0, 0.0]).logsumexp(0) - 2.0)
    torch.testing.assert_close(same_history(1, 0.5, cosine=True)(states, *ends), cosine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": -1}, "num_steps=-1 must not be below 0"),
        ({"early_weight": 1.0}, "early_weight=1.0 with progressive=False: that variant has no such term"),
        ({"progressive": True}, "likeness_weight=0.01 with progressive=True"),
        ({"noise": 0.0}, "noise=0.0 must be above 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ReaRec(**settings)


# ---- ManCAR ----------------------------------------------------------------------------------------------------------

TRIANGLE = Ragged.of([[0, 1, 2], [0, 1], [3, 3]])
"""Item 1 comes after 0 twice, and 2 after 0 and 1 once; 3 comes after itself alone, and 4 never."""


def test_neighbours_are_ranked_by_their_links_without_the_item_itself() -> None:
    graph = ItemGraph(TRIANGLE, 5, 3)
    # g(0, 1) = 2 / sqrt(2 * 2) and g(0, 2) = 0.5 / sqrt(2); g(1, 0) = 1 / sqrt(2 * 2) and g(1, 2) = 1 / sqrt(2);
    # g(2, 0) = 0.25 / sqrt(2) and g(2, 1) = 0.5 / sqrt(2).
    assert graph.neighbours(torch.arange(7)).tolist() == [[1, 2, 5], [2, 0, 5], [1, 0, 5], *[[5, 5, 5]] * 4]


def test_a_soft_target_narrows_from_the_neighbours_to_the_target() -> None:
    graph = ItemGraph(TRIANGLE, 5, 3)
    last, target = torch.tensor([0, 0, 3]), torch.tensor([4, 1, 2])
    e = math.e
    # After 0: its neighbours 1 and 2. The target 1 is not its own neighbour. 3 has none.
    for width, far in ((1.0, [1 / e, 1 / e**2]), (2.0, [1 / e**0.5, 1 / e])):
        items, chances = graph.soft_targets(last, target, width)
        assert items.tolist() == [[4, 1, 2, 4], [1, 1, 2, 1], [2, 2, 2, 2]]
        first = [1 / (1 + sum(far)), far[0] / (1 + sum(far)), far[1] / (1 + sum(far)), 0]
        second = [1 / (1 + far[0]), 0, far[0] / (1 + far[0]), 0]
        torch.testing.assert_close(chances, torch.tensor([first, second, [1, 0, 0, 0]]))


def test_a_graph_teaches_each_state_its_own_width(data: TrainingSequences) -> None:
    settings = ManCAR(**SMALL, temperature=0.5, num_neighbours=4, graph_weight=0.3)
    stage = stages_of(settings, data)[-1]
    rows = rows_of(stage)
    found = losses(stage.trainable, rows)
    torch.manual_seed(1)
    states, items = states_of(stage, rows)
    logs, scores, target = (states @ items.T / 0.5).log_softmax(-1), states @ items.T, rows["targets"]
    entropies, divergences = [], []
    graph = ItemGraph(data.sequences, data.num_items, 4)
    for place, width in enumerate((3, 2, 1)):
        entropies.append(F.cross_entropy(scores[:, place] / (0.5 * (place + 1) ** 2), target, reduction="sum"))
        for row in range(len(target)):
            last = rows["items"][row][rows["items"][row] != data.num_items][-1]
            others = [n for n in graph.neighbours(last).tolist() if n not in (data.num_items, target[row])]
            chances = torch.tensor([math.exp(-rank / width) for rank in range(len(others) + 1)])
            chances /= chances.sum()
            chosen = logs[row, place, [int(target[row]), *others]]
            divergences.append((chances * (chances.log() - chosen)).sum())
    torch.testing.assert_close(found[NEXT_ITEM], torch.stack(entropies).mean())
    torch.testing.assert_close(found["graph"], 0.3 * torch.stack(divergences).sum())


def test_without_links_soft_targets_are_the_targets_and_no_prompt_is_read() -> None:
    """Users with one event each link nothing: all that is left of the graph is the cross-entropy."""
    graph = ItemGraph(Ragged.of([[0], [1], [2]]), 3, 2)
    items, chances = graph.soft_targets(torch.tensor([0, 3]), torch.tensor([1, 2]), 2.0)
    assert items[:, 0].tolist() == [1, 2] and chances.tolist() == [[1, 0, 0], [1, 0, 0]]
    rows, vectors = torch.tensor([[0, 2], [1, 3]]), torch.randn(5, 4)
    read, lengths = Prompts(graph, 2, 2, 4)(rows, vectors)
    assert lengths.tolist() == [2, 1]
    torch.testing.assert_close(read[0, :2], vectors[[0, 2]])
    torch.testing.assert_close(read[1, :1], vectors[[1]])


def test_prompts_stand_before_the_history_without_gaps() -> None:
    prompts, vectors = Prompts(ItemGraph(TRIANGLE, 5, 3), 2, 2, 4), torch.randn(7, 4)
    torch.nn.init.ones_(prompts.kind_D)
    read, lengths = prompts(torch.tensor([[4, 3, 1], [0, 5, 5], [5, 5, 5]]), vectors)
    assert lengths.tolist() == [5, 3, 0]
    # The latest two of the first row are 3, which has no neighbour, and 1 with 2 and 0; the second row has 0 alone.
    torch.testing.assert_close(read[0, :5], torch.cat([vectors[[2, 0]] + 1, vectors[[4, 3, 1]]]))
    torch.testing.assert_close(read[1, :3], torch.cat([vectors[[1, 2]] + 1, vectors[[0]]]))


def test_the_first_state_that_hardly_moves_the_distribution_answers() -> None:
    """Over two items with scores (x, 0) the distributions are those of a coin with the chance sigmoid(x)."""
    items = torch.tensor([[1.0, 0.0], [0.0, 0.0]])

    def states(*scores: float) -> torch.Tensor:
        return torch.tensor([[score, float(place)] for place, score in enumerate(scores)])

    rows = torch.stack([states(0, 2, 2.1, 2.1), states(1, 1, 3, 3), states(0, 2, 0, 2), states(0, 1, 2, 0)])
    # From 2 to 2.1 the chance goes from 0.8808 to 0.8909: a divergence of 0.0005.
    found = settled(rows, items, stop_below=0.03, temperature=1.0)
    assert found[:, 1].tolist() == [2, 1, 3, 3]
    assert settled(rows, items, stop_below=0.0004, temperature=1.0)[:, 1].tolist() == [3, 1, 3, 3]
    assert settled(rows, items, stop_below=0.03, temperature=50.0)[:, 1].tolist() == [1, 1, 1, 1], "all nearly even"
    assert settled(rows, items, stop_below=0.0, temperature=1.0)[:, 1].tolist() == [3, 3, 3, 3]
    assert settled(rows[:, :1], items, stop_below=0.03, temperature=1.0)[:, 1].tolist() == [0, 0, 0, 0]


# ---- IGR-SR ----------------------------------------------------------------------------------------------------------


def intent_steps(num_steps: int, mask_share: float = 0.0) -> IntentSteps:
    torch.manual_seed(0)
    encoder = SelfAttention(8, max_length=5, num_blocks=2, num_heads=2, dropout=0.0, causal=True)
    distiller = Distiller(encoder, 8, num_prefix=2, num_intents=3)
    return IntentSteps(encoder, distiller, 8, num_steps=num_steps, num_heads=1, dropout=0.0, mask_share=mask_share)


@torch.no_grad()
def test_intents_are_the_states_of_slots_after_prefix_and_history() -> None:
    steps, inputs, lengths = intent_steps(1), torch.randn(2, 4, 8), torch.tensor([4, 2])
    found = steps.distiller(inputs, lengths)
    for row, length in enumerate(lengths.tolist()):
        history = steps.encoder.embed(inputs[row : row + 1, :length], lengths[row : row + 1])[0]
        read = torch.cat([steps.distiller.prefix_PD, history, steps.distiller.slot_MD])[None]
        slots = steps.encoder.read(read, torch.tensor([length + 5]))[0, -3:]
        torch.testing.assert_close(found[row], steps.distiller.project(slots))
    for parameter in steps.encoder.parameters():
        parameter.add_(1)
    torch.testing.assert_close(steps.distiller(inputs, lengths), found, msg="a copy is read, not what goes on learning")


@torch.no_grad()
def test_a_step_reads_the_intents_then_the_history() -> None:
    steps, inputs, lengths = intent_steps(1), torch.randn(1, 4, 8), torch.tensor([3])
    plain = steps.encoder.last(inputs, lengths)
    torch.testing.assert_close(steps.last(inputs, lengths)[:, 0], plain, msg="it begins at the encoder")
    for layer in (steps.from_intents.output, steps.from_history.output, steps.second):
        torch.nn.init.normal_(layer.weight)

    def read(part: Reading, state: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        key, value = part.key_value(others).chunk(2, -1)
        found: torch.Tensor = part.output((part.query(part.norm(state)) @ key.T / 8**0.5).softmax(-1) @ value)
        return found

    step, history = steps.step.weight[0], steps.encoder(inputs, lengths)[0, :3]
    state = plain[0] + read(steps.from_intents, plain[0] + step, steps.distiller(inputs, lengths)[0])
    state = state + read(steps.from_history, state + step, history)
    state = state + steps.second(F.gelu(steps.first(steps.norm(state))))
    torch.testing.assert_close(steps.last(inputs, lengths)[0, 0], state)


def test_only_tokens_learn_where_intents_are_distilled() -> None:
    steps, inputs = intent_steps(1, mask_share=0.5), torch.randn(2, 4, 8, requires_grad=True)
    states = steps.train().last(inputs, torch.tensor([4, 2]))
    assert states.shape == (2, 1 + 2 * 3, 8) and steps.eval().last(inputs, torch.tensor([4, 2])).shape == (2, 1, 8)
    states[:, 1:].square().sum().backward()
    learnt = {
        name for name, parameter in steps.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    projections = {f"distiller.project.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert learnt == {"mask_D", "distiller.prefix_PD", "distiller.slot_MD", *projections}
    assert inputs.grad is None or not inputs.grad.any()


@torch.no_grad()
def test_copies_differ_in_their_masks_alone() -> None:
    inputs, lengths = torch.randn(3, 4, 8), torch.tensor([4, 2, 3])
    for share, alike in ((0.5, False), (1.0, True)):
        steps = intent_steps(1, mask_share=share).train()
        first, second = steps.last(inputs, lengths)[:, 1:].chunk(2, 1)
        assert torch.allclose(first, second, atol=1e-6) == alike, "with all items masked nothing tells them apart"
    steps.mask_D.copy_(inputs[0, 0])
    of_one_item = steps.distiller(inputs[:1, :1].expand(1, 4, 8), lengths[:1])
    torch.testing.assert_close(steps.last(inputs, lengths)[:1, 1:4], of_one_item)


def test_the_frozen_encoder_is_that_of_the_first_stage(split: Split, tmp_path: Path) -> None:
    settings = IGRSR(**SMALL, num_epochs=0.5, first_epochs=1)
    recommender = settings.make(split, "ring", folder=tmp_path)
    (weights,) = tmp_path.glob("*/stage-1/best.safetensors")
    first, last = load_file(weights), recommender.model.state_dict()  # type: ignore[attr-defined]
    names = [name.removeprefix("encoder.") for name in first if name.startswith("encoder.blocks")]
    assert names
    for name in names:
        torch.testing.assert_close(last[f"encoder.distiller.encoder.{name}"], first[f"encoder.{name}"], rtol=0, atol=0)
    assert any(not torch.equal(last[f"encoder.encoder.{name}"], first[f"encoder.{name}"]) for name in names)
    again, histories = settings.make(split, "ring", folder=tmp_path), Ragged.of([[0, 1, 2], [5]])
    scores = [made.score_histories(histories, ["", ""]) for made in (recommender, again)]  # type: ignore[attr-defined]
    torch.testing.assert_close(*scores)
