"""TIGER: an item is a few codes made of its text, and the next item's codes are written one by one.

Rajput et al. 2023, "Recommender Systems with Generative Retrieval", section 3. Deviations: codes are residual k-means
of title vectors (there a residual-quantised autoencoder of Sentence-T5 vectors); the code that tells items of equal
codes apart stands only where it is needed, and a token closes each item; one causal decoder reads and writes (there a
T5 encoder and decoder, with a token for the user); rankings are searched until proven, not by a beam alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from cprec import distributed
from cprec.errors import ConfigError
from cprec.progress import say
from cprec.systems.codes import ItemCodes
from cprec.systems.generator import CodeRecommender, CodeStream, decoder
from cprec.systems.quantise import residual_codes
from cprec.systems.settings import TextSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.train.loss import PackedLoss
from cprec.train.trainable import Stream, Trainable


@dataclass(frozen=True, kw_only=True)
class CodeSettings(TextSettings):
    """Settings of systems in which a causal decoder writes the codes of the next item."""

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
    text_size: int = 64
    """Directions that the TF-IDF of titles is reduced to; with more, more items share their codes."""
    beam_width: int = 20
    """Prefixes that a beam keeps at each depth; weights are chosen by beams."""
    max_nodes: int = 2000
    """Prefixes that are read for a list at most; where they do not suffice for a proof, it is the best found."""

    VALIDATION_QUERIES: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_layers", "num_heads", "num_levels", "num_codes", "beam_width", "max_nodes")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`."""
        codes = self.codes(data, seed)
        model = self.decoder(codes)
        stream = self.stream(data, codes, seed)
        return [
            Stage(
                trainable=self.trainable(data, codes, model),
                stream=stream,
                schedule=self.schedule(stream.num_steps),
                recommender=lambda: self.code_recommender(data, codes, model),
            )
        ]

    def codes(self, data: TrainingSequences, seed: int) -> ItemCodes:
        """The codes of the domain's items. Says how many items share theirs."""
        found = ItemCodes.of(residual_codes(self.frozen(data), self.num_levels, self.num_codes, seed), self.num_codes)
        say(f"{data.domain}: {found.num_collisions:,} of {data.num_items:,} items share their codes and get one more")
        return found

    def stream(self, data: TrainingSequences, codes: ItemCodes, seed: int) -> Stream:
        """The rows of codes that are learnt from."""
        return CodeStream(data, codes, self.max_length, self.passes(seed))

    def decoder(self, codes: ItemCodes) -> Any:
        """The decoder before training."""
        sizes = {"hidden_size": self.hidden_size, "num_layers": self.num_layers, "num_heads": self.num_heads}
        return decoder(codes, max_length=self.max_length, dropout=self.dropout, **sizes)

    def trainable(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> Trainable:
        """What is trained on rows of codes: here the softmax of each next token over all tokens."""
        return PackedLoss(model, bf16=distributed.use_bf16("auto", distributed.pick_device()))

    def code_recommender(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> CodeRecommender:
        """A recommender of the decoder's current weights."""
        reads = {"max_length": self.max_length, "beam_width": self.beam_width, "max_nodes": self.max_nodes}
        return CodeRecommender(self.LABEL or type(self).__name__, data, codes, model, **reads)


@dataclass(frozen=True, kw_only=True)
class TIGER(CodeSettings):
    """Settings of TIGER: levels, codes, layers and the length of histories are the paper's, the others ours."""
