"""IGR-SR: latent steps that are anchored in intents of a history (Shao and Zhou 2025).

A frozen copy of a trained SASRec reads prefix tokens, the history, and a slot for each intent; of these the tokens
alone learn. The last state of the SASRec, which goes on learning, then takes a few steps: in each it reads the intents,
then the history. Intents of two copies of a history, in which other items are masked, are drawn together, against those
of other histories. There is no public code; we know the method of the paper, but neither all of its equations nor its
settings. Ours are therefore: a network of two layers from a slot's state to an intent; cosines of intents, slot by
slot; a small network at the end of a step; steps that add zero before training; a frozen copy that reads item vectors
as they are learnt. Deviations of SASRec hold too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from cprec.choices import Choice, OneOf, Real
from cprec.errors import ConfigError
from cprec.systems.dot_product import SequenceModel
from cprec.systems.encoders import LatentSteps, SelfAttention
from cprec.systems.intents import Distiller, IntentSteps
from cprec.systems.items import IdTable
from cprec.systems.recipes.latent import LatentSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import Term, of_state, same_history


@dataclass(frozen=True, kw_only=True)
class IGRSR(LatentSettings):
    """Settings of IGR-SR, all ours."""

    num_prefix: int = 4
    """Tokens before a history that the frozen encoder reads."""
    num_intents: int = 4
    """Slots after it, each of which becomes an intent."""
    mask_share: float = 0.2
    """Share of a history's items that are masked in each of two copies."""
    contrast_weight: float = 0.1
    """Weight of the contrast of their intents."""
    contrast_temperature: float = 0.2
    """Cosines in it are divided by it."""

    LABEL: ClassVar[str] = "IGR-SR"
    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **LatentSettings.SEARCH,
        "num_intents": OneOf(values=(1, 2, 4, 8)),
        "mask_share": Real(low=0.1, high=0.6),
        "contrast_weight": Real(low=0.01, high=1, log=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_intents", "contrast_temperature")
        self.require_not_negative("num_prefix", "contrast_weight")
        if not 0 < self.mask_share < 1:
            raise ConfigError(f"mask_share={self.mask_share} must lie between 0 and 1; contrast_weight=0 masks nothing")

    def second(self, data: TrainingSequences, items: IdTable, encoder: SelfAttention, seed: int) -> Stage:
        terms: dict[str, tuple[float, Term]] = {NEXT_ITEM: (1.0, of_state(self.main(), 0))}
        if not self.num_steps:
            model = SequenceModel(items, LatentSteps(encoder, 0, self.hidden_size), answer)
            return self.on_prefixes(data, model, terms, seed)
        tokens = {"num_prefix": self.num_prefix, "num_intents": self.num_intents}
        distiller = Distiller(encoder, self.hidden_size, **tokens)
        reasoning = IntentSteps(
            encoder,
            distiller,
            self.hidden_size,
            num_steps=self.num_steps,
            num_heads=self.num_heads,
            dropout=self.dropout,
            mask_share=self.mask_share if self.contrast_weight else 0.0,
        )
        contrast = same_history(self.num_intents, self.contrast_temperature, cosine=True)
        terms["intents"] = self.contrast_weight, contrast
        model, begin = SequenceModel(items, reasoning, answer), partial(distiller.adopt, encoder)
        return self.on_prefixes(data, model, terms, seed, whole=self.contrast_weight > 0, begin=begin)


def answer(hidden_RWD: torch.Tensor, items_VD: torch.Tensor) -> torch.Tensor:
    """The first of the states, which has taken all steps: RD."""
    return hidden_RWD[:, 0]


CONTROL = IGRSR(num_steps=0, num_blocks=6)
"""Blocks instead of intents and steps; see `latent`."""
