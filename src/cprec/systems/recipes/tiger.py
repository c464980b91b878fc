"""TIGER: an item is a few codes made of its text, and the next item's codes are written one by one.

Rajput et al. 2023, "Recommender Systems with Generative Retrieval", section 3. Deviations: codes are residual k-means
of title vectors (there of Sentence-T5 vectors, by a residual-quantised autoencoder: see `vectors` and `quantiser`); the
code that tells items of equal codes apart stands only where it is needed, and a token closes each item; one causal
decoder reads and writes (there a T5 encoder and decoder, with a token for the user); rankings are searched until
proven, not by a beam alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from cprec import distributed
from cprec.errors import ConfigError
from cprec.progress import say
from cprec.systems.code_report import code_report
from cprec.systems.codes import Collisions, ItemCodes, Kind, fitted
from cprec.systems.generator import CodeRecommender, CodeStream, decoder
from cprec.systems.quantise import SideBySide
from cprec.systems.settings import TextSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.systems.vectors import collaborative_vectors
from cprec.train.loss import PackedLoss
from cprec.train.trainable import Stream, Trainable

VectorKind = Literal["text", "collaborative"]


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
    of: VectorKind = "text"
    """What codes are made of: `text`, or `collaborative`, vectors of what items stand near in training events."""
    text_size: int = 64
    """Directions that the TF-IDF of titles, or what items stand near, is reduced to; with more, more items share their
    codes."""
    quantiser: Kind = "residual k-means"
    """How vectors become codes: from coarse to fine by k-means or by an `autoencoder`, or of slices of them, by k-means
    (`product`) or in steps (`scalar`)."""
    collisions: Collisions = "count"
    """Where items share all their codes: `count` gives each one more; `reassign` exchanges last codes for the nearest
    free ones; `sinkhorn` spreads those of all items that share the others; `share` gives each an equal share of the
    probability."""
    beam_width: int = 20
    """Prefixes that a beam keeps at each depth; weights are chosen by beams."""
    max_nodes: int = 2000
    """Prefixes that are read for a list at most; where they do not suffice for a proof, it is the best found."""

    VALIDATION_QUERIES: ClassVar[int] = 1000
    READS_TEXTS: ClassVar[bool] = False
    """Whether vectors of titles are read beside codes, of whatever these are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vectors and self.of != "text" and not self.READS_TEXTS:
            raise ConfigError(f"vectors={self.vectors} are not read where codes are of={self.of!r}: leave one out")
        self.require_positive("num_layers", "num_heads", "num_levels", "num_codes", "beam_width", "max_nodes")
        for name, accepted in (
            ("of", get_args(VectorKind)),
            ("quantiser", get_args(Kind)),
            ("collisions", get_args(Collisions)),
        ):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {', '.join(accepted)}")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`."""
        codes = self.codes(data, seed)
        model = self.model(data, codes)
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
        """The codes of the domain's items. Says how good they are."""
        codes = self.codes_of(data, seed, self.kinds)
        say(f"{data.domain}: {code_report(codes, data)}")
        return codes

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of vectors that items have codes of."""
        return (self.of,)

    def codes_of(self, data: TrainingSequences, seed: int, kinds: Sequence[str]) -> ItemCodes:
        """Codes of some kinds of vectors, those of each kind after those of the one before; items share all their codes
        if they do so in all kinds.

        Raises Unsuitable where all items have the same codes.
        """
        vectors = [self.vectors_of(data, kind) for kind in kinds]
        fits = [fitted(self.quantiser, each, self.num_levels, self.num_codes, seed) for each in vectors]
        whole = fits[0] if len(fits) == 1 else SideBySide(tuple(fits), tuple(each.shape[1] for each in vectors))
        codes = ItemCodes.coded(whole, np.concatenate(vectors, axis=1), self.num_codes, self.collisions)

        def new_vectors(item_ids: Sequence[str], titles: Sequence[str]) -> np.ndarray:
            return np.concatenate([self.vectors_of_new(data, kind, item_ids, titles) for kind in kinds], axis=1)

        return replace(codes, new_vectors=new_vectors)

    def vectors_of(self, data: TrainingSequences, kind: str) -> np.ndarray:
        """Vectors of the domain's items, by their titles or by training events alone: float32[V, F]."""
        if kind == "text":
            return self.frozen(data)
        return collaborative_vectors(data.sequences, data.num_items, self.text_size)

    def vectors_of_new(
        self, data: TrainingSequences, kind: str, item_ids: Sequence[str], titles: Sequence[str]
    ) -> np.ndarray:
        """Vectors of items that came after training, among those of `vectors_of`: float32[N, F]. Raises ConfigError for
        vectors of training events, of which such items have none."""
        if kind == "text":
            return self.frozen_new(data, item_ids, titles)
        raise ConfigError(
            f"{self.LABEL or type(self).__name__}: codes of training events cannot be given to {len(item_ids):,} new "
            "items, which have none: train again, or take codes of titles (of='text')"
        )

    def stream(self, data: TrainingSequences, codes: ItemCodes, seed: int) -> Stream:
        """The rows of codes that are learnt from."""
        return CodeStream(data, codes, self.max_length, self.passes(seed))

    def model(self, data: TrainingSequences, codes: ItemCodes) -> Any:
        """What is trained, before training: here the decoder alone."""
        return self.decoder(codes)

    def decoder(self, codes: ItemCodes) -> Any:
        """A decoder of the codes before training."""
        sizes = {"hidden_size": self.hidden_size, "num_layers": self.num_layers, "num_heads": self.num_heads}
        return decoder(codes, max_length=self.max_length, dropout=self.dropout, **sizes)

    def trainable(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> Trainable:
        """What is trained on rows of codes: here the softmax of each next token over all tokens."""
        return PackedLoss(model, bf16=distributed.use_bf16("auto", distributed.pick_device()))

    def code_recommender(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> CodeRecommender:
        """A recommender of the decoder's current weights."""
        return CodeRecommender(self.LABEL or type(self).__name__, data, codes, model, **self.ranking())

    def ranking(self) -> dict[str, Any]:
        """How lists are searched; see `CodeRecommender`."""
        return {"max_length": self.max_length, "beam_width": self.beam_width, "max_nodes": self.max_nodes}


@dataclass(frozen=True, kw_only=True)
class TIGER(CodeSettings):
    """Settings of TIGER: levels, codes, layers and the length of histories are the paper's, the others ours."""
