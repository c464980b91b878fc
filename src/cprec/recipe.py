"""A recipe: everything that a run needs, one configuration per stage."""

from __future__ import annotations

import dataclasses

from cprec.baselines.config import TuneConfig
from cprec.errors import ConfigError
from cprec.evaluate.config import EvaluateConfig
from cprec.fit.config import FitConfig
from cprec.rank.config import BlendConfig, RefitConfig
from cprec.serve.config import RecommendConfig, ServeConfig
from cprec.text.config import PrepareConfig
from cprec.train.config import AnnealConfig, DistilConfig, FinetuneConfig, PretrainConfig, ShrinkConfig

STAGE_CONFIGS: dict[str, type] = {
    "prepare": PrepareConfig,
    "shrink": ShrinkConfig,
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "distil": DistilConfig,
    "blend": BlendConfig,
    "refit": RefitConfig,
    "evaluate": EvaluateConfig,
    "anneal": AnnealConfig,
    "tune": TuneConfig,
    "recommend": RecommendConfig,
    "serve": ServeConfig,
    "fit": FitConfig,
}
"""The configuration class of each stage."""

FINETUNED, CPREC, UNTRAINED = "fine-tuning only", "CPRec-style", "base model"
"""The arms of a run: fine-tuned from the base model as it is, and after continual pre-training; and the base model
where nothing is fine-tuned but an item head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete run: one configuration per stage. A recipe that needs more is a subclass with more fields."""

    name: str
    """The recipe's name, as on the command line."""
    description: str
    """What the run shows, in one sentence."""
    prepare: PrepareConfig
    """From raw logs to token shards, examples and queries."""
    shrink: ShrinkConfig | None = None
    """The base model without the tokens that the data never use, made before the data are prepared with it; None: as
    it is."""
    pretrain: PretrainConfig | None = None
    """Continual pre-training on the token shards; None where nothing is pre-trained."""
    finetune: FinetuneConfig | None = None
    """Fine-tuning on next-item examples of a domain; None where the recipe trains no language model."""
    blend: BlendConfig | None = BlendConfig()
    """What each model that is fine-tuned is blended with; None leaves the models alone."""
    evaluate: EvaluateConfig
    """Ranking the held-out queries, and the numbers made from the rankings."""
    hours: float = 0.0
    """About how long the training of language models takes: passes are chosen by a timed micro-batch and kept in
    `budget.json`. 0: as many passes as the stages say."""

    def __post_init__(self) -> None:
        if self.hours < 0 or (self.hours and self.finetune is None):
            raise ConfigError(f"hours={self.hours:g} must be 0 or more, and 0 where no language model is trained")

    def model_folder(self, domain: str, arm: str, seed: int | None = None) -> str:
        """Where the model of an arm that is fine-tuned on a domain goes; of several seeds that of `seed`, or of the
        first."""
        assert self.finetune is not None, "a recipe without fine-tuning makes no such model"
        folder = f"{self.finetune.output_dir}/{domain}/{arm.lower().replace(' ', '-')}"
        first, *more = self.evaluate.seeds
        return f"{folder}-seed-{first if seed is None else seed}" if more else folder
