"""HMamba: Mamba4Rec whose scores are distances in hyperbolic space (Zhang et al. 2025), as its code has it.

Items and states are points of a hyperboloid of curvature -1: an item's by the exponential map of its vector at the
origin, a state's by the coordinate that puts it there. The score of an item is -2 - 2 d^2, where d is the distance of
the two points, in a softmax over all items. The paper's discretisation of the states follows the curvature; the scan of
its code is the usual one with a curvature of 1, and so is ours: nothing here is said of curved states.

Deviations from the code: the encoder reads an item's coordinates without the first, which follows from the others;
distances have no upper bound (there cosh d is cut at 10, and farther items get no gradient). Deviations of Mamba4Rec
hold too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cprec.systems.batches import WindowStream
from cprec.systems.dot_product import SequenceModel
from cprec.systems.hyperbolic import DistanceModel, OnHyperboloid, ToHyperboloid, nearest_item
from cprec.systems.recipes.mamba4rec import StateSpaceSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import Term, next_item


@dataclass(frozen=True, kw_only=True)
class HMamba(StateSpaceSettings):
    """Settings of HMamba; the defaults are ours."""

    distance: bool = True
    """Items are scored by distance; without, by products, as in Mamba4Rec."""

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        items, encoder = self.parts(data.num_items, [self.block() for _ in range(self.num_layers)])
        model: SequenceModel = SequenceModel(items, encoder)
        term: Term = next_item("softmax")
        if self.distance:
            model, term = DistanceModel(OnHyperboloid(items), ToHyperboloid(encoder)), nearest_item
        stream = WindowStream(data, [NEXT_ITEM], self.max_length, self.passes(seed))
        return [self.stage(data, model, {NEXT_ITEM: (1.0, term)}, stream)]


PUBLISHED = HMamba(hidden_size=64, dropout=0.1, batch_size=256, num_epochs=300, anneal=0.0, patience=3)
"""HMamba with the dimensions, layer, directions, dropout, learning rate and passes of the code, and 50 events as it
notes for Amazon. A batch of 256 windows has about as many targets as their 2,048 rows."""
