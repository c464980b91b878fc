"""An open language model as a recommender: its item head over titles, blended, without training the model itself."""

from __future__ import annotations

from pathlib import Path

from cprec.evaluate.config import EvaluateConfig
from cprec.rank.config import BlendConfig, RankConfig
from cprec.recipe import Recipe
from cprec.recipes.baselines import FOLDERS, prepared_for
from cprec.train.config import FinetuneConfig


def open_llm(
    *,
    data: Path,
    model: str = "HuggingFaceTB/SmolLM2-135M",
    output_dir: str = "runs/open_llm",
    domains: str = ",".join(FOLDERS),
) -> Recipe:
    """Beauty, Sports, Toys, Games, Scientific and MovieLens-100K: an open model with an item head; baselines."""
    prepared = f"{output_dir}/data"
    return Recipe(
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
        ),
        blend=BlendConfig(log_p=False, max_queries=2000),
        evaluate=EvaluateConfig(data=prepared, output_dir=output_dir, rank=RankConfig(mode="vectors")),
    )
