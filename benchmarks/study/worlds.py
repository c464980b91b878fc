"""Where a study takes place: which domains there are, the size of the model, how much is trained and asked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cprec.data.config import SyntheticConfig, TableSource
from cprec.evaluate.config import EvaluateConfig
from cprec.rank.config import RankConfig
from cprec.recipe import Recipe
from cprec.recipes.amazon_small import source as table_of
from cprec.text.config import Mixture, PrepareConfig
from cprec.train.config import FinetuneConfig, PretrainConfig, TinyModel

POOL = {
    "beauty": "amazon14_beauty",
    "sports": "amazon14_sports",
    "toys": "amazon14_toys",
    "games": "amazon18_games",
    "giftcards": "amazon18_giftcards",
    "lastfm": "lastfm_hetrec",
    "movielens": "movielens_100k",
}
"""Domains to pre-train on, and the folder of each with its items.parquet and interactions.parquet."""
UNSEEN = {"scientific": "amazon18_scientific", "retail": "online_retail_uk", "steam": "steam_llara"}
"""Domains to recommend in that no pre-training reads."""
LEFT_OUT = ("toys", "lastfm")
"""Domains of the pool that are recommended in by models whose pre-training read all others."""
ORDER_ONLY = ("games", "lastfm", "scientific", "steam")
"""Domains whose times are only an order, so that they are not merged with others into mixed sequences."""


@dataclass(frozen=True, kw_only=True)
class World:
    """A study's domains and sizes."""

    recipe: Recipe
    """Data, model and settings that all arms share, pre-training on the whole pool."""
    main: tuple[str, ...]
    """Unseen domains that every arm is judged in."""
    left_out: tuple[str, ...]
    """Domains of the pool that are left out in turn."""
    subsets: dict[int, tuple[str, ...]]
    """Number of domains -> those that pre-training reads, for the arms that have fewer than the pool."""
    tokens: int
    """Tokens of the whole pre-training."""
    left_out_tokens: int
    """Tokens of a pre-training that leaves a domain out."""
    tuning_tokens: int
    """Tokens that fine-tuning on all events reads at most, where the passes of the recipe would read more."""
    few: dict[int, float]
    """Number of fine-tuning examples -> passes over them."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Every domain that is recommended in: unseen ones, then those left out in turn."""
        return (*self.recipe.prepare.target_domains, *self.left_out)

    def recipe_for(self, domain: str) -> Recipe:
        """The recipe whose pre-training has not seen a target: the shared one, or one without the domain."""
        if domain not in self.left_out:
            return self.recipe
        shared, root = self.recipe, f"{self.recipe.evaluate.output_dir}/without_{domain}"
        data = f"{root}/data"
        return replace(
            shared,
            name=f"{shared.name}, without {domain}",
            prepare=replace(
                shared.prepare,
                output_dir=data,
                tables=tuple(
                    table for table in shared.prepare.tables if table.domain in shared.prepare.pretrain_domains
                ),
                pretrain_domains=tuple(name for name in shared.prepare.pretrain_domains if name != domain),
                target_domains=(domain,),
            ),
            pretrain=replace(shared.pretrain, data=data, output_dir=f"{root}/pretrain"),
            finetune=replace(shared.finetune, data=data, output_dir=f"{root}/finetune"),
            evaluate=replace(shared.evaluate, data=data, output_dir=root),
        )


