"""TIGER: an item is a few codes made of its text, and the next item's codes are written one by one.

Rajput et al. 2023, "Recommender Systems with Generative Retrieval", section 3. Deviations: codes are residual k-means
of title vectors (there a residual-quantised autoencoder of Sentence-T5 vectors); the code that tells items of equal
codes apart stands only where it is needed, and a token closes each item; one causal decoder reads and writes (there a
T5 encoder and decoder, with a token for the user); rankings are searched until proven, not by a beam alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from cprec import distributed
from cprec.errors import ConfigError
from cprec.progress import say
from cprec.systems.codes import ItemCodes, residual_codes
from cprec.systems.generator import CodeRecommender, CodeStream, decoder
from cprec.systems.items import read_vectors
from cprec.systems.settings import SystemSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.systems.vectors import text_vectors
from cprec.train.loss import PackedLoss


@dataclass(frozen=True, kw_only=True)
class TIGER(SystemSettings):
    """Settings of TIGER: levels, codes, layers and the length of histories are the paper's, the others ours."""

    max_length: int = 20
    dropout: float = 0.2
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    num_epochs: float = 15
    num_layers: int = 4
    """Layers of the decoder."""
    num_heads: int = 4
    """Heads; must divide hidden_size."""
    num_levels: int = 3
    """Codes of an item, from coarse to fine."""
    num_codes: int = 256
    """Codes of a level."""
    vectors: str = ""
    """An .npz file with `item_id` and `vectors` of the domain's items; empty: TF-IDF of titles, reduced by SVD."""
    text_size: int = 64
    """Directions that the TF-IDF of titles is reduced to; with more, more items share their codes."""
    beam_width: int = 20
    """Prefixes that a beam keeps at each depth; weights are chosen by beams."""
    max_nodes: int = 2000
    """Prefixes that are read for a list at most; where they do not suffice for a proof, it is the best found."""

    VALIDATION_QUERIES: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_layers", "num_heads", "num_levels", "num_codes", "text_size", "beam_width", "max_nodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`. Says how many items share their codes."""
        given = read_vectors(self.vectors, data.item_ids) if self.vectors else text_vectors(data.titles, self.text_size)
        codes = ItemCodes.of(residual_codes(given, self.num_levels, self.num_codes, seed), self.num_codes)
        say(f"{data.domain}: {codes.num_collisions:,} of {data.num_items:,} items share their codes and get one more")
        sizes = {"hidden_size": self.hidden_size, "num_layers": self.num_layers, "num_heads": self.num_heads}
        model = decoder(codes, max_length=self.max_length, dropout=self.dropout, **sizes)
        stream = CodeStream(data, codes, self.max_length, self.passes(seed))
        reads = {"max_length": self.max_length, "beam_width": self.beam_width, "max_nodes": self.max_nodes}
        return [
            Stage(
                trainable=PackedLoss(model, bf16=distributed.use_bf16("auto", distributed.pick_device())),
                stream=stream,
                schedule=self.schedule(stream.num_steps),
                recommender=lambda: CodeRecommender("TIGER", data, codes, model, **reads),
            )
        ]
