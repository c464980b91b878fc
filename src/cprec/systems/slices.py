"""Items as several codes that have no order, read as so many tokens and predicted all at once.

Suffixes: V items, S special rows, X both, L slices of an item, K codes of a slice, C width of a slice, R rows, T items
of a row, N targets, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cprec.systems.dot_product import Rows, SequenceModel, Vectors
from cprec.systems.encoders import Encoder, SelfAttention, at_last
from cprec.systems.items import NUM_SPECIAL, ItemTable
from cprec.systems.terms import product_dtype
from cprec.train.loss import linear_cross_entropy


class SliceTable(ItemTable):
    """Items as L tokens, whose vectors stand side by side: [..., L * D]. That of a slice is the norm of its code's row
    plus the norm of the slice itself, through a linear map that all slices share. Special rows have code 0 and zeros.
    """

    def __init__(self, code_VL: np.ndarray, frozen_VF: np.ndarray, num_codes: int, size: int) -> None:
        """Codes are below `num_codes`; frozen vectors are cut into slices as `np.array_split` does."""
        super().__init__()
        self.num_items, self.num_special, self.num_codes = len(code_VL), NUM_SPECIAL, num_codes
        self.num_slices = code_VL.shape[1]
        slices = np.array_split(frozen_VF.astype(np.float32), self.num_slices, axis=1)
        width = max(slice_VC.shape[1] for slice_VC in slices)
        slice_VLC = np.stack([np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in slices], axis=1)
        row_VL = code_VL + np.arange(self.num_slices) * num_codes
        after = ((0, NUM_SPECIAL), (0, 0))
        self.register_buffer("row_XL", torch.from_numpy(np.pad(row_VL, after)), persistent=False)
        self.register_buffer("slice_XLC", torch.from_numpy(np.pad(slice_VLC, (*after, (0, 0)))), persistent=False)
        self.rows = nn.Embedding(self.num_slices * num_codes, size)
        self.map = nn.Linear(width, size, bias=False)
        self.norm_row, self.norm_slice = nn.LayerNorm(size), nn.LayerNorm(size)

    def vectors(self, items: torch.Tensor | None = None) -> torch.Tensor:
        row, slices = self.get_buffer("row_XL"), self.get_buffer("slice_XLC")
        if items is not None:
            row, slices = row[items], slices[items]
        tokens: torch.Tensor = self.norm_row(self.rows(row)) + self.norm_slice(self.map(slices))
        return tokens.flatten(-2)

    def code_rows(self) -> torch.Tensor:
        """The rows of the codes of all items, side by side: [V, L * D]."""
        codes: torch.Tensor = self.rows(self.get_buffer("row_XL")[: self.num_items])
        return codes.flatten(1)


class SliceEncoder(Encoder):
    """Self-attention over the tokens of items: those of one item read each other, and all of the items before it."""

    def __init__(self, encoder: SelfAttention, num_slices: int) -> None:
        """The encoder has positions for as many tokens; its own order is not used."""
        super().__init__()
        self.encoder, self._num_slices = encoder, num_slices

    def embed(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """See `Encoder.embed`; inputs have the tokens of an item side by side."""
        tokens = inputs_RTD.unflatten(2, (self._num_slices, -1)).flatten(1, 2)
        # They are of norms and need no scale, which the encoder gives to small vectors.
        return self.encoder.embed(tokens * tokens.shape[2] ** -0.5, lengths_R * self._num_slices)

    def read(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """See `Encoder.read`; states of an item's tokens stand side by side."""
        item_T = torch.arange(embedded_RTD.shape[1], device=embedded_RTD.device) // self._num_slices
        # Padding comes after all items, so that none of them reads it.
        mask_11TT = (item_T <= item_T[:, None])[None, None]
        hidden_RTD = embedded_RTD
        for block in self.encoder.blocks:
            hidden_RTD = block(hidden_RTD, mask_11TT)
        normed: torch.Tensor = self.encoder.norm(hidden_RTD)
        return normed.unflatten(1, (-1, self._num_slices)).flatten(2)

    def read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return at_last(self.read(embedded_RTD, lengths_R), lengths_R)


class SliceModel(SequenceModel):
    """Predicts each code of the next item by the state of the same slice of the last one. Given the history, codes are
    independent:

        log P(item) = sum over slices of (log softmax of the slice's codes)[the item's code]

    which is a product of vectors: states, and minus the sum of the softmaxes' normalisers, with the rows of the item's
    codes, and 1. So items of equal codes tie, and all items are ranked without a search.
    """

    items: SliceTable

    def over(self, code_VL: np.ndarray, frozen_VF: np.ndarray) -> SliceModel:
        """The same weights over other items, whose codes and vectors mean what those of training do. Their domain is
        ranked without training."""
        items = SliceTable(code_VL, frozen_VF, self.items.num_codes, self.items.rows.embedding_dim)
        items.load_state_dict(self.items.state_dict())
        return SliceModel(items, self.encoder)

    def vectors(self, items_K: torch.Tensor | None = None) -> Vectors:
        assert items_K is None, "codes are shared, so that no few items stand for all"
        return Vectors(F.pad(self.items.code_rows(), (0, 1), value=1.0), self.items.vectors())

    def encode(self, vectors: Vectors, rows: Rows) -> torch.Tensor:
        state_RD = self._last(vectors, rows)
        state_RLD = state_RD.unflatten(1, (self.items.num_slices, -1))
        row_LKD = self.items.rows.weight.unflatten(0, (self.items.num_slices, -1))
        normaliser_R = torch.einsum("rld,lkd->rlk", state_RLD, row_LKD).logsumexp(2).sum(1)
        return torch.cat([state_RD, -normaliser_R[:, None]], dim=1)

    def loss(self, hidden_ND: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        """A `Term`: minus log P of the targets."""
        code_LN = self.items.get_buffer("row_XL")[target_N].T
        parts = zip(
            hidden_ND.unflatten(1, (self.items.num_slices, -1)).unbind(1),
            self.items.rows.weight.unflatten(0, (self.items.num_slices, -1)),
            code_LN % self.items.num_codes,
            strict=True,
        )
        dtype = product_dtype()
        return torch.stack([linear_cross_entropy(*each, dtype) for each in parts]).sum()
