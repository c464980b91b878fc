"""What LLaRA and ULMRec share: a language model that answers prompts of titles, beside a SASRec that was trained first.

A base has adapters (LoRA, Hu et al. 2021), of the rank and scale that the code of both has, on all linear layers (that
of ULMRec has them on queries and values), and nothing else of it is trained; without a base all weights of the small
decoder are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from cprec.choices import Choice, Real
from cprec.inspection import check_attention, output_scale
from cprec.models import add_lora, freeze_lowest
from cprec.systems.language import Language, LanguageSettings
from cprec.systems.recipes.sasrec import SASRec
from cprec.systems.signals import TrainingSequences

LORA_ALPHA = 32
"""Adapters are multiplied by this over their rank."""


@dataclass(frozen=True, kw_only=True)
class BesideSASRec(LanguageSettings):
    """Settings of a language model beside a SASRec, whose `hidden_size` and `dropout` these are."""

    max_length: int = 10
    hidden_size: int = 64
    dropout: float = 0.6
    learning_rate: float = 8e-4
    beta2: float = 0.999
    batch_size: int = 32
    num_epochs: float = 5
    lora_rank: int = 8
    """Rank of the adapters of a base; 0: all its weights are trained."""
    item_epochs: float = 60
    """Passes of the SASRec over the training rows."""
    item_steps: int = 600
    """Optimizer steps of the SASRec at least."""

    VALIDATION_QUERIES: ClassVar[int] = 40
    SEARCH: ClassVar[Mapping[str, Choice]] = {"learning_rate": Real(low=1e-4, high=3e-3, log=True)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("item_epochs")
        self.require_not_negative("lora_rank", "item_steps")

    def sasrec(self) -> SASRec:
        """The settings of the SASRec, which are otherwise those of its own row."""
        size = self.hidden_size
        return SASRec(hidden_size=size, dropout=self.dropout, num_epochs=self.item_epochs, min_steps=self.item_steps)

    def language(self, data: TrainingSequences, seed: int) -> Language:
        """See `LanguageSettings.language`; with adapters, and without gradients in the lowest `frozen_layers`.

        Raises ConfigError also for a base that cannot be ranked by or trained like that: all else is trained later.
        """
        language = super().language(data, seed)
        model = language.model
        output_scale(model)
        check_attention(model)
        if self.base and self.lora_rank:
            model = add_lora(model, rank=self.lora_rank, alpha=LORA_ALPHA, seed=seed)
        if self.frozen_layers:
            freeze_lowest(model, self.frozen_layers)
        return replace(language, model=model)


@contextmanager
def place(folder: Path | None) -> Iterator[Path]:
    """The folder that both are trained in, one for the block if none is given."""
    if folder is not None:
        yield folder
        return
    with TemporaryDirectory() as temporary:
        yield Path(temporary)
