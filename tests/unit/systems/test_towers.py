"""HLLM and Lite-LLM4Rec: their loss by hand, what a step reads, and SASRec over frozen vectors as their control."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.models import tiny_model
from cprec.systems.dot_product import DotProductRecommender
from cprec.systems.encoders import Mean
from cprec.systems.items import IdTable
from cprec.systems.language import TextTable
from cprec.systems.recipes.hllm import HLLM, LITE
from cprec.systems.recipes.title_sasrec import TitleSASRec
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.systems.towers import TowerLoss, TowerModel, against_drawn
from cprec.text.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("in_fp32")
SMALL: dict[str, Any] = {"hidden_size": 16, "batch_size": 16, "max_length": 6, "num_heads": 2, "num_epochs": 1}
FROZEN: dict[str, Any] = {**SMALL, "frozen_layers": 2, "cosine": False, "num_negatives": 0}


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)


def stage_of(settings: HLLM | TitleSASRec, data: TrainingSequences) -> Stage:
    torch.manual_seed(0)
    (stage,) = settings.stages(data, 3)
    return stage


def trained(stage: Stage, num_steps: int = 3) -> list[float]:
    """The losses of some steps."""
    optimizer = torch.optim.AdamW(stage.trainable.parameter_groups(0.05), lr=1e-2)
    found = []
    for step in range(num_steps):
        torch.manual_seed(step)
        batch = stage.stream.batch(step)
        rows = {name: torch.from_numpy(array) for name, array in batch.rows.items()}
        loss = sum(stage.trainable.losses(rows).values(), torch.zeros(()))
        (loss / batch.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand() -> None:
    """Three items at 0, 4 and 90 degrees: the first two are too near each other, with a cosine of 0.9976, to be set
    against each other. Of four that are drawn, the first target has item 2 against it twice, the second one items 0
    and 1."""
    angle = torch.tensor([0.0, 4.0, 90.0]).deg2rad()
    items_VD = 3 * torch.stack([angle.cos(), angle.sin()], dim=1)
    states_ND, target_N = torch.tensor([[0.2, 0.1], [0.0, 0.3]]), torch.tensor([0, 2])
    drawn_M = torch.tensor([0, 1, 2, 2])
    first = math.log(math.exp(0.6) + 2 * math.exp(0.3)) - 0.6
    of_item_1 = 0.9 * math.sin(math.radians(4))
    second = math.log(math.exp(0.9) + math.exp(0.0) + math.exp(of_item_1)) - 0.9
    found = against_drawn(states_ND, items_VD, target_N, drawn_M, 0.99)
    torch.testing.assert_close(found, torch.tensor(first + second))
    near = 0.6 * math.cos(math.radians(4)) + 0.3 * math.sin(math.radians(4))
    first = math.log(math.exp(0.6) + math.exp(near) + 2 * math.exp(0.3)) - 0.6
    found = against_drawn(states_ND, items_VD, target_N, drawn_M, 1.0)
    torch.testing.assert_close(found, torch.tensor(first + second), msg="the target itself never counts")


def test_where_all_that_is_drawn_is_too_near_there_is_nothing_to_learn() -> None:
    states_ND = torch.ones(1, 2, requires_grad=True)
    loss = against_drawn(states_ND, torch.ones(3, 2), torch.tensor([0]), torch.tensor([1, 2, 0]), 0.99)
    loss.backward()
    assert loss == 0
    assert states_ND.grad is not None and not states_ND.grad.any()


def test_scores_are_cosines_times_a_number_that_is_bounded(data: TrainingSequences) -> None:
    torch.manual_seed(0)
    model = TowerModel(IdTable(data.num_items, 4), Mean(0.0), cosine=True)
    recommender = DotProductRecommender("two towers", data, model, 5)
    history, table = data.sequences.take(np.array([0])), model.items.vectors().detach()
    state = table[torch.from_numpy(history[0][-5:])].mean(0)
    cosines = F.cosine_similarity(state, table[: data.num_items])
    torch.testing.assert_close(recommender.score_histories(history, ["nobody"])[0], cosines / 0.07)
    assert model.log_scale is not None
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    torch.testing.assert_close(recommender.score_histories(history, ["nobody"])[0], cosines * 100)


@pytest.mark.parametrize("settings", [HLLM(**SMALL, num_negatives=2), LITE], ids=["HLLM", "Lite-LLM4Rec"])
def test_a_step_reads_the_titles_that_it_needs(
    settings: HLLM, data: TrainingSequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its losses are those of a model that reads all. One title, the first, tells what is common to all."""
    monkeypatch.setattr("cprec.systems.language.COMMON", 1)
    stage = stage_of(replace(settings, **SMALL | {"batch_size": 2, "dropout": 0.0, "attention_dropout": 0.0}), data)
    model, asked = stage.trainable.module, []
    assert isinstance(model, TowerModel) and isinstance(model.items, TextTable)
    rows = {name: torch.from_numpy(array[:, :2]) for name, array in stage.stream.batch(0).rows.items()}
    model.items.reader.register_forward_pre_hook(lambda _, given: asked.append(set(given[0].tolist())))
    torch.manual_seed(1)
    found = stage.trainable.losses(rows)["next_item"]
    torch.manual_seed(1)
    drawn = torch.randint(data.num_items, (2,))
    needed = {0, *rows["items"].flatten().tolist()}
    if settings.tied:
        needed |= {*rows["targets"].flatten().tolist(), *drawn.tolist()}
    assert asked == [needed - {-100, data.num_items}]
    assert len(asked[0]) < data.num_items
    vectors = model.vectors()
    states_ND, target_N = model.states(vectors, rows)
    if settings.tied:
        expected = against_drawn(states_ND, vectors.items_VD, target_N, drawn, 0.99)
    else:
        expected = F.cross_entropy(states_ND @ vectors.items_VD.T, target_N, reduction="sum")
    torch.testing.assert_close(found, expected)


