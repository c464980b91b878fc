"""PinSage: an item's vector is made from its text and the texts of items near it on random walks (Ying et al. 2018).

Neighbours of an item are those that short walks over the training events visit most, weighted by the visits. Two steps
of convolution and a small network make vectors of texts (algorithms 1 and 2). An item is to be nearer to what its user
had next than other items by a margin (equation 1): than items that all pairs of a step share, and, from the second pass
on, than more and more hard ones, which stand in the middle ranks by visits. As no weight belongs to an item, those that
training never saw are ranked as well; their neighbours are known items with like titles, and negatives are drawn from
known items alone, so that nothing is learnt against new ones.

There is no code of the authors. Deviations: vectors are TF-IDF of titles reduced by SVD unless a file of vectors is
given (theirs are of images, annotations and degrees); vectors of all items are computed in each step (there of a
sampled part of the graph); hard negatives are drawn from the ranks of the same walks (there of personalised PageRank).
The paper asks with one item, and offers users the neighbours of their latest ones: a history is the mean of the vectors
of its latest `max_length` items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from cprec.choices import Choice, OneOf, Real, Whole
from cprec.errors import ConfigError, Unsuitable
from cprec.systems.batches import PairStream
from cprec.systems.dot_product import SequenceModel
from cprec.systems.encoders import Mean
from cprec.systems.graph import ranked
from cprec.systems.settings import TextSettings
from cprec.systems.signals import TrainingSequences, consecutive
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import MaxMargin
from cprec.systems.walks import ConvolvedTable, importance, visits


@dataclass(frozen=True, kw_only=True)
class PinSage(TextSettings):
    """Settings of PinSage; the defaults are ours, for catalogues of thousands of items (theirs has billions)."""

    max_length: int = 10
    dropout: float = 0.0
    learning_rate: float = 1e-3
    batch_size: int = 512
    num_epochs: float = 10
    num_layers: int = 2
    """Steps of convolution."""
    num_neighbours: int = 10
    """Neighbours of an item; 0: an item is its text alone."""
    num_walks: int = 100
    """Random walks from each item."""
    walk_length: int = 3
    """Hops of a walk, each to an item of a user who had the one before."""
    num_negatives: int = 256
    """Items drawn in each step that all its pairs share as negatives."""
    most_hard: int = 6
    """Hard negatives of a pair at most: none in the first pass, and one more in each after it."""
    hard_from: int = 20
    """Hard negatives are drawn from the ranks by visits after this one ..."""
    hard_to: int = 100
    """... up to this one."""
    margin: float = 1.0
    """By how much a target is to score above negatives."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "hidden_size": OneOf(values=(64, 128, 256)),
        "learning_rate": Real(low=3e-4, high=3e-3, log=True),
        "num_epochs": OneOf(values=(5, 10, 20)),
        "num_neighbours": Whole(low=2, high=50),
        "most_hard": Whole(low=0, high=10),
        "max_length": OneOf(values=(1, 3, 10, 50)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_layers", "num_walks", "walk_length", "num_negatives", "margin")
        self.require_not_negative("num_neighbours", "most_hard", "hard_from")
        if self.hard_to <= self.hard_from:
            raise ConfigError(f"hard_to={self.hard_to} must be above hard_from={self.hard_from}")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`. Raises Unsuitable where no item comes after another one in training."""
        frozen_VF, pairs_P2 = self.frozen(data), consecutive(data.sequences)
        if not len(pairs_P2):
            raise Unsuitable(
                f"PinSage learns from items that come after other ones, and in training no user of domain "
                f"{data.domain!r} has two different items in a row: give a domain with two items or more"
            )
        walks, known = {"num_walks": self.num_walks, "num_hops": self.walk_length}, np.unique(data.sequences.values)
        visits_VV = visits(data.sequences, data.num_items, **walks, generator=np.random.default_rng(seed))
        weights_VV = importance(visits_VV, frozen_VF, known, self.num_neighbours) if self.num_neighbours else None
        items = ConvolvedTable(frozen_VF, weights_VV, self.hidden_size, self.num_layers)
        hard, _ = ranked(visits_VV, self.hard_to, self.hard_from)
        stream = PairStream(pairs_P2, hard, [NEXT_ITEM], self.passes(seed), most_hard=self.most_hard)
        margin = MaxMargin(self.margin, self.num_negatives, known)
        model = SequenceModel(items, Mean(self.dropout))
        return [self.stage(data, model, {}, stream, teachers={NEXT_ITEM: (1.0, margin)})]
