"""A run's models: which are made, with which seeds, and where they go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cprec import run
from cprec.errors import ConfigError
from cprec.recipe import Recipe
from cprec.recipes.demo import demo
from cprec.train.config import FinetuneConfig


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FinetuneConfig]:
    """The models that were asked for; none is made."""
    asked: list[FinetuneConfig] = []

    def note(config: FinetuneConfig) -> Path:
        asked.append(config)
        return Path(config.output_dir)

    monkeypatch.setattr("cprec.finetune.finetune", note)
    monkeypatch.setattr("cprec.blend.blend", lambda config, networks: None)
    return asked


def arms(recipe: Recipe) -> dict[str, str]:
    return run._arms(recipe, "books", iter(["[1/1]"]))


def test_a_run_of_one_seed_has_the_seed_of_fine_tuning(made: list[FinetuneConfig]) -> None:
    folders = arms(demo(output_dir="out", seed=7))
    assert list(folders) == ["fine-tuning only", "CPRec-style"]
    assert [(config.seed, config.output_dir) for config in made] == [(7, folder) for folder in folders.values()]


def test_every_model_is_made_with_every_seed(made: list[FinetuneConfig]) -> None:
    recipe = demo(output_dir="out")
    folders = arms(replace(recipe, evaluate=replace(recipe.evaluate, seeds=(1, 4))))
    assert folders["CPRec-style (seed 4)"] == "out/finetune/books/cprec-style-seed-4"
    several = replace(recipe, evaluate=replace(recipe.evaluate, seeds=(1, 4)))
    assert several.model_folder("books", "CPRec-style") == folders["CPRec-style (seed 1)"]  # what is served
    assert {(config.model_name_or_path, config.seed) for config in made} == {
        ("tiny", 1),
        ("tiny", 4),
        ("out/pretrain", 1),
        ("out/pretrain", 4),
    }
    assert len(set(folders.values())) == len(folders) == 4


def test_a_run_ranks_the_domains_asked_for(
    made: list[FinetuneConfig], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ranked: list[dict[str, dict[str, str]]] = []
    for stage in ("text.prepare.prepare", "pretrain.pretrain"):
        monkeypatch.setattr(f"cprec.{stage}", lambda config, networks=None: None)
    monkeypatch.setattr(run, "_report", lambda config, models, runs, **given: ranked.append(models))
    recipe = demo(output_dir="out")
    first, second = recipe.prepare.target_domains
    run.run(replace(recipe, evaluate=replace(recipe.evaluate, domains=(second,), models={"mine": "elsewhere"})))
    run.run(recipe)
    assert [list(models) for models in ranked] == [[second], [first, second]]
    assert capfd.readouterr().err.count("evaluate.models are left out") == 1
    with pytest.raises(ConfigError, match="evaluate.domains: 'garden' is no target domain; there are "):
        run.run(replace(recipe, evaluate=replace(recipe.evaluate, domains=("garden",))))
