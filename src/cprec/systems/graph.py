"""Graphs of training: who had what, with sums over neighbours and steps of smoothing, and which items stand near each
other.

Suffixes: U users, V items, N users or items or targets, D width, E edges, R rows (of a sparse matrix, of a batch), T
positions, K neighbours of an item, X positions of a row with prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import nn
from torch.nn import functional as F

from cprec.data.links import links
from cprec.data.ragged import Ragged
from cprec.systems.dropout import dropout

SLOPE = 0.2
"""Of LeakyReLU below zero, as the codes of NGCF and SRA-CL have it."""


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


def neighbour_sums(vectors: torch.Tensor, matrix: Neighbours, transposed: Neighbours) -> torch.Tensor:
    """The weighted sum of each row's vectors, with a gradient: RD. The transposed matrix is what the gradient needs."""
    summed: torch.Tensor = _NeighbourSums.apply(vectors, matrix, transposed)
    return summed


class Step(nn.Module):
    """A step of smoothing: the next vectors of users or items, from their own and their neighbours' weighted sums.

    Without options these are the sums (He et al. 2020, equation 3). With `product` the sums of the neighbours' products
    with the own vector are added, and with `weights` both are mapped by matrices, the own vector beside the sums (Wang
    et al. 2019, equations 3 to 7): LeakyReLU(W1 (own + sum) + W2 (own * sum)). `dropout` is the share of entries that
    are left out in training.
    """

    def __init__(self, size: int, *, weights: bool = False, product: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.of_sum, self.of_product = (
            nn.Linear(size, size, bias=False) if weights and used else nn.Identity() for used in (True, product)
        )
        for matrix in self.parameters():
            nn.init.xavier_uniform_(matrix)
        self._weights, self._product, self._dropout = weights, product, dropout

    def forward(self, own_ND: torch.Tensor, sum_ND: torch.Tensor) -> torch.Tensor:
        """The next vectors: ND."""
        next_ND: torch.Tensor = self.of_sum(own_ND + sum_ND if self._weights else sum_ND)
        if self._product:
            next_ND = next_ND + self.of_product(own_ND * sum_ND)
        if self._weights:
            next_ND = F.leaky_relu(next_ND, SLOPE)
        return dropout(next_ND, self._dropout, training=self.training)


class UserItemGraph(nn.Module):
    """Training events as edges between users and items, each of weight 1 / sqrt(degree of its user * of its item).

    In training a share `dropout` of users and items sends nothing in a step, drawn anew for each; what others send
    grows to make up for it.
    """

    def __init__(self, sequences: Ragged, num_items: int, dropout: float = 0.0) -> None:
        super().__init__()
        self._dropout = dropout
        user, item, num_users = sequences.row_of, sequences.values, len(sequences)
        counts = sparse.csr_array((np.ones(len(item)), (user, item)), (num_users, num_items))
        degree_U, degree_V = np.maximum(counts.sum(1), 1), np.maximum(counts.sum(0), 1)
        edges_UV = sparse.diags_array(degree_U**-0.5) @ counts @ sparse.diags_array(degree_V**-0.5)
        self.of_users = Neighbours(sparse.csr_array(edges_UV))
        self.of_items = Neighbours(sparse.csr_array(edges_UV.T))
        degree = torch.from_numpy(np.bincount(item, minlength=num_items)).clamp(min=1)
        self.register_buffer("degree_V", degree, persistent=False)

    def layers(
        self, user_UD: torch.Tensor, item_VD: torch.Tensor, steps: Iterable[nn.Module]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Vectors of users and items before the first step and after each: (UD, VD) each time."""
        yield user_UD, item_VD
        for step in steps:
            of_user_UD = neighbour_sums(self._sent(item_VD), self.of_users, self.of_items)
            of_item_VD = neighbour_sums(self._sent(user_UD), self.of_items, self.of_users)
            user_UD, item_VD = step(user_UD, of_user_UD), step(item_VD, of_item_VD)
            yield user_UD, item_VD

    def _sent(self, vectors_ND: torch.Tensor) -> torch.Tensor:
        """What neighbours read of vectors: ND."""
        if not (self._dropout and self.training):
            return vectors_ND
        return vectors_ND * dropout(vectors_ND.new_ones(len(vectors_ND), 1), self._dropout, training=True)

    def new_user_sums(self, vectors_VD: torch.Tensor, items_RT: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """The weighted sums of the items' vectors that users of the graph would have with these histories: RD."""
        is_item_RT = torch.arange(items_RT.shape[1], device=items_RT.device) < lengths_R[:, None]
        items_RT = items_RT.clamp(max=len(vectors_VD) - 1)
        degree_V = self.get_buffer("degree_V")
        weight_RT = is_item_RT / (degree_V[items_RT] * lengths_R[:, None].clamp(min=1)).sqrt()
        return torch.einsum("rt,rtd->rd", weight_RT, vectors_VD[items_RT])


def ranked(matrix: sparse.csr_array, stop: int, start: int = 0) -> tuple[Ragged, np.ndarray]:
    """The columns of each row's entries from rank `start` to before `stop`, and these entries: the greatest first and
    then by column, without the diagonal.

    >>> columns, entries = ranked(sparse.csr_array([[9, 1, 2, 2], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]), stop=2)
    >>> [columns[row].tolist() for row in range(4)], entries.tolist()
    ([[2, 3], [], [0], []], [2, 2, 1])
    """
    entries = matrix.tocoo()
    row, column = entries.coords
    order = np.lexsort((column, -entries.data, row))
    order = order[row[order] != column[order]]
    every = Ragged(column[order], np.searchsorted(row[order], np.arange(matrix.shape[0] + 1)))
    kept = (every.place_of >= start) & (every.place_of < stop)
    return every.kept(kept), entries.data[order][kept]


class ItemGraph(nn.Module):
    """The strongest links of each item to others in training: `links` within five events, backwards half as strong."""

    def __init__(self, sequences: Ragged, num_items: int, num_neighbours: int) -> None:
        super().__init__()
        self.num_items = num_items
        linked = links(sequences.row_of, sequences.values, num_items, window=5, backward=0.5)
        strongest, _ = ranked(linked, num_neighbours)
        neighbour_VK = np.full((num_items + 1, num_neighbours), num_items)
        neighbour_VK[strongest.row_of, strongest.place_of] = strongest.values
        self.register_buffer("neighbour_VK", torch.from_numpy(neighbour_VK), persistent=False)

    def neighbours(self, items: torch.Tensor) -> torch.Tensor:
        """The neighbours of items, by number, strongest first and then by number; V fills up: [..., K]. Special rows
        have none."""
        return self.get_buffer("neighbour_VK")[items.clamp(max=self.num_items)]

    def soft_targets(
        self, last_N: torch.Tensor, target_N: torch.Tensor, width: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each target and the neighbours of an item, and the chances of all: int64 and float32[N, 1 + K].

        Chances are a softmax of -rank / width; the target has rank 0, the strongest other neighbour 1. Where there are
        fewer neighbours, the target stands again, without a chance.
        """
        items_NK = torch.cat([target_N[:, None], self.neighbours(last_N)], 1)
        is_other_NK = (items_NK != self.num_items) & (items_NK != target_N[:, None])
        is_other_NK[:, 0] = True
        rank_NK = is_other_NK.cumsum(1) - 1
        chance_NK = (-rank_NK / width).masked_fill(~is_other_NK, -torch.inf).softmax(1)
        return items_NK.where(is_other_NK, target_N[:, None]), chance_NK


def latest(items_RT: torch.Tensor, most: int, pad: int) -> torch.Tensor:
    """The last `most` items of rows that are padded on the right, with padding before them in shorter ones: [R, most].

    >>> latest(torch.tensor([[3, 1, 2, 9], [4, 9, 9, 9]]), 2, 9).tolist()
    [[1, 2], [9, 4]]
    """
    place = (items_RT != pad).sum(1, keepdim=True) - torch.arange(most, 0, -1, device=items_RT.device)
    return items_RT.gather(1, place.clamp(min=0)).where(place >= 0, pad)


class Prompts(nn.Module):
    """Neighbours of a history's latest items, which stand before it. A vector that is trained tells them from items of
    the history."""

    def __init__(self, graph: ItemGraph, num_latest: int, num_each: int, size: int) -> None:
        super().__init__()
        self.graph, self._num_latest, self._num_each = graph, num_latest, num_each
        self.kind_D = nn.Parameter(torch.zeros(size))

    def forward(self, items_RT: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors of prompts and items, without gaps, and the length of each row: RXD, R. Item number V pads."""
        pad = self.graph.num_items
        neighbours = self.graph.neighbours(latest(items_RT, self._num_latest, pad))[..., : self._num_each].flatten(1)
        both_RX = torch.cat([neighbours, items_RT], 1)
        order_RX = (both_RX == pad).byte().argsort(dim=1, stable=True)
        both_RX, is_prompt_RX = both_RX.gather(1, order_RX), order_RX < neighbours.shape[1]
        return F.embedding(both_RX, vectors) + is_prompt_RX[..., None] * self.kind_D, (both_RX != pad).sum(1)


def soft_rows(counts: sparse.csr_array, temperature: float) -> tuple[sparse.csr_array, np.ndarray]:
    """The softmax over all columns of each row of counts, which are divided by the row's greatest and by a temperature,
    in two parts: the chance of each column without a count, float64[V], and how much more those with one have, csr.

    >>> more, least = soft_rows(sparse.csr_array([[0, 2, 1, 0], [0, 0, 0, 0]]), temperature=0.5 / np.log(2))
    >>> least.round(3).tolist()  # of weights 1, 4, 2, 1, and of equal ones
    [0.125, 0.25]
    >>> more.toarray().round(3).tolist()
    [[0.0, 0.375, 0.125, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    num_counted, row = np.diff(counts.indptr), np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    greatest = counts.max(axis=1).toarray().ravel()
    # Weights relative to the greatest, which therefore cannot overflow; where there is no count all are equal.
    weight, floor = np.exp((counts.data / greatest[row] - 1) / temperature), np.exp(-1 / temperature)
    least = np.where(num_counted == 0, 1.0, floor)
    total = np.bincount(row, weight, counts.shape[0]) + (counts.shape[1] - num_counted) * least
    more = sparse.csr_array(((weight - floor) / total[row], counts.indices, counts.indptr), counts.shape)
    return more, least / total
