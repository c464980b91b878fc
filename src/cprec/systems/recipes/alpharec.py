"""AlphaRec: frozen vectors of titles, adapted and smoothed over the graph of who had what (Sheng et al. 2025).

A user is the mean of their items' frozen vectors; one network maps users and items (their equations 2 and 3); both are
smoothed as in LightGCN (equation 4) and compared by cosines over a temperature in a softmax against sampled items
(equation 5). Paper and code agree on this. Deviations: the vectors are TF-IDF of titles reduced by SVD unless a file of
vectors is given (theirs are of a large embedding model); negatives are shared by the pairs of a step (there each pair
has its own) and may be items of the user; users who are not in training are smoothed over their history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from cprec.choices import Choice, Real
from cprec.systems.batches import UserItemStream
from cprec.systems.dot_product import GraphModel
from cprec.systems.graph import Step, UserItemGraph
from cprec.systems.items import FrozenTable
from cprec.systems.settings import GraphSettings, TextSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import next_item


@dataclass(frozen=True, kw_only=True)
class AlphaRec(TextSettings, GraphSettings):
    """Settings of AlphaRec; the defaults are ours: more negatives and fewer passes."""

    learning_rate: float = 2e-3
    adapter_size: int = 256
    """Width of the network's hidden layer."""
    temperature: float = 0.15
    """Cosines are divided by it."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {**GraphSettings.SEARCH, "temperature": Real(low=0.05, high=0.3, log=True)}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("adapter_size", "temperature")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        frozen_VF = self.frozen(data)
        adapter = nn.Sequential(
            nn.Linear(frozen_VF.shape[1], self.adapter_size),
            nn.LeakyReLU(),
            nn.Linear(self.adapter_size, self.hidden_size),
        )
        sums_UF = np.add.reduceat(frozen_VF[data.sequences.values], data.sequences.offsets[:-1])
        users = FrozenTable(sums_UF / data.sequences.lengths[:, None], adapter, num_special=0)
        items = FrozenTable(frozen_VF, adapter, num_special=0)

        def mean_of_history(items_RT: torch.Tensor) -> torch.Tensor:
            frozen_VF = items.get_buffer("frozen")
            is_item_RT1 = (items_RT < data.num_items)[:, :, None]
            sums_RF = (frozen_VF[items_RT.clamp(max=data.num_items - 1)] * is_item_RT1).sum(1)
            mapped: torch.Tensor = adapter(sums_RF / is_item_RT1.sum(1).clamp(min=1))
            return mapped

        graph = UserItemGraph(data.sequences, data.num_items)
        steps = [Step(self.hidden_size) for _ in range(self.num_layers)]
        model = GraphModel(users, items, graph, steps, cosine=True, new_user=mean_of_history)
        terms = {NEXT_ITEM: (1.0, next_item(self.objective, self.num_negatives, self.temperature))}
        return [self.stage(data, model, terms, UserItemStream(data, [NEXT_ITEM], self.passes(seed)))]


PUBLISHED = AlphaRec(num_negatives=256, learning_rate=5e-4, num_epochs=200, anneal=0.0, patience=3)
"""AlphaRec with the learning rate, temperature, layers, batches and number of negatives of the code; 200 passes."""
