"""BERT4Rec: attention in both directions, trained to fill in masked items (Sun et al. 2019).

The next item is asked for by a mask after the history (their section 3.6). Deviations from paper and code: blocks
normalise before their layers, not after, and the items' vectors have no bias at the output. Rows of which only the last
item is masked, which the code adds once to each epoch, are a share of all rows here (`last_share`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.systems.batches import MaskedStream
from cprec.systems.dot_product import SequenceModel
from cprec.systems.items import MASK
from cprec.systems.recipes.sasrec import SelfAttentionSettings
from cprec.systems.settings import NextItemSettings
from cprec.systems.signals import TrainingSequences, padded, recent
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import Objective


@dataclass(frozen=True, kw_only=True)
class BERT4Rec(NextItemSettings, SelfAttentionSettings):
    """Settings of BERT4Rec; the defaults are ours. Few items of a row are masked at a time, so that it needs more
    epochs than SASRec (Petrov and Macdonald 2022); sampled negatives make these cheap."""

    objective: Objective = "sampled_softmax"
    num_negatives: int = 1024
    num_heads: int = 2
    dropout: float = 0.2
    num_epochs: float = 60
    mask_share: float = 0.3
    """Share of a row's items that are masked, beside rows of which only the last one is."""
    last_share: float = 0.3
    """Share of rows of which the last item alone is masked, as when the next one is asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.mask_share < 1 and 0 <= self.last_share <= 1):
            raise ConfigError(f"mask_share={self.mask_share} and last_share={self.last_share} must lie in 0..1")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:

        def with_mask(histories: Ragged) -> np.ndarray:
            """The latest events, and a mask after them where the next one is asked for."""
            ids, lengths = padded(recent(histories, self.max_length - 1), data.num_items)
            ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=data.num_items)
            ids[np.arange(len(ids)), lengths] = data.num_items + MASK
            return ids

        model = SequenceModel(*self.parts(data.num_items, causal=False))
        masks: dict[str, Any] = {"mask_share": self.mask_share, "last_share": self.last_share}
        stream = MaskedStream(data, [NEXT_ITEM], self.max_length, self.passes(seed), **masks)
        return [self.stage(data, model, self.next_item(), stream, history=with_mask)]


PUBLISHED = BERT4Rec(
    objective="softmax",
    num_negatives=0,
    hidden_size=64,
    num_heads=2,
    mask_share=0.2,
    last_share=0.0,
    dropout=0.1,
    learning_rate=1e-4,
    batch_size=256,
    num_epochs=200,
    anneal=0.0,
    patience=3,
)
"""BERT4Rec as first published: 64 dimensions, two layers and heads, a fifth of the items masked, learning rate 1e-4;
200 passes over every row."""
