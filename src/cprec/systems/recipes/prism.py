"""PRISM: TIGER whose codes are made of texts and of who had an item, with cooler steps where many codes go on.

Two parts of Fang et al. 2026 are here. The quantiser reads an item's text vector beside gate * vector of who had it;
the gate is low for items with few events, whose vectors are noise. And the logits of a step are divided by a
temperature that falls with the number K of the children of its node in the trie of all items,

    coolest + (warmest - coolest) * exp(-K / branches),

and is 1 at the root. This follows the code, where 1 / branches is alpha / k_ref. Deviations: the gate is
log(1 + events) over that of the most frequent item, towards which theirs, a network, is drawn by a loss; vectors of
who had an item are a truncated singular value decomposition of the training events (there LightGCN's); the
temperatures hold in ranking, too (there in training alone, so that it ranks by other probabilities than it learns).
Left out: anchors of categories and balance of codes (the script for Beauty gives both the weight 0, and k-means leaves
no code unused), and in the decoder the dense inputs, their mixture of experts, and the regressions of vectors.
Deviations of TIGER hold too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cprec import distributed
from cprec.choices import Choice, Real
from cprec.errors import ConfigError
from cprec.search.trie import Trie
from cprec.systems.codes import ItemCodes
from cprec.systems.generator import CodeStream
from cprec.systems.prefixes import NodeStream, TemperedLoss
from cprec.systems.recipes.tiger import CodeSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.vectors import collaborative_vectors
from cprec.train.trainable import Stream, Trainable


@dataclass(frozen=True, kw_only=True)
class PRISM(CodeSettings):
    """Settings of PRISM: temperatures and branches as its scripts have them, the rest ours or TIGER's."""

    collaborative_weight: float = 1.0
    """Vectors of who had an item are multiplied by it and the gate; text vectors have length one. 0: texts alone."""
    collaborative_size: int = 64
    """Directions that the training events are reduced to."""
    coolest: float = 0.7
    """The temperature where very many codes go on."""
    warmest: float = 0.8
    """The temperature where hardly any do; with 1 for both there are no temperatures."""
    branches: float = 100.0
    """The temperature falls by 1 - 1/e of the difference with as many codes."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **CodeSettings.SEARCH,
        "collaborative_weight": Real(low=0.1, high=3.0, log=True),
        "coolest": Real(low=0.3, high=0.8),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("collaborative_size", "coolest", "branches")
        self.require_not_negative("collaborative_weight")
        if self.warmest < self.coolest:
            raise ConfigError(f"warmest={self.warmest} must be at least coolest={self.coolest}")
        if self.of != "text":
            raise ConfigError(
                f"of={self.of!r}: codes are of texts and of who had an item; collaborative_weight weighs these"
            )

    def vectors_of(self, data: TrainingSequences, kind: str) -> np.ndarray:
        """See `CodeSettings.vectors_of`: with the gated vectors of who had an item beside them."""
        own_VF = super().vectors_of(data, kind)
        if not self.collaborative_weight:
            return own_VF
        gate_V = np.log1p(np.bincount(data.sequences.values, minlength=data.num_items))
        gated_VF = collaborative_vectors(data.sequences, data.num_items, self.collaborative_size)
        gated_VF *= (self.collaborative_weight * gate_V / gate_V.max()).astype(np.float32)[:, None]
        return np.hstack([_of_length_one(own_VF), gated_VF])

    def vectors_of_new(
        self, data: TrainingSequences, kind: str, item_ids: Sequence[str], titles: Sequence[str]
    ) -> np.ndarray:
        """See `CodeSettings.vectors_of_new`. The gate of items without events is closed: beside their own vectors
        stand zeros."""
        own_NF = super().vectors_of_new(data, kind, item_ids, titles)
        if not self.collaborative_weight:
            return own_NF
        return np.pad(_of_length_one(own_NF), ((0, 0), (0, self.collaborative_size)))

    def temperatures(self, trie: Trie) -> np.ndarray:
        """The temperature of the steps after each node: float32[num_nodes]."""
        share_N = np.exp(-np.diff(trie.first_child) / self.branches)
        found_N = self.coolest + (self.warmest - self.coolest) * share_N
        found_N[0] = 1
        return found_N.astype(np.float32)

    def stream(self, data: TrainingSequences, codes: ItemCodes, seed: int) -> Stream:
        """See `CodeSettings.stream`."""
        rows = CodeStream(data, codes, self.max_length, self.passes(seed))
        return NodeStream(rows, codes, Trie.build(codes.sequences))

    def trainable(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> Trainable:
        """See `CodeSettings.trainable`."""
        trie = Trie.build(codes.sequences)
        bf16 = distributed.use_bf16("auto", distributed.pick_device())
        return TemperedLoss(model, trie, self.temperatures(trie), bf16=bf16)

    def ranking(self) -> dict[str, Any]:
        """See `CodeSettings.ranking`: at the temperatures of training; further items cool the steps that they widen."""
        return super().ranking() | {"temperatures": self.temperatures}


def _of_length_one(vectors_VF: np.ndarray) -> np.ndarray:
    """Vectors of a file may be of any length; the gate weighs against one. Zeros stay."""
    length_V1 = np.linalg.norm(vectors_VF, axis=1, keepdims=True)
    scaled: np.ndarray = vectors_VF / np.where(length_V1 > 0, length_V1, 1)
    return scaled
