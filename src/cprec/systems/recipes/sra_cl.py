"""SRA-CL: SASRec with contrasts of histories that are alike by their items' texts (Cui et al. 2025).

Every prefix of a sequence is a training row, with the item after it as its target. One contrast draws a prefix to a mix
of the prefixes of other users whose texts are the nearest, weighted by attention; another draws two copies of a prefix
to each other, in which some items gave way to others with a near text. Where they differ this follows the code, whose
negatives are all other rows of the step, but neighbours are other users' prefixes, as in the paper. Deviations: texts
are titles, as TF-IDF reduced by SVD unless a file of vectors is given, and a prefix has the mean of its items' vectors
(theirs are of descriptions that a chat model wrote of items and of prefixes); neighbours are found in a sample of
prefixes; each prefix is encoded once in a step (there a second time for its contrast, with other dropout); deviations
of SASRec hold too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cprec.choices import Choice, Real, Whole
from cprec.errors import ConfigError
from cprec.systems.batches import OtherPrefixes, Prefixes, PrefixStream, Substitutions, Views
from cprec.systems.dot_product import SequenceModel
from cprec.systems.recipes.sasrec import SelfAttentionSettings
from cprec.systems.settings import NextItemSettings, TextSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import MixOfNeighbours, Teacher, of_state, same_history
from cprec.systems.vectors import mean_vectors, most_similar

SEARCHED = 20_000
"""Prefixes among which neighbours are looked for, at most."""


@dataclass(frozen=True, kw_only=True)
class SRACL(TextSettings, NextItemSettings, SelfAttentionSettings):
    """Settings of SRA-CL; the defaults are ours: fewer neighbours, annealing, and no more passes than fit into minutes
    on a CPU."""

    max_length: int = 20
    hidden_size: int = 64
    num_heads: int = 2
    batch_size: int = 256
    num_epochs: float = 8
    text_size: int = 128
    num_neighbours: int = 4
    """Prefixes in a mix, and items of which one takes another's place."""
    neighbour_weight: float = 0.1
    """Weight of the contrast of a prefix with the mix of its neighbours; 0: there is none."""
    copy_weight: float = 0.1
    """Weight of the contrast of two copies of a prefix; 0: there is none."""
    substituted: float = 0.2
    """Chance of an item to give way in a copy."""
    temperature: float = 1.0
    """Products in both contrasts are divided by it."""

    LABEL: ClassVar[str] = "SRA-CL"
    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SelfAttentionSettings.SEARCH,
        "num_neighbours": Whole(low=1, high=10),
        "neighbour_weight": Real(low=0.01, high=1, log=True),
        "copy_weight": Real(low=0.01, high=1, log=True),
        "substituted": Real(low=0.1, high=0.5),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_neighbours", "temperature")
        self.require_not_negative("neighbour_weight", "copy_weight")
        if not 0 < self.substituted <= 1:
            raise ConfigError(f"substituted={self.substituted} must lie above 0 and at most at 1")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        model, frozen_VF = SequenceModel(*self.parts(data.num_items)), self.frozen_alike(data)
        prefixes, every = Prefixes(data, self.max_length), np.arange(data.num_items)
        terms, teachers, views = self.next_item(), dict[str, tuple[float, Teacher]](), list[Views]()
        if self.neighbour_weight:
            some = np.random.default_rng(seed).permutation(len(prefixes))[:SEARCHED]
            of_rows = mean_vectors(prefixes.take, frozen_VF)
            views.append(OtherPrefixes(prefixes, most_similar(of_rows, prefixes.users, some, self.num_neighbours)))
            mix = MixOfNeighbours(frozen_VF, self.hidden_size, self.num_neighbours, self.temperature, self.dropout)
            teachers["neighbours"] = self.neighbour_weight, mix
        if self.copy_weight:
            alike_VK = most_similar(frozen_VF.__getitem__, every, every, self.num_neighbours)
            views.append(Substitutions(prefixes, alike_VK, self.substituted))
            terms["copies"] = self.copy_weight, same_history(1, self.temperature)
        if views:
            _, main = terms[NEXT_ITEM]
            terms[NEXT_ITEM] = 1.0, of_state(main, 0)
        stream = PrefixStream(data, [*terms, *teachers], self.max_length, self.passes(seed), views)
        return [self.stage(data, model, terms, stream, teachers=teachers)]


PUBLISHED = SRACL(num_neighbours=10, learning_rate=1e-3, num_epochs=100, anneal=0.0, patience=3)
"""SRA-CL as its code has it for Beauty: 64 dimensions, two layers and heads, learning rate 1e-3, ten neighbours."""
