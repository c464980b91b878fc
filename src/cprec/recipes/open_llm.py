"""An open language model as a recommender: an item head over titles and a blend; if asked, the model is trained too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cprec.errors import ConfigError
from cprec.evaluate.config import EvaluateConfig
from cprec.rank.config import BlendConfig, RankConfig
from cprec.recipe import Recipe
from cprec.recipes.amazon_small import SIZE
from cprec.recipes.baselines import FOLDERS, prepared_for
from cprec.text.config import TINY, Mixture
from cprec.train.config import FinetuneConfig, PretrainConfig, ShrinkConfig

WALKS = ("transition graph", "transition graph (two hops)", "transition graph (titles)")
WORDS = "SASRec (titles x3)"
"""The control: networks like those of the item head, over words."""
BLENDED = (*BlendConfig.parts, WORDS)
"""With the control among them, what the model adds to the blend comes from the model."""
FROZEN = 0.4
"""Share of the layers that are not trained: the item head reads titles by these."""

REPLAYED = 0.05
"""Share of general text among the tokens of pre-training, where there is some: against forgetting."""

TEACHERS = ("transition graph (titles)", "EASE")
"""What chooses a second title after each event in fine-tuning: from the log's next titles alone a language model learns
more slowly (docs/experiments.md, "With trees and teachers")."""

EVALUATED = 5_000
"""Held-out tokens of a domain that are read to measure perplexity: more would take much of the hours."""


def open_llm(
    *,
    data: Path,
    model: str = "HuggingFaceTB/SmolLM2-135M",
    output_dir: str = "runs/open_llm",
    domains: str = ",".join(FOLDERS),
    hours: float = 0.0,
    text: str = "",
) -> Recipe:
    """Beauty, Sports, Toys, Games, Scientific and MovieLens-100K: an open model, as it is or trained for some hours."""
    if text and not hours:
        raise ConfigError(f"text={text} is read again in training, and hours=0 trains nothing: give hours, as hours=4")
    prepared = f"{output_dir}/data"
    recipe = Recipe(
        name="open_llm",
        description="what an open language model adds to the best recommenders without one",
        prepare=prepared_for(data, prepared, domains, tokenizer=model),
        finetune=FinetuneConfig(
            data=prepared,
            output_dir=f"{output_dir}/finetune",
            domain="",
            model_name_or_path=model,
            num_train_epochs=0,
            item_head=True,
            head_networks=3,
        ),
        blend=BlendConfig(parts=BLENDED, log_p=False, max_queries=8000),
        evaluate=EvaluateConfig(
            data=prepared,
            output_dir=output_dir,
            baselines=("popularity", "titles", *WALKS, "ItemKNN", "EASE", WORDS),
            rank=RankConfig(mode="vectors"),
        ),
    )
    return _trained(recipe, model, hours, (text,) if text else ()) if hours else recipe


def _trained(recipe: Recipe, model: str, hours: float, text: tuple[str, ...]) -> Recipe:
    """The recipe with a cut vocabulary, continual pre-training where there are several domains or there is `text`, and
    fine-tuning. The model then ranks by decoding, which takes a second a query or so: fewer queries are asked."""
    assert recipe.finetune is not None
    folder, is_tiny = recipe.evaluate.output_dir, model == TINY
    smaller = model if is_tiny else f"{folder}/model"
    pretrain = PretrainConfig(
        data=recipe.finetune.data,
        output_dir=f"{folder}/pretrain",
        model_name_or_path=smaller,
        tiny=SIZE,
        frozen_layers=0 if is_tiny else FROZEN,
        learning_rate=3e-3 if is_tiny else 2e-4,
        max_length=256,
        train_batch_size=16 if is_tiny else 8,
        save_steps=100,
        eval_tokens=EVALUATED,
        replay=text,
        mixture=Mixture(text_share=REPLAYED if text else 0),
    )
    finetune = replace(
        recipe.finetune,
        documents="trees",
        teachers=TEACHERS,
        taught_targets=1,
        model_name_or_path=smaller,
        tiny=SIZE,
        frozen_layers=pretrain.frozen_layers,
        learning_rate=2e-3 if is_tiny else 4e-4,
        num_train_epochs=1,
        max_length=512,
        train_batch_size=8 if is_tiny else 4,
        save_steps=100,
        eval_tokens=EVALUATED,
    )
    whole = f"{recipe.prepare.output_dir}-whole"
    return replace(
        recipe,
        shrink=None if is_tiny else ShrinkConfig(model=model, output_dir=smaller, data=whole, text=text),
        prepare=replace(recipe.prepare, tokenizer=smaller, title_cut="distinct"),
        pretrain=pretrain if text or len(recipe.prepare.target_domains) > 1 else None,
        finetune=finetune,
        blend=BlendConfig(parts=BLENDED, max_queries=500),
        evaluate=replace(recipe.evaluate, rank=RankConfig(), max_queries=2000),
        hours=hours,
    )
