"""Items by what they are and by those near them: which stand near an item on random walks, and a network that adds what
neighbours are to what the item is (Ying et al. 2018).

Suffixes: V items, E edges, F width of given vectors, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import nn
from torch.nn import functional as F

from cprec.data.ragged import Ragged, offsets_of
from cprec.systems.graph import Neighbours, neighbour_sums, ranked
from cprec.systems.items import ItemTable
from cprec.systems.vectors import most_similar

WALKS_AT_ONCE = 1 << 20
"""Walks that exist at once: this bounds the memory that they need."""


def visits(
    sequences: Ragged, num_items: int, *, num_walks: int, num_hops: int, generator: np.random.Generator
) -> sparse.csr_array:
    """How often random walks from each item (row) came by each other one (column): int64 csr[V, V].

    Each item is where `num_walks` walks begin. A hop goes from an item to one of its events, and from there to one of
    the events of that user, the same one perhaps, all with equal chances. Coming back to the start is no visit. Items
    without events are on no walk.
    """
    events = np.argsort(sequences.values, kind="stable")  # by item
    user_of, lengths = sequences.row_of, sequences.lengths
    first_event = offsets_of(np.bincount(sequences.values, minlength=num_items))
    num_events = np.diff(first_event)

    def drawn(first: np.ndarray, num: np.ndarray) -> np.ndarray:
        return first + (generator.random(len(num)) * num).astype(np.int64)

    reached, at_once = sparse.csr_array((num_items, num_items), dtype=np.int64), max(1, WALKS_AT_ONCE // num_walks)
    starts = np.flatnonzero(num_events)
    for part in np.split(starts, range(at_once, len(starts), at_once)):
        start = np.repeat(part, num_walks)
        item = start
        for _ in range(num_hops):
            user = user_of[events[drawn(first_event[item], num_events[item])]]
            item = sequences.values[drawn(sequences.offsets[user], lengths[user])]
            away = item != start
            ones = np.ones(away.sum(), dtype=np.int64)
            reached = reached + sparse.csr_array((ones, (start[away], item[away])), reached.shape)
    return reached


def importance(visits_VV: sparse.csr_array, frozen_VF: np.ndarray, known: np.ndarray, num: int) -> sparse.csr_array:
    """The weights of each item's neighbours (columns), which sum to one: csr[V, V].

    Neighbours are the `num` items that walks from it visited most, then by number, weighted by these visits. An item
    that is not `known`, as it has no events, has those known items whose vectors are most like its own, weighted by
    their cosines, as far as these are above zero.
    """
    nearest, weights = ranked(visits_VV, num)
    row, column = nearest.row_of, nearest.values
    new = np.setdiff1d(np.arange(len(frozen_VF)), known)
    num_alike = min(num, len(known) - 1)
    if len(new) and num_alike:
        alike_QK = most_similar(frozen_VF.__getitem__, np.arange(len(frozen_VF)), known, num_alike, new)
        unit_VF = F.normalize(torch.from_numpy(frozen_VF), dim=1).numpy()
        cosine_QK = np.einsum("qf,qkf->qk", unit_VF[new], unit_VF[alike_QK])
        row, column = np.append(row, np.repeat(new, num_alike)), np.append(column, alike_QK)
        weights = np.append(weights, cosine_QK.clip(min=0))
    weighted = sparse.csr_array((weights.astype(float), (row, column)), visits_VV.shape)
    totals_V = weighted.sum(1)
    return sparse.csr_array(sparse.diags_array(1 / np.where(totals_V > 0, totals_V, 1)) @ weighted)


class Convolve(nn.Module):
    """A step from vectors to those of the next layer, of length one (Ying et al. 2018, algorithm 1):

        n = sum of weight * ReLU(Q z_neighbour + q),   z' = ReLU(W [z, n] + w),   z' / |z'|

    Without neighbours it is a layer over the own vector: z' = ReLU(W z + w).
    """

    def __init__(self, in_size: int, size: int, *, neighbours: bool) -> None:
        super().__init__()
        self.own = nn.Linear(in_size, size)
        if neighbours:
            self.sent, self.pooled = nn.Linear(in_size, size), nn.Linear(size, size, bias=False)

    def forward(self, vectors_VD: torch.Tensor, matrices: Sequence[Neighbours]) -> torch.Tensor:
        """`matrices` are the neighbours' weights and their transpose, or nothing: VD."""
        next_VD: torch.Tensor = self.own(vectors_VD)
        if matrices:
            next_VD = next_VD + self.pooled(neighbour_sums(self.sent(vectors_VD).relu(), *matrices))
        return F.normalize(next_VD.relu(), dim=1)


class ConvolvedTable(ItemTable):
    """Given vectors, and those of an item's neighbours, through steps of `Convolve` and a last network; one special row
    of zeros. As nothing belongs to single items, those that are new have vectors as well."""

    num_special = 1

    def __init__(self, frozen_VF: np.ndarray, weights_VV: sparse.csr_array | None, size: int, num_steps: int) -> None:
        """`weights_VV` are those of `importance`; None where the steps read no neighbours."""
        super().__init__()
        self.num_items = len(frozen_VF)
        self.register_buffer("frozen", torch.from_numpy(frozen_VF), persistent=False)
        both = [] if weights_VV is None else [weights_VV, sparse.csr_array(weights_VV.T)]
        self.matrices = nn.ModuleList([Neighbours(matrix) for matrix in both])
        sizes = [frozen_VF.shape[1], *[size] * (num_steps - 1)]
        self.steps = nn.ModuleList([Convolve(read, size, neighbours=weights_VV is not None) for read in sizes])
        self.last = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size, bias=False))

    def vectors(self, items: torch.Tensor | None = None) -> torch.Tensor:
        """See `ItemTable.vectors`. Those of all items are computed each time."""
        hidden_VD = self.get_buffer("frozen")
        for step in self.steps:
            hidden_VD = step(hidden_VD, list(self.matrices))
        every = F.pad(self.last(hidden_VD), (0, 0, 0, self.num_special))
        return every if items is None else F.embedding(items, every)

    def given(self) -> torch.Tensor:
        return self.get_buffer("frozen")
