"""A run's models: which are made, with which seeds, and where they go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cprec import run
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
    monkeypatch.setattr("cprec.blend.blend", lambda config: None)
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
