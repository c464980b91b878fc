"""A recipe: everything that a run needs, one configuration per stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from cprec.evaluate.config import EvaluateConfig
    from cprec.text.config import PrepareConfig
    from cprec.train.config import FinetuneConfig, PretrainConfig

STAGE_CONFIGS = {
    "prepare": "cprec.text.config:PrepareConfig",
    "pretrain": "cprec.train.config:PretrainConfig",
    "finetune": "cprec.train.config:FinetuneConfig",
    "evaluate": "cprec.evaluate.config:EvaluateConfig",
    "anneal": "cprec.anneal:AnnealConfig",
    "tune": "cprec.tune:TuneConfig",
    "recommend": "cprec.serve.config:RecommendConfig",
    "serve": "cprec.serve.config:ServeConfig",
}
"""Where each stage's configuration class lives: `module:class`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete run: one configuration per stage. A recipe that needs more subclasses it and adds fields."""

    name: str
    """The recipe's name, as on the command line."""
    description: str
    """What the run shows, in one sentence."""
    prepare: PrepareConfig
    """From raw logs to token shards, examples and queries."""
    pretrain: PretrainConfig | None = None
    """Continual pre-training on the token shards; None where nothing is pre-trained."""
    finetune: FinetuneConfig | None = None
    """Fine-tuning on next-item examples of a domain; None where the recipe trains no language model."""
    evaluate: EvaluateConfig
    """Ranking the held-out queries, and the numbers made from the rankings."""

    LAZY_TYPES: ClassVar[Mapping[str, str]] = {
        stage: STAGE_CONFIGS[stage] for stage in ("prepare", "pretrain", "finetune", "evaluate")
    }
