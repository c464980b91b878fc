"""LLM2Rec: a language model learns what comes next, then to tell titles apart; items are its vectors (He et al. 2025).

First it continues histories: titles joined by commas, of which each is learnt given those before it. Then its causal
mask is off: it fills in masked tokens of titles, and two readings of a title under dropout are to be nearer to each
other than to those of other titles in the step. An item is the mean of the states of its title, which stay as they are
under a SASRec. The first stage is what CPRec does without mixed sequences: `base` may be a folder that CPRec has
trained, on all domains and with annealing, and `language_steps=0` goes on from there. Where paper and code differ, this
follows the code. Deviations:

- It learns one domain (there six, and other ones get vectors without training). Decoder and steps are smaller (there
  Qwen2-0.5B, 10,000 steps of 128 histories, then 1,000 of 32 and 500 or 1,000 of 256 titles).
- A row of the first stage learns all its titles but the first, so each is read once (there a row learns its last title
  alone, and titles are read as often as there are prefixes). A title ends with a comma (there the last one with a line
  break and the end of the text). The last weights are kept (there those of the lowest loss).
- A masked token is always replaced by an underscore (there in eight of ten cases). First tokens are not masked (there
  they are, but nothing predicts them). Equal titles are no negatives of each other.
- The network is that of `SASRec (titles)`, and reads the vectors along the directions in which they differ most, as an
  item head does (there a linear map, then a SASRec without rows of items' own).

`LLM2RecRecommender.write_vectors` writes the vectors of the items to a file, which `vectors` of this and of all other
systems that read titles takes in place of words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch

from cprec import distributed
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.inspection import check_attention
from cprec.models import context_of, freeze_lowest
from cprec.systems.batches import Passes, RowStream
from cprec.systems.dot_product import DotProductModel
from cprec.systems.embedding import (
    MASKED_TOKEN,
    SAME_TITLE,
    DropoutPairs,
    HistoryStream,
    MaskedTokens,
    TitleStream,
    texts_of,
    title_vectors,
)
from cprec.systems.items import FrozenTable, write_vectors
from cprec.systems.language import Language, LanguageSettings
from cprec.systems.recipes.title_sasrec import TitleSASRec, TitleSASRecRecommender
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.systems.vectors import Directions
from cprec.text.tokenizer import encode_pieces
from cprec.train.loss import PackedLoss


@dataclass(frozen=True, kw_only=True)
class LLM2Rec(TitleSASRec, LanguageSettings):
    """Settings of LLM2Rec: rates of the language model, masks, dropout and temperature are the code's, steps and
    batches ours. Without steps of the language model it is `SASRec (titles)` over vectors of the base. With `vectors`
    there is no language model either."""

    language_steps: int = 1000
    """Steps that continue histories; 0: the base has learnt that, or is not to."""
    language_batch: int = 16
    """Rows of such a step."""
    language_titles: int = 10
    """Titles of a row that are learnt, at most."""
    masked_steps: int = 500
    """Steps that fill in masked tokens."""
    masked_share: float = 0.2
    """Share of a title's tokens that are masked."""
    contrast_steps: int = 500
    """Steps that tell titles apart."""
    contrast_dropout: float = 0.2
    """Share of attention weights that each of two readings is without."""
    contrast_temperature: float = 0.1
    """Cosines are divided by it."""
    title_batch: int = 128
    """Titles of a step that reads titles alone."""
    language_rate: float = 2e-4
    """Peak learning rate of the language model."""

    LABEL: ClassVar[str] = "LLM2Rec"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_not_negative("language_steps", "masked_steps", "contrast_steps")
        self.require_positive("language_batch", "language_titles", "title_batch", "language_rate")
        self.require_positive("masked_share", "contrast_dropout", "contrast_temperature")
        for name in ("masked_share", "contrast_dropout"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be below 1")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`. Raises ConfigError for a base that cannot read both ways, or not so much."""
        if self.vectors:
            return super().stages(data, seed)
        with torch.random.fork_rng(devices=[]):  # first weights of the network are those of `SASRec (titles)`
            language = self.language(data, seed)
        check_attention(language.model)
        if self.frozen_layers:
            freeze_lowest(language.model, self.frozen_layers)
        size = min(self.text_size, data.num_items, language.width)
        network = self.network(np.zeros((data.num_items, size), dtype=np.float32))

        def read() -> None:
            model = language.model.to(distributed.pick_device())
            states_VF = title_vectors(model, texts_of(language), f"{data.domain}: reading titles")
            vectors_VF = Directions.of(states_VF, size).project(states_VF)
            cast(FrozenTable, network.items).fill(vectors_VF)

        last = replace(self.of_network(network, data, seed), begin=read)
        return [*self.language_stages(data, language, seed), last]

    def language_stages(self, data: TrainingSequences, language: Language, seed: int) -> list[Stage]:
        """The stages of the language model that have steps."""
        model, texts, found = language.model, texts_of(language), list[Stage]()
        bf16 = distributed.use_bf16("auto", distributed.pick_device())
        settings = replace(self, learning_rate=self.language_rate)

        def add(loss: PackedLoss, stream: RowStream) -> None:
            schedule = settings.schedule(stream.num_steps)
            found.append(Stage(trainable=loss, stream=stream, schedule=schedule, recommender=None))

        if self.language_steps:
            passes = Passes(batch_size=self.language_batch, num_steps=self.language_steps, seed=seed)
            (mark,) = encode_pieces(language.tokenizer, [","])
            stream = HistoryStream(data.sequences, language.titles, mark, self.language_titles, passes)
            if stream.longest > (context_of(model) or stream.longest):
                raise ConfigError(
                    f"language_titles={self.language_titles} makes rows of up to {stream.longest:,} tokens, and the "
                    f"language model reads {context_of(model):,}: lower language_titles or title_tokens"
                )
            add(PackedLoss(model, bf16=bf16), stream)
        if self.masked_steps:
            passes = Passes(batch_size=self.title_batch, num_steps=self.masked_steps, seed=seed)
            mask = encode_pieces(language.tokenizer, ["_"])[0][0]
            masked = TitleStream(texts, MASKED_TOKEN, passes, mask=mask, mask_share=self.masked_share)
            add(MaskedTokens(model, bf16=bf16), masked)
        if self.contrast_steps:
            passes = Passes(batch_size=self.title_batch, num_steps=self.contrast_steps, seed=seed)
            apart = {"dropout": self.contrast_dropout, "temperature": self.contrast_temperature}
            add(DropoutPairs(model, bf16=bf16, **apart), TitleStream(texts, SAME_TITLE, passes))
        return found

    def recommender(
        self, data: TrainingSequences, model: DotProductModel, history: Callable[[Ragged], np.ndarray] | None = None
    ) -> LLM2RecRecommender:
        return LLM2RecRecommender(replace(self, start=""), data, model)


class LLM2RecRecommender(TitleSASRecRecommender):
    """Ranks by a trained SASRec over vectors of a language model."""

    SETTINGS = LLM2Rec

    def write_vectors(self, path: str | Path) -> None:
        """Write the items' vectors, as `TextSettings.vectors` reads them."""
        item_ids = TrainingSequences(self.catalogue, self.domain, Ragged.of([]), ()).item_ids
        write_vectors(path, item_ids, self.model.items.given().cpu().numpy())
