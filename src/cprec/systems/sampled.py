"""Training on a sample of a large catalogue: the items of a step's rows, and others drawn uniformly, stand for all.

Each score gets minus the logarithm of the item's chance to be in the sample, the target's too, which makes the softmax
over the sample aim at the scores of that over all items (McFadden 1978; `sampled softmax with logQ correction` since).
The items of the rows are popular ones mostly; the mixture of them and of uniform draws is that of Yang et al. (2020).
What a row holds beside the target is left out at its own positions, unless it was drawn or another row has it: it would
be in that sample for certain, and items that come again or come together would seem improbable. Suffixes: V items, K
items of the sample, R rows, T positions, N targets, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cprec.batch import IGNORE
from cprec.data.ragged import Ragged
from cprec.systems.dot_product import SequenceModel
from cprec.systems.stage import NEXT_ITEM, WeightedTerms
from cprec.train.loss import linear_cross_entropy


class SampledItemsLoss:
    """Cross-entropy of a sequence model over a sample of the items, as a `Trainable`. Vectors are made of the items of
    the sample alone, which torch's seed decides.

    The loss is near that over all items.
    """

    def __init__(
        self, model: SequenceModel, windows: Ragged, num_items: int, num_drawn: int, dtype: torch.dtype
    ) -> None:
        """`windows` are the rows of training: how often they hold an item decides its chance to be in a sample."""
        self._model, self._num_drawn, self._dtype = model, num_drawn, dtype
        self._whole = WeightedTerms(model, {})
        self.module: nn.Module = self._whole.module
        counts_V = np.bincount(windows.values, minlength=num_items)
        self._share_V = torch.from_numpy((counts_V / counts_V.sum()).astype(np.float32))

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`."""
        num_items, items_RT, targets_RT = len(self._share_V), rows["items"], rows["targets"]
        drawn = torch.randperm(num_items, device=items_RT.device)[: self._num_drawn]
        in_rows = torch.cat([items_RT[items_RT < num_items], targets_RT[targets_RT != IGNORE]])
        kept_K, is_target_RT = torch.cat([in_rows, drawn]).unique(), targets_RT != IGNORE
        places = {name: _places(rows[name], kept_K, num_items) for name in ("items", "targets")}
        vectors = self._model.vectors(kept_K)
        states_ND, target_N = self._model.states(vectors, places)
        own_RT, is_own_RT = self._own(places, torch.searchsorted(kept_K, drawn), len(kept_K))
        row_N = is_target_RT.nonzero()[:, 0]
        # Where there is nothing to leave out, the target stands, which always counts.
        left_out_NT = torch.where(is_own_RT[row_N], own_RT[row_N], target_N[:, None])
        num_events = int(is_target_RT.sum()) + len(items_RT)
        log_chance_K = self._log_chance(kept_K, num_events * (1 - 1 / len(items_RT)))
        loss = linear_cross_entropy(states_ND, vectors.items_VD, target_N, self._dtype, -log_chance_K, left_out_NT)
        return {NEXT_ITEM: loss - log_chance_K[target_N].sum()}

    def _own(
        self, places: Mapping[str, torch.Tensor], drawn: torch.Tensor, num_kept: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The items of each row, its last target too, as places in the sample, and which of them nothing but that row
        brought into it: int64 and bool[R, T + 1]. Other places hold 0 and false."""
        items_RT, targets_RT = places["items"], places["targets"]
        last_R1 = targets_RT.gather(1, ((targets_RT != IGNORE).sum(1) - 1).clamp(min=0)[:, None])
        own_RT = torch.cat([items_RT, last_R1], dim=1)
        is_item_RT = (own_RT != IGNORE) & (own_RT < num_kept)
        own_RT = torch.where(is_item_RT, own_RT, 0)
        # How many rows hold each item of the sample; what was drawn is there whatever rows hold.
        row_RT = torch.arange(len(own_RT), device=own_RT.device)[:, None].expand_as(own_RT)
        pairs = (row_RT * num_kept + own_RT)[is_item_RT].unique()
        num_rows_K = torch.bincount(pairs % num_kept, minlength=num_kept)
        num_rows_K[drawn] += 1
        return own_RT, is_item_RT & (num_rows_K[own_RT] == 1)

    def _log_chance(self, kept_K: torch.Tensor, num_events: float) -> torch.Tensor:
        """The logarithm of the chance that an item is drawn, or among so many events of other rows."""
        share_K = self._share_V.to(kept_K.device)[kept_K]
        missing_K = (1 - self._num_drawn / len(self._share_V)) * torch.exp(num_events * torch.log1p(-share_K))
        return torch.log1p(-missing_K)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """See `Trainable.parameter_groups`."""
        return self._whole.parameter_groups(weight_decay)

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Trainable.save`."""
        self._whole.save(folder, weights)


def _places(items_RT: torch.Tensor, kept_K: torch.Tensor, num_items: int) -> torch.Tensor:
    """Items as their places in a sample; special rows come after it, and IGNORE stays."""
    places_RT = torch.searchsorted(kept_K, items_RT)
    places_RT = torch.where(items_RT >= num_items, items_RT - num_items + len(kept_K), places_RT)
    return torch.where(items_RT == IGNORE, items_RT, places_RT)
