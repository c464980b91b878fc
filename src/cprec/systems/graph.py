"""The graph of who had what in training, and sums over neighbours in it.

Suffixes: U users, V items, D width, E edges, R rows of a sparse matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import nn
from torch.nn import functional as F

from cprec.data.ragged import Ragged


class Neighbours(nn.Module):
    """A constant sparse matrix by rows: its columns, where each row begins, and the weights."""

    def __init__(self, matrix: sparse.csr_array) -> None:
        super().__init__()
        for name, array, kind in (
            ("column_E", matrix.indices, np.int32),
            ("start_R", matrix.indptr[:-1], np.int32),
            ("weight_E", matrix.data, np.float32),
        ):
            self.register_buffer(name, torch.from_numpy(array.astype(kind)), persistent=False)

    def sums(self, vectors: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each row's vectors: RD. Many times as fast as torch's sparse products on a CPU."""
        column, start, weight = (self.get_buffer(name) for name in ("column_E", "start_R", "weight_E"))
        return F.embedding_bag(column, vectors, start, mode="sum", per_sample_weights=weight)


class _NeighbourSums(torch.autograd.Function):
    """`Neighbours.sums`; the gradient is the same sum over those that a row is a neighbour of."""

    @staticmethod
    def forward(ctx: Any, vectors: torch.Tensor, matrix: Neighbours, transposed: Neighbours) -> torch.Tensor:
        ctx.transposed = transposed
        return matrix.sums(vectors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.transposed.sums(grads[0].contiguous()), None, None


class UserItemGraph(nn.Module):
    """Training events as edges between users and items, each of weight 1 / sqrt(degree of its user * of its item)."""

    def __init__(self, sequences: Ragged, num_items: int) -> None:
        super().__init__()
        user, item, num_users = sequences.row_of, sequences.values, len(sequences)
        counts = sparse.csr_array((np.ones(len(item)), (user, item)), (num_users, num_items))
        degree_U, degree_V = np.maximum(counts.sum(1), 1), np.maximum(counts.sum(0), 1)
        edges_UV = sparse.diags_array(degree_U**-0.5) @ counts @ sparse.diags_array(degree_V**-0.5)
        self.of_users = Neighbours(sparse.csr_array(edges_UV))
        self.of_items = Neighbours(sparse.csr_array(edges_UV.T))
        degree = torch.from_numpy(np.bincount(item, minlength=num_items)).clamp(min=1)
        self.register_buffer("degree_V", degree, persistent=False)

    def layers(
        self, user_UD: torch.Tensor, item_VD: torch.Tensor, num_layers: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Vectors of users and items after 0, 1, ... steps, in each of which every vector becomes the weighted sum of
        its neighbours': (UD, VD) each time."""
        yield user_UD, item_VD
        for _ in range(num_layers):
            user_UD, item_VD = (
                _NeighbourSums.apply(item_VD, self.of_users, self.of_items),
                _NeighbourSums.apply(user_UD, self.of_items, self.of_users),
            )
            yield user_UD, item_VD

    def new_user_sums(self, vectors_VD: torch.Tensor, items_RT: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """The weighted sums of the items' vectors that users of the graph would have with these histories: RD."""
        is_item_RT = torch.arange(items_RT.shape[1], device=items_RT.device) < lengths_R[:, None]
        items_RT = items_RT.clamp(max=len(vectors_VD) - 1)
        degree_V = self.get_buffer("degree_V")
        weight_RT = is_item_RT / (degree_V[items_RT] * lengths_R[:, None].clamp(min=1)).sqrt()
        return torch.einsum("rt,rtd->rd", weight_RT, vectors_VD[items_RT])
