"""Every baseline on six domains, full catalogue, with intervals: the table to stand beside a model of one's own."""

from __future__ import annotations

from pathlib import Path

from cprec.errors import ConfigError
from cprec.evaluate.config import EvaluateConfig
from cprec.recipe import Recipe
from cprec.recipes.amazon_small import FOLDERS as AMAZON
from cprec.recipes.amazon_small import source
from cprec.text.config import TINY, PrepareConfig

FOLDERS = {**AMAZON, "movielens": "movielens_100k"}
"""Domain -> the folder with its items.parquet and interactions.parquet."""
PLATFORMS = {"movielens": "movielens"}
"""Domains whose users are other people than Amazon's."""


def baselines(*, data: Path, output_dir: str = "runs/baselines", domains: str = ",".join(FOLDERS)) -> Recipe:
    """Beauty, Sports, Toys, Games, Scientific and MovieLens-100K, leave-one-out in the published order of ties."""
    prepared = prepared_for(data, f"{output_dir}/data", domains)
    return Recipe(
        name="baselines",
        description="what baselines reach under one protocol",
        prepare=prepared,
        evaluate=EvaluateConfig(data=prepared.output_dir, output_dir=output_dir, baselines=("all",)),
    )


def prepared_for(data: Path, output_dir: str, domains: str, tokenizer: str = TINY) -> PrepareConfig:
    """The settings that all rows of these domains share. Raises ConfigError for a domain that there is not."""
    names = tuple(name.strip() for name in domains.split(","))
    if unknown := [name for name in names if name not in FOLDERS]:
        raise ConfigError(f"domains: there is no {unknown[0]!r}; there are {', '.join(FOLDERS)}")
    return PrepareConfig(
        output_dir=output_dir,
        tables=tuple(source(Path(data) / FOLDERS[name], name, PLATFORMS.get(name, "amazon")) for name in names),
        target_domains=names,
        tokenizer=tokenizer,
        k_core=0,  # the files are 5-core already
        drop_consecutive_repeats=False,  # as the published splits
        max_title_tokens=8,
        min_events=3,
        min_history=1,
    )
