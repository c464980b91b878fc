"""HLLM: a language model reads items, another one histories of what it made of them (Chen et al. 2024).

An item is the state of the token that ends its title, a history that of its last item; each position is to be near the
next item. The loss is InfoNCE of cosines times a number that is learnt (1 / 0.07 at first, 100 at most), against items
that are drawn and shared in a step, of which none counts whose cosine with the target is above 0.99. Deviations:

- SASRec's blocks read histories; with `reader="base"` the lowest blocks of the language model between two linear maps
  (there all blocks of a second one).
- The token that ends a title is the tokenizer's own (there a new one, after a line that asks for a summary).
- Vectors pass a small network, see `language.TextTable`, and with `own_rows` each item has a row beside its text (there
  neither): few steps then suffice. The language model learns at a share of the learning rate.
- Lower blocks alone may read, and the upper of these learn (there all), or low-rank matrices do in their place.
- Negatives are drawn among all items (there outside the row's own history).

`LITE` is Lite-LLM4Rec (Wang et al. 2024): the same two models, a linear head over all items and the softmax over them.
There is no public code; of what the paper leaves open all is as above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

from torch import nn

from cprec.errors import ConfigError
from cprec.models import add_lora
from cprec.systems.batches import WindowStream
from cprec.systems.encoders import BlockKind, Encoder
from cprec.systems.items import IdTable, ItemTable, two_layers
from cprec.systems.language import LanguageEncoder, LanguageSettings, Pool, TextTable, TitleReader, check_blocks
from cprec.systems.recipes.sasrec import INITIAL, SelfAttentionSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import Teacher
from cprec.systems.towers import TowerLoss, TowerModel

Reader = Literal["own", "base"]


@dataclass(frozen=True, kw_only=True)
class HLLM(LanguageSettings, SelfAttentionSettings):
    """Settings of HLLM: loss and filter are the paper's, the networks those of `SASRec (titles)`."""

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
        return [self.of_towers(self.towers(data, seed), data, seed)]

    def towers(self, data: TrainingSequences, seed: int) -> TowerModel:
        """The model before training."""
        language: Any = self.language(data, seed) if self.needs_language else None
        size = self.hidden_size
        if self.lora_rank and language:
            lora = add_lora(language.model, rank=self.lora_rank, alpha=2 * self.lora_rank, seed=seed)
            language = replace(language, model=lora)
        items = self.items(data, language)
        if self.reader == "base":
            encoder: Encoder = LanguageEncoder(language, self.num_blocks, self.max_length, size, self.dropout)
        else:
            encoder = own = self.encoder()
            nn.init.normal_(own.position.weight, std=INITIAL)
        output = None if self.tied else IdTable(data.num_items, size, num_special=0)
        if output is not None:
            nn.init.normal_(output.table.weight, std=INITIAL)
        return TowerModel(items, encoder, output, cosine=self.cosine)

    def items(self, data: TrainingSequences, language: Any) -> ItemTable:
        """The table of items, made of their titles by a `Language`."""
        titles = TitleReader(language, pool=self.pool, layers=self.layers, frozen_layers=self.frozen_layers)
        size = self.hidden_size
        return TextTable(titles, data.num_items, partial(two_layers, size=size), rows=size if self.own_rows else None)

    def of_towers(self, model: TowerModel, data: TrainingSequences, seed: int, **more: tuple[float, Teacher]) -> Stage:
        """The stage that trains a model, with more terms, which compare the rows of a step: (weight, term) by name."""
        stream = WindowStream(data, [NEXT_ITEM, *more], self.max_length, self.passes(seed), whole=bool(more))
        rate = self.language_rate
        loss = TowerLoss(model, more, num_drawn=self.num_negatives, too_near=self.too_near, language_rate=rate)
        return replace(self.stage(data, model, {}, stream), trainable=loss)


LITE = HLLM(tied=False, cosine=False, num_negatives=0, reader="base")
"""Lite-LLM4Rec."""
