"""SASRec: self-attention over the latest items of a history (Kang and McAuley 2018).

Each position of a sequence predicts the next item by the product of its state with the items' vectors (their equation
6). Deviations of all settings from the paper and its code: blocks normalise before their layers, not after, and nothing
is dropped out inside attention; positions are counted from the end of a history; the feed-forward layers have a GELU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from cprec.choices import Choice, Whole
from cprec.errors import ConfigError
from cprec.systems.dot_product import SequenceModel
from cprec.systems.encoders import SelfAttention
from cprec.systems.fit import NEXT_ITEM, NextItemSettings, Stage, SystemSettings
from cprec.systems.items import IdTable
from cprec.systems.signals import TrainingSequences, WindowStream

INITIAL = 0.02
"""Standard deviation of vectors before training."""


@dataclass(frozen=True, kw_only=True)
class SelfAttentionSettings(SystemSettings):
    """Settings of systems that read histories with blocks of self-attention."""

    num_blocks: int = 2
    """Transformer blocks."""
    num_heads: int = 4
    """Heads; must divide hidden_size."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {**SystemSettings.SEARCH, "num_blocks": Whole(low=1, high=3)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_blocks", "num_heads")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")

    def parts(self, num_items: int, *, causal: bool = True) -> tuple[IdTable, SelfAttention]:
        """Item vectors and an encoder before training."""
        items, encoder = IdTable(num_items, self.hidden_size), self.encoder(causal=causal)
        for table in (items.table, encoder.position):
            nn.init.normal_(table.weight, std=INITIAL)
        return items, encoder

    def encoder(self, *, causal: bool = True) -> SelfAttention:
        """An encoder before training."""
        sizes = {"max_length": self.max_length, "num_blocks": self.num_blocks, "num_heads": self.num_heads}
        return SelfAttention(self.hidden_size, **sizes, dropout=self.dropout, causal=causal)


@dataclass(frozen=True, kw_only=True)
class SASRec(NextItemSettings, SelfAttentionSettings):
    """Settings of SASRec; the defaults are ours, the best of six tried on the validation queries of Amazon Beauty
    (docs/results.md)."""

    hidden_size: int = 256
    learning_rate: float = 2e-3
    num_epochs: float = 14

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        model = SequenceModel(*self.parts(data.num_items))
        stream = WindowStream(data, [NEXT_ITEM], self.max_length, self.passes(seed))
        return [self.stage(data, model, self.next_item(), stream)]


SAMPLED = SASRec(objective="sampled_softmax", num_negatives=1024, num_epochs=20)
"""Against 1,024 negatives that the targets of a step share: nearly as good as all items, and quicker where these are
many."""

PUBLISHED = SASRec(
    objective="bce",
    num_negatives=1,
    hidden_size=50,
    num_heads=1,
    batch_size=128,
    learning_rate=1e-3,
    num_epochs=200,
    anneal=0.0,
    patience=3,
)
"""SASRec as first published, for sparse data: binary cross-entropy against one negative, 50 dimensions, one head,
dropout 0.5, no annealing. Negatives may be items of the user's history (there they are drawn outside it)."""
