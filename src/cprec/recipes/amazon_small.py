"""Four Amazon domains to pre-train on, an unseen fifth to recommend in; a decoder small enough for two CPU cores."""

from __future__ import annotations

from pathlib import Path

from cprec.data.config import TableSource
from cprec.evaluate.config import EvaluateConfig
from cprec.recipe import Recipe
from cprec.text.config import Mixture, PrepareConfig
from cprec.train.config import FinetuneConfig, PretrainConfig, TinyModel

FOLDERS = {
    "beauty": "amazon14_beauty",
    "sports": "amazon14_sports",
    "toys": "amazon14_toys",
    "games": "amazon18_games",
    "scientific": "amazon18_scientific",
}
"""Domain -> the folder with its items.parquet and interactions.parquet."""

ORDER_ONLY = ("games", "scientific")
"""Domains whose times are only an order, so that they cannot be merged with others into mixed sequences."""

SIZE = TinyModel(hidden_size=192, num_hidden_layers=3, num_attention_heads=6)
"""2.9 M parameters with 8,192 tokens: what two cores train to a flat held-out perplexity (docs/experiments.md)."""


def source(folder: Path, domain: str, platform: str) -> TableSource:
    """A domain's folder with items.parquet and interactions.parquet, ties in the order that the source has."""
    return TableSource(
        domain=domain,
        platform=platform,
        interactions=str(folder / "interactions.parquet"),
        items=str(folder / "items.parquet"),
        columns={"order": "position"},
        timestamps="order" if domain in ORDER_ONLY else "seconds",
    )


def amazon_small(*, data: Path, output_dir: str = "runs/amazon_small") -> Recipe:
    """Beauty, Sports, Toys and Games (5-core reviews) to pre-train on; Scientific, unseen, to recommend in."""
    prepared = f"{output_dir}/data"
    return Recipe(
        name="amazon_small",
        description="what pre-training on four Amazon domains gives an unseen fifth",
        prepare=PrepareConfig(
            output_dir=prepared,
            tables=tuple(source(Path(data) / folder, domain, "amazon") for domain, folder in FOLDERS.items()),
            pretrain_domains=("beauty", "sports", "toys", "games"),
            target_domains=("scientific",),
            k_core=0,  # the files are 5-core already
            drop_consecutive_repeats=False,  # as the published splits
            max_title_tokens=8,
            min_events=3,  # most users have five events, and two of those are held out
            min_history=1,
        ),
        pretrain=PretrainConfig(
            data=prepared,
            output_dir=f"{output_dir}/pretrain",
            tiny=SIZE,
            learning_rate=3e-3,
            num_train_epochs=3,
            warmup_steps=259,
            mixture=Mixture(mixed_share=0.1),  # they are few: at half of the tokens each would be read 29 times
            anneal_steps=0.2,
            min_lr_ratio=0.05,
            max_length=256,
            train_batch_size=16,
            save_steps=500,
            eval_steps=500,
        ),
        finetune=FinetuneConfig(
            data=prepared,
            output_dir=f"{output_dir}/finetune",
            domain="scientific",
            tiny=SIZE,
            learning_rate=2e-3,
            num_train_epochs=3,
            max_length=256,
            train_batch_size=16,
            save_steps=500,
            eval_steps=100,
        ),
        evaluate=EvaluateConfig(data=prepared, output_dir=output_dir, max_queries=4000),
    )
