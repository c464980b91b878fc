"""Groups of items that are known before any query, and heads that rank one group each (Zhang et al. 2025).

A target has the head of its group, and of how far ahead it is, in training alone: in ranking all heads score, each the
items of its own group, and nothing is asked about a target. Suffixes: V items, F width of frozen vectors, G groups, S
stretches of the future, R rows, Q queries, D width, N targets, P places ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from cprec.batch import IGNORE
from cprec.errors import Unsuitable
from cprec.systems.clusters import k_means
from cprec.systems.dot_product import SequenceModel, Vectors
from cprec.systems.encoders import Encoder
from cprec.systems.intents import at_zero
from cprec.systems.items import ItemTable
from cprec.systems.terms import product_dtype
from cprec.train.loss import linear_cross_entropy

ROUNDS = 20
"""Rounds of k-means over titles."""


def by_category(categories: Sequence[str], num_groups: int) -> np.ndarray:
    """Groups of items by their category: int64[V]. The categories with the most items have a group each, all others
    share the last; of equal ones the first by name comes first, and to have none is one as well.

    Raises Unsuitable where there are fewer categories than groups, or none.

    >>> by_category(["tea", "mug", "tea", "", "pot"], 3).tolist()
    [0, 2, 0, 1, 2]
    """
    names, category_V, counts = np.unique(categories, return_inverse=True, return_counts=True)
    if not any(names):
        raise Unsuitable(
            "prior='category' needs categories of items, and here no item has any: give the column categories, or take "
            "prior='titles' or prior='popularity'"
        )
    if len(names) < num_groups:
        raise Unsuitable(
            f"num_groups={num_groups} with prior='category', but there are only {len(names)} categories (items without "
            f"one count as one): give at most {len(names)}"
        )
    rank = np.empty(len(names), dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(names))
    return np.minimum(rank[category_V], num_groups - 1)


def by_title(vectors_VF: np.ndarray, num_groups: int, seed: int) -> np.ndarray:
    """Groups of items by k-means over vectors of their titles, begun at a seeded sample of them: int64[V].

    Raises Unsuitable where the vectors make fewer groups.
    """
    check_count(len(vectors_VF), num_groups)
    points_VF = torch.from_numpy(vectors_VF)
    start = np.random.default_rng(seed).permutation(len(vectors_VF))[:num_groups]
    _, group_V = k_means(points_VF, points_VF[start], ROUNDS, moves_empty=True)
    found = len(group_V.unique())
    if found < num_groups:
        raise Unsuitable(
            f"num_groups={num_groups} with prior='titles', but titles make only {found} groups: give fewer, or take "
            "prior='popularity'"
        )
    return group_V.numpy()


def by_popularity(counts_V: np.ndarray, num_groups: int) -> np.ndarray:
    """Groups of items by their training events, the most popular first: int64[V]. All hold as many items, or one more.
    Of equally popular items the first comes first. Raises Unsuitable where there are fewer items than groups.

    >>> by_popularity(np.array([3, 9, 1, 3, 0]), 2).tolist()
    [0, 0, 1, 0, 1]
    """
    check_count(len(counts_V), num_groups)
    group_V = np.empty(len(counts_V), dtype=np.int64)
    parts = np.array_split(np.argsort(-counts_V, kind="stable"), num_groups)
    for group, members in enumerate(parts):
        group_V[members] = group
    return group_V


def check_count(num_items: int, num_groups: int) -> None:
    """Raises Unsuitable where there are fewer items than groups."""
    if num_items < num_groups:
        raise Unsuitable(f"num_groups={num_groups}, but there are only {num_items} items: give at most {num_items}")


class HeadModel(SequenceModel):
    """A sequence model with a head for each of G groups of items and S stretches of the future. A head gives the state
    plus SiLU of a linear layer of it, which is zero before training; a single head is the state itself.

    An item's score is the greatest of the S heads of its own group: a product, or a cosine over `temperature` unless
    that is 0.
    """

    def __init__(
        self, items: ItemTable, encoder: Encoder, group_V: np.ndarray, num_stretches: int, temperature: float
    ) -> None:
        """`group_V` holds each number from 0 to G - 1 at least once."""
        super().__init__(items, encoder)
        sizes = np.bincount(group_V)
        self.num_stretches, self._sizes, self._temperature = num_stretches, sizes.tolist(), temperature
        # Items group by group, and where each stands in its own.
        order_V = np.argsort(group_V, kind="stable")
        place_V = np.empty_like(order_V)
        place_V[order_V] = np.arange(len(order_V)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        for name, array in (("group_V", group_V), ("order_V", order_V), ("place_V", place_V)):
            self.register_buffer(name, torch.from_numpy(array), persistent=False)
        num_heads, size = len(sizes) * num_stretches, items.vectors(torch.zeros(1, dtype=torch.int64)).shape[1]
        self.heads = nn.ModuleList(at_zero(nn.Linear(size, size)) for _ in range(num_heads if num_heads > 1 else 0))

    def vectors(self, items_K: torch.Tensor | None = None) -> Vectors:
        vectors = super().vectors(items_K)
        return vectors._replace(items_VD=F.normalize(vectors.items_VD, dim=1)) if self._temperature else vectors

    def head(self, group: int, stretch: int, state_ND: torch.Tensor) -> torch.Tensor:
        """What a head makes of states: ND."""
        if self.heads:
            state_ND = state_ND + F.silu(self.heads[group * self.num_stretches + stretch](state_ND))
        return F.normalize(state_ND, dim=1) / self._temperature if self._temperature else state_ND

    def encode(self, vectors: Vectors, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What all heads make of histories: RGSD."""
        state_RD, groups, stretches = super().encode(vectors, rows), range(len(self._sizes)), range(self.num_stretches)
        heads = [torch.stack([self.head(group, each, state_RD) for each in stretches], 1) for group in groups]
        return torch.stack(heads, 1)

    def products(self, hidden_QGSD: torch.Tensor, items_VD: torch.Tensor, out_QV: torch.Tensor) -> torch.Tensor:
        """See `DotProductModel.products`: of each item with the best of its own group's heads."""
        members = self.get_buffer("order_V").split(self._sizes)
        for group, (members_B, items_BD) in enumerate(zip(members, self.by_group(items_VD), strict=True)):
            out_QV[:, members_B] = (hidden_QGSD[:, group] @ items_BD.T).amax(1)
        return out_QV

    def by_group(self, of_items: torch.Tensor) -> Sequence[torch.Tensor]:
        """What there is of each item, group by group."""
        parts: Sequence[torch.Tensor] = of_items[self.get_buffer("order_V")].split(self._sizes)
        return parts


