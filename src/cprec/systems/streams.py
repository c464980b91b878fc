"""Several vectors of each item, read as streams that share their weights.

Suffixes: R rows, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from cprec.systems.dot_product import SequenceModel, Vectors
from cprec.systems.dropout import Dropout
from cprec.systems.encoders import Encoder, at_last
from cprec.systems.items import ItemTable
from cprec.systems.state_space import AfterMixing, StateSpaceBlock


class SideBySide(ItemTable):
    """The vectors of one or two tables beside each other."""

    def __init__(self, tables: Sequence[ItemTable]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(tables)
        self.num_items, self.num_special = tables[0].num_items, tables[0].num_special

    def vectors(self, items: torch.Tensor | None = None) -> torch.Tensor:
        tables = [table for table in self.tables if isinstance(table, ItemTable)]
        return torch.cat([table.vectors(items) for table in tables], dim=-1)


class StreamsModel(SequenceModel):
    """A sequence model whose scores are sums over tables, of the products of its state with the item's vector, which is
    scaled to length one."""

    def __init__(self, tables: Sequence[ItemTable], encoder: Encoder) -> None:
        super().__init__(SideBySide(tables), encoder)
        self._num_tables = len(tables)

    def vectors(self, items_K: torch.Tensor | None = None) -> Vectors:
        """See `SequenceModel.vectors`."""
        items, inputs, _ = super().vectors(items_K)
        scaled = [F.normalize(part, dim=1) for part in items.chunk(self._num_tables, dim=1)]
        return Vectors(torch.stack(scaled).sum(0), inputs)


class SharedStreams(Encoder):
    """State-space layers over one stream, or over two of which the second is read with the states of the first.

    Inputs hold the streams side by side, and last the gaps where the blocks read them. States are those of the last
    stream.
    """

    def __init__(self, layers: Sequence[StreamLayer], size: int, dropout: float) -> None:
        super().__init__()
        num_streams = 1 if layers[0].cross is None else 2
        self.layers, self.dropout = nn.ModuleList(layers), Dropout(dropout)
        self.norms = nn.ModuleList([nn.LayerNorm(size) for _ in range(num_streams)])
        self._sizes = [size] * num_streams + [1] * (layers[0].block.by_gap is not None)

    def embed(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """See `Encoder.embed`. A gap that is dropped out counts as not known."""
        parts = self.dropout(inputs_RTD).split(self._sizes, dim=2)
        normed = [norm(part) for norm, part in zip(self.norms, parts, strict=False)]
        return torch.cat([*normed, *parts[len(normed) :]], dim=2)

    def read(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        parts = embedded_RTD.split(self._sizes, dim=2)
        streams, gaps = parts[: len(self.norms)], parts[len(self.norms) :]
        for layer in self.layers:
            streams = layer(streams, lengths_R, *gaps)
        return streams[-1]

    def read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return at_last(self.read(embedded_RTD, lengths_R), lengths_R)


class StreamLayer(nn.Module):
    """One block reads each stream. With `cross`, a second block writes the states of the first stream and reads them by
    the second one."""

    def __init__(self, block: StateSpaceBlock, cross: StateSpaceBlock | None, size: int, dropout: float) -> None:
        super().__init__()
        self.block, self.cross, self.after = block, cross, AfterMixing(size, dropout)
        if cross is not None:
            self.norm, self.dropout, self.after_cross = (
                nn.LayerNorm(size),
                Dropout(dropout),
                AfterMixing(size, dropout),
            )

    def forward(
        self, streams: Sequence[torch.Tensor], lengths_R: torch.Tensor, gap_RT1: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """What each stream becomes: RTD each."""
        first_RTD = self.after(self.block(streams[0], lengths_R, gap_RT1=gap_RT1), streams[0])
        if self.cross is None:
            return (first_RTD,)
        own_RTD = self.norm(self.dropout(self.block(streams[1], lengths_R, gap_RT1=gap_RT1)) + streams[1])
        crossed_RTD = self.cross(own_RTD, lengths_R, first_RTD, gap_RT1)
        return first_RTD, self.after_cross(crossed_RTD, own_RTD + first_RTD)
