"""Titles as vectors of words."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy import sparse

_WORD = re.compile(
    r"[\w\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0e3a\u0e40-\u0eff\u1000-\u109f\u1780-\u17d3\u200c\u200d]+"
)
"""Letters, digits, and what belongs to letters: vowels, marks (Indic, Thai, Arabic) and joiners. `\\w` lacks those."""


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
    words = [_WORD.findall(title.casefold()) for title in titles]
    number = {word: place for place, word in enumerate(dict.fromkeys(word for title in words for word in title))}
    column = np.array([number[word] for title in words for word in title], dtype=np.int64)
    row = np.repeat(np.arange(len(words)), [len(title) for title in words])
    counts = sparse.csr_array((np.ones(len(row)), (row, column)), (len(words), len(number)))
    titles_with = np.bincount(counts.indices, minlength=len(number))
    weighted = sparse.csr_array(counts @ sparse.diags_array(np.log(len(words) / titles_with)))
    length = np.sqrt(weighted.multiply(weighted).sum(axis=1))
    return sparse.csr_array(sparse.diags_array(1 / np.where(length > 0, length, 1)) @ weighted)
