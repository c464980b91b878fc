"""Items as sums of rows: SASRec over an item's own row and those of its codes, which items of like texts share.

H2Rec (Liu et al. 2025) has both, and a contrast of the two: an item's own row and the sum of its code rows are drawn
to each other, and to those of items near it in training histories. This follows the code, but is only the core of it:
there two branches read rows and codes, with attention between them and gates on the levels, and a second contrast masks
levels. More deviations: codes are residual k-means of title vectors (there by an autoencoder, of a language model's
vectors); rows start at random (there from these vectors); code rows are added up (there averaged); the strongest links
within five events are near (there all within three). As there by default, near items count as much as the item itself.

Semantic IDs (Singh et al. 2024) are codes alone. Each piece of an item's codes has a row; pieces are learnt on the
items of training events, so that a popular item may be one piece. `CODES` has a row for each code (their unigrams).
Theirs predict clicks; their pieces are SentencePiece's (ours of byte pairs) and share rows by hashing. Against SASRec,
these two say what an item's own row is worth. Deviations of SASRec hold for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from cprec.choices import Choice, OneOf, Real
from cprec.errors import ConfigError, Unsuitable
from cprec.progress import say
from cprec.systems.batches import WindowStream
from cprec.systems.codes import pieces_of
from cprec.systems.dot_product import SequenceModel
from cprec.systems.graph import ItemGraph
from cprec.systems.items import SumTable
from cprec.systems.quantise import residual_codes
from cprec.systems.recipes.sasrec import INITIAL, SelfAttentionSettings
from cprec.systems.settings import NextItemSettings, TextSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.systems.terms import Alignment


@dataclass(frozen=True, kw_only=True)
class H2Rec(TextSettings, NextItemSettings, SelfAttentionSettings):
    """Settings of H2Rec: codes, weight and temperature as its code has them, the rest ours, as for SASRec."""

    hidden_size: int = 256
    learning_rate: float = 2e-3
    num_epochs: float = 14
    own_rows: bool = True
    """Each item has a row of its own."""
    num_levels: int = 4
    """Codes of an item, from coarse to fine; 0: items are their own rows alone."""
    num_codes: int = 128
    """Codes of a level."""
    num_pieces: int = 0
    """Pieces at most, single codes among them, of which each has a row; 0: each code has a row."""
    alignment_weight: float = 0.1
    """Weight of the contrast of own rows with those of codes; 0: there is none."""
    num_neighbours: int = 20
    """Other items, those most strongly linked to an item in training, that the contrast draws it to."""
    temperature: float = 0.5
    """Cosines in the contrast are divided by it."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SelfAttentionSettings.SEARCH,
        "num_codes": OneOf(values=(64, 128, 256)),
        "num_pieces": OneOf(values=(2048, 4096, 8192)),
        "alignment_weight": Real(low=0.01, high=1, log=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_codes", "num_neighbours", "temperature")
        self.require_not_negative("num_levels", "num_pieces", "alignment_weight")
        if not (self.own_rows or self.num_levels):
            raise ConfigError("own_rows=false with num_levels=0 leaves items without a row: change one of them")
        if self.alignment_weight and not (self.own_rows and self.num_levels):
            raise ConfigError(f"alignment_weight={self.alignment_weight} needs own_rows=true and num_levels above 0")
        if 0 < self.num_pieces <= (num_single := self.num_levels * self.num_codes):
            raise ConfigError(f"num_pieces={self.num_pieces} must be above the {num_single} single codes, or 0")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`. Raises Unsuitable where texts tell no items apart."""
        own, encoder = self.parts(data.num_items if self.own_rows else 0)
        model, terms = SequenceModel(own, encoder), self.next_item()
        if self.num_levels:
            model.items = items = SumTable(own, self.rows(data, seed))
            nn.init.normal_(items.shared.weight, std=INITIAL)
            if self.alignment_weight:
                graph = ItemGraph(data.sequences, data.num_items, self.num_neighbours)
                terms["alignment"] = self.alignment_weight, Alignment(items.parts, graph, self.temperature)
        whole = self.alignment_weight > 0
        stream = WindowStream(data, [*terms], self.max_length, self.passes(seed), whole=whole)
        return [self.stage(data, model, terms, stream)]

    def rows(self, data: TrainingSequences, seed: int) -> np.ndarray:
        """The numbers of the rows of each item's codes; see `SumTable`. Says how many items share all their codes.
        Raises Unsuitable where all items do."""
        code_VL = residual_codes(self.frozen_alike(data), self.num_levels, self.num_codes, seed)
        _, sizes = np.unique(code_VL, axis=0, return_counts=True)
        if len(sizes) == 1:
            raise Unsuitable(
                f"{self.LABEL or type(self).__name__}: all {data.num_items} items of domain {data.domain!r} have the "
                "same codes: give vectors that tell them apart (vectors=FILE) or leave it out"
            )
        say(f"{data.domain}: {sizes[sizes > 1].sum():,} of {data.num_items:,} items share all their codes with others")
        row_VL = code_VL + np.arange(self.num_levels) * self.num_codes  # a row for each code of each level
        return pieces_of(row_VL, data.sequences.values, self.num_pieces) if self.num_pieces else row_VL


@dataclass(frozen=True, kw_only=True)
class SemanticIDs(H2Rec):
    """Settings of Semantic IDs; the defaults are ours."""

    own_rows: bool = False
    num_pieces: int = 2048
    alignment_weight: float = 0.0

    LABEL: ClassVar[str] = "Semantic IDs"


CODES = SemanticIDs(num_pieces=0)
"""A row for each code instead of pieces."""
