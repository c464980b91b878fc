"""Systems with latent steps: what each adds to its backbone, and controls of the same cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cprec.choices import can_be
from cprec.errors import ConfigError
from cprec.systems.dot_product import SequenceModel
from cprec.systems.encoders import LatentSteps, SelfAttention
from cprec.systems.fit import NEXT_ITEM, Stage, WeightedTerms
from cprec.systems.recipes import rearec
from cprec.systems.recipes.latent import LatentSettings
from cprec.systems.recipes.rearec import ReaRec
from cprec.systems.recipes.sasrec import SASRec
from cprec.systems.signals import PrefixStream, TrainingSequences
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


def states_of(stage: Stage, rows: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """States of training rows and the vectors of all items."""
    model = stage.trainable.module
    assert isinstance(model, SequenceModel)
    vectors = model.vectors()
    return model.states(vectors, rows)[0], vectors.items_VD


def losses(trainable: Any, rows: Mapping[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(trainable.losses(rows))


# ---- what is left without steps is the backbone ----------------------------------------------------------------------

ABLATED: list[LatentSettings] = [
    ReaRec(num_steps=0),
    replace(rearec.PROGRESSIVE, num_steps=0),
]


@pytest.mark.parametrize("settings", ABLATED, ids=lambda settings: type(settings).__name__)
def test_without_steps_the_losses_are_those_of_the_backbone(settings: LatentSettings, data: TrainingSequences) -> None:
    settings = replace(settings, **{**SMALL, "dropout": 0.3})
    first, second = stages_of(settings, data)
    torch.manual_seed(0)
    backbone = SequenceModel(*settings.parts(data.num_items))
    plain = WeightedTerms(backbone, {NEXT_ITEM: (1.0, next_item("softmax"))})
    prefixes = PrefixStream(data, [NEXT_ITEM], settings.max_length, settings.passes(3))
    sasrec = SASRec(**{**SMALL, "dropout": 0.3}, num_heads=settings.num_heads, num_epochs=settings.first_epochs)
    (windows,) = stages_of(sasrec, data)
    for step in range(3):
        rows = {name: torch.from_numpy(array) for name, array in prefixes.batch(step).rows.items()}
        assert losses(second.trainable, rows_of(second, step)) == losses(plain, rows)
        assert losses(first.trainable, rows_of(first, step)) == losses(windows.trainable, rows_of(windows, step))


# ---- controls of the same cost ---------------------------------------------------------------------------------------


def operations(settings: LatentSettings, data: TrainingSequences) -> int:
    """Floating-point operations of the encoder for one full history."""
    model = stages_of(settings, data)[-1].trainable.module.eval()
    assert isinstance(model, SequenceModel)
    items = torch.arange(settings.max_length)[None] % data.num_items
    vectors = model.vectors()
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.encode(vectors, {"items": items})
    return counter.get_total_flops()


CONTROLS: list[tuple[LatentSettings, LatentSettings]] = [(ReaRec(), rearec.CONTROL)]


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
