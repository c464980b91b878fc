"""Two towers: items that a language model reads, and histories that an encoder reads over its vectors of them.

In a training step only the titles are read that it needs. Suffixes: V items, S special rows, K some items, M drawn
items, N targets, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from cprec.batch import IGNORE
from cprec.systems.dot_product import Rows, SequenceModel, Vectors
from cprec.systems.encoders import Encoder
from cprec.systems.items import ItemTable
from cprec.systems.language import language_groups
from cprec.systems.stage import NEXT_ITEM
from cprec.systems.terms import Teacher, product_dtype
from cprec.train.loss import linear_cross_entropy

SCALE, LARGEST_SCALE = 1 / 0.07, 100.0
"""What cosines are multiplied by before training, and at most."""


class TowerModel(SequenceModel):
    """A sequence model whose scores are products, or cosines times a number that is learnt."""

    def __init__(
        self, items: ItemTable, encoder: Encoder, output: ItemTable | None = None, *, cosine: bool = False
    ) -> None:
        super().__init__(items, encoder, output=output)
        self.log_scale = nn.Parameter(torch.tensor(math.log(SCALE))) if cosine else None

    def vectors(self, items_K: torch.Tensor | None = None) -> Vectors:
        vectors = super().vectors(items_K)
        return vectors._replace(items_VD=self._directed(vectors.items_VD))

    def vectors_read(self, items_K: torch.Tensor) -> Vectors:
        """As `vectors` gives them for all items, but only some are read: what is made of others is zero."""
        num_items, num_special = self.items.num_items, self.items.num_special
        special_S = torch.arange(num_special, device=items_K.device) + num_items
        read = torch.cat([items_K, special_S])
        found = self.items.vectors(read)
        inputs = found.new_zeros(num_items + num_special, found.shape[1]).index_copy(0, read, found)
        output_VD = inputs[:num_items] if self.output is None else self.output.vectors()
        return Vectors(self._directed(output_VD), inputs)

    def states(self, vectors: Vectors, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        states_ND, target_N = super().states(vectors, rows)
        return self._scaled(states_ND), target_N

    def encode(self, vectors: Vectors, rows: Rows) -> torch.Tensor:
        return self._scaled(super().encode(vectors, rows))

    def _directed(self, items_VD: torch.Tensor) -> torch.Tensor:
        return items_VD if self.log_scale is None else F.normalize(items_VD, dim=-1)

    def _scaled(self, states: torch.Tensor) -> torch.Tensor:
        if self.log_scale is None:
            return states
        return F.normalize(states, dim=-1) * self.log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()


def against_drawn(
    states_ND: torch.Tensor, items_VD: torch.Tensor, target_N: torch.Tensor, drawn_M: torch.Tensor, too_near: float
) -> torch.Tensor:
    """Summed cross-entropy of each target against items that all targets of the step share, without those that are
    the target itself or whose cosine with it is above `too_near`: they may well be right (InfoNCE with the filter of
    Chen et al. 2024)."""
    target_ND, drawn_MD = items_VD[target_N], items_VD[drawn_M]
    cosine_NM = F.normalize(target_ND.detach(), dim=1) @ F.normalize(drawn_MD.detach(), dim=1).T
    left_out_NM = (cosine_NM > too_near) | (drawn_M == target_N[:, None])
    score_N1 = (states_ND * target_ND).sum(1, keepdim=True)
    score_NM = (states_ND @ drawn_MD.T).masked_fill(left_out_NM, -torch.inf)
    return (torch.cat([score_N1, score_NM], dim=1).logsumexp(1) - score_N1.squeeze(1)).sum()


class TowerLoss:
    """The loss of a model of two towers as a `Trainable`, against drawn items or against all.

    Read are the titles of the items in rows and, where items have one vector, those of what they are set against.
    """

    def __init__(
        self,
        model: TowerModel,
        teachers: Mapping[str, tuple[float, Teacher]] | None = None,
        *,
        num_drawn: int,
        too_near: float,
        language_rate: float,
    ) -> None:
        """`teachers` are more terms by name: (weight, term). `num_drawn` items are drawn in each step, uniformly, by
        torch's seed; 0: all items count. `language_rate` is the share of the learning rate that weights of the language
        model have."""
        self._teachers = teachers or {}
        learnt = {name: term for name, (_, term) in self._teachers.items() if isinstance(term, nn.Module)}
        self.module: nn.Module = nn.ModuleDict({"model": model, **learnt}) if learnt else model
        self._model, self._num_drawn, self._too_near = model, num_drawn, too_near
        self._language_rate, self._dtype = language_rate, product_dtype()

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`."""
        model, targets = self._model, rows["targets"]
        num_items = model.items.num_items
        if self._num_drawn:
            against = torch.randint(num_items, (self._num_drawn,), device=targets.device)
        else:
            against = torch.arange(num_items, device=targets.device)
        needed = rows["items"].flatten()
        if model.output is None:
            needed = torch.cat([needed, targets[targets != IGNORE], against])
        vectors = model.vectors_read(needed[needed < num_items].unique())
        states_ND, target_N = model.states(vectors, rows)
        if self._num_drawn:
            loss = against_drawn(states_ND, vectors.items_VD, target_N, against, self._too_near)
        else:
            loss = linear_cross_entropy(states_ND, vectors.items_VD, target_N, self._dtype)
        more = {
            name: weight * term(states_ND, rows, vectors.items_VD) for name, (weight, term) in self._teachers.items()
        }
        return {NEXT_ITEM: loss, **more}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """See `Trainable.parameter_groups`."""
        return language_groups(self.module, weight_decay, self._language_rate)

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Trainable.save`."""
        save_file(dict(weights), folder / "model.safetensors")
