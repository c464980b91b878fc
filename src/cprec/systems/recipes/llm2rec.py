"""LLM2Rec: a language model learns what comes next, then to tell titles apart; items are its vectors (He et al. 2025).

First it continues histories: titles joined by commas, each learnt given those before it. Then its causal mask is off:
it fills in masked tokens of titles, and two readings of a title under dropout are to be nearer to each other than to
those of other titles. An item is the mean of the states of its title, which stays as it is under a SASRec, and which
`write_vectors` of the recommender writes to a file. The first stage is what CPRec does without mixed sequences: with a
folder that CPRec has trained as `base`, `language_steps=0` goes on from there. This follows the code. Deviations:

- It learns one domain (there six), with a smaller decoder (there Qwen2-0.5B), in fewer and smaller steps.
- A row of the first stage learns all its titles but the first (there the last one alone). A title ends with a comma
  (there the last one with a line break). The last weights are kept (there the best ones by validation).
- A masked token is always replaced by an underscore (there in eight of ten cases). First tokens, which nothing
  predicts, are not masked. Equal titles are no negatives of each other.
- The network is that of `SASRec (titles)`, and reads the vectors along the directions in which they differ most, as an
  item head does (there a linear map, then a SASRec without rows of items' own).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

import numpy as np
import torch

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.inspection import check_attention
from cprec.models import freeze_lowest
from cprec.systems.batches import Passes
from cprec.systems.dot_product import DotProductModel
from cprec.systems.embedding import continuing, filling_in, telling_apart, texts_of, title_vectors
from cprec.systems.items import FrozenTable
from cprec.systems.language import LanguageSettings
from cprec.systems.recipes.title_sasrec import TitleSASRec, TitleSASRecRecommender
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.systems.vectors import Directions


@dataclass(frozen=True, kw_only=True)
class LLM2Rec(TitleSASRec, LanguageSettings):
    """Settings of LLM2Rec: rates of the language model, masks, dropout and temperature are the code's, steps and
    batches ours; `text_size` is the number of directions. Without steps of the language model it is `SASRec (titles)`
    over vectors of the base; with `vectors` there is no language model."""

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
        if self.base and self.vectors:
            raise ConfigError(f"base={self.base} and vectors={self.vectors}: give one, as vectors need no base")
        self.require_not_negative("language_steps", "masked_steps", "contrast_steps")
        self.require_positive(
            "language_batch", "language_titles", "title_batch", "language_rate", "contrast_temperature"
        )
        for name in ("masked_share", "contrast_dropout"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie between 0 and 1")

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
            states_VF = title_vectors(language.model, texts_of(language), f"{data.domain}: reading titles")
            cast(FrozenTable, network.items).fill(Directions.of(states_VF, size).project(states_VF))

        histories, apart = (data.sequences, self.language_titles), (self.contrast_dropout, self.contrast_temperature)
        stages = list[Stage]()
        for steps, batch_size, made in (
            (self.language_steps, self.language_batch, partial(continuing, language, *histories)),
            (self.masked_steps, self.title_batch, partial(filling_in, language, self.masked_share)),
            (self.contrast_steps, self.title_batch, partial(telling_apart, language, *apart)),
        ):
            if steps:
                loss, stream = made(Passes(batch_size=batch_size, num_steps=steps, seed=seed))
                schedule = replace(self, learning_rate=self.language_rate).schedule(steps)
                stages.append(Stage(trainable=loss, stream=stream, schedule=schedule, recommender=None))
        return [*stages, replace(self.of_network(network, data, seed), begin=read)]

    def recommender(
        self, data: TrainingSequences, model: DotProductModel, history: Callable[[Ragged], np.ndarray] | None = None
    ) -> LLM2RecRecommender:
        return LLM2RecRecommender(replace(self, start=""), data, model)


class LLM2RecRecommender(TitleSASRecRecommender):
    """Ranks by a trained SASRec over vectors of a language model."""

    SETTINGS = LLM2Rec

    def with_catalogue(self, catalogue: Catalogue) -> None:
        """See `StoredRecommender.with_catalogue`: what reads titles is not kept, so new ones have no vectors."""
