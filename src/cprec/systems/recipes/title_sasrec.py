"""SASRec over vectors of titles: what an item is comes from its text, and what it adds to that is learnt.

An item's vector is its frozen text vector through a small network, plus a row of its own that starts at zero; the rest
is SASRec with the softmax over all items. Near to UniSRec (Hou et al. 2022), which has a mixture of experts as the
network and rows instead of none or all, and to HLLM (Chen et al. 2024), which trains the text encoder too. The vectors
are TF-IDF of titles reduced by SVD unless a file of vectors is given; the item head of a language model gives its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from cprec.systems.dot_product import SequenceModel
from cprec.systems.fit import NEXT_ITEM, NextItemSettings, Stage, TextSettings
from cprec.systems.items import FrozenTable
from cprec.systems.recipes.sasrec import INITIAL, SelfAttentionSettings
from cprec.systems.signals import TrainingSequences, WindowStream


@dataclass(frozen=True, kw_only=True)
class TitleSASRec(TextSettings, NextItemSettings, SelfAttentionSettings):
    """Settings of SASRec over vectors of titles, chosen on the validation queries of Amazon Scientific
    (docs/experiments.md)."""

    hidden_size: int = 192
    dropout: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    num_epochs: float = 4
    text_size: int = 384

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        stream = WindowStream(data, [NEXT_ITEM], self.max_length, self.passes(seed))
        return [self.stage(data, self.model(self.frozen(data)), self.next_item(), stream)]

    def model(self, frozen_VF: np.ndarray) -> SequenceModel:
        """The model before training, over the frozen vectors of all items."""
        size = self.hidden_size
        adapter = nn.Sequential(nn.Linear(frozen_VF.shape[1], size), nn.GELU(), nn.Linear(size, size))
        encoder = self.encoder()
        nn.init.normal_(encoder.position.weight, std=INITIAL)
        return SequenceModel(FrozenTable(frozen_VF, adapter, rows=size), encoder)
