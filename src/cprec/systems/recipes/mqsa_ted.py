"""MQSA-TED: SASRec with a short and a long query, and with transitions distilled into the items (Zhu et al. 2024).

Two stacks of self-attention read the same input: in one a position asks with its own vector, in the other with the mean
over the last few positions. Scores are the weighted mean of theirs. A second term draws the input vector of each item
to the vectors of those that came right after it in training. This follows the code, which takes the input as the
encoder reads it: scaled by the root of the width, with dropout. Deviations: there is no penalty on the weights'
squares; deviations of SASRec hold too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from cprec.choices import Choice, Real, Whole
from cprec.data.links import followers
from cprec.errors import ConfigError
from cprec.systems.batches import WindowStream
from cprec.systems.dot_product import SequenceModel
from cprec.systems.encoders import Encoder, TwoEncoders
from cprec.systems.recipes.sasrec import SelfAttentionSettings
from cprec.systems.settings import NextItemSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.systems.terms import Successors, Teacher


@dataclass(frozen=True, kw_only=True)
class MQSATED(NextItemSettings, SelfAttentionSettings):
    """Settings of MQSA-TED; the defaults are those of `SASRec (wide)`, with the weights of the paper."""

    hidden_size: int = 256
    learning_rate: float = 2e-3
    num_epochs: float = 14
    long_query: int = 3
    """Positions whose mean is the long query."""
    short_share: float = 0.5
    """Weight of the scores with short queries; the others have the rest. 1: there are no long queries."""
    transition_weight: float = 0.1
    """Weight of the term that draws items to those that came after them; 0: there is none."""
    temperature: float = 0.1
    """Of both sides of that term."""

    LABEL: ClassVar[str] = "MQSA-TED"
    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SelfAttentionSettings.SEARCH,
        "long_query": Whole(low=2, high=5),
        "short_share": Real(low=0.1, high=0.9),
        "transition_weight": Real(low=0.01, high=1, log=True),
        "temperature": Real(low=0.03, high=0.3, log=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("long_query", "temperature")
        self.require_not_negative("transition_weight")
        if not 0 <= self.short_share <= 1:
            raise ConfigError(f"short_share={self.short_share} must lie in 0..1")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        items, short = self.parts(data.num_items)
        encoder: Encoder = short
        if self.short_share < 1:
            encoder = TwoEncoders(short, self.encoder(span=self.long_query), self.short_share)
        terms, teachers = self.next_item(), dict[str, tuple[float, Teacher]]()
        if self.transition_weight:
            counts = followers(data.sequences.row_of, data.sequences.values, data.num_items)
            teachers["transitions"] = self.transition_weight, Successors(counts, self.temperature, self.dropout)
        stream = WindowStream(data, [*terms, *teachers], self.max_length, self.passes(seed))
        return [self.stage(data, SequenceModel(items, encoder), terms, stream, teachers=teachers)]


PUBLISHED = MQSATED(
    hidden_size=64,
    num_blocks=1,
    num_heads=1,
    batch_size=256,
    learning_rate=1e-3,
    num_epochs=200,
    anneal=0.0,
    patience=3,
)
"""MQSA-TED as its code has it for Beauty: 64 dimensions, one block and head, queries of three items; 200 passes at
most."""
