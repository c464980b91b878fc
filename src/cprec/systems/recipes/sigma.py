"""SIGMA: Mamba4Rec that also reads a history partly backwards, with gates and a recurrent branch (Liu et al. 2025).

A layer's block reads its input twice: as it is, and with all but the latest few events in reverse order. What it gives
is multiplied by one plus a gate of that input. A convolution over neighbours and a GRU read it a third time, for short
histories. Shares of a softmax mix the three, and a linear layer follows. Here a state depends on later events too, so
every prefix of a sequence is a row, with the item after it as its target.

This follows the code, but the paper where the code has a fault: a row's own events are reversed (there the first 45 of
50 places, which puts padding before the events of a short history); a gate reads the input of its own reading (there
the backward one reads the forward gate too); the shares are learnt (there they are computed and not used: the weights
that ours start from stay as they are). Deviations: each gate has layers of its own; those of Mamba4Rec's block hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from cprec.choices import Choice, OneOf, Whole
from cprec.errors import ConfigError
from cprec.systems.batches import PrefixStream
from cprec.systems.dot_product import SequenceModel
from cprec.systems.dropout import Dropout
from cprec.systems.recipes.mamba4rec import StateSpaceSettings
from cprec.systems.settings import NextItemSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.state_space import ConvolvedGRU, PartlyBackwards

SHARES = {"forwards": 0.8, "backwards": 0.1, "recurrent": 0.1}
"""What each reading counts for before training."""


@dataclass(frozen=True, kw_only=True)
class SIGMA(NextItemSettings, StateSpaceSettings):
    """Settings of SIGMA; the defaults are ours."""

    batch_size: int = 512
    num_epochs: float = 10
    backwards: bool = True
    """Histories are also read partly backwards."""
    kept: int = 5
    """The latest events, which keep their order there."""
    gates: bool = True
    """What a block reads is gated by its input."""
    recurrent: bool = True
    """A convolution and a GRU read histories, too."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **StateSpaceSettings.SEARCH,
        **{"batch_size": OneOf(values=(256, 512, 1024)), "kept": Whole(low=1, high=10)},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kept < 0:
            raise ConfigError(f"kept={self.kept} must be 0 or more: the latest events that keep their order")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        model = SequenceModel(*self.parts(data.num_items, [self.mixer() for _ in range(self.num_layers)]))
        stream = PrefixStream(data, [NEXT_ITEM], self.max_length, self.passes(seed))
        return [self.stage(data, model, self.next_item(), stream)]

    def mixer(self) -> nn.Module:
        """All readings of a layer, or the only one."""
        block, size = self.block(), self.hidden_size

        def reading() -> nn.Module:
            return Gated(block, size, self.dropout) if self.gates else block

        readings = {"forwards": reading()}
        if self.backwards:
            readings["backwards"] = PartlyBackwards(reading(), self.kept)
        if self.recurrent:
            readings["recurrent"] = ConvolvedGRU(size)
        return Mixture(readings, size) if len(readings) > 1 else readings["forwards"]


class Mixture(nn.Module):
    """Readings, weighted by learnt shares, and a linear layer."""

    def __init__(self, readings: Mapping[str, nn.Module], size: int) -> None:
        super().__init__()
        self.readings, self.output = nn.ModuleDict(readings), nn.Linear(size, size)
        self.log_share = nn.Parameter(torch.tensor([SHARES[name] for name in readings]).log())

    def forward(self, hidden_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        shares = self.log_share.softmax(0).unbind()
        weighted = [
            share * reading(hidden_RTD, lengths_R)
            for share, reading in zip(shares, self.readings.values(), strict=True)
        ]
        mixed: torch.Tensor = self.output(torch.stack(weighted).sum(0))
        return mixed


class Gated(nn.Module):
    """What a block gives, times one plus a gate of what it reads."""

    def __init__(self, block: nn.Module, size: int, dropout: float) -> None:
        super().__init__()
        self.block, self.dropout = block, Dropout(dropout)
        self.dense, self.of_silu, self.of_sigmoid = (nn.Linear(size, size) for _ in range(3))

    def forward(self, hidden_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        dense_RTD = hidden_RTD + self.dense(hidden_RTD)
        gate_RTD = self.of_silu(F.silu(dense_RTD)) + self.of_sigmoid(dense_RTD.sigmoid())
        gated: torch.Tensor = self.block(hidden_RTD, lengths_R) * (1 + self.dropout(gate_RTD))
        return gated


PUBLISHED = SIGMA(hidden_size=64, dropout=0.2, batch_size=2048, num_epochs=200, anneal=0.0, patience=3)
"""SIGMA as its code has it: 64 dimensions, one layer, 32 directions, dropout 0.2, learning rate 1e-3, batches of 2,048
prefixes, 200 passes at most, 5 of 50 events kept in order."""
