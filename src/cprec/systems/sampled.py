"""Training on a sample of a large catalogue: the items of a step's rows, and others drawn uniformly, stand for all.

An item that is in a step's sample with probability p counts 1 / p times in the sum of the softmax, so that the sum is
right on average (Horvitz and Thompson 1952). The items of the rows are the popular ones mostly: the mixture of them and
of uniform draws is that of Yang et al. (2020). Suffixes: V items, K items of the sample, R rows, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from cprec.batch import IGNORE
from cprec.systems.dot_product import SequenceModel
from cprec.systems.fit import NEXT_ITEM, WeightedTerms
from cprec.systems.signals import TrainingSequences
from cprec.train.loss import linear_cross_entropy


class SampledSoftmax(WeightedTerms):
    """Cross-entropy over a sample of the items, as a `Trainable`. Vectors are made of the items of the sample alone.

    The loss estimates that over all items. Draws depend on torch's seed.
    """

    def __init__(self, model: SequenceModel, data: TrainingSequences, num_drawn: int, dtype: torch.dtype) -> None:
        super().__init__(model, {})
        self._sequences, self._num_drawn, self._dtype = model, num_drawn, dtype
        counts_V = np.bincount(data.sequences.values, minlength=data.num_items)
        self._share_V = torch.from_numpy((counts_V / counts_V.sum()).astype(np.float32))

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`."""
        num_items, items_RT, targets_RT = len(self._share_V), rows["items"], rows["targets"]
        drawn = torch.randperm(num_items, device=items_RT.device)[: self._num_drawn]
        in_rows = torch.cat([items_RT[items_RT < num_items], targets_RT[targets_RT != IGNORE]])
        kept_K = torch.cat([in_rows, drawn]).unique()
        # An item is not in the sample if it is neither drawn nor among the events of the rows.
        num_events = int((targets_RT != IGNORE).sum()) + len(items_RT)
        share_K = self._share_V.to(kept_K.device)[kept_K]
        missing_K = (1 - self._num_drawn / num_items) * torch.exp(num_events * torch.log1p(-share_K))
        log_weight_K = -torch.log1p(-missing_K)
        vectors = self._sequences.vectors(kept_K)
        states_ND, target_N = self._sequences.states(
            vectors, {"items": _places(items_RT, kept_K, num_items), "targets": _places(targets_RT, kept_K, num_items)}
        )
        loss = linear_cross_entropy(states_ND, vectors.items_VD, target_N, self._dtype, log_weight_K)
        return {NEXT_ITEM: loss + log_weight_K[target_N].sum()}  # a target's own score has no weight


def _places(items_RT: torch.Tensor, kept_K: torch.Tensor, num_items: int) -> torch.Tensor:
    """Items as their places in a sample; special rows come after it, and IGNORE stays."""
    places_RT = torch.searchsorted(kept_K, items_RT)
    places_RT = torch.where(items_RT >= num_items, items_RT - num_items + len(kept_K), places_RT)
    return torch.where(items_RT == IGNORE, items_RT, places_RT)
