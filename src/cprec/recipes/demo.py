"""The two-command demonstration: every stage on the synthetic world, in minutes on two CPU cores."""

from __future__ import annotations

from cprec.data.config import SyntheticConfig
from cprec.evaluate.config import EvaluateConfig
from cprec.rank.config import BlendConfig, RankConfig
from cprec.recipe import Recipe
from cprec.text.config import PrepareConfig
from cprec.train.config import FinetuneConfig, PretrainConfig, TinyModel

SIZE = TinyModel(hidden_size=128, num_hidden_layers=2, num_attention_heads=4)


def demo(*, output_dir: str = "runs/demo", seed: int = 0) -> Recipe:
    """All stages on a synthetic world: pre-train on one platform, recommend in a seen and an unseen domain."""
    data = f"{output_dir}/data"
    world = SyntheticConfig(seed=seed)
    return Recipe(
        name="demo",
        description="does pre-training on all domains help a seen and an unseen domain?",
        prepare=PrepareConfig(
            output_dir=data,
            synthetic=world,
            pretrain_domains=("beauty", "garden", "kitchen", "sports", "toys"),
            target_domains=("kitchen", "books"),  # one seen, one of another platform and unseen
            vocabulary_size=512,  # so small that words are spelt from pieces: words of the unseen domain too
            max_title_tokens=16,
            max_document_tokens=256,
            min_events=3,
            min_history=1,
            seed=seed,
        ),
        pretrain=PretrainConfig(
            data=data,
            output_dir=f"{output_dir}/pretrain",
            tiny=SIZE,
            learning_rate=3e-3,
            num_train_epochs=1.5,
            max_length=256,
            train_batch_size=16,
            eval_steps=100,
            save_steps=200,
            seed=seed,
        ),
        finetune=FinetuneConfig(
            data=data,
            output_dir=f"{output_dir}/finetune",
            domain="kitchen",
            item_head=True,
            tiny=SIZE,
            learning_rate=2e-3,
            num_train_epochs=1,
            max_length=256,
            train_batch_size=16,
            eval_steps=50,
            save_steps=200,
            seed=seed,
        ),
        blend=BlendConfig(log_p=False, seed=seed),  # log P, too, would take minutes for each model
        evaluate=EvaluateConfig(
            data=data,
            output_dir=output_dir,
            baselines=("random", "popularity", "titles", "transition graph", "transition graph (titles)", "EASE"),
            rank=RankConfig(mode="vectors"),
            max_queries=1000,
            seed=seed,
        ),
    )
