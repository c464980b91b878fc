"""GRU4Rec: a gated recurrent network over the items of a history (Hidasi et al. 2016).

Deviations from paper and code: histories are read from their start, not in parallel sessions, and one table of items
serves both ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from cprec.systems.batches import WindowStream
from cprec.systems.dot_product import SequenceModel
from cprec.systems.encoders import Recurrent
from cprec.systems.items import IdTable
from cprec.systems.settings import NextItemSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage


@dataclass(frozen=True, kw_only=True)
class GRU4Rec(NextItemSettings):
    """Settings of GRU4Rec; the defaults are ours: cross-entropy over all items."""

    num_layers: int = 1
    """Recurrent layers."""

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        items = IdTable(data.num_items, self.hidden_size, num_special=1)
        nn.init.normal_(items.table.weight, std=self.hidden_size**-0.5)
        encoder = Recurrent(self.hidden_size, num_layers=self.num_layers, dropout=self.dropout)
        stream = WindowStream(data, [NEXT_ITEM], self.max_length, self.passes(seed))
        return [self.stage(data, SequenceModel(items, encoder), self.next_item(), stream)]


PUBLISHED = GRU4Rec(
    objective="bpr_max",
    num_negatives=2048,
    hidden_size=100,
    dropout=0.0,
    batch_size=32,
    learning_rate=1e-3,
    num_epochs=10,
    anneal=0.0,
)
"""GRU4Rec as Hidasi and Karatzoglou (2018) have it: BPR-max with 2,048 shared negatives, 100 units, batches of 32, ten
epochs. Negatives are uniform (there by a power of popularity), and the optimizer is AdamW (there Adagrad)."""
