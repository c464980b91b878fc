"""ReaRec: latent steps of reasoning before a sequence model answers (Tang et al. 2025).

A SASRec reads its own last state again, with a vector for the step, a few times (their equations 4 to 6). In the
ensemble variant the states before and after each step are averaged into the representation of the history (equation 7),
and a term keeps their item distributions apart (equation 9). In the progressive variant the last state answers; each
state k before it learns the same target at the temperature tau * alpha^(K - k), flat at first and then ever sharper,
and each state after a step is contrasted with that of a row which has noise in its thoughts. Where they differ this
follows the code: scores are divided by a temperature, one side of each pair of distributions has no gradient, and the
noise is added to thoughts of the row without noise. Deviations: the contrast goes both ways and has negatives of both
sides (there of the side without noise), and both rows share the dropout of their items. Deviations of SASRec hold too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from cprec.choices import Choice, Real
from cprec.errors import ConfigError
from cprec.systems.dot_product import SequenceModel
from cprec.systems.encoders import LatentSteps, SelfAttention
from cprec.systems.items import IdTable
from cprec.systems.recipes.latent import LatentSettings
from cprec.systems.recipes.sasrec import INITIAL
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import Term, by_step, likeness, next_item, of_mean, of_state, same_history


@dataclass(frozen=True, kw_only=True)
class ReaRec(LatentSettings):
    """Settings of ReaRec, in the ensemble variant."""

    likeness_weight: float = 0.01
    """Ensemble: weight of the term that keeps the states of different steps apart."""
    progressive: bool = False
    """Whether it is the progressive variant."""
    early_weight: float = 0.0
    """Progressive: weight of the cross-entropy of the states before the last one, their mean."""
    sharpening: float = 5.0
    """Progressive: the temperature of a state relative to that of the one after it (alpha)."""
    contrast_weight: float = 0.0
    """Progressive: weight of the contrast with states of thoughts with noise."""
    noise: float = 0.01
    """Progressive: standard deviation of that noise."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **LatentSettings.SEARCH,
        "likeness_weight": Real(low=0.001, high=0.1, log=True),
        "early_weight": Real(low=0.1, high=3, log=True),
        "contrast_weight": Real(low=0.1, high=3, log=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("sharpening", "noise")
        self.require_not_negative("likeness_weight", "early_weight", "contrast_weight")
        others = ("likeness_weight",) if self.progressive else ("early_weight", "contrast_weight")
        for name in others:
            if getattr(self, name):
                raise ConfigError(
                    f"{name}={getattr(self, name)} with progressive={self.progressive}: that variant has no such term; "
                    f"give {name}=0"
                )

    def second(self, data: TrainingSequences, items: IdTable, encoder: SelfAttention, seed: int) -> Stage:
        steps, is_contrasted = self.num_steps, bool(self.num_steps and self.contrast_weight)
        reasoning = LatentSteps(encoder, steps, self.hidden_size, noise=self.noise if is_contrasted else 0.0)
        torch.nn.init.normal_(reasoning.step.weight, std=INITIAL)
        answer = of_state(self.main(), steps) if self.progressive else of_mean(self.main())
        early = [
            next_item("softmax", temperature=self.temperature * self.sharpening ** (steps - k)) for k in range(steps)
        ]
        own: dict[str, tuple[float, Term]] = {
            "likeness": (self.likeness_weight, likeness(self.temperature)),
            "early": (self.early_weight, by_step(early)),
            "noise": (self.contrast_weight, same_history(steps, self.temperature)),
        }
        model = SequenceModel(
            items, reasoning, lambda hidden_RWD, _: hidden_RWD[:, -1] if self.progressive else hidden_RWD.mean(1)
        )
        terms = {NEXT_ITEM: (1.0, answer), **(own if steps else {})}
        return self.on_prefixes(data, model, terms, seed, whole=is_contrasted)


PROGRESSIVE = ReaRec(progressive=True, likeness_weight=0.0, early_weight=1.0, contrast_weight=1.0)
"""The progressive variant, with the weights, alpha and noise of the code."""
CONTROL = ReaRec(num_steps=0, num_blocks=5)
"""Blocks instead of steps, for both variants, which are the same without steps; see `latent`."""

PUBLISHED = ReaRec(
    max_length=50,
    hidden_size=256,
    learning_rate=1e-3,
    num_epochs=100,
    first_epochs=2,
    temperature=0.07,
    likeness_weight=0.05,
    anneal=0.0,
    patience=3,
)
"""ReaRec with the dimensions, heads, dropout, temperature, steps and weights of the code; 100 passes at most."""