class OwnHeads:
    """A teacher: cross-entropy of the next P targets of each position, each over the items of its own group, from the
    head of that group and of the stretch that it is in.

    Stretches are of equal length. Target p, counted from 0, weighs discount^p; the weights add up to 1. Targets are
    those of the same row, so that there are fewer far ahead.
    """

    def __init__(self, model: HeadModel, horizon: int, discount: float) -> None:
        weights_P = discount ** np.arange(horizon)
        self._model, self._weights_P, self._dtype = model, (weights_P / weights_P.sum()).tolist(), product_dtype()

    def __call__(
        self, hidden_ND: torch.Tensor, rows: Mapping[str, torch.Tensor], weight_VD: torch.Tensor
    ) -> torch.Tensor:
        model, targets_RT = self._model, rows["targets"]
        group_V, place_V = (model.get_buffer(name) for name in ("group_V", "place_V"))
        is_target_RT, loss = targets_RT != IGNORE, 0 * hidden_ND.sum()  # a step may have no target
        items_of_group = model.by_group(weight_VD)
        for ahead, weight in enumerate(self._weights_P):
            later_N = F.pad(targets_RT, (0, ahead), value=IGNORE)[:, ahead:][is_target_RT]
            group_N = torch.where(later_N == IGNORE, -1, group_V[later_N.clamp(min=0)])
            stretch = ahead * model.num_stretches // len(self._weights_P)
            for group, items_BD in enumerate(items_of_group):
                mine = (group_N == group).nonzero().squeeze(1)
                if len(mine):
                    head_ND = model.head(group, stretch, hidden_ND[mine])
                    loss = loss + weight * linear_cross_entropy(head_ND, items_BD, place_V[later_N[mine]], self._dtype)
        return loss
