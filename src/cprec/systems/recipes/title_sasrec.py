"""SASRec over vectors of titles: what an item is comes from its text, and what it adds to that is learnt.

An item's vector is its frozen text vector through a small network, plus a row of its own that starts at zero; the rest
is SASRec with the softmax over all items. Near to UniSRec (Hou et al. 2022), which has a mixture of experts as the
network and rows instead of none or all, and to HLLM (Chen et al. 2024), which trains the text encoder too. The vectors
are TF-IDF of titles reduced by SVD unless a file of vectors is given; the item head of a language model gives its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from cprec.data.ragged import Ragged
from cprec.systems.dot_product import DotProductModel, SequenceModel
from cprec.systems.fit import TextSettings
from cprec.systems.items import FrozenTable
from cprec.systems.recipes.sasrec import INITIAL, CausalRecommender, CausalSettings
from cprec.systems.signals import TrainingSequences


@dataclass(frozen=True, kw_only=True)
class TitleSASRec(TextSettings, CausalSettings):
    """Settings of SASRec over vectors of titles, chosen on the validation queries of Amazon Scientific
    (docs/experiments.md)."""

    hidden_size: int = 192
    dropout: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    num_epochs: float = 4
    min_steps: int = 300
    text_size: int = 384

    def model(self, frozen_VF: np.ndarray) -> SequenceModel:
        size = self.hidden_size
        adapter = nn.Sequential(nn.Linear(frozen_VF.shape[1], size), nn.GELU(), nn.Linear(size, size))
        encoder = self.encoder()
        nn.init.normal_(encoder.position.weight, std=INITIAL)
        return SequenceModel(FrozenTable(frozen_VF, adapter, rows=size), encoder)

    def recommender(
        self, data: TrainingSequences, model: DotProductModel, history: Callable[[Ragged], np.ndarray] | None = None
    ) -> TitleSASRecRecommender:
        return TitleSASRecRecommender(self, data, model)


class TitleSASRecRecommender(CausalRecommender):
    """Ranks by a trained SASRec over vectors of titles."""

    SETTINGS = TitleSASRec
