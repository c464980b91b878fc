"""RecGPT: an item is a code for each slice of its text's vector, and all codes of the next item are predicted at once.

Jiang et al. 2025, "RecGPT: A Foundation Model for Sequential Recommendation"; where paper and code differ, this follows
the code. Each slice is a token: the norm of its code's row plus the norm of the slice through a linear map. Tokens read
those of their own item and of all before it, and each predicts the code of its slice of the next item. Deviations:

- Vectors are those of titles (there of MPNet), and codes come from steps along principal directions, a few for each
  slice in turn, without training (there finite scalar quantisation of what an autoencoder makes of a slice, 15,360
  codes).
- Each slice has code rows of its own, which also predict it (there all share one table, and another one predicts).
- Positions are counted from the end of a history, and blocks are those of SASRec here (there of GPT-2).
- The loss of an item is the sum over its codes (there their mean, as the loss of a token).
- As codes are independent given the history, the score of every item is a sum over its codes, and all are ranked (there
  a beam of 10, then 5 codes keeps 20 items at temperature 0.1). Items of equal codes tie (there the last one stands for
  all of them).
- It learns one domain (there eleven, and others are ranked without training). Codes and maps know texts alone, so that
  `SliceModel.over` ranks other items whose vectors lie in the same space and were coded in the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import numpy as np
from torch import nn

from cprec.choices import Choice, OneOf
from cprec.errors import ConfigError
from cprec.progress import say
from cprec.systems.batches import WindowStream
from cprec.systems.quantise import Scalar
from cprec.systems.recipes.sasrec import INITIAL, SelfAttentionSettings
from cprec.systems.settings import TextSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.slices import SliceEncoder, SliceModel, SliceTable
from cprec.systems.stage import NEXT_ITEM, Stage


@dataclass(frozen=True, kw_only=True)
class RecGPT(TextSettings, SelfAttentionSettings):
    """Settings of RecGPT: slices and blocks are its code's, the others ours."""

    max_length: int = 20
    dropout: float = 0.2
    learning_rate: float = 1e-3
    num_blocks: int = 3
    num_slices: int = 4
    """Slices of a vector, of which each has a code."""
    steps: tuple[int, ...] = (8, 8, 4)
    """Steps along each of the first directions of a slice; their product is the number of codes. Theirs are 8, 8, 8, 6
    and 5, for texts of eleven domains."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SelfAttentionSettings.SEARCH,
        "num_slices": OneOf(values=(4, 8)),
        "text_size": OneOf(values=(64, 128, 256)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_slices")
        if not self.steps or min(self.steps) < 1 or prod(self.steps) < 2:
            raise ConfigError(f"steps={self.steps} must be numbers above 0, one of them above 1")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`."""
        frozen_VF = self.frozen(data)
        items = SliceTable(self.codes(data, frozen_VF), frozen_VF, prod(self.steps), self.hidden_size)
        encoder = replace(self, max_length=self.max_length * self.num_slices).encoder(causal=False)
        for table in (items.rows, encoder.position):
            nn.init.normal_(table.weight, std=INITIAL)
        model = SliceModel(items, SliceEncoder(encoder, self.num_slices))
        stream = WindowStream(data, [NEXT_ITEM], self.max_length, self.passes(seed))
        return [self.stage(data, model, {NEXT_ITEM: (1.0, model.loss)}, stream)]

    def codes(self, data: TrainingSequences, frozen_VF: np.ndarray) -> np.ndarray:
        """The codes of the domain's items: int64[V, L]. Says how many items share theirs. Raises ConfigError where
        vectors are narrower than there are slices."""
        if frozen_VF.shape[1] < self.num_slices:
            raise ConfigError(
                f"num_slices={self.num_slices}, but vectors have {frozen_VF.shape[1]} numbers: lower num_slices, or "
                "give wider vectors"
            )
        code_VL = Scalar.of(frozen_VF.astype(np.float64), self.num_slices, self.steps).encode(frozen_VF)
        _, sizes = np.unique(code_VL, axis=0, return_counts=True)
        say(f"{data.domain}: {sizes[sizes > 1].sum():,} of {data.num_items:,} items share their codes and are tied")
        return code_VL
