"""Settings of `cprec fit`."""

from __future__ import annotations

from dataclasses import dataclass

from cprec.data.config import TableSource
from cprec.errors import ConfigError
from cprec.text.config import TINY


@dataclass(frozen=True, kw_only=True)
class FitConfig(TableSource):
    """One domain in files, as any source of tables, and how long to work on it."""

    domain: str = "shop"
    """Name of the domain; a language model reads it before every item."""
    output_dir: str = "runs/fit"
    """Where everything goes: the recipe that was chosen, the data, the model and the report."""
    minutes: float = 20.0
    """Time for everything, about: it decides the size of the model, its passes over the log, and how many customers the
    recommenders are tried on."""
    base: str = TINY
    """A causal language model to begin with, as a Hugging Face name or folder; `tiny`: a small one from random
    weights."""
    seed: int = 0
    """Decides the order of training and the model's first weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.minutes > 0:
            raise ConfigError(f"minutes={self.minutes:g} must be above 0")
