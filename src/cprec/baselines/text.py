"""Titles as vectors of words, and the baseline that knows nothing else: what reads like the last events."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from scipy import sparse

from cprec.baselines.domain import DomainRecommender, profiles
from cprec.baselines.search import Choice, Real
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError

_WORD = re.compile(r"\w+")


def title_vectors(titles: Sequence[str]) -> sparse.csr_array:
    """TF-IDF vectors of titles, of length one: csr[N, words]; a title without a word that tells it apart is zero.

    A word of n titles out of N weighs ln(N / n) each time it occurs (Salton and Buckley 1988, "tfc"); words are runs
    of letters and digits, upper and lower case alike.

    >>> vectors = title_vectors(["Red shoe", "red hat", "shoe shoe"])
    >>> (vectors @ vectors.T).toarray().round(3).tolist()
    [[1.0, 0.245, 0.707], [0.245, 1.0, 0.0], [0.707, 0.0, 1.0]]
    """
    words = [_WORD.findall(title.casefold()) for title in titles]
    number = {word: place for place, word in enumerate(dict.fromkeys(word for title in words for word in title))}
    column = np.array([number[word] for title in words for word in title], dtype=np.int64)
    row = np.repeat(np.arange(len(words)), [len(title) for title in words])
    counts = sparse.csr_array((np.ones(len(row)), (row, column)), (len(words), len(number)))
    titles_with = np.bincount(counts.indices, minlength=len(number))
    weighted = sparse.csr_array(counts @ sparse.diags_array(np.log(len(words) / titles_with)))
    length = np.sqrt(weighted.multiply(weighted).sum(axis=1))
    return sparse.csr_array(sparse.diags_array(1 / np.where(length > 0, length, 1)) @ weighted)


def domain_titles(split: Split, domain: str) -> sparse.csr_array:
    """`title_vectors` of a domain's catalogue, which needs no events: csr[N, words]."""
    return title_vectors([str(title) for title in split.catalogue.title[split.catalogue.rows_of(domain)]])


@dataclass(frozen=True, kw_only=True)
class TitleSimilarity:
    """Items whose titles read like those of the last events; learns nothing, so that it can rank new items.

        score(j) = sum over items i of the history of decay ** age(i) * cosine(i, j), over TF-IDF of title words

    The frequencies of words are those of the domain's catalogue.
    """

    decay: float = 0.7
    """Weight of an event of the history relative to the one after it; 1 weighs all alike."""

    SEARCH: ClassVar[Mapping[str, Choice]] = {"decay": Real(low=0.1, high=1)}

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay={self.decay} must lie above 0 and at most at 1")

    def make(
        self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None
    ) -> TitleSimilarityRecommender:
        """See `Settings.make`; nothing is random and nothing kept."""
        return TitleSimilarityRecommender(split, domain, self)


class TitleSimilarityRecommender(DomainRecommender):
    """Ranks a domain's items by their titles' likeness to the history's; see `TitleSimilarity`.

    Items that share no word with the history are not returned from the full catalogue, and stand last among
    candidates.
    """

    name = "titles"
    floor = 0.0

    def __init__(self, split: Split, domain: str, settings: TitleSimilarity) -> None:
        super().__init__(split, domain)
        self._decay, self._titles = settings.decay, domain_titles(split, domain)

    def history_scores(self, history: Ragged) -> np.ndarray:
        """See `DomainRecommender.history_scores`."""
        return title_scores(profiles(history, self._titles.shape[0], self._decay), self._titles)


def title_scores(profiles_QN: sparse.csr_array, titles: sparse.csr_array) -> np.ndarray:
    """Cosines of titles summed over weighted histories: float64[Q, N]."""
    scores: np.ndarray = ((profiles_QN @ titles) @ titles.T).toarray()
    return scores
