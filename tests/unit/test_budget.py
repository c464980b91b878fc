"""Hours of training as passes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cprec import budget
from cprec.budget import CHOSEN, within_hours
from cprec.config import find_config
from cprec.errors import ConfigError, Unsuitable
from cprec.evaluate.config import EvaluateConfig
from cprec.recipe import Recipe
from cprec.recipes.open_llm import open_llm
from cprec.train.run import general_text_of


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Two domains of 1,000 and 2,000 tokens a pass, at 100 tokens a second of which 80 are reached. Item heads take no
    time."""
    monkeypatch.setattr(budget, "timed", lambda config: SimpleNamespace(tokens_per_second=100.0))
    monkeypatch.setattr(budget, "tokens_of_pass", lambda config: {"beauty": 1000, "toys": 2000}[config.domain])
    monkeypatch.setattr(budget, "read_shard_manifest", lambda folder: {"num_tokens": 6000})
    monkeypatch.setattr(budget, "read_split", lambda data: "split")
    monkeypatch.setattr(budget, "seconds_to_train", lambda split, domain, seed: 0.0)
    return open_llm(data=tmp_path, model="tiny", domains="beauty,toys", output_dir=str(tmp_path / "run"), hours=0.1)


def passes(recipe: Recipe) -> tuple[float, float]:
    assert recipe.finetune is not None
    pretraining = recipe.pretrain.num_train_epochs if recipe.pretrain else 0
    return pretraining, recipe.finetune.num_train_epochs


def test_pretraining_has_half_and_models_divide_the_rest(recipe: Recipe) -> None:
    # 0.1 hours are 28,800 tokens; two arms in two domains read 6,000 a pass.
    assert passes(within_hours(recipe)) == pytest.approx((2.4, 2.4))


def test_every_seed_is_a_model(recipe: Recipe) -> None:
    seeds = replace(recipe, evaluate=replace(recipe.evaluate, seeds=(0, 1, 2)))
    assert passes(within_hours(seeds)) == pytest.approx((2.4, 0.8))


def test_without_pretraining_all_is_for_fine_tuning(recipe: Recipe) -> None:
    assert passes(within_hours(replace(recipe, pretrain=None, hours=0.05))) == pytest.approx((0, 4.8))


def test_item_heads_are_trained_within_the_hours(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each network of each model of each domain, and the head of pre-training where there is one."""

    def seconds(split: str, domain: str, seed: int) -> float:
        if domain == "toys":
            raise Unsuitable("nothing to learn from")
        return 12.0

    monkeypatch.setattr(budget, "seconds_to_train", seconds)
    monkeypatch.setattr(budget, "seconds_of_head", lambda config: 24.0)

    def left(**changes: Any) -> float:
        """The share of 360 seconds that is left for passes."""
        return passes(within_hours(replace(recipe, **changes)))[0] / 2.4

    assert recipe.finetune is not None and recipe.pretrain is not None and recipe.finetune.head_networks == 3
    # Two models of three networks take 72 seconds, of which 0.8 are reached: 90.
    assert left() == pytest.approx(270 / 360)
    assert "item heads take about 1.5 minutes" in capsys.readouterr().err
    elsewhere = [replace(recipe.evaluate, output_dir=f"{recipe.evaluate.output_dir}{n}") for n in range(4)]
    again = replace(elsewhere[3], refit=True)  # every head is trained twice
    assert left(evaluate=again) == pytest.approx(180 / 360)
    none = replace(recipe.finetune, item_head=False)
    assert left(finetune=none, evaluate=elsewhere[0]) == pytest.approx(1)
    first = replace(recipe.pretrain, item_head=True)
    assert left(pretrain=first, evaluate=elsewhere[1]) == pytest.approx(240 / 360)
    with pytest.raises(ConfigError, match="item head of pre-training was False, now True"):
        left(pretrain=first)
    with pytest.raises(ConfigError, match=r"hours=0\.02, less 0\.025 of item heads, are 0 tokens at 80 a second: too"):
        left(hours=0.02, evaluate=elsewhere[2])


def test_what_was_chosen_stays(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    first = within_hours(recipe)
    monkeypatch.setattr(budget, "timed", lambda config: SimpleNamespace(tokens_per_second=7.0))
    assert within_hours(recipe) == first
    path = Path(recipe.evaluate.output_dir, CHOSEN)
    assert json.loads(path.read_text())["asked"]["hours"] == 0.1
    with pytest.raises(ConfigError, match=r"budget\.json was chosen for something else \(hours was 0\.1, now 0\.2\): "):
        within_hours(replace(recipe, hours=0.2))
    with pytest.raises(ConfigError, match="models of a domain was 2, now 4"):
        within_hours(replace(recipe, evaluate=replace(recipe.evaluate, seeds=(0, 1))))
    monkeypatch.setattr(budget, "tokens_of_pass", lambda config: 1500)
    with pytest.raises(ConfigError, match="tokens of a pass was {'beauty': 1000, 'toys': 2000}, now {'beauty': 1500"):
        within_hours(recipe)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="hours was None, now 0.1"):
        within_hours(recipe)


def test_passes_have_bounds(recipe: Recipe) -> None:
    assert passes(within_hours(replace(recipe, hours=10))) == (5, 5)
    elsewhere = replace(recipe, evaluate=replace(recipe.evaluate, output_dir=recipe.evaluate.output_dir + "2"))
    with pytest.raises(ConfigError, match="too few to train each model, of which a pass has 1,000 tokens and more"):
        within_hours(replace(elsewhere, hours=1e-6))
    assert not Path(elsewhere.evaluate.output_dir).exists()


def test_hours_are_of_a_whole_run(tmp_path: Path) -> None:
    settings = [f"data={tmp_path}", "model=tiny", "hours=1"]
    with pytest.raises(ConfigError, match="hours=1 are of the whole run: use `cprec run`"):
        find_config("open_llm", settings, "pretrain")
    with pytest.raises(ConfigError, match="arm=tokens_10 and hours=1: arms are compared after equal passes"):
        find_config("open_llm", [*settings, "arm=tokens_10"])


def test_hours_need_a_model_to_train(recipe: Recipe) -> None:
    settings = {"name": "x", "description": "", "prepare": recipe.prepare, "evaluate": recipe.evaluate}
    assert isinstance(recipe.evaluate, EvaluateConfig)
    with pytest.raises(ConfigError, match="hours=1 must be 0 or more, and 0 where no language model is trained"):
        Recipe(**settings, hours=1)
    with pytest.raises(ConfigError, match="hours=-1 must be 0 or more"):
        replace(recipe, hours=-1)


def test_replayed_text_is_kept_by_the_cut_and_read_in_pretraining(tmp_path: Path) -> None:
    recipe = open_llm(data=tmp_path, model="big", domains="toys", hours=1, text="general.jsonl")
    assert recipe.shrink is not None and recipe.shrink.text == ("general.jsonl",)
    assert recipe.pretrain is not None and recipe.pretrain.replay == ("general.jsonl",)
    assert recipe.pretrain.mixture.text_share == 0.05
    assert open_llm(data=tmp_path, model="big", domains="toys", hours=1).pretrain is None
    plain = open_llm(data=tmp_path, model="big", domains="toys,beauty", hours=1)
    for stage in (recipe.pretrain, recipe.finetune, plain.pretrain, plain.finetune):
        assert stage is not None and general_text_of(stage) == "", (
            "forgetting is measured on our own text, replay or not"
        )
    with pytest.raises(ConfigError, match="text=general.jsonl is read again in training, and hours=0 trains nothing"):
        open_llm(data=tmp_path, text="general.jsonl")
