"""HLLM: one language model reads the titles of items, another one histories of their vectors (Chen et al. 2024).

An item is the state of a token that ends its text, a history that of its last item, and each position of a history is
to be near the next item. The loss is InfoNCE of cosines times a number that is learnt (1 / 0.07 at first, 100 at most)
against items that are drawn and shared in a step; of these none counts whose cosine with the target is above 0.99.
Deviations:

- Histories are read by SASRec's blocks here; with `reader="base"` by the lowest blocks of the language model, between
  two linear maps (there by all blocks of a second one).
- The token that ends an item's text is the tokenizer's own (there a new one, after a line that asks for a summary).
- Vectors go through a small network along the directions in which those of titles differ most at first, and with
  `own_rows` each item has a row of its own beside its text (there neither): that makes small training sets and few
  steps enough.
- `layers` and `frozen_layers` let the lower blocks alone read titles, and the upper of these learn (there all of all
  blocks), or low-rank matrices learn in their place (`lora_rank`).
- Negatives are drawn among all items (there outside the row's own history).

Lite-LLM4Rec (Wang et al. 2024) has the same two models, a linear head over all items and the softmax over them; so are
`LITE`'s settings. Their code is not public: the loss and the head are the paper's, all else is as above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

from torch import nn

from cprec.choices import Choice, OneOf
from cprec.errors import ConfigError
from cprec.models import add_lora
from cprec.systems.batches import WindowStream
from cprec.systems.encoders import BlockKind, Encoder
from cprec.systems.items import IdTable
from cprec.systems.language import (
    Language,
    LanguageEncoder,
    LanguageSettings,
    Pool,
    TextTable,
    TitleReader,
    check_blocks,
)
from cprec.systems.recipes.sasrec import INITIAL, SelfAttentionSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.towers import TowerLoss, TowerModel

Reader = Literal["own", "base"]


@dataclass(frozen=True, kw_only=True)
class HLLM(LanguageSettings, SelfAttentionSettings):
    """Settings of HLLM: loss and filter are the paper's, the encoder and the network are those of `SASRec (titles)`,
    whose rows over frozen vectors are the control."""

    hidden_size: int = 192
    block: BlockKind = "query_norm"
    dropout: float = 0.4
    attention_dropout: float = 0.4
    learning_rate: float = 1e-3
    beta2: float = 0.999
    weight_decay: float = 0.05
    sorted_batches: int = 1
    num_epochs: float = 8
    layers: float = 0.0
    """The lowest blocks of the language model, which read titles: a fraction below 1, or a number; 0: all."""
    pool: Pool = "end"
    """What stands for a title: the state of the token that ends it, or the mean over its own tokens."""
    language_rate: float = 0.1
    """The share of the learning rate that the weights of the language model have: a step of all of it would move what
    titles have in common by more than they differ."""
    lora_rank: int = 0
    """Rank of the matrices that are learnt beside those of a base, which then stay as they are; 0: none."""
    reader: Reader = "own"
    """What reads histories: blocks of our own, or the `num_blocks` lowest of the base, whose heads are its own."""
    own_rows: bool = True
    """Each item has a row of its own, which starts at zero and is added; without, an item is its text alone."""
    tied: bool = True
    """An item is as a target what it is in a history; otherwise a row of a table."""
    cosine: bool = True
    """Scores are cosines times a number that is learnt; otherwise products."""
    num_negatives: int = 512
    """Items drawn in each step, which each target is set against; 0: all items, of which a step reads all titles if
    `tied`."""
    too_near: float = 0.99
    """A drawn item whose cosine with the target is above this does not count."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SelfAttentionSettings.SEARCH,
        "pool": OneOf(values=get_args(Pool)),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks("layers", self.layers)
        self.require_positive("language_rate")
        self.require_not_negative("lora_rank", "num_negatives")
        for name, accepted in (("pool", get_args(Pool)), ("reader", get_args(Reader))):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r}: expected {' or '.join(accepted)}")
        if not -1 <= self.too_near <= 1:
            raise ConfigError(f"too_near={self.too_near} must be a cosine, in -1..1; 1 leaves out the target alone")
        if self.lora_rank and not self.base:
            raise ConfigError(f"lora_rank={self.lora_rank} needs a base: random weights are to be learnt themselves")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        language, size = self.language(data, seed), self.hidden_size
        if self.lora_rank:
            lora = add_lora(language.model, rank=self.lora_rank, alpha=2 * self.lora_rank, seed=seed)
            language = replace(language, model=lora)
        titles = TitleReader(language, pool=self.pool, layers=self.layers, frozen_layers=self.frozen_layers)
        items = TextTable(titles, data.num_items, self._adapter, rows=size if self.own_rows else None)
        encoder = self._history_encoder(language)
        output = None if self.tied else IdTable(data.num_items, size, num_special=0)
        if output is not None:
            nn.init.normal_(output.table.weight, std=INITIAL)
        model = TowerModel(items, encoder, output, cosine=self.cosine)
        stream = WindowStream(data, [NEXT_ITEM], self.max_length, self.passes(seed))
        how = {"num_drawn": self.num_negatives, "too_near": self.too_near, "language_rate": self.language_rate}
        loss = TowerLoss(model, **how)
        return [replace(self.stage(data, model, {}, stream), trainable=loss)]

    def _adapter(self, width: int) -> nn.Module:
        """The network between the language model's vectors and those of items, before training."""
        size = self.hidden_size
        return nn.Sequential(nn.Linear(width, size), nn.GELU(), nn.Linear(size, size))

    def _history_encoder(self, language: Language) -> Encoder:
        """What reads histories, before training."""
        if self.reader == "base":
            return LanguageEncoder(language, self.num_blocks, self.hidden_size, self.dropout)
        encoder = self.encoder()
        nn.init.normal_(encoder.position.weight, std=INITIAL)
        return encoder


LITE = HLLM(tied=False, cosine=False, num_negatives=0, reader="base")
"""Lite-LLM4Rec: a linear head over the catalogue, and the language model reads histories as well."""
