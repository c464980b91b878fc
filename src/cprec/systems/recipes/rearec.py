"""ReaRec: latent steps of reasoning before a sequence model answers, in the ensemble variant (Tang et al. 2025).

A SASRec reads its own last state again, with a vector for the step, a few times (their equations 4 to 6). The states
before and after each step are averaged into the representation of the history (equation 7), and a term keeps their item
distributions apart (equation 9). Where they differ this follows the code, which divides scores by a temperature and
gives one side of each pair no gradient. A first stage without steps trains on windows, as the authors advise against
losses that are not finite; in the second every prefix of a sequence is a row. Deviations of SASRec hold too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from cprec.choices import Choice, Real, Whole
from cprec.errors import ConfigError
from cprec.systems.dot_product import SequenceModel
from cprec.systems.encoders import LatentSteps
from cprec.systems.fit import NEXT_ITEM, Stage
from cprec.systems.recipes.sasrec import INITIAL, SelfAttentionSettings
from cprec.systems.signals import PrefixStream, TrainingSequences, WindowStream
from cprec.systems.terms import likeness, next_item, of_mean


@dataclass(frozen=True, kw_only=True)
class ReaRec(SelfAttentionSettings):
    """Settings of ReaRec; the defaults are ours: a long first stage, which is cheap, and a short second one."""

    max_length: int = 20
    num_heads: int = 2
    learning_rate: float = 2e-3
    num_epochs: float = 3
    first_epochs: float = 10
    """Passes over the training windows without reasoning, before `num_epochs` passes over all prefixes with it."""
    num_steps: int = 2
    """Steps of reasoning."""
    likeness_weight: float = 0.01
    """Weight of the term that keeps the states of different steps apart."""
    temperature: float = 1.0
    """Scores are divided by it."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SelfAttentionSettings.SEARCH,
        "num_steps": Whole(low=1, high=3),
        "likeness_weight": Real(low=0.001, high=0.1, log=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("first_epochs", "num_steps", "temperature")
        if self.likeness_weight < 0:
            raise ConfigError(f"likeness_weight={self.likeness_weight} must not be below 0")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        items, encoder = self.parts(data.num_items)
        reasoning = LatentSteps(encoder, self.num_steps, self.hidden_size)
        torch.nn.init.normal_(reasoning.step.weight, std=INITIAL)
        main = next_item("softmax", temperature=self.temperature)
        first = SequenceModel(items, encoder)
        second = SequenceModel(items, reasoning, pool=lambda hidden_RWD: hidden_RWD.mean(1))
        terms = {NEXT_ITEM: (1.0, of_mean(main)), "likeness": (self.likeness_weight, likeness(self.temperature))}
        passes = replace(self, num_epochs=self.first_epochs).passes(seed)
        windows = WindowStream(data, [NEXT_ITEM], self.max_length, passes)
        prefixes = PrefixStream(data, list(terms), self.max_length, self.passes(seed))
        return [
            self.stage(data, first, {NEXT_ITEM: (1.0, main)}, windows),
            self.stage(data, second, terms, prefixes),
        ]


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
