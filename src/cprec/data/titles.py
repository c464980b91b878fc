"""Titles as vectors of words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np
from scipy import sparse

_WORD = re.compile(
    r"[\w\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0e3a\u0e40-\u0eff\u1000-\u109f\u1780-\u17d3\u200c\u200d]+"
)
"""Letters, digits, and what belongs to letters: vowels, marks (Indic, Thai, Arabic) and joiners. `\\w` lacks those."""
ALIKE = 10
"""Items with the titles most like that of a new one, by which what is learnt of items is guessed for it
(docs/experiments.md)."""
_CELLS = 8_000_000
"""Cosines that exist at once at most, where all titles have a word in common: 100 MB."""


def words_in(text: str) -> list[str]:
    """The words of a text in their order: runs of letters, with their marks, and digits, upper and lower case alike."""
    return _WORD.findall(text.casefold())


class TitleWords:
    """The words of some titles and what each weighs, by which these and other titles become vectors.

    >>> words = TitleWords(["red shoe", "red hat", "blue shoe"])
    >>> (words.vectors(["red cap"]) @ words.vectors(["red shoe", "blue hat"]).T).toarray().round(3).tolist()
    [[0.707, 0.0]]
    """

    def __init__(self, titles: Sequence[str]) -> None:
        words = [words_in(title) for title in titles]
        self._number = {word: place for place, word in enumerate(dict.fromkeys(chain.from_iterable(words)))}
        counts = self._counts(words)
        self._weight = np.log(len(words) / np.bincount(counts.indices, minlength=len(self._number)))
        self.of_titles = self._weighted(counts)
        """The vectors of the titles themselves: csr[N, words]."""

    def vectors(self, titles: Sequence[str]) -> sparse.csr_array:
        """Vectors of any titles, in which words that are not known do not count: csr[len(titles), words]."""
        known = self._number
        found = ([word for word in words_in(title) if word in known] for title in titles)
        return self._weighted(self._counts([*found]))

    def of_more(self, titles: Sequence[str], place_N: np.ndarray) -> sparse.csr_array:
        """Vectors of titles of which some are those that the words are of, by their place, -1 for another: csr[N,
        words]."""
        new_N = place_N < 0
        others = self.vectors([title for title, is_new in zip(titles, new_N, strict=True) if is_new])
        row_N = np.where(new_N, self.of_titles.shape[0] + np.cumsum(new_N) - 1, place_N)
        return sparse.csr_array(sparse.vstack([self.of_titles, others], format="csr")[row_N])

    def nearest(self, titles: Sequence[str], num: int) -> sparse.csr_array:
        """Weights of the `num` titles of its own that are most like each of some titles: csr[M, N].

        They are in proportion to the cosines of words and sum to one; titles without a common word have none, so the
        row of a title without a known word is empty. Of equal cosines the first count.
        """
        words, of_words = self.vectors(titles), sparse.csr_array(self.of_titles.T)
        step = max(1, _CELLS // self.of_titles.shape[0])
        columns, weights = [np.empty(0, dtype=np.int64)], [np.empty(0)]
        for start in range(0, len(titles), step):
            cosines = sparse.csr_array(words[start : start + step] @ of_words)
            cosines.eliminate_zeros()  # of words that all titles have
            cosines.sort_indices()
            for first, end in pairwise(cosines.indptr.tolist()):
                best = first + _largest(cosines.data[first:end], num)
                columns.append(cosines.indices[best])
                weights.append(cosines.data[best] / cosines.data[best].sum())
        offsets = np.cumsum([len(each) for each in columns])
        shape = (len(titles), self.of_titles.shape[0])
        return sparse.csr_array((np.concatenate(weights), np.concatenate(columns), offsets), shape)

    def _counts(self, words: Sequence[Sequence[str]]) -> sparse.csr_array:
        """How often each word stands in each title."""
        column = np.array([self._number[word] for title in words for word in title], dtype=np.int64)
        row = np.repeat(np.arange(len(words)), [len(title) for title in words])
        return sparse.csr_array((np.ones(len(row)), (row, column)), (len(words), len(self._number)))

    def _weighted(self, counts: sparse.csr_array) -> sparse.csr_array:
        weighted = sparse.csr_array(counts @ sparse.diags_array(self._weight))
        length = np.sqrt(weighted.multiply(weighted).sum(axis=1))
        return sparse.csr_array(sparse.diags_array(1 / np.where(length > 0, length, 1)) @ weighted)


def _largest(values: np.ndarray, num: int) -> np.ndarray:
    """The places of the `num` largest values, the largest first; of equal values the first."""
    near = np.arange(len(values))
    if len(values) > num:
        near = np.flatnonzero(values >= np.partition(values, -num)[-num])
    return near[np.argsort(-values[near], kind="stable")[:num]]


def title_vectors(titles: Sequence[str]) -> sparse.csr_array:
    """TF-IDF vectors of titles, of length one: csr[N, words]; a title without a word that tells it apart is zero.

    A word of n titles out of N weighs ln(N / n) each time it occurs (Salton and Buckley 1988, "tfc"); words are runs
    of letters, with their marks, and digits, upper and lower case alike.

    >>> vectors = title_vectors(["Red shoe", "red hat", "shoe shoe"])
    >>> (vectors @ vectors.T).toarray().round(3).tolist()
    [[1.0, 0.245, 0.707], [0.245, 1.0, 0.0], [0.707, 0.0, 1.0]]
    >>> title_vectors(["हिन्दी चाय", "می‌خواهم", "ไม้"]).shape  # four words
    (3, 4)
    """
    return TitleWords(titles).of_titles
