"""MMM4Rec: text and images of a history, read by one state-space block whose states fade with time (Fan et al. 2025).

An item's text vector, and its image vector where there are images, go through a linear layer each, plus a row of the
item's own for each, which starts at zero. A state-space layer reads the texts. The same block reads the images; a cross
layer then writes the states of the texts and reads them by the images (their Cross-SSD). The score of an item is the
product of the last state with its text vector plus that with its image vector, both of length one, over a temperature,
in a softmax over all items. The step of a state depends on the time since the event before, so that states fade more
over long gaps.

Deviations from the code, which it follows otherwise: vectors are TF-IDF of titles reduced by SVD, or from files;
a gap moves the step of each head by a weight of its own (there by networks over all places of a row, later ones and
padding among them, and a Fourier filter); gaps are logarithms of days, standardised (there raw, normalised by row); all
heads write and read along the same directions (there in 8 groups); each position of a window has a target (there each
prefix is a row). A ranking knows the gaps of training events only: those of later events, and of users who are not in
training, count as the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from cprec.choices import Choice, Real
from cprec.data.ragged import Ragged
from cprec.provenance import file_sha256
from cprec.systems.batches import WindowStream
from cprec.systems.dot_product import DotProductModel, DotProductRecommender
from cprec.systems.items import FrozenTable, read_vectors
from cprec.systems.recipes.mamba4rec import StateSpaceSettings
from cprec.systems.settings import TextSettings
from cprec.systems.signals import Gaps, TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.streams import SharedStreams, StreamLayer, StreamsModel
from cprec.systems.terms import next_item


@dataclass(frozen=True, kw_only=True)
class MMM4Rec(TextSettings, StateSpaceSettings):
    """Settings of MMM4Rec; the defaults are ours."""

    max_length: int = 20
    images: str = ""
    """An .npz file like `vectors`, of the items' images; empty: texts alone."""
    own_rows: bool = True
    """Each item has rows of its own beside its text and image."""
    gaps: bool = True
    """States fade by the time between events."""
    temperature: float = 0.8
    """Scores are divided by it."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **StateSpaceSettings.SEARCH,
        "temperature": Real(low=0.1, high=1.0, log=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("temperature")

    def identity(self) -> dict[str, Any]:
        """See `SystemSettings.identity`: the content of a file counts, not its place."""
        return super().identity() | ({"images": file_sha256(self.images)} if self.images else {})

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`. Raises Unsuitable where neither titles nor files say anything of the items."""
        given = [self.frozen(data), *([read_vectors(self.images, data.item_ids)] if self.images else [])]
        size, gaps = self.hidden_size, Gaps(data).training if self.gaps else None
        rows = size if self.own_rows else None
        tables = [FrozenTable(vectors_VF, nn.Linear(vectors_VF.shape[1], size), 1, rows) for vectors_VF in given]
        layers = []
        for _ in range(self.num_layers):
            block, cross = self.block(gaps=self.gaps), self.block(gaps=self.gaps) if self.images else None
            layers.append(StreamLayer(block, cross, size, self.dropout))
        model = StreamsModel(tables, SharedStreams(layers, size, self.dropout))
        stream = WindowStream(data, [NEXT_ITEM], self.max_length, self.passes(seed), gaps=gaps)
        terms = {NEXT_ITEM: (1.0, next_item("softmax", temperature=self.temperature))}
        return [self.stage(data, model, terms, stream)]

    def recommender(
        self, data: TrainingSequences, model: DotProductModel, history: Callable[[Ragged], np.ndarray] | None = None
    ) -> DotProductRecommender:
        gaps = Gaps(data).of if self.gaps else None
        return DotProductRecommender(type(self).__name__, data, model, self.max_length, history, gaps)


PUBLISHED = MMM4Rec(
    hidden_size=256,
    num_heads=8,
    state_size=64,
    learning_rate=1e-4,
    weight_decay=0.005,
    batch_size=1024,
    num_epochs=100,
    anneal=0.0,
    patience=3,
)
"""MMM4Rec with the dimensions, heads, directions, dropout, temperature, learning rate and decay that its code has for
Scientific, over our vectors of titles, without images or weights from other domains. A batch of 1,024 windows has about
as many targets as their 8,192 rows."""
