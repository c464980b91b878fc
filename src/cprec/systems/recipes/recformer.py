"""Recformer: items are their attributes in words, and one encoder reads a history and an item alike (Li et al. 2023).

An item is the keys and values of its attributes, a history the latest item's, then those before it. Each token has a
vector of its own, of its position, of its kind (key or value) and of its item's place; a token reads those near it, and
the start reads all. The start's state is the history, or of a single item the item. First histories are to be near
their next items and far from those of other histories in the step, and masked words are filled in. Then the encoder
learns the next item among all, whose matrix is made anew before each validation; at last the best matrix stays, and the
encoder alone goes on. This follows the code of a replication. Deviations:

- The encoder begins with random weights, and its tokens are made of the domain's attributes (there Longformer-base,
  trained on seven other domains, which is not at hand). It is small, and runs have fewer tokens (there 1,024,
  and 32 of an attribute).
- Attributes are title, brand and category (there up to three of each item's own). Keys are single words.
- Attention outside the window is masked, not spared. Blocks are those of SASRec here.
- A target that several histories of a step share stands there once (there it is a negative of itself).
- Tokens are masked one by one and always replaced (there whole words, in eight of ten cases).
- Histories are all prefixes (there one of a user in a pass, with a target in the later half). The matrix is made anew
  before validation, so that it is the validated one which stays (there before each pass).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from cprec.choices import Choice, Real
from cprec.errors import ConfigError
from cprec.systems.attributes import AttributeModel, AttributeReader, InBatch, MaskedWords, words_of
from cprec.systems.batches import PrefixStream
from cprec.systems.recipes.sasrec import INITIAL, SelfAttentionSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import NEXT_ITEM, Stage
from cprec.systems.terms import Teacher, next_item

CONTRAST, WORDS = "contrast", "words"


@dataclass(frozen=True, kw_only=True)
class Recformer(SelfAttentionSettings):
    """Settings of Recformer: temperature, weights, masks and window are the code's, the others ours. `num_epochs` are
    those among all items with a matrix that is made anew."""

    dropout: float = 0.1
    learning_rate: float = 1e-3
    num_epochs: float = 4
    first_epochs: float = 2
    """Passes of the first stage, in which a step's histories and items are contrasted; 0: there is none."""
    last_epochs: float = 2
    """Passes of the last stage, whose matrix stays; 0: there is none."""
    window: int = 64
    """Tokens on both sides together that a token reads, beside the start; 0: all of its run."""
    max_tokens: int = 128
    """Tokens of a run that are read."""
    attribute_tokens: int = 16
    """Tokens of an attribute that are read, its key among them."""
    temperature: float = 0.05
    """Cosines are divided by it."""
    mask_weight: float = 0.1
    """Weight of masked words beside the contrast; 0: none are masked."""
    mask_share: float = 0.15
    """Share of tokens that are masked."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {
        **SelfAttentionSettings.SEARCH,
        "temperature": Real(low=0.02, high=0.3, log=True),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("max_tokens", "attribute_tokens", "temperature", "mask_share")
        self.require_not_negative("first_epochs", "last_epochs", "window", "mask_weight")
        if self.mask_share >= 1:
            raise ConfigError(f"mask_share={self.mask_share} must be below 1")

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`."""
        words = words_of(data, self.attribute_tokens)
        sizes = {"max_items": self.max_length, "max_tokens": self.max_tokens, "window": self.window}
        blocks = list(self.encoder(causal=False).blocks)
        reader = AttributeReader(words, self.hidden_size, blocks, **sizes)
        for table in (reader.word, reader.kind, reader.position, reader.item):
            nn.init.normal_(table.weight, std=INITIAL)
        model, stages = AttributeModel(reader, data.num_items, self.hidden_size), list[Stage]()
        if self.first_epochs:
            teachers: dict[str, tuple[float, Teacher]] = {CONTRAST: (1.0, InBatch(model, self.temperature))}
            if self.mask_weight:
                teachers[WORDS] = self.mask_weight, MaskedWords(reader, self.hidden_size, self.mask_share)
            first = self.prefixes(data, [*teachers], self.first_epochs, seed)
            stages += [self.stage(data, model, {}, first, teachers=teachers, refresh=model.read_all_items)]
        terms = {NEXT_ITEM: (1.0, next_item("softmax", temperature=self.temperature))}
        second = self.prefixes(data, [NEXT_ITEM], self.num_epochs, seed)
        stages += [self.stage(data, model, terms, second, refresh=model.read_all_items)]
        if self.last_epochs:
            stages += [self.stage(data, model, terms, self.prefixes(data, [NEXT_ITEM], self.last_epochs, seed + 1))]
        return stages

    def prefixes(self, data: TrainingSequences, terms: Sequence[str], num_epochs: float, seed: int) -> PrefixStream:
        """All prefixes; steps that contrast stay whole."""
        passes = replace(self.passes(seed), num_epochs=num_epochs)
        return PrefixStream(data, terms, self.max_length, passes, whole=NEXT_ITEM not in terms)