# ---- what is trained -------------------------------------------------------------------------------------------------


def test_wholly_frozen_it_is_sasrec_over_frozen_vectors(data: TrainingSequences, tmp_path: Path) -> None:
    """With products and the softmax over all items; the vectors of titles are those of the same language model."""
    stage = stage_of(HLLM(**FROZEN), data)
    table = stage.trainable.module.items
    assert isinstance(table, TextTable)
    vectors_VK = table.states(torch.arange(data.num_items)).numpy()
    np.savez(tmp_path / "titles.npz", item_id=np.array(data.item_ids), vectors=vectors_VK)
    control = TitleSASRec(**SMALL, vectors=str(tmp_path / "titles.npz"), sampled_items=0, min_steps=0)
    found = trained(stage)
    assert found == trained(stage_of(control, data))
    assert found[0] != found[2]


def test_the_language_model_learns_with_the_rest(data: TrainingSequences) -> None:
    frozen, whole = (stage_of(HLLM(**FROZEN | {"frozen_layers": layers}), data) for layers in (2, 1))
    first, *later = trained(whole)
    assert first == pytest.approx(trained(frozen)[0])
    assert later != trained(frozen)[1:]


@pytest.fixture
def base(data: TrainingSequences, tmp_path: Path) -> str:
    tokenizer = train_tokenizer([f" {title}" for title in data.titles], 300)
    model = tiny_model(len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, seed=4)
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_a_base_learns_at_its_own_rate(base: str, data: TrainingSequences) -> None:
    trainable = stage_of(HLLM(**SMALL, base=base, language_rate=0.2, reader="base"), data).trainable
    shares = {
        id(weight): group["rate_share"] for group in trainable.parameter_groups(0.1) for weight in group["params"]
    }
    for name, weight in trainable.module.named_parameters():
        assert not weight.requires_grad or shares[id(weight)] == (0.2 if ".blocks.trunk." in name else 1.0)
    assert set(shares.values()) == {0.2, 1.0}


def test_the_loop_gives_each_group_its_share_of_the_rate(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    step, rates = torch.optim.AdamW.step, []

    def noted(self: torch.optim.AdamW, *given: Any) -> None:
        rates.append({group["rate_share"]: group["lr"] for group in self.param_groups})
        step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    HLLM(**SMALL | {"num_epochs": 0.1}, num_negatives=2, learning_rate=0.01, language_rate=0.25).make(split, "ring")
    assert rates and all(found[0.25] == found[1.0] / 4 for found in rates)
    assert max(found[1.0] for found in rates) == pytest.approx(0.01)


@pytest.mark.slow
def test_low_rank_matrices_learn_in_place_of_the_base(base: str, data: TrainingSequences) -> None:
    settings = HLLM(**SMALL, base=base, reader="base", frozen_layers=1, lora_rank=2, language_rate=1.0)
    stage = stage_of(settings, data)
    language = {name: w for name, w in stage.trainable.module.named_parameters() if ".blocks.trunk." in name}
    before = {name: weight.detach().clone() for name, weight in language.items()}
    trained(stage)
    changed = {name for name, weight in language.items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in language if "lora_" in name}
    assert {name.partition(".")[0] for name in changed} == {"items", "encoder"}


@pytest.mark.slow
def test_a_kill_in_training_changes_nothing(
    base: str, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares of the learning rate and frozen blocks are those of before."""
    settings = HLLM(**SMALL | {"num_epochs": 2}, base=base, frozen_layers=1, num_negatives=4)
    whole = settings.make(split, "ring", folder=tmp_path / "whole")
    losses, steps = TowerLoss.losses, []

    def dies(self: Any, rows: Any) -> Any:
        steps.append(1)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return losses(self, rows)

    monkeypatch.setattr(TowerLoss, "losses", dies)
    with pytest.raises(KeyboardInterrupt):
        settings.make(split, "ring", folder=tmp_path / "killed")
    resumed = settings.make(split, "ring", folder=tmp_path / "killed")
    assert len(steps) == 7 + 1 + 12, "the last checkpoint is that of step 4 of 16"
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):  # type: ignore[attr-defined]
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pool": "last"}, "pool='last': expected end or mean"),
        ({"reader": "llm"}, "reader='llm': expected own or base"),
        ({"too_near": 2.0}, "too_near=2.0 must be a cosine"),
        ({"lora_rank": 4}, "lora_rank=4 needs a base"),
        ({"layers": 1.5}, "layers=1.5 must be a fraction below 1 or a whole number"),
        ({"language_rate": 0.0}, "language_rate=0.0 must be above 0"),
        ({"num_negatives": -1}, "num_negatives=-1 must not be below 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HLLM(**wrong)
