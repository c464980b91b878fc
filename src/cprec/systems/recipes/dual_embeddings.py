"""Dual embeddings: two vectors of each item, learnt from baskets, say what goes with what (Kvernadze et al. 2022).

Items of a basket are paired as the words of a sentence are in skip-gram with negatives (Mikolov et al. 2013): the input
vector of one is to have a high product with the output vector of the other. So items whose output vectors are near to
an item's input vector go with it (complements), and items with like input vectors are found in like baskets, where they
stand in for each other (substitutes). A history is the mean of the input vectors of its last basket.

The authors publish no code, and all settings are ours. Deviations: a pass pairs each item of a basket with one other,
drawn anew, so that a basket counts by its items (there by its pairs); there are no pairs of items with like texts or
images for those that are rarely bought. A basket is what a user had at one time. Where times are only an order, it is a
run of `window` events.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from cprec.choices import Choice, OneOf, Real, Whole
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.systems.batches import BasketStream
from cprec.systems.dot_product import DotProductModel, DotProductRecommender, SequenceModel
from cprec.systems.encoders import Mean
from cprec.systems.items import IdTable
from cprec.systems.settings import SystemSettings
from cprec.systems.signals import Baskets, TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import SkipGram


@dataclass(frozen=True, kw_only=True)
class DualEmbeddings(SystemSettings):
    """Settings of dual embeddings."""

    dropout: float = 0.0
    learning_rate: float = 5e-3
    batch_size: int = 1024
    num_epochs: float = 10
    window: int = 5
    """Events in a row that count as a basket, where no user has two at one time."""
    num_negatives: int = 20
    """Items drawn for each pair."""
    power: float = 0.75
    """Negatives are drawn by the number of baskets with an item, to the power of this; 0: uniformly."""
    substitutes: bool = False
    """Rank by products of input vectors: what stands in for items of the basket, in place of what goes with them."""

    LABEL: ClassVar[str] = "dual embeddings"
    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "hidden_size": OneOf(values=(64, 128, 256)),
        "learning_rate": Real(low=1e-3, high=1e-2, log=True),
        "num_epochs": OneOf(values=(5, 10, 20)),
        "num_negatives": Whole(low=5, high=50),
        "power": Real(low=-0.5, high=1.0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_negatives")
        if not math.isfinite(self.power):
            raise ConfigError(f"power={self.power} must be a finite number")
        if self.window < 2:
            raise ConfigError(f"window={self.window} must be 2 or more: a basket has two items at least")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`. Raises Unsuitable where no basket has two different items."""
        baskets = Baskets(data, self.window).training
        if not len(baskets):
            raise Unsuitable(
                f"dual embeddings learn from items that a user had together, and in training no basket of domain "
                f"{data.domain!r} has two different items: give a domain where some do"
            )
        inputs, outputs = (IdTable(data.num_items, self.hidden_size, num_special=num) for num in (1, 0))
        for table in (inputs, outputs):
            nn.init.normal_(table.table.weight, std=0.1)
        counts_V = np.bincount(baskets.values, minlength=data.num_items)
        terms = {NEXT_ITEM: (1.0, SkipGram(counts_V, self.num_negatives, self.power))}
        stream = BasketStream(baskets, [NEXT_ITEM], self.passes(seed))
        model = SequenceModel(inputs, Mean(self.dropout, gaps=True), output=outputs)
        return [self.stage(data, model, terms, stream)]

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> DotProductRecommender:
        """See `SystemSettings.make`. Substitutes come from the weights that find complements best."""
        learnt = super(DualEmbeddings, replace(self, substitutes=False)).make(split, domain, seed=seed, folder=folder)
        assert isinstance(learnt, DotProductRecommender) and isinstance(learnt.model, SequenceModel)
        if not self.substitutes:
            return learnt
        by_inputs = SequenceModel(learnt.model.items, learnt.model.encoder)
        found = self.recommender(TrainingSequences.of(split, domain), by_inputs)
        found.seconds = learnt.seconds
        return found

    def recommender(
        self, data: TrainingSequences, model: DotProductModel, history: Callable[[Ragged], np.ndarray] | None = None
    ) -> DotProductRecommender:
        gaps = Baskets(data, self.window).gaps
        return DotProductRecommender(self.LABEL, data, model, self.max_length, history, gaps)
