"""SynerGen: one encoder retrieves and ranks, and attention knows how much time lies between events.

Gao et al. 2025, "SynerGen: Contextualized Generative Recommender for Unified Search and Recommendation". Attention
turns queries and keys by angles in proportion to real time (`encoders.turned`), in typical gaps of the domain.
Retrieval is a softmax of products with all items. A ranking head maps the state that retrieves to one that ranks: its
products with the target and with items drawn learn a binary cross-entropy and a comparison in pairs. A score is the
product with a mix of both states, so that the full catalogue is ranked by both tasks at once.

Deviations: no queries, since logs here have none, and so no search; there a candidate is a token that reads the whole
history and is masked from other candidates, and ranks a retrieved list; negatives are drawn, not shown; there is no
language model, and actions are all of one kind. A ranking knows the gaps of training events only; later ones count as
typical. Without times that are more than an order, angles are those of positions. With `ranking_weight=0` and
`time_angles=false` it is SASRec with the same settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from cprec.choices import Choice, Real
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.systems.batches import WindowStream
from cprec.systems.dot_product import DotProductModel, DotProductRecommender, Rows, SequenceModel, Vectors
from cprec.systems.encoders import SelfAttention
from cprec.systems.items import ItemTable
from cprec.systems.recipes.sasrec import SelfAttentionSettings
from cprec.systems.settings import NextItemSettings
from cprec.systems.signals import Gaps, TrainingSequences
from cprec.systems.stage import Stage
from cprec.systems.terms import Term, objective_loss

RANKING = "ranking"
"""The name of the terms of the head."""


class TwoTasks(SequenceModel):
    """A sequence model with a head that maps its state to one that ranks; histories are a mix of both."""

    def __init__(self, items: ItemTable, encoder: SelfAttention, size: int, share: float) -> None:
        super().__init__(items, encoder)
        self.head = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))
        self._share = share

    def encode(self, vectors: Vectors, rows: Rows) -> torch.Tensor:
        hidden_RD = super().encode(vectors, rows)
        return (1 - self._share) * hidden_RD + self._share * self.head(hidden_RD)

    def ranking(self, num_negatives: int) -> Term:
        """The mean of the binary cross-entropy of the head's scores of the target and of items drawn for it, and of the
        logistic loss of their differences."""

        def term(hidden_ND: torch.Tensor, target_N: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
            given = (self.head(hidden_ND), weight_VD, target_N)
            pointwise, pairwise = (objective_loss(kind, *given, num_negatives=num_negatives) for kind in ("bce", "bpr"))
            return (pointwise + pairwise) / 2

        return term


@dataclass(frozen=True, kw_only=True)
class SynerGen(NextItemSettings, SelfAttentionSettings):
    """Settings of SynerGen; all are ours."""

    time_angles: bool = True
    """Attention knows the time between events."""
    ranking_weight: float = 0.5
    """Weight of the ranking head's loss; 0: there is no head."""
    ranking_negatives: int = 16
    """Items drawn for each target, which the head is to tell it from."""
    ranking_share: float = 0.3
    """Share of the head's state in what ranks; the rest is that of retrieval."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SelfAttentionSettings.SEARCH,
        "ranking_weight": Real(low=0.1, high=2.0, log=True),
        "ranking_share": Real(low=0.0, high=1.0),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("ranking_negatives")
        self.require_not_negative("ranking_weight")
        if not 0 <= self.ranking_share <= 1:
            raise ConfigError(f"ranking_share={self.ranking_share} must lie in 0..1: it is a share of what ranks")
        if self.time_angles and self.hidden_size // self.num_heads % 2:
            raise ConfigError(
                f"hidden_size={self.hidden_size} over num_heads={self.num_heads} is odd, and angles turn pairs of "
                "numbers: choose others, or time_angles=false"
            )

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`."""
        items, encoder = self.parts(data.num_items, time_angles=self.time_angles)
        terms, model = self.next_item(), SequenceModel(items, encoder)
        if self.ranking_weight:
            model = two_tasks = TwoTasks(items, encoder, self.hidden_size, self.ranking_share)
            terms = {**terms, RANKING: (self.ranking_weight, two_tasks.ranking(self.ranking_negatives))}
        gaps = Gaps(data, linear=True).training if self.time_angles else None
        stream = WindowStream(data, [*terms], self.max_length, self.passes(seed), gaps=gaps)
        return [self.stage(data, model, terms, stream)]

    def recommender(
        self, data: TrainingSequences, model: DotProductModel, history: Callable[[Ragged], np.ndarray] | None = None
    ) -> DotProductRecommender:
        gaps = Gaps(data, linear=True).of if self.time_angles else None
        return DotProductRecommender(type(self).__name__, data, model, self.max_length, history, gaps)
