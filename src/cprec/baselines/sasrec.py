"""SASRec: self-attention over the latest items of a history (Kang and McAuley 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from cprec.baselines.search import Choice, Whole
from cprec.baselines.sequential import ItemModel, TrainedBaseline, TrainingLog
from cprec.batch import IGNORE
from cprec.errors import ConfigError

INITIAL = 0.02
"""Standard deviation of vectors before training."""
ENCODE_POSITIONS = 4096
"""Positions of histories that are encoded at once."""
MASK = 1
"""How far the number of the mask lies above that of the padding."""


@dataclass(frozen=True, kw_only=True)
class SASRec(TrainedBaseline):
    """Settings of SASRec; the defaults are ours, the best of six tried on the validation queries of Amazon Beauty
    (docs/results.md)."""

    hidden_size: int = 256
    learning_rate: float = 2e-3
    num_epochs: float = 14
    num_blocks: int = 2
    """Transformer blocks."""
    num_heads: int = 4
    """Heads; must divide hidden_size."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **TrainedBaseline.SEARCH,
        "num_blocks": Whole(low=1, high=3),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_blocks < 1:
            raise ConfigError(f"num_blocks={self.num_blocks} must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")

    def build(self, log: TrainingLog) -> ItemModel:
        """See `TrainedBaseline.build`."""
        return SelfAttention(self, log.num_items, causal=True)


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
dropout 0.5, no annealing. Negatives may be items of the user's history (there they are drawn outside it); blocks
normalise before, not after, and nothing is dropped out inside attention."""


class SelfAttention(ItemModel):
    """Blocks of self-attention over item and position vectors; causal, or over the whole row where padding is hidden.

    Suffixes: R rows, T positions, D width, H heads, N targets, V items. Item number V pads, V + MASK masks.
    """

    def __init__(self, settings: SASRec, num_items: int, *, causal: bool) -> None:
        super().__init__()
        size = settings.hidden_size
        self.num_items, self.causal = num_items, causal
        self.item = nn.Embedding(num_items + 1 + MASK, size)
        self.position = nn.Embedding(settings.max_length + 1, size)
        self.blocks = nn.ModuleList([Block(settings, causal) for _ in range(settings.num_blocks)])
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(settings.dropout)
        for table in (self.item, self.position):
            nn.init.normal_(table.weight, std=INITIAL)

    def inputs(self, input_ids_RT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the first block reads, RTD, and what may be read of it, R11T. Positions are counted from a row's last
        item back, as padding on the left has it. A causal one needs no mask, since padding comes after what is read."""
        visible_RT = input_ids_RT != self.num_items
        place_T = torch.arange(input_ids_RT.shape[1], device=input_ids_RT.device)
        position_RT = (visible_RT.sum(1, keepdim=True) - 1 - place_T).clamp(min=0)
        scale = self.item.embedding_dim**0.5  # as Kang and McAuley have it; so scores begin small and inputs do not
        hidden_RTD = self.dropout(self.item(input_ids_RT) * scale + self.position(position_RT))
        return hidden_RTD, None if self.causal else visible_RT[:, None, None]

    def hidden(self, input_ids_RT: torch.Tensor) -> torch.Tensor:
        """What each position has read: RTD."""
        hidden_RTD, mask_R11T = self.inputs(input_ids_RT)
        for block in self.blocks:
            hidden_RTD = block(hidden_RTD, mask_R11T)
        normed: torch.Tensor = self.norm(hidden_RTD)
        return normed

    def forward(
        self, input_ids_RT: torch.Tensor, targets_RT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `ItemModel.forward`."""
        at_N = (targets_RT.flatten() != IGNORE).nonzero().squeeze(1)
        hidden_RTD = self.hidden(input_ids_RT)
        return hidden_RTD.flatten(0, 1)[at_N], targets_RT.flatten()[at_N], self.items()

    def encode(self, input_ids_RT: torch.Tensor, lengths_R: torch.Tensor, users_R: torch.Tensor) -> torch.Tensor:
        """See `ItemModel.encode`: what the last event has read. As many rows at once as stay in the cache."""
        num_rows = max(1, ENCODE_POSITIONS // input_ids_RT.shape[1])
        parts = zip(input_ids_RT.split(num_rows), (lengths_R - 1).clamp(min=0).split(num_rows), strict=True)
        return torch.cat([self._at(ids_RT, last_R) for ids_RT, last_R in parts])

    def _at(self, input_ids_RT: torch.Tensor, place_R: torch.Tensor) -> torch.Tensor:
        """What one place of each row has read: RD."""
        hidden_RTD, mask_R11T = self.inputs(input_ids_RT)
        for block in self.blocks[:-1]:
            hidden_RTD = block(hidden_RTD, mask_R11T)
        if mask_R11T is None:  # a place reads itself and those before it
            mask_R11T = (torch.arange(input_ids_RT.shape[1], device=place_R.device) <= place_R[:, None])[:, None, None]
        last = self.blocks[-1]
        assert isinstance(last, Block)
        normed: torch.Tensor = self.norm(last.at(hidden_RTD, place_R, mask_R11T))
        return normed

    def items(self) -> torch.Tensor:
        """See `ItemModel.items`: the vectors that items have as input."""
        return self.item.weight[: self.num_items]


class Block(nn.Module):
    """Attention, then two linear layers with a GELU between, each after a norm and added to its input."""

    def __init__(self, settings: SASRec, causal: bool) -> None:
        super().__init__()
        size = settings.hidden_size
        self.num_heads, self.causal = settings.num_heads, causal
        self.norm_attention, self.norm_linear = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query_key_value, self.output = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, hidden_RTD: torch.Tensor, mask_R11T: torch.Tensor | None) -> torch.Tensor:
        rows, length, size = hidden_RTD.shape
        parts = self.query_key_value(self.norm_attention(hidden_RTD)).view(rows, length, 3, self.num_heads, -1)
        query_RHTD, key_RHTD, value_RHTD = parts.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(
            query_RHTD, key_RHTD, value_RHTD, attn_mask=mask_R11T, is_causal=self.causal
        )
        return self._rest(hidden_RTD, read.transpose(1, 2).reshape(rows, length, size))

    def at(self, hidden_RTD: torch.Tensor, place_R: torch.Tensor, mask_R11T: torch.Tensor) -> torch.Tensor:
        """The block's output at one place of each row, which reads what the mask shows it: RD."""
        rows, length, size = hidden_RTD.shape
        normed_RTD, every_R = self.norm_attention(hidden_RTD), torch.arange(rows, device=place_R.device)
        weight, bias = self.query_key_value.weight, self.query_key_value.bias
        query_RHD1 = F.linear(normed_RTD[every_R, place_R], weight[:size], bias[:size]).view(
            rows, self.num_heads, -1, 1
        )
        parts = F.linear(normed_RTD, weight[size:], bias[size:]).view(rows, length, 2, self.num_heads, -1)
        key_RHTD, value_RHTD = parts.permute(2, 0, 3, 1, 4)
        score_RH1T = (key_RHTD @ query_RHD1).transpose(2, 3) * query_RHD1.shape[2] ** -0.5
        read_RH1D = score_RH1T.masked_fill(~mask_R11T, -torch.inf).softmax(-1) @ value_RHTD
        return self._rest(hidden_RTD[every_R, place_R], read_RH1D.reshape(rows, size))

    def _rest(self, hidden: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """What follows attention, at any positions."""
        hidden = hidden + self.dropout(self.output(read))
        out: torch.Tensor = hidden + self.dropout(self.second(F.gelu(self.first(self.norm_linear(hidden)))))
        return out
