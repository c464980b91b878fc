"""GRU4Rec: a gated recurrent network over the items of a history (Hidasi et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from cprec.baselines.sequential import ItemModel, TrainedBaseline, TrainingLog
from cprec.batch import IGNORE


@dataclass(frozen=True, kw_only=True)
class GRU4Rec(TrainedBaseline):
    """Settings of GRU4Rec; the defaults are ours: cross-entropy over all items, one table of items for both ends."""

    num_layers: int = 1
    """Recurrent layers."""

    def build(self, log: TrainingLog) -> ItemModel:
        """See `TrainedBaseline.build`."""
        return Recurrent(self, log.num_items)


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
epochs. Negatives are uniform (there by a power of popularity), the optimizer is AdamW (there Adagrad), and histories
are read from their start, not in parallel sessions."""


class Recurrent(ItemModel):
    """GRU layers over item vectors, and a linear layer back to their space. Suffixes as in `SelfAttention`."""

    def __init__(self, settings: GRU4Rec, num_items: int) -> None:
        super().__init__()
        size = settings.hidden_size
        self.num_items = num_items
        self.item = nn.Embedding(num_items + 1, size)
        nn.init.normal_(self.item.weight, std=size**-0.5)
        between = settings.dropout if settings.num_layers > 1 else 0.0
        self.layers = nn.GRU(size, size, settings.num_layers, batch_first=True, dropout=between)
        self.output = nn.Linear(size, size)
        self.dropout = nn.Dropout(settings.dropout)

    def hidden(self, input_ids_RT: torch.Tensor) -> torch.Tensor:
        """What has been read by each position: RTD."""
        read_RTD, _ = self.layers(self.dropout(self.item(input_ids_RT)))
        hidden_RTD: torch.Tensor = self.output(self.dropout(read_RTD))
        return hidden_RTD

    def forward(
        self, input_ids_RT: torch.Tensor, targets_RT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `ItemModel.forward`."""
        at_N = (targets_RT.flatten() != IGNORE).nonzero().squeeze(1)
        return self.hidden(input_ids_RT).flatten(0, 1)[at_N], targets_RT.flatten()[at_N], self.items()

    def encode(self, input_ids_RT: torch.Tensor, lengths_R: torch.Tensor, users_R: torch.Tensor) -> torch.Tensor:
        """See `ItemModel.encode`."""
        rows_R = torch.arange(len(lengths_R), device=lengths_R.device)
        return self.hidden(input_ids_RT)[rows_R, (lengths_R - 1).clamp(min=0)]

    def items(self) -> torch.Tensor:
        """See `ItemModel.items`."""
        return self.item.weight[: self.num_items]
