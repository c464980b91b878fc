"""A base model trained on text alone: from random weights, or healed after its layers were cut."""

from __future__ import annotations

from cprec.evaluate.config import EvaluateConfig
from cprec.recipe import Recipe
from cprec.recipes.amazon_small import SIZE
from cprec.text.config import TINY, PrepareConfig
from cprec.train.config import PretrainConfig

ROW = 512
"""Tokens of a row, and of a document at most: longer texts are cut into pieces of nearly equal length."""


def base_text(*, text: tuple[str, ...], model: str, output_dir: str = "runs/base_text") -> Recipe:
    """General and product text, to train a base model on: `tiny` from random weights, or one that `shrink` cut."""
    data, is_tiny = f"{output_dir}/data", model == TINY
    return Recipe(
        name="base_text",
        description="a base model trained on text alone",
        prepare=PrepareConfig(
            output_dir=data,
            text=text,
            target_domains=(),
            tokenizer=model,
            max_document_tokens=ROW,
            heldout_share=0.01,
        ),
        pretrain=PretrainConfig(
            data=data,
            output_dir=f"{output_dir}/pretrain",
            model_name_or_path=model,
            tiny=SIZE,
            learning_rate=3e-3 if is_tiny else 2e-4,
            max_length=ROW,
            train_batch_size=16 if is_tiny else 8,
            save_steps=100,
        ),
        blend=None,
        evaluate=EvaluateConfig(data=data, output_dir=output_dir),
    )
