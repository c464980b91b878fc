"""CoVE: items as tokens of a language model, against that model with more tokens, and SASRec as its control."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cprec.batch import IGNORE
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.models import tiny_model
from cprec.systems.dot_product import DotProductRecommender
from cprec.systems.language import mean_rows
from cprec.systems.recipes.cove import CoVE
from cprec.systems.recipes.sasrec import SASRec
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.text.tokenizer import train_tokenizer

SMALL: dict[str, Any] = {"hidden_size": 16, "batch_size": 16, "max_length": 6, "num_heads": 2, "num_epochs": 1}


@pytest.fixture(autouse=True)
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cprec.distributed.use_bf16", lambda setting, device: False)


@pytest.fixture
def base(data: TrainingSequences, tmp_path: Path) -> str:
    tokenizer = train_tokenizer([f" {title}" for title in data.titles], 300)
    model = tiny_model(len(tokenizer), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, seed=4)
    for part in (tokenizer, model):
        part.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def stage_of(settings: CoVE | SASRec, data: TrainingSequences) -> Stage:
    torch.manual_seed(0)
    (stage,) = settings.stages(data, 3)
    return stage


def rows_of(stage: Stage, step: int = 0) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in stage.stream.batch(step).rows.items()}


def trained(stage: Stage, num_steps: int = 3) -> list[float]:
    """The losses of some steps."""
    optimizer = torch.optim.AdamW(stage.trainable.parameter_groups(0.05), lr=1e-2)
    found = []
    for step in range(num_steps):
        torch.manual_seed(step)
        loss = sum(stage.trainable.losses(rows_of(stage, step)).values(), torch.zeros(()))
        (loss / 16).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def test_rows_begin_as_means_of_title_tokens() -> None:
    rows_TF = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 4.0]])
    titles = Ragged.of([[1, 1, 2, 0], [], [2]])
    # The one without a title: halfway between (1/2, 1) and (0, 4).
    expected = torch.tensor([[0.5, 1.0], [0.25, 2.5], [0.0, 4.0]])
    torch.testing.assert_close(mean_rows(titles, rows_TF), expected)


def test_it_is_the_language_model_with_a_token_more_for_each_item(base: str, data: TrainingSequences) -> None:
    """Its loss and its scores are those of the base after `resize_token_embeddings`."""
    settings = CoVE(**SMALL, base=base, dropout=0.0)
    stage = stage_of(settings, data)
    language = settings.language(data, 3)
    model, first = language.model.eval(), language.model.get_input_embeddings().num_embeddings
    rows = [model.get_input_embeddings().weight.detach().clone(), model.get_output_embeddings().weight.detach().clone()]
    model.config.tie_word_embeddings = False
    model.resize_token_embeddings(first + data.num_items, mean_resizing=False)
    with torch.no_grad():
        for module, of_tokens in zip((model.get_input_embeddings(), model.get_output_embeddings()), rows, strict=True):
            for item in range(data.num_items):
                module.weight[first + item] = of_tokens[torch.from_numpy(language.titles[item].copy())].mean(0)
        batch, expected = rows_of(stage), torch.zeros(())
        for items, targets in zip(batch["items"], batch["targets"], strict=True):
            history = items[items < data.num_items]
            logits = model(first + history[None]).logits[0, :, first:]
            expected += F.cross_entropy(logits, targets[: len(history)], reduction="sum", ignore_index=IGNORE)
        stage.trainable.module.eval()
        torch.testing.assert_close(stage.trainable.losses(batch)["next_item"], expected, rtol=1e-5, atol=1e-4)
        history = data.sequences.take(np.array([1]))
        recommender = DotProductRecommender("CoVE", data, stage.trainable.module, 6)  # type: ignore[arg-type]
        logits = model(first + torch.from_numpy(history[0][-6:])[None]).logits[0, -1, first:]
        torch.testing.assert_close(recommender.score_histories(history, ["nobody"])[0], logits, rtol=1e-5, atol=1e-5)


def test_with_a_reader_of_its_own_it_is_sasrec_with_two_vectors_of_an_item(data: TrainingSequences) -> None:
    shape: dict[str, Any] = {**SMALL, "dropout": 0.3, "block": "pre_norm", "attention_dropout": 0.0}
    found = trained(stage_of(CoVE(**shape, reader="own"), data))
    control = SASRec(**shape, tied=False, min_steps=0)
    assert found == trained(stage_of(control, data))
    assert found[0] != found[2]


def test_what_learns_is_what_was_asked(base: str, data: TrainingSequences) -> None:
    settings = CoVE(**SMALL, base=base, layers=2)
    items = {"items.table.weight", "output.table.weight"}
    for changes, learnt in (
        ({}, {"layers.0", "layers.1", "norm"}),
        ({"frozen_layers": 1}, {"layers.1", "norm"}),
        ({"lora_rank": 2}, {"layers.0", "layers.1"}),
    ):
        trainable = stage_of(replace(settings, **changes), data).trainable
        named = {name for name, weight in trainable.module.named_parameters() if weight.requires_grad}
        assert items < named
        language = {name.partition("trunk.")[2] for name in named - items}
        assert {
            name if name == "norm" else ".".join(name.split(".")[:2])
            for name in (n.removesuffix(".weight") for n in language)
        } == learnt
        assert ("lora_rank" in changes) == all("lora_" in name for name in language)
        shares = {id(w): group["rate_share"] for group in trainable.parameter_groups(0.1) for w in group["params"]}
        for name, weight in trainable.module.named_parameters():
            assert not weight.requires_grad or shares[id(weight)] == (1.0 if name in items else 0.1)
    one, other = (trained(stage_of(replace(settings, from_titles=begin), data), 1) for begin in (True, False))
    assert one != other


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reader": "llm"}, "reader='llm': expected base or own"),
        ({"lora_rank": 4}, "lora_rank=4 needs a base"),
        ({"reader": "own", "base": "some/base"}, "base=some/base is not read with reader=own"),
        ({"layers": 1.5}, "layers=1.5 must be a fraction below 1 or a whole number"),
        ({"language_rate": 0.0}, "language_rate=0.0 must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CoVE(**wrong)


def test_adapters_of_frozen_layers_are_frozen(base: str, data: TrainingSequences) -> None:
    stage = stage_of(CoVE(**SMALL | {"base": base, "lora_rank": 2, "frozen_layers": 2}), data)
    weights = stage.trainable.module.named_parameters()
    learnt = {name.partition("layers.")[2][0] for name, weight in weights if weight.requires_grad and "lora_" in name}
    assert learnt == {"2"}


def test_a_base_that_is_too_small_is_refused(base: str, data: TrainingSequences) -> None:
    for changes, message in (
        ({"layers": 4}, "layers=4 means 4 blocks, and the language model has 3"),
        ({"max_length": 5000}, "max_length=5000, and the language model reads"),
        ({"base": "/nowhere/at/all"}, "base=/nowhere/at/all cannot be used"),
    ):
        with pytest.raises(ConfigError, match=message):
            CoVE(**SMALL | {"base": base} | changes).stages(data, 0)
