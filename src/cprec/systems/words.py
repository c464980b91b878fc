"""Words before codes: a decoder of items' codes that reads a text first, such as a preference or a query.

In what the decoder reads, the number of its tokens + i is word i; see `hybrid.Slots`. A text takes a fixed number of
places, filled up in front, so that what follows stands where it always does; words are never written. Suffixes: V
items, W words, F width of given vectors, R rows, T tokens, Q queries.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from scipy import sparse

from cprec.batch import IGNORE, Batch
from cprec.data.catalogue import Catalogue
from cprec.data.cleaning import spelling
from cprec.data.ragged import Ragged, offsets_of
from cprec.data.titles import words_in
from cprec.errors import ConfigError, DataError, Unsuitable
from cprec.recommender import RankingQuery, Recommender
from cprec.systems.batches import Passes, RowStream
from cprec.systems.codes import PADDING, ItemCodes
from cprec.systems.generator import CodeRecommender
from cprec.systems.signals import TrainingSequences, padded
from cprec.text.stream import NEXT_TOKEN
from cprec.train.loss import PackedLoss


def texts_of(catalogue: Catalogue, domain: str) -> list[str]:
    """The title, brand and categories of each item of a domain, as one text."""
    rows = catalogue.rows_of(domain)
    parts = (catalogue.title[rows], catalogue.brand[rows], catalogue.categories[rows])
    return [" ".join(map(str, each)) for each in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Words:
    """The words of a domain's items, numbered from 0."""

    number: Mapping[str, int]
    weight_W: np.ndarray
    """ln(V / n) of a word that n of V items have."""
    vectors_WF: np.ndarray
    """The mean of the vectors of the items that have a word: float32[W, F]."""
    most: int
    """Words of a text that are read at most."""

    @classmethod
    def of(cls, data: TrainingSequences, vectors_VF: np.ndarray, most: int) -> Words:
        """Of the items of a domain, which have these vectors. Raises Unsuitable where no word tells items apart."""
        texts = [dict.fromkeys(words_in(text)) for text in texts_of(data.catalogue, data.domain)]
        number = {word: place for place, word in enumerate(dict.fromkeys(word for text in texts for word in text))}
        column = np.array([number[word] for text in texts for word in text], dtype=np.int64)
        row = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        has_WV = sparse.csr_array((np.ones(len(row)), (column, row)), (len(number), len(texts)))
        count_W = np.bincount(column, minlength=len(number))
        weight_W = np.log(len(texts) / count_W)
        if not weight_W.any():
            raise Unsuitable(
                f"no word in titles, brands and categories of domain {data.domain!r} tells its items apart, so no text "
                "can say which are meant: take a system that reads no words"
            )
        vectors_WF = (has_WV @ vectors_VF) / count_W[:, None]
        return cls(number, weight_W, vectors_WF.astype(np.float32), most)

    def read(self, texts: Sequence[str]) -> Ragged:
        """Of each text the words that weigh most, each once, in their order; of equals the first. Those that all items
        or none have do not count.

        >>> words = Words({"a": 0, "red": 1, "shoe": 2}, np.array([0.0, 2.0, 1.0]), np.empty((3, 0)), most=1)
        >>> words.read(["A red shoe", "a shoe, a new one"]).values.tolist()
        [1, 2]
        """
        rows = []
        for text in texts:
            known = np.array([self.number[word] for word in dict.fromkeys(words_in(text)) if word in self.number], int)
            known = known[self.weight_W[known] > 0]
            rows.append(known[np.sort(np.argsort(-self.weight_W[known], kind="stable")[: self.most])])
        return Ragged.of(rows)

    def read_some(self, texts: Sequence[str], setting: str) -> Ragged:
        """As `read`. Raises ConfigError, which names the setting that gave the texts, where none has a word that
        counts."""
        found = self.read(texts)
        if not len(found.values):
            raise ConfigError(
                f"{setting}: no text there has a word of an item's title, brand or categories that tells items apart: "
                "give texts in the words of the items"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class WordedCodes(ItemCodes):
    """Codes of items, and the words of their texts."""

    words: Words
    of_items: Ragged
    """The words of each item's text, as `Words.read` gives them."""

    @classmethod
    def worded(cls, codes: ItemCodes, data: TrainingSequences, vectors_VF: np.ndarray, most: int) -> WordedCodes:
        """From the codes of items and the vectors of which words have the means. Raises what `Words.of` does."""
        words = Words.of(data, vectors_VF, most)
        return cls(**vars(codes), words=words, of_items=words.read(texts_of(data.catalogue, data.domain)))

    def behind(self, words: Ragged, prompts: Ragged) -> Ragged:
        """See `behind_words`."""
        return behind_words(words, prompts, self.vocabulary_size, self.words.most)


def behind_words(words: Ragged, prompts: Ragged, num_tokens: int, most: int) -> Ragged:
    """Rows of tokens behind `most` places for words, of which those that are too many are filled up with PADDING.

    >>> rows = behind_words(Ragged.of([[5], []]), Ragged.of([[2, 9], [2]]), num_tokens=100, most=2)
    >>> [rows[row].tolist() for row in range(2)]
    [[0, 105, 2, 9], [0, 0, 2]]
    """
    lengths = most + prompts.lengths
    offsets = offsets_of(lengths)
    tokens = np.full(offsets[-1], PADDING, dtype=np.int64)
    tokens[(offsets[:-1] + most - words.lengths)[words.row_of] + words.place_of] = num_tokens + words.values
    tokens[(offsets[:-1] + most)[prompts.row_of] + prompts.place_of] = prompts.values
    return Ragged(tokens, offsets)


class Told(NamedTuple):
    """Rows to learn from."""

    words: Ragged
    items: Ragged
    first_R: np.ndarray
    """The place of the first item of each row that is learnt; so are all after it."""


class WordedStream(RowStream):
    """Rows of words and codes, for `cprec.train.loss.PackedLoss`; a subclass says which."""

    def __init__(self, rows: Ragged, codes: WordedCodes, passes: Passes) -> None:
        """`rows` are those of item numbers that a pass reads."""
        self._rows, self._codes = rows, codes
        super().__init__(codes.words.most + codes.prompts(rows).lengths - 1, [NEXT_TOKEN], passes)

    @abstractmethod
    def told(self, members: np.ndarray, generator: np.random.Generator) -> Told:
        """The rows of these numbers, with what is drawn anew for each step."""

    def batch(self, step: int) -> Batch:
        members = self.members(step)
        words, items, first_R = self.told(members, np.random.default_rng([self._seed, step, 6]))
        tokens, lengths = padded(self._codes.behind(words, self._codes.prompts(items)), PADDING)
        # The state before an item's first token is that of BEGIN or of the item before it.
        start_E = offsets_of(self._codes.sequences.lengths[items.values])
        start_R = self._codes.words.most + start_E[items.offsets[:-1] + first_R] - start_E[items.offsets[:-1]]
        place = np.tile(np.arange(tokens.shape[1] - 1), (len(members), 1))
        is_learnt = (place >= start_R[:, None]) & (place + 1 < lengths[:, None])
        return self._batch(
            members,
            int(is_learnt.sum()),
            int((lengths - 1).sum()),
            input_ids=np.ascontiguousarray(tokens[:, :-1]),
            position_ids=place,
            targets=np.where(is_learnt, tokens[:, 1:], IGNORE),
        )


class WordedLoss(PackedLoss):
    """The loss of a decoder that reads words, whose weights are stored by themselves."""

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """See `Trainable.save`."""
        save_file(dict(weights), folder / "model.safetensors")


class WordedRecommender(CodeRecommender):
    """Ranks by the probability of codes after words and perhaps a history. The words are those of the query's text;
    where it has none, a subclass says which."""

    reads_histories: ClassVar[bool] = True
    """Whether it reads a history behind the words."""

    def __init__(self, name: str, data: TrainingSequences, codes: WordedCodes, model: Any, **ranking: Any) -> None:
        """`ranking`: see `SequenceRecommender`."""
        self._worded, self._of_items = codes, codes.of_items
        super().__init__(name, data, codes, model, **ranking)

    def with_items(self, catalogue: Catalogue) -> CodeRecommender:
        """See `CodeRecommender.with_items`. Of the texts of new items, words count that the others have."""
        out = super().with_items(catalogue)
        assert isinstance(out, WordedRecommender)
        out._of_items = self._worded.words.read(texts_of(catalogue, self.domain))
        return out

    @abstractmethod
    def without_text(self, history: np.ndarray, user: str | None) -> np.ndarray:
        """The words for a query without a text, with this history of item numbers: int64."""

    def read_text(self, text: str) -> np.ndarray:
        """The words of a query's text, as it is written and in its plain spelling: int64. Raises DataError where it has
        none that was learnt."""
        found = self._worded.words.read([f"{text} {spelling(text)}"])[0]
        if not len(found):
            raise DataError(
                f"query={text!r} has no word that {self.name} has learnt and that tells the items of {self.domain!r} "
                "apart: give words of titles, brands or categories, or leave it out"
            )
        return found

    def _prompts(self, queries: Sequence[RankingQuery]) -> Ragged:
        """Raises DataError as `read_text` does."""
        histories = self._histories(queries)
        words = [
            self.read_text(query.text) if query.text else self.without_text(histories[number], query.user)
            for number, query in enumerate(queries)
        ]
        read = histories if self.reads_histories else Ragged.of([[] for _ in queries])
        return self._worded.behind(Ragged.of(words), self._codes.prompts(read))


def steering(
    recommender: Recommender, catalogue: Catalogue, queries: Sequence[RankingQuery], text: str, k: int
) -> np.ndarray:
    """How far a text moves lists towards it: of the first `k` items after each query of one domain, the share that has
    a word of the text, as the query is, and with the text in its place: float64[Q, 2].

    For any recommender that reads the text of queries. Raises ConfigError for a text of which no item has a word.
    """
    (domain,) = {query.domain for query in queries}
    named = set(catalogue.item_id[catalogue.rows_of(domain)[catalogue.words_of(domain).having(text)]].tolist())
    if not named:
        raise ConfigError(f"text={text!r}: no item of {domain!r} has any of its words, so no list can move towards it")
    asked = (queries, [replace(query, text=text) for query in queries])
    lists = [[each.item_ids[:k] for each in recommender.rank(both, k)] for both in asked]
    return np.array([[sum(item in named for item in ids) / k for ids in both] for both in lists]).T
