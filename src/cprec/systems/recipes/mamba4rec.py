"""Mamba4Rec: state-space layers over the latest items of a history (Liu et al. 2024).

Item vectors go through a dropout and a norm, then through layers of a state-space block and a feed-forward network with
norms after them, without positions (their section 3); the last state is compared with all items. Deviations from paper
and code: the block is Mamba-2's, where all of a head decays alike (theirs is Mamba's, each channel and direction by
itself), since its states are products of matrices on a CPU; each position of a window predicts the next item (there
each prefix is a row, which asks the same of a causal network).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from cprec.choices import Choice, OneOf, Whole
from cprec.errors import ConfigError
from cprec.systems.batches import WindowStream
from cprec.systems.dot_product import SequenceModel
from cprec.systems.items import IdTable
from cprec.systems.recipes.sasrec import INITIAL
from cprec.systems.settings import NextItemSettings, SystemSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.state_space import EXPAND, StateSpace, StateSpaceBlock


@dataclass(frozen=True, kw_only=True)
class StateSpaceSettings(SystemSettings):
    """Settings of systems that read histories with state-space layers."""

    dropout: float = 0.4
    learning_rate: float = 1e-3
    num_layers: int = 1
    """State-space layers."""
    num_heads: int = 4
    """Heads of a layer; must divide twice hidden_size."""
    state_size: int = 32
    """Directions of a state, along which a head's values are kept."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SystemSettings.SEARCH,
        "num_layers": Whole(low=1, high=2),
        "state_size": OneOf(values=(16, 32, 64)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_layers", "num_heads", "state_size")
        if EXPAND * self.hidden_size % self.num_heads:
            raise ConfigError(
                f"num_heads={self.num_heads} must divide {EXPAND} * hidden_size={EXPAND * self.hidden_size}"
            )

    def block(self, *, gaps: bool = False) -> StateSpaceBlock:
        """A block before training, which may read gaps."""
        return StateSpaceBlock(self.hidden_size, num_heads=self.num_heads, state_size=self.state_size, gaps=gaps)

    def parts(self, num_items: int, mixers: Sequence[nn.Module]) -> tuple[IdTable, StateSpace]:
        """Item vectors and an encoder before training, with a layer for each mixer."""
        items = IdTable(num_items, self.hidden_size, num_special=1)
        nn.init.normal_(items.table.weight, std=INITIAL)
        return items, StateSpace(self.hidden_size, mixers, self.dropout)


@dataclass(frozen=True, kw_only=True)
class Mamba4Rec(NextItemSettings, StateSpaceSettings):
    """Settings of Mamba4Rec; the defaults are ours."""

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        blocks = [self.block() for _ in range(self.num_layers)]
        model = SequenceModel(*self.parts(data.num_items, blocks))
        stream = WindowStream(data, [NEXT_ITEM], self.max_length, self.passes(seed))
        return [self.stage(data, model, self.next_item(), stream)]


PUBLISHED = Mamba4Rec(hidden_size=64, dropout=0.2, batch_size=256, num_epochs=300, anneal=0.0, patience=3)
"""Mamba4Rec with the dimensions, layer, directions, dropout, learning rate and passes of the code's only configuration,
and 50 events as it notes for Amazon. A batch of 256 windows has about as many targets as their 2,048 rows."""
