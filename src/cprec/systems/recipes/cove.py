"""CoVE: each item is one more token of a language model, which reads histories of them (Zhang et al. 2025).

An item has a row among the vectors that the model reads and another in its output layer. A history is its items'
tokens, and at each of them the next item is predicted by the softmax over all: a list is exact after one pass.
`reader="own"` is the control without a language model: SASRec with a second vector of each item (`tied=false`).
Deviations from paper and code:

- Items' tokens alone are read and learnt, and the softmax is over them (there over words, too; an instruction stands
  before a history and, unless left out, a title after each token, and both are learnt).
- Rows begin as means of those of title tokens (there at random). Each item has its own (there items may share some,
  chosen by hashes, so that tables are smaller).
- All of the language model learns unless told otherwise, at a share of the rows' learning rate that gives it the code's
  (there adapters of low rank, `lora_rank`, and one rate).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn

from cprec.errors import ConfigError
from cprec.inspection import output_scale
from cprec.models import add_lora, blocks_of, freeze_lowest, number_of_blocks, trunk_and_head
from cprec.systems.batches import WindowStream
from cprec.systems.encoders import Encoder
from cprec.systems.items import IdTable
from cprec.systems.language import Language, LanguageEncoder, LanguageSettings, check_blocks, mean_rows
from cprec.systems.recipes.sasrec import INITIAL, SelfAttentionSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.towers import TowerLoss, TowerModel

Reader = Literal["base", "own"]


@dataclass(frozen=True, kw_only=True)
class CoVE(LanguageSettings, SelfAttentionSettings):
    """Settings of CoVE: passes and the language model's learning rate are the code's."""

    dropout: float = 0.2
    learning_rate: float = 1e-3
    beta2: float = 0.999
    batch_size: int = 64
    sorted_batches: int = 1
    num_epochs: float = 3
    reader: Reader = "base"
    """What reads histories: the base, or `num_blocks` blocks of our own over rows of `hidden_size` random numbers."""
    from_titles: bool = True
    """Rows of items begin as means of those of their titles' tokens; otherwise at random."""
    layers: float = 0.0
    """The lowest blocks of the base, which read: a fraction below 1, or a number; 0: all."""
    language_rate: float = 0.1
    """The share of the learning rate that the weights of the language model have."""
    lora_rank: int = 0
    """Rank of the matrices that are learnt beside those of a base, which then stay as they are; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks("layers", self.layers)
        self.require_positive("language_rate")
        self.require_not_negative("lora_rank")
        if self.reader not in get_args(Reader):
            raise ConfigError(f"reader={self.reader!r}: expected {' or '.join(get_args(Reader))}")
        if self.base and self.reader == "own":
            raise ConfigError(f"base={self.base} is not read with reader=own: give one of them")
        if self.lora_rank and not self.base:
            raise ConfigError(f"lora_rank={self.lora_rank} needs a base: random weights are to be learnt themselves")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`. Raises ConfigError for a base that has not so many blocks, or reads less."""
        if self.reader == "base":
            items, encoder, output = self._of_language(self.language(data, seed), data.num_items, seed)
        else:
            items, encoder = self.parts(data.num_items)
            output = IdTable(data.num_items, self.hidden_size, num_special=0)
            nn.init.normal_(output.table.weight, std=INITIAL)
        stream = WindowStream(data, [NEXT_ITEM], self.max_length, self.passes(seed))
        model = TowerModel(items, encoder, output)
        loss = TowerLoss(model, num_drawn=0, too_near=1.0, language_rate=self.language_rate)
        return [replace(self.stage(data, model, {}, stream), trainable=loss)]

    def _of_language(self, language: Language, num_items: int, seed: int) -> tuple[IdTable, Encoder, IdTable]:
        model, total = language.model, len(blocks_of(language.model))
        num_blocks = number_of_blocks(self.layers, total) if self.layers else total
        if not 0 < num_blocks <= total:
            raise ConfigError(f"layers={self.layers:g} means {num_blocks} blocks, and the language model has {total}")
        read, scored = IdTable(num_items, language.width), IdTable(num_items, language.width, num_special=0)
        (_, head), tokens = trunk_and_head(model), model.get_input_embeddings()
        with torch.no_grad():
            rows_TF = tokens(torch.arange(len(tokens.weight)))
            for table, of_tokens_TF in ((read, rows_TF), (scored, head.weight * output_scale(model))):
                nn.init.normal_(table.table.weight, std=INITIAL)
                if self.from_titles:
                    table.table.weight[:num_items] = mean_rows(language.titles, of_tokens_TF)
        if self.lora_rank:
            model = add_lora(model, rank=self.lora_rank, alpha=2 * self.lora_rank, seed=seed)
            language = replace(language, model=model)
        if self.frozen_layers:  # with their adapters
            freeze_lowest(model, self.frozen_layers)
        return read, LanguageEncoder(language, num_blocks, self.max_length, None, self.dropout), scored
