"""LightGCN: vectors of users and items, smoothed over the graph of who had what (He et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cprec.baselines.objectives import Objective
from cprec.baselines.search import Choice, OneOf, Real, Whole
from cprec.baselines.sequential import NEXT_ITEM, BatchStream, ItemModel, TrainedBaseline, TrainingLog
from cprec.batch import Batch


@dataclass(frozen=True, kw_only=True)
class LightGCN(TrainedBaseline):
    """Settings of LightGCN; the defaults are ours: cross-entropy against shared negatives, which needs far fewer passes
    than pairs. It knows no order: what a user had lately counts as much as the rest."""

    objective: Objective = "sampled_softmax"
    num_negatives: int = 2048
    hidden_size: int = 64
    dropout: float = 0.0
    learning_rate: float = 5e-3
    batch_size: int = 4096
    num_epochs: float = 30
    max_length: int = 1000
    num_layers: int = 2
    """Smoothing steps."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        "hidden_size": OneOf(values=(64, 128)),
        "learning_rate": Real(low=1e-3, high=2e-2, log=True),
        "num_layers": Whole(low=1, high=4),
        "num_epochs": OneOf(values=(10, 30, 60)),
    }

    def build(self, log: TrainingLog) -> ItemModel:
        """See `TrainedBaseline.build`."""
        return Smoothed(self, log)

    def stream(self, log: TrainingLog, seed: int) -> BatchStream:
        """Pairs of a user and an item of theirs."""
        return PairStream(log, self, seed)


PUBLISHED = LightGCN(
    objective="bpr",
    num_negatives=1,
    num_layers=3,
    learning_rate=1e-3,
    batch_size=2048,
    num_epochs=200,
    anneal=0.0,
    patience=3,
)
"""LightGCN as first published: pairs with one negative (BPR), three layers, learning rate 1e-3, batches of 2,048. It
lacks the penalty on the vectors' squares and has 200 passes for 1,000; negatives may be items of the user."""


class PairStream(BatchStream):
    """A user and an item of theirs in each row; every training event is one pair."""

    def __init__(self, log: TrainingLog, settings: LightGCN, seed: int) -> None:
        self._user, self._item = log.sequences.row_of, log.sequences.values
        super().__init__(np.ones(len(self._item), dtype=np.int64), settings, seed)

    def batch(self, step: int) -> Batch:
        """See `BatchStream.batch`."""
        pairs = self.members(step)
        return Batch(
            rows={"input_ids": self._user[pairs, None], "targets": self._item[pairs, None]},
            counts={NEXT_ITEM: len(pairs)},
            num_tokens=len(pairs),
            examples=pairs,
        )


class Neighbours(NamedTuple):
    """Rows of a constant sparse matrix one after the other: their columns, where each row begins, and the weights."""

    column_N: torch.Tensor
    start_R: torch.Tensor
    weight_N: torch.Tensor

    def sums(self, vectors_VD: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each row's vectors: RD. Many times as fast as torch's sparse products on a CPU."""
        return F.embedding_bag(self.column_N, vectors_VD, self.start_R, mode="sum", per_sample_weights=self.weight_N)


class _Smooth(torch.autograd.Function):
    """The weighted sums of neighbours' vectors; the gradient is the same sum over those that one is a neighbour of."""

    @staticmethod
    def forward(ctx: Any, vectors: torch.Tensor, matrix: Neighbours, transposed: Neighbours) -> torch.Tensor:
        ctx.transposed = transposed
        return matrix.sums(vectors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.transposed.sums(grads[0].contiguous()), None, None


class Smoothed(ItemModel):
    """The mean over layers of vectors that take the sum of their neighbours' at each, over sqrt(degree * degree).

    A user unknown in training is represented by the same sums over the items of the history, without a vector of its
    own. Suffixes: U users, V items, D width, R rows.
    """

    def __init__(self, settings: LightGCN, log: TrainingLog) -> None:
        super().__init__()
        self.num_layers = settings.num_layers
        self.num_items = log.num_items
        self.user = nn.Embedding(len(log.users), settings.hidden_size)
        self.item = nn.Embedding(log.num_items, settings.hidden_size)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)
        self._graph = _graph(log)
        self._degree_V = torch.from_numpy(np.bincount(log.sequences.values, minlength=log.num_items)).clamp(min=1)

    def layers(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Vectors of users and items after 0, 1, ... smoothing steps: UD, VD."""
        device = self.user.weight.device
        if self._graph[0].weight_N.device != device:
            of_users, of_items = (Neighbours(*(each.to(device) for each in matrix)) for matrix in self._graph)
            self._graph = of_users, of_items
        of_users, of_items = self._graph
        user_UD, item_VD = self.user.weight, self.item.weight
        yield user_UD, item_VD
        for _ in range(self.num_layers):
            user_UD, item_VD = (
                _Smooth.apply(item_VD, of_users, of_items),
                _Smooth.apply(user_UD, of_items, of_users),
            )
            yield user_UD, item_VD

    def forward(
        self, input_ids_RT: torch.Tensor, targets_RT: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `ItemModel.forward`; an input is the row of a user."""
        users, items = zip(*self.layers(), strict=True)
        user_UD, item_VD = _mean(users), _mean(items)
        return user_UD[input_ids_RT[:, 0]], targets_RT[:, 0], item_VD

    def encode(self, input_ids_RT: torch.Tensor, lengths_R: torch.Tensor, users_R: torch.Tensor) -> torch.Tensor:
        """See `ItemModel.encode`."""
        layers = list(self.layers())
        out_RD = _mean([user_UD for user_UD, _ in layers])[users_R.clamp(min=0)]
        unknown_R = users_R < 0
        if unknown_R.any():
            ids_RT = input_ids_RT[unknown_R]
            real_RT = ids_RT < self.num_items
            ids_RT = ids_RT.clamp(max=self.num_items - 1)
            degree_V = self._degree_V.to(ids_RT.device)
            weight_RT = real_RT / (degree_V[ids_RT] * lengths_R[unknown_R, None].clamp(min=1)).sqrt()
            below_VD = torch.stack([item_VD for _, item_VD in layers[:-1]]).sum(0) / len(layers)
            out_RD[unknown_R] = torch.einsum("rt,rtd->rd", weight_RT, below_VD[ids_RT])
        return out_RD

    def items(self) -> torch.Tensor:
        """See `ItemModel.items`."""
        return _mean([item_VD for _, item_VD in self.layers()])


def _mean(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Added one by one: stacking them first takes several times as long, forwards and backwards."""
    return sum(layers[1:], layers[0]) / len(layers)


def _graph(log: TrainingLog) -> tuple[Neighbours, Neighbours]:
    """Users by items and its transpose, each event 1 / sqrt(degree of its user * degree of its item)."""
    from scipy import sparse

    user, item = log.sequences.row_of, log.sequences.values
    counts = sparse.csr_array((np.ones(len(item)), (user, item)), (len(log.users), log.num_items))
    degree_U, degree_V = np.maximum(counts.sum(1), 1), np.maximum(counts.sum(0), 1)
    of_users = sparse.diags_array(degree_U**-0.5) @ counts @ sparse.diags_array(degree_V**-0.5)

    def as_neighbours(matrix: Any) -> Neighbours:
        rows = sparse.csr_array(matrix)
        columns, starts = (torch.from_numpy(each.astype(np.int32)) for each in (rows.indices, rows.indptr[:-1]))
        return Neighbours(columns, starts, torch.from_numpy(rows.data.astype(np.float32)))

    return as_neighbours(of_users), as_neighbours(of_users.T)
