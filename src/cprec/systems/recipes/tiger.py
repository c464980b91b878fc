"""TIGER: items are short codes made of their text, and the next item's codes are written one by one.

Rajput et al. 2023, "Recommender Systems with Generative Retrieval", section 3. Deviations: codes are residual k-means
of title vectors (there a residual-quantised autoencoder of Sentence-T5 vectors); the code that tells items of equal
codes apart stands only where it is needed, and a token closes each item; one causal decoder reads and writes (there a
T5 encoder and decoder, with a token for the user); rankings are searched until proven, not by a beam alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import GPT2Config, GPT2LMHeadModel

from cprec import distributed
from cprec.choices import Choice, Whole
from cprec.errors import ConfigError
from cprec.progress import say
from cprec.systems.codes import END, PADDING, ItemCodes, residual_codes
from cprec.systems.fit import Stage, SystemSettings
from cprec.systems.generator import CodeRecommender, CodeStream
from cprec.systems.items import read_vectors
from cprec.systems.signals import TrainingSequences
from cprec.systems.vectors import text_vectors
from cprec.train.loss import PackedLoss


@dataclass(frozen=True, kw_only=True)
class TIGER(SystemSettings):
    """Settings of TIGER; levels, codes, layers and the events that are read are the paper's."""

    max_length: int = 20
    dropout: float = 0.2
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    num_epochs: float = 40
    num_layers: int = 4
    """Layers of the decoder."""
    num_heads: int = 4
    """Heads; must divide hidden_size."""
    num_levels: int = 3
    """Codes of an item, from coarse to fine."""
    num_codes: int = 256
    """Codes of a level."""
    vectors: str = ""
    """An .npz file with `item_id` and `vectors`; without it vectors are made of titles."""
    vector_size: int = 128
    """Width of vectors made of titles."""
    beam_width: int = 20
    """Prefixes that a beam keeps at each depth, when weights are chosen."""
    max_nodes: int = 2000
    """Prefixes that a query reads at most until its list is proven; then it is the best found."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {**SystemSettings.SEARCH, "num_layers": Whole(low=1, high=4)}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_layers", "num_levels", "num_codes", "vector_size", "beam_width", "max_nodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`."""
        codes = self.codes(data, seed)
        model = self.decoder(codes)
        stream = CodeStream(data, codes, self.max_length, **self.passes(seed))
        reads = {"max_length": self.max_length, "beam_width": self.beam_width, "max_nodes": self.max_nodes}
        return [
            Stage(
                trainable=PackedLoss(model, bf16=distributed.use_bf16("auto", distributed.pick_device())),
                stream=stream,
                schedule=self.schedule(stream.num_steps),
                recommender=lambda: CodeRecommender("TIGER", data, codes, model, **reads),
            )
        ]

    def codes(self, data: TrainingSequences, seed: int) -> ItemCodes:
        """Codes of the domain's items. Says how many items share theirs."""
        ids = [str(item) for item in data.catalogue.item_id[data.catalogue.rows_of(data.domain)]]
        vectors = read_vectors(self.vectors, ids) if self.vectors else text_vectors(data.titles, self.vector_size, seed)
        codes = ItemCodes.of(residual_codes(vectors, self.num_levels, self.num_codes, seed), self.num_codes)
        say(f"{data.domain}: {codes.num_collisions:,} of {len(ids):,} items share their codes and get one more")
        return codes

    def decoder(self, codes: ItemCodes) -> Any:
        """The model before training: a causal transformer whose input and output tokens share their vectors."""
        config = GPT2Config(
            vocab_size=codes.vocabulary_size,
            n_positions=1 + (self.max_length + 1) * codes.longest,
            n_embd=self.hidden_size,
            n_layer=self.num_layers,
            n_head=self.num_heads,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), self.dropout),
            **{"bos_token_id": None, "eos_token_id": END, "pad_token_id": PADDING},
        )
        return GPT2LMHeadModel(config)
