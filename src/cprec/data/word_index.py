"""Items by the words of a query: how much likelier each word of it is for an item than for the items of a domain.

Suffixes: N items of the domain, W words of the query.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, count
from typing import Any

import numpy as np
from scipy import sparse

from cprec.data.cleaning import spelling
from cprec.data.titles import words_in
from cprec.errors import DataError

QUERY = "query"
"""The name of the part of a score that the words of a query make."""
MAX_QUERY = 2_000
"""Characters that a query may have."""
OWN_WORDS = 0.9
"""The share of an item's own words in what it is asked for by; the rest are words of the domain. Zhai and Lafferty find
this share best for short queries."""
MOST_SHOWN = 3
"""Words that a message finds near ones of."""


class WordIndex:
    """What the words of a query say of items, each of which is the words of a text.

    By Bayes' rule log P(item | history, query) = log P(item | history) + log P(query | item) + a constant, if the query
    is about the item that is wanted and the history tells nothing more of it. P(query | item) is that of a language
    model of single words (Ponte and Croft 1998), smoothed as Jelinek and Mercer do (Zhai and Lafferty 2004):

        P(word | item) = OWN_WORDS * count in the text / length of the text + (1 - OWN_WORDS) * share in all texts

    Without what all items have in common, a word adds `log(P(word | item) / ((1 - OWN_WORDS) * share in all texts))`:
    nothing where the text lacks it, and more the rarer it is. A word counts once, however often the query has it.

    >>> index = WordIndex(["red shoe", "red hat", "a hat in blue"])
    >>> index.effects("A RED Hat")[0], index.effects("A RED Hat")[1].round(2).tolist()
    (['a', 'red', 'hat'], [[0.0, 0.0, 2.94], [2.94, 2.94, 0.0], [0.0, 2.94, 2.3]])
    """

    def __init__(self, texts: Sequence[str]) -> None:
        numbers: dict[str, int] = defaultdict(count().__next__)
        of_texts = [[numbers[word] for word in words_in(text)] for text in texts]
        self._number = dict(numbers)
        length_N = np.array([len(words) for words in of_texts], dtype=np.int64)
        column = np.fromiter(chain.from_iterable(of_texts), np.int64, length_N.sum())
        row = np.repeat(np.arange(len(texts)), length_N)
        counts = sparse.csc_array((np.ones(len(row)), (row, column)), (len(texts), len(numbers)))
        word = np.repeat(np.arange(counts.shape[1]), np.diff(counts.indptr))
        own = counts.data / length_N[counts.indices]
        of_all = (np.bincount(column, minlength=counts.shape[1]) / max(len(column), 1))[word]
        effect = np.log1p(OWN_WORDS * own / ((1 - OWN_WORDS) * of_all))
        self._effects = sparse.csc_array((effect, counts.indices, counts.indptr), counts.shape)

    def effects(self, query: str) -> tuple[list[str], np.ndarray]:
        """The words of a query that some item has, each once, and what each adds to the log-score of the items: above 0
        where an item has the word, else 0: float64[W, N]."""
        words = [word for word in _words_of(query) if word in self._number]
        effects_WN: np.ndarray = self._effects[:, [self._number[word] for word in words]].T.toarray()
        return words, effects_WN

    def matched(self, place: int, query: str) -> dict[str, float]:
        """What each word of a query that an item has, given by its place, adds to its log-score, the largest first."""
        words, effects_WN = self.effects(query)
        found = zip(words, effects_WN[:, place].tolist(), strict=True)
        return dict(sorted((pair for pair in found if pair[1]), key=lambda pair: -pair[1]))

    def having(self, query: str) -> np.ndarray:
        """The places of the items that have a word of the query, ascending: int64."""
        known = [self._number[word] for word in _words_of(query) if word in self._number]
        return np.unique(self._effects[:, known].indices).astype(np.int64)

    def no_match(self, query: str, where: str) -> DataError:
        """The error for a query of which no item that may be returned has a word; `where` names what items are of."""
        if num_having := len(self.having(query)):
            return DataError(
                f"query={_short(query)!r}: all items of {where} that have one of its words ({num_having:,}) are in the "
                "history, withdrawn or filtered out: let them in, or use other words"
            )
        near = dict.fromkeys(word for unknown in _words_of(query)[:MOST_SHOWN] for word in self._near(unknown))
        advice = f"near are {', '.join(near)}" if near else "use other words"
        return DataError(
            f"query={_short(query)!r}: no item of {where} has any of its words in title, brand or categories; {advice}"
        )

    def _near(self, unknown: str) -> list[str]:
        alike = [word for word in self._number if word[:2] == unknown[:2]][:2_000]
        return difflib.get_close_matches(unknown, alike, n=3, cutoff=0.6)


def check_query(query: Any) -> str:
    """The query, if it can be one. Raises DataError for what is no text, has no word, or is longer than MAX_QUERY."""
    if not isinstance(query, str):
        raise DataError(f"query={query!r} is a {type(query).__name__}: give words as one text")
    if len(query) > MAX_QUERY:
        raise DataError(f"query has {len(query):,} characters: give {MAX_QUERY:,} at most")
    if not _words_of(query):
        raise DataError(f"query={query!r} has no word: give words of titles, brands or categories, or leave it out")
    return query


def _words_of(query: str) -> list[str]:
    return list(dict.fromkeys(words_in(spelling(query))))


def _short(query: str) -> str:
    return query if len(query) <= 80 else query[:80] + "…"
