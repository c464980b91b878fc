"""MDGR: an item is a few unordered codes, and those of the next item are filled in by a network that denoises them.

Mu et al. 2026, "Masked Diffusion Generative Recommendation". A target's codes are masked at random, a few at first and
up to all of them later, and each masked one is learnt from the history and the others. A list is made step by step: the
code that the network is surest of comes first, one a step, then several at once, along a beam. The probability of an
item is that along this path (`paths`), by which the exact search and a wide enough beam give the same list.

Neither code nor, as far as we know them, the rules of masking are public. Ours: how many codes are masked is uniform up
to a most that grows with the steps, which ones is random (there it is adapted to each sample), and all masked codes
count alike. More deviations: codes are product-quantised slices of title vectors (there of vectors that are rotated
first); an item is read as the sum of its codes' rows; of the history the decoder reads the last state alone, with the
codes after it; only codes of items that exist are filled in, and lists are searched until proven, not by beams alone.

Without a decoder (`num_decoder_blocks=0`) the history's state alone asks for each code, all at once. With one code for
each item besides, this is SASRec.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import nn

from cprec.choices import Choice, OneOf
from cprec.errors import ConfigError
from cprec.progress import say
from cprec.systems.cloze import ClozeLoss, ClozeStream, CodeCloze, CodeTable
from cprec.systems.encoders import SelfAttention
from cprec.systems.paths import Order, PathRecommender
from cprec.systems.quantise import product_codes
from cprec.systems.recipes.sasrec import INITIAL, SelfAttentionSettings
from cprec.systems.settings import TextSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage


@dataclass(frozen=True, kw_only=True)
class MDGR(TextSettings, SelfAttentionSettings):
    """Settings of MDGR; all are ours."""

    max_length: int = 20
    dropout: float = 0.2
    learning_rate: float = 1e-3
    num_epochs: float = 15
    text_size: int = 64
    num_levels: int = 4
    """Codes of an item, of which each is that of a slice of its vector."""
    num_codes: int = 256
    """Codes of a slice."""
    num_decoder_blocks: int = 1
    """Transformer blocks over the codes of one item, in both directions; 0: no code is asked for by other codes."""
    growth: float = 0.3
    """Share of the steps in which the most codes that are masked grow from one to all; 0: all from the first step."""
    warm_up: int = 2
    """Codes that are filled in one by one, at first."""
    at_once: int = 2
    """Codes that each further step fills in."""
    beam_width: int = 20
    """Beginnings that a beam keeps after each step; weights are chosen by beams."""
    max_nodes: int = 2000
    """Beginnings that are read for a list at most; where they do not suffice for a proof, it is the best found."""

    VALIDATION_QUERIES: ClassVar[int] = 1000
    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SelfAttentionSettings.SEARCH,
        "num_codes": OneOf(values=(64, 128, 256)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_levels", "num_codes", "at_once", "beam_width", "max_nodes")
        self.require_not_negative("num_decoder_blocks", "warm_up")
        if not 0 <= self.growth <= 1:
            raise ConfigError(f"growth={self.growth} must lie in 0..1: it is a share of the steps")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`. Says how many items share all their codes."""
        code_VL = self.codes(data, seed)
        num_levels = code_VL.shape[1]
        rows, encoder = self.parts(num_levels * self.num_codes)
        items = CodeTable(rows, code_VL, self.num_codes)
        say(f"{data.domain}: {(items.alike_V > 1).sum():,} of {data.num_items:,} items share all codes with others")
        model = CodeCloze(items, encoder, self.decoder(num_levels))
        stream = ClozeStream(data, self.max_length, self.passes(seed), num_levels=num_levels, growth=self.growth)
        return [
            Stage(
                trainable=self.loss(model),
                stream=stream,
                schedule=self.schedule(stream.num_steps),
                recommender=lambda: self.path_recommender(data, model),
            )
        ]

    def codes(self, data: TrainingSequences, seed: int) -> np.ndarray:
        """The codes of the domain's items: int64[V, L]."""
        return product_codes(self.frozen(data), self.num_levels, self.num_codes, seed)

    def decoder(self, num_levels: int) -> SelfAttention | None:
        """What reads the codes of one item, before training."""
        if not self.num_decoder_blocks:
            return None
        decoder = replace(self, max_length=num_levels, num_blocks=self.num_decoder_blocks).encoder(causal=False)
        nn.init.normal_(decoder.position.weight, std=INITIAL)
        return decoder

    def loss(self, model: CodeCloze) -> ClozeLoss:
        """What is minimised."""
        return ClozeLoss(model)

    def path_recommender(self, data: TrainingSequences, model: CodeCloze) -> PathRecommender:
        """A recommender of the current weights."""
        reads = {"max_length": self.max_length, "beam_width": self.beam_width, "max_nodes": self.max_nodes}
        return PathRecommender(self.LABEL or type(self).__name__, data, model, self.order(), **reads)

    def order(self) -> Order:
        """How codes are filled in."""
        return Order(warm_up=self.warm_up, at_once=self.at_once)
