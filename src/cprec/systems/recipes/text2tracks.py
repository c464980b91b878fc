"""Text2Tracks: a query in words, and the codes of the item that is asked for.

Palumbo et al. 2025, "Text2Tracks: Prompt-based Music Recommendation via Generative Retrieval". A decoder reads the
words of a query and writes an item's codes, which are made of what items stand near in training events (their best
choice, of playlists); no history is read.

Logs hardly ever have queries. Without a file of them (`queries`) a row asks for an item by some of the telling words of
its own title, brand and categories, drawn anew in each step: for each item once in a pass, and once for each of its
training events, so that popular items are more probable. The text of a held-out target is never read: a list answers
the query's own text, and where there is none the words of the latest item of the history, which
asks for items like that one. So the row in a table of next items, which have no queries, says little of what this is
for; what it is worth beyond a search for words is what it makes of words that an item does not have.

Deviations: words as in our Mender (there a pretrained T5 reads the prompt); codes by
residual k-means (there sparse coding, besides others); one causal decoder; lists are proven.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.provenance import file_sha256
from cprec.systems.batches import Passes
from cprec.systems.codes import ItemCodes
from cprec.systems.generator import CodeRecommender
from cprec.systems.preferences import Stated, read_preferences
from cprec.systems.recipes.mender import WordedSettings
from cprec.systems.recipes.tiger import VectorKind
from cprec.systems.signals import TrainingSequences
from cprec.systems.stage import Stage
from cprec.systems.words import Told, WordedCodes, WordedRecommender, WordedStream
from cprec.train.trainable import Stream


class AskingStream(WordedStream):
    """Items behind words that ask for them: queries of users, and for all items and events words of the item's text."""

    def __init__(self, data: TrainingSequences, codes: WordedCodes, passes: Passes, stated: Stated) -> None:
        """A stated text asks for the event right after those that it was made after; held-out ones are not learnt."""
        row_of = {user: row for row, user in enumerate(data.users)}
        asked = [
            (int(data.sequences[row_of[user]][after]), text)
            for user, rows in stated.items()
            for after, text in rows
            if after < data.sequences.lengths[row_of[user]]
        ]
        if asked:  # a text without a word that counts asks for nothing
            known = codes.words.read_some([text for _, text in asked], "queries").lengths > 0
            asked = [each for each, is_known in zip(asked, known, strict=True) if is_known]
        of_events = data.sequences.values if not asked else np.empty(0, dtype=np.int64)
        items = np.concatenate([[item for item, _ in asked], np.arange(data.num_items), of_events]).astype(np.int64)
        queries = codes.words.read([text for _, text in asked])
        self._texts, self._num_queries = (
            Ragged.concatenate([queries, codes.of_items.take(items[len(asked) :])]),
            len(asked),
        )
        super().__init__(Ragged(items, np.arange(len(items) + 1)), codes, passes)

    def told(self, members: np.ndarray, generator: np.random.Generator) -> Told:
        """See `WordedStream.told`. Of an item's text any number of words is kept, one at least; queries stay whole."""
        words = self._texts.take(members)
        num_R = np.where(members < self._num_queries, words.lengths, generator.integers(1, words.lengths.clip(1) + 1))
        order = np.lexsort((generator.random(len(words.values)), words.row_of))
        kept = np.zeros(len(order), dtype=bool)
        kept[order] = words.place_of < num_R[words.row_of]
        return Told(words.kept(kept), self._rows.take(members), np.zeros(len(members), dtype=np.int64))


class AskedRecommender(WordedRecommender):
    """Ranks by the codes after a query's words alone."""

    reads_histories = False

    def without_text(self, history: np.ndarray, user: str | None) -> np.ndarray:
        """See `WordedRecommender.without_text`: the words of the latest item."""
        return self._of_items[int(history[-1])] if len(history) else np.empty(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Text2Tracks(WordedSettings):
    """Settings of Text2Tracks; all are ours, most of them those of TIGER."""

    of: VectorKind = "collaborative"
    queries: str = ""
    """A file like `Mender.preferences`, of queries: each asks for the event right after those that it names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("num_words")
        if self.patience:
            raise ConfigError(
                f"patience={self.patience}: next items cannot judge what asks for items, so leave it at 0"
            )

    def identity(self) -> dict[str, Any]:
        """See `SystemSettings.identity`: the content of a file counts, not its place."""
        return super().identity() | ({"queries": file_sha256(self.queries)} if self.queries else {})

    def codes(self, data: TrainingSequences, seed: int) -> WordedCodes:
        """See `CodeSettings.codes`."""
        return self.worded(data, super().codes(data, seed))

    def stages(self, data: TrainingSequences, seed: int) -> Sequence[Stage]:
        """See `SystemSettings.stages`. The last weights are kept: validation events are not asked for in words."""
        return [replace(stage, keeps_last=True) for stage in super().stages(data, seed)]

    def stream(self, data: TrainingSequences, codes: ItemCodes, seed: int) -> Stream:
        """See `CodeSettings.stream`."""
        assert isinstance(codes, WordedCodes)
        stated: Stated = read_preferences(self.queries, data, "queries") if self.queries else {}
        return AskingStream(data, codes, self.passes(seed), stated)

    def code_recommender(self, data: TrainingSequences, codes: ItemCodes, model: Any) -> CodeRecommender:
        """See `CodeSettings.code_recommender`."""
        assert isinstance(codes, WordedCodes)
        return AskedRecommender(self.LABEL or type(self).__name__, data, codes, model, **self.ranking())