def tiny(data: Path, output_dir: str) -> World:
    """Public data and a decoder of 2.9 M parameters: about six hours of one core for the first questions."""
    prepared = f"{output_dir}/data"
    size = TinyModel(hidden_size=192, num_hidden_layers=3, num_attention_heads=6)
    training = {"data": prepared, "tiny": size, "max_length": 256, "train_batch_size": 16, "report_to": ("none",)}
    return World(
        recipe=Recipe(
            name="study",
            description="what CPRec's parts give on domains that pre-training never saw",
            prepare=PrepareConfig(
                output_dir=prepared,
                tables=tuple(source(data / folder, domain, folder) for domain, folder in {**POOL, **UNSEEN}.items()),
                pretrain_domains=tuple(POOL),
                target_domains=tuple(UNSEEN),
                k_core=0,  # the files are filtered already, or not meant to be
                drop_consecutive_repeats=False,
                max_title_tokens=8,
                min_events=3,
                min_history=1,
                workers=1,
            ),
            pretrain=PretrainConfig(
                **training,
                output_dir=f"{output_dir}/pretrain",
                learning_rate=3e-3,
                warmup_steps=50,
                mixture=Mixture(mixed_share=0.1),  # they are few, and would be read often
                anneal_steps=0.2,
                min_lr_ratio=0.05,
                eval_steps=250,
            ),
            finetune=FinetuneConfig(
                **training,
                output_dir=f"{output_dir}/finetune",
                domain="scientific",
                learning_rate=2e-3,
                num_train_epochs=4,
                documents="users",
                eval_steps=1000,
            ),
            evaluate=EvaluateConfig(
                data=prepared,
                output_dir=output_dir,
                max_queries=1000,
                rank=RankConfig(max_nodes=500),  # a model that has learnt little would read thousands of prefixes
            ),
        ),
        main=("scientific", "steam"),
        left_out=LEFT_OUT,
        subsets={
            1: ("sports",),
            3: ("sports", "games", "movielens"),
            5: ("sports", "games", "movielens", "beauty", "lastfm"),
        },
        tokens=10_000_000,
        left_out_tokens=3_000_000,
        tuning_tokens=1_400_000,
        few={64: 10, 256: 6, 1024: 4},
    )


def small(output_dir: str) -> World:
    """The generated world and models that learn nearly nothing: every path of the study in minutes."""
    prepared = f"{output_dir}/data"
    size = TinyModel(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    training = {"data": prepared, "tiny": size, "max_length": 128, "train_batch_size": 8, "report_to": ("none",)}
    pool = ("beauty", "garden", "kitchen", "sports", "toys")
    return World(
        recipe=Recipe(
            name="small study",
            description="every path of the study, on a generated world",
            prepare=PrepareConfig(
                output_dir=prepared,
                synthetic=SyntheticConfig(num_market_users=150, num_library_users=60, items_per_domain=30),
                pretrain_domains=pool,
                target_domains=("books",),
                k_core=0,
                vocabulary_size=400,
                max_title_tokens=8,
                max_document_tokens=128,
                min_events=3,
                min_history=1,
                heldout_share=0.05,
                workers=1,
            ),
            pretrain=PretrainConfig(
                **training,
                output_dir=f"{output_dir}/pretrain",
                learning_rate=1e-2,
                warmup_steps=2,
                anneal_steps=0.2,
                min_lr_ratio=0.05,
                eval_steps=10,
            ),
            finetune=FinetuneConfig(
                **training,
                output_dir=f"{output_dir}/finetune",
                domain="books",
                learning_rate=1e-2,
                num_train_epochs=1,
                documents="users",
            ),
            evaluate=EvaluateConfig(data=prepared, output_dir=output_dir, max_queries=30),
        ),
        main=("books",),
        left_out=("toys",),
        subsets={1: pool[3:4], 3: pool[1:4], 5: pool},
        tokens=60_000,
        left_out_tokens=15_000,
        tuning_tokens=2_000,
        few={64: 1, 256: 1, 1024: 1},
    )


def source(folder: Path, domain: str, name: str) -> TableSource:
    """A domain's folder, ties in the order that the source has; the platform is the first word of the folder's name."""
    platform = name.partition("_")[0].rstrip("0123456789")
    timestamps: Literal["order", "seconds"] = "order" if domain in ORDER_ONLY else "seconds"
    return replace(table_of(folder, domain, platform), timestamps=timestamps)
