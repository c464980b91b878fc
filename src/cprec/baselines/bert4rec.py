"""BERT4Rec: attention in both directions, trained to fill in masked items (Sun et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cprec.baselines.objectives import Objective
from cprec.baselines.sasrec import MASK, SASRec, SelfAttention
from cprec.baselines.sequential import NEXT_ITEM, BatchStream, ItemModel, TrainingLog, padded, recent, windows
from cprec.batch import IGNORE, Batch
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BERT4Rec(SASRec):
    """Settings of BERT4Rec; the defaults are ours. Few items of a row are masked at a time, so that it needs more
    epochs than SASRec (Petrov and Macdonald 2022); sampled negatives make these cheap."""

    objective: Objective = "sampled_softmax"
    num_negatives: int = 1024
    hidden_size: int = 128
    num_heads: int = 2
    dropout: float = 0.2
    learning_rate: float = 3e-3
    num_epochs: float = 60
    mask_share: float = 0.3
    """Share of a row's items that are masked, beside rows of which only the last one is."""
    last_share: float = 0.3
    """Share of rows of which the last item alone is masked, as when the next one is asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.mask_share < 1 and 0 <= self.last_share <= 1):
            raise ConfigError(f"mask_share={self.mask_share} and last_share={self.last_share} must lie in 0..1")

    def build(self, log: TrainingLog) -> ItemModel:
        """See `TrainedBaseline.build`."""
        return SelfAttention(self, log.num_items, causal=False)

    def stream(self, log: TrainingLog, seed: int) -> BatchStream:
        """Whole windows with some of their items masked."""
        return MaskedStream(log, self, seed)

    def history(self, rows: Ragged, num_items: int) -> tuple[np.ndarray, np.ndarray]:
        """The latest events, and a mask after them where the next one is asked for."""
        ids, lengths = padded(recent(rows, self.max_length - 1), num_items)
        ids = np.pad(ids, ((0, 0), (0, 1)), constant_values=num_items)
        ids[np.arange(len(ids)), lengths] = num_items + MASK
        return ids, lengths + 1


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
200 passes over every row. Blocks normalise before, not after, and the vectors of items have no bias at the output."""


class MaskedStream(BatchStream):
    """Windows of training sequences with masked items, which are the targets; masks depend on seed and step alone."""

    def __init__(self, log: TrainingLog, settings: BERT4Rec, seed: int) -> None:
        self._windows = windows(log.sequences, settings.max_length - 1)
        self._settings, self._pad = settings, log.num_items
        super().__init__(self._windows.lengths, settings, seed)

    def batch(self, step: int) -> Batch:
        """See `BatchStream.batch`."""
        members = self.members(step)
        rows, lengths = padded(self._windows.take(members), self._pad)
        generator = np.random.default_rng([self._seed, step, 1])
        place = np.arange(rows.shape[1])
        is_item, is_last = place < lengths[:, None], place == lengths[:, None] - 1
        masked = is_item & (generator.random(rows.shape) < self._settings.mask_share)
        only_last = generator.random(len(rows)) < self._settings.last_share
        masked[only_last] = is_last[only_last]
        none = ~masked.any(1)
        masked[none] = is_last[none]
        inputs = np.where(masked, self._pad + MASK, rows)
        targets = np.where(masked, rows, IGNORE)
        return Batch(
            rows={"input_ids": inputs, "targets": targets},
            counts={NEXT_ITEM: int(masked.sum())},
            num_tokens=int(lengths.sum()),
            examples=members,
            blank={"targets": IGNORE},
        )
