"""MSCGRec: TIGER over the codes of several modalities, learnt and ranked among the codes that go on.

Vandenhirtz et al. 2026. An item's codes are those of its text, of who had it, and of its image where there are images,
one after the other. The softmax of a step runs over the children of its node in the trie of all items, in training as
in ranking, so that the probabilities of all items sum to one and nothing is spent on codes that lead nowhere. There is
no public code to follow. Deviations: the vectors of who had an item are a truncated singular value decomposition of the
training events (there those of a SASRec; ours need no training); codes of images are residual k-means, as all codes
are (there learnt by self-distillation); the numbers of codes are ours. Deviations of TIGER hold too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from cprec import distributed
from cprec.choices import Choice, OneOf
from cprec.errors import ConfigError
from cprec.provenance import file_sha256
from cprec.search.normaliser import Over
from cprec.search.trie import Trie
from cprec.systems.codes import ItemCodes
from cprec.systems.generator import CodeStream
from cprec.systems.items import read_vectors
from cprec.systems.prefixes import NodeStream
from cprec.systems.recipes.tiger import CodeSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.vectors import collaborative_vectors
from cprec.text.stream import NEXT_CHILD
from cprec.train.catalogue_loss import CatalogueLoss
from cprec.train.trainable import Stream, Trainable


@dataclass(frozen=True, kw_only=True)
class MSCGRec(CodeSettings):
    """Settings of MSCGRec; the defaults are ours."""

    num_levels: int = 2
    """Codes of an item in each modality, from coarse to fine."""
    collaborative_size: int = 64
    """Directions that the training events are reduced to; 0: there are no codes of who had an item."""
    images: str = ""
    """An .npz file like `vectors`, of the items' images; empty: there are no codes of images."""
    softmax: Over = "catalogue"
    """What the probabilities of a step sum to one over: `vocabulary`, or `catalogue`, the children of its node."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {**CodeSettings.SEARCH, "collaborative_size": OneOf(values=(32, 64, 128))}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_not_negative("collaborative_size")
        if self.of != "text":
            raise ConfigError(f"of={self.of!r}: the first codes are of texts; leave others out by collaborative_size=0")
        if self.softmax not in ("vocabulary", "catalogue"):
            raise ConfigError(f"softmax={self.softmax!r} must be vocabulary or catalogue")

    def identity(self) -> dict[str, Any]:
        """See `SystemSettings.identity`: the content of a file counts, not its place."""
        return super().identity() | ({"images": file_sha256(self.images)} if self.images else {})

    @property
    def kinds(self) -> Sequence[str]:
        """See `CodeSettings.kinds`: the modalities."""
        more = {"collaborative": self.collaborative_size, "images": self.images}
        return ("text", *(kind for kind, given in more.items() if given))

    def vectors_of(self, data: TrainingSequences, kind: str) -> np.ndarray:
        """See `CodeSettings.vectors_of`."""
        if kind == "images":
            return read_vectors(self.images, data.item_ids)
        if kind == "collaborative":
            return collaborative_vectors(data.sequences, data.num_items, self.collaborative_size)
        return super().vectors_of(data, kind)

    def vectors_of_new(
        self, data: TrainingSequences, kind: str, item_ids: Sequence[str], titles: Sequence[str]
    ) -> np.ndarray:
        """See `CodeSettings.vectors_of_new`; the file of images must hold these items as well."""
        if kind == "images":
            return read_vectors(self.images, item_ids)
        if kind == "collaborative":
            raise ConfigError(
                f"MSCGRec: codes of who had an item cannot be given to {len(item_ids):,} new items: train again, or "
                "without these codes (collaborative_size=0)"
            )
        return super().vectors_of_new(data, kind, item_ids, titles)

    def stream(self, data: TrainingSequences, codes: ItemCodes, seed: int) -> Stream:
        """See `CodeSettings.stream`."""
        rows = CodeStream(data, codes, self.max_length, self.passes(seed))
        if self.softmax == "vocabulary":
            return rows
        return NodeStream(rows, codes, Trie.build(codes.sequences), (NEXT_CHILD,))

    def trainable(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> Trainable:
        """See `CodeSettings.trainable`."""
        if self.softmax == "vocabulary":
            return super().trainable(data, codes, model)
        bf16 = distributed.use_bf16("auto", distributed.pick_device())
        return CatalogueLoss(model, Trie.build(codes.sequences), 1.0, bf16=bf16)

    def ranking(self) -> dict[str, Any]:
        """See `CodeSettings.ranking`: by the probabilities that were trained."""
        return super().ranking() | {"over": self.softmax}
