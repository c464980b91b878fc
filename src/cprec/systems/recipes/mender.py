"""Mender: TIGER that reads a preference in words before the history, and can be steered by it.

Paischer et al. 2025, "Preference Discerning with LLM-Enhanced Generative Retrieval". A preference is a text about what
the user likes, made of earlier events. The decoder reads its words, then the codes of the history, and writes the codes
of the next item. A query's text takes the place of the preference; `words.steering` measures how far lists follow it.

The preference that a ranking reads is the `last` or a `random` one of the user's own past. In the released code it is
the one nearest to the title of the target, which is an oracle, and refused here. A training row, whose target is known,
may read the `nearest`: this teaches to follow a preference, and what it is about differs from what a ranking reads.

Deviations. A chat model of 70 B makes theirs, five for each event; here they come from a file (`preferences`), or as a
stand-in each event makes one of the telling words of its item's title, brand and categories. Words are read one by one
as the mean vectors of the items that have them, through a small network, plus a row of each word's own (there T5 reads
the titles of the history and the preference, with LoRA); so a file of better `vectors` makes better words. One causal
decoder reads and writes, as in our TIGER. In each step a row is cut at a place that is drawn, and only what comes after
the preference is learnt, so that a pass has about half as many targets as TIGER's. With `num_words=0` it is TIGER.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from cprec import distributed
from cprec.errors import ConfigError
from cprec.provenance import file_sha256
from cprec.systems.codes import ItemCodes
from cprec.systems.generator import CodeRecommender, decoder
from cprec.systems.hybrid import with_slots
from cprec.systems.preferences import (
    PreferenceCodes,
    PreferenceRecommender,
    Preferences,
    PreferenceStream,
    Shown,
    Taught,
    read_preferences,
)
from cprec.systems.recipes.tiger import CodeSettings
from cprec.systems.signals import TrainingSequences
from cprec.systems.words import WordedCodes, WordedLoss
from cprec.train.trainable import Stream, Trainable


@dataclass(frozen=True, kw_only=True)
class WordedSettings(CodeSettings):
    """Settings of systems that write codes after words."""

    num_words: int = 8
    """Words of a text that are read at most, those that fewest items have."""

    def worded(self, data: TrainingSequences, codes: ItemCodes) -> WordedCodes:
        """Codes with the words of the domain's items, whose vectors are of what codes are made of."""
        return WordedCodes.worded(codes, data, self.vectors_of(data, self.of), self.num_words)

    def decoder(self, codes: ItemCodes) -> Any:
        """See `CodeSettings.decoder`: one with room for words, which it reads."""
        room = self.max_length + -(-self.num_words // codes.longest)
        sizes = {"hidden_size": self.hidden_size, "num_layers": self.num_layers, "num_heads": self.num_heads}
        model = decoder(codes, max_length=room, dropout=self.dropout, **sizes)
        if isinstance(codes, WordedCodes):
            with_slots(model, codes.words.vectors_WF, own_rows=True)
        return model

    def trainable(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> Trainable:
        """See `CodeSettings.trainable`."""
        return WordedLoss(model, bf16=distributed.use_bf16("auto", distributed.pick_device()))


@dataclass(frozen=True, kw_only=True)
class Mender(WordedSettings):
    """Settings of Mender; all are ours, most of them those of TIGER."""

    preferences: str = ""
    """A file of preferences (`preferences.read_preferences`); empty: keywords of the user's earlier events."""
    shown: Shown = "last"
    """Which preference of the user's past a ranking reads where its query has no text: the last, or a random one."""
    taught: Taught = "random"
    """Which one a training row reads: the last, a random one, or the nearest to what is to be learnt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_not_negative("num_words")
        if self.shown not in get_args(Shown):
            raise ConfigError(
                f"shown={self.shown!r}: expected {' or '.join(get_args(Shown))}. Which preference is nearest to a "
                "target is known from the target alone, so a list that reads it is that of an oracle"
            )
        if self.taught not in get_args(Taught):
            raise ConfigError(f"taught={self.taught!r}: expected {', '.join(get_args(Taught))}")
        if self.preferences and not self.num_words:
            raise ConfigError(f"preferences={self.preferences} are not read with num_words=0: leave one out")

    def identity(self) -> dict[str, Any]:
        """See `SystemSettings.identity`: the content of a file counts, not its place."""
        return super().identity() | ({"preferences": file_sha256(self.preferences)} if self.preferences else {})

    def codes(self, data: TrainingSequences, seed: int) -> ItemCodes:
        """See `CodeSettings.codes`."""
        stated = read_preferences(self.preferences, data) if self.preferences else None
        codes = super().codes(data, seed)
        if not self.num_words:
            return codes
        worded = self.worded(data, codes)
        return PreferenceCodes(**vars(worded), preferences=Preferences(worded.words, stated))

    def stream(self, data: TrainingSequences, codes: ItemCodes, seed: int) -> Stream:
        """See `CodeSettings.stream`."""
        if not isinstance(codes, PreferenceCodes):
            return super().stream(data, codes, seed)
        return PreferenceStream(data, codes, self.max_length, self.passes(seed), self.taught)

    def code_recommender(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> CodeRecommender:
        """See `CodeSettings.code_recommender`."""
        if not isinstance(codes, PreferenceCodes):
            return super().code_recommender(data, codes, model)
        name = self.LABEL or type(self).__name__
        return PreferenceRecommender(name, data, codes, model, self.shown, **self.ranking())
