"""COBRA: an item is a few coarse codes and then a vector, and a decoder writes the next item's in this order.

Yang et al. 2025, "Sparse Meets Dense: Unified Generative Recommendations with Cascaded Sparse-Dense Representations".
The decoder reads the codes and the vector of each item in turn; it learns the next codes by a softmax (their sparse
loss) and, once these are read, the next vector by a softmax of cosines (their dense loss). As there, three levels of 32
codes for public data; a state itself is the predicted vector; codes and vectors come from texts. Deviations:

- Vectors are frozen ones of titles through a small network (there a text encoder, trained as a whole), and codes are
  residual k-means of the frozen ones (there a residual-quantised autoencoder).
- The vector has the place of the token END that closes an item here, and is added to its row.
- The softmax of vectors runs over all items (there over those of the batch, some of which may be the target itself),
  with cosines times `cosine_scale` (there, as far as we know, in ranking alone).
- Lists are proven over the full catalogue, as `cascade.CascadeRecommender` says. Theirs come from BeamFusion: the
  softmax of a beam's log-probabilities of codes times that of the cosines of the nearest items. We let the second run
  over the items of a cell. The first divides all scores of a query alike, so `mode="beam"` has the order of BeamFusion.

Two limits are rows: `CODES` reads and predicts no vectors, which is TIGER with coarse codes that items share; `VECTORS`
has one code for all items, so that their order is that of cosines, as in dense retrieval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from cprec import distributed
from cprec.errors import ConfigError
from cprec.systems.cascade import CascadeLoss, CascadeRecommender, CascadeStream, CodesAndVectors
from cprec.systems.codes import Collisions, ItemCodes
from cprec.systems.generator import CodeRecommender
from cprec.systems.items import FrozenTable
from cprec.systems.recipes.tiger import CodeSettings
from cprec.systems.signals import TrainingSequences
from cprec.train.trainable import Trainable


@dataclass(frozen=True, kw_only=True)
class COBRA(CodeSettings):
    """Settings of COBRA: levels and codes are the paper's for public data, the others ours."""

    num_codes: int = 32
    """Codes of a level: few, so that items share them, and vectors tell these apart."""
    text_size: int = 256
    collisions: Collisions = "share"
    vector_weight: float = 1.0
    """Weight of the loss of vectors; 0: they are not predicted, and items of equal codes are tied."""
    reads_vectors: bool = True
    """The decoder reads items' vectors beside their codes."""
    cosine_scale: float = 16.0
    """Logits of vectors are cosines times this, in the loss and in lists."""
    code_scale: float = 1.0
    """Weight of the log-probability of codes in scores; 1: scores are log-probabilities of items."""

    READS_TEXTS: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_not_negative("vector_weight")
        self.require_positive("cosine_scale", "code_scale")
        if self.collisions != "share":
            raise ConfigError(f"collisions={self.collisions!r}: items share their codes here, which vectors tell apart")

    def model(self, data: TrainingSequences, codes: ItemCodes) -> Any:
        """See `CodeSettings.model`: a decoder that reads vectors, too."""
        model, size, frozen_VF = self.decoder(codes), self.hidden_size, self.frozen(data)
        adapter = nn.Sequential(nn.Linear(frozen_VF.shape[1], size), nn.GELU(), nn.Linear(size, size))
        items = FrozenTable(frozen_VF, adapter, num_special=0)
        items.requires_grad_(self.reads_vectors or self.vector_weight > 0)
        model.set_input_embeddings(
            CodesAndVectors(model.get_input_embeddings(), items, reads_vectors=self.reads_vectors)
        )
        return model

    def stream(self, data: TrainingSequences, codes: ItemCodes, seed: int) -> CascadeStream:
        """See `CodeSettings.stream`: the vectors stand behind the codes."""
        return CascadeStream(data, codes, self.max_length, self.passes(seed))

    def codes(self, data: TrainingSequences, seed: int) -> ItemCodes:
        """See `CodeSettings.codes`. With one code, all items are one cell."""
        if self.num_codes > 1:
            return super().codes(data, seed)
        return ItemCodes.of(np.zeros((data.num_items, self.num_levels), dtype=np.int64), 1, self.collisions)

    def trainable(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> Trainable:
        """See `CodeSettings.trainable`: the two softmaxes."""
        bf16 = distributed.use_bf16("auto", distributed.pick_device())
        return CascadeLoss(model, self.vector_weight, self.cosine_scale, bf16=bf16)

    def code_recommender(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> CodeRecommender:
        """See `CodeSettings.code_recommender`."""
        cosine_scale = self.cosine_scale if self.vector_weight else 0.0
        return CascadeRecommender(
            self.LABEL or type(self).__name__,
            data,
            codes,
            model,
            code_scale=self.code_scale,
            cosine_scale=cosine_scale,
            **self.ranking(),
        )


CODES = COBRA(vector_weight=0.0, reads_vectors=False)
"""Codes alone."""

VECTORS = COBRA(num_levels=1, num_codes=1)
"""Vectors alone: all items are one cell."""
