"""Dense vectors of item texts, made without a language model or a download, and what is alike by such vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from cprec.data.ragged import Ragged
from cprec.data.titles import title_vectors
from cprec.errors import Unsuitable

_OVERSAMPLES = 10
_POWER_STEPS = 4
_COMPARED = 1024
"""Vectors whose cosines exist at once."""


def text_vectors(titles: Sequence[str], size: int, seed: int = 0) -> np.ndarray:
    """Latent semantic vectors of titles, of length one: float32[N, size].

    The TF-IDF matrix of the titles is projected on its `size` strongest singular directions (Deerwester et al. 1990),
    found by random projection and power steps (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1). Titles with
    no word that tells them apart are zero, and so are the columns beyond the rank of the matrix.

    >>> vectors = text_vectors(["red shoe", "red boot", "green tea", "black tea"], size=2)
    >>> (vectors @ vectors.T).round(2).tolist()
    [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    """
    words = title_vectors(titles)
    rank = min(size, *words.shape)
    start = np.random.default_rng(seed).standard_normal((words.shape[1], min(rank + _OVERSAMPLES, *words.shape)))
    # An orthonormal basis of the strongest left singular directions, sharpened by each power step.
    basis, _ = np.linalg.qr(words @ start)
    for _ in range(_POWER_STEPS):
        across, _ = np.linalg.qr(words.T @ basis)
        basis, _ = np.linalg.qr(words @ across)
    # Singular vectors inside the basis; each vector's sign is such that its largest entry is positive.
    inner, strengths, _ = np.linalg.svd((words.T @ basis).T, full_matrices=False)
    left = basis @ inner[:, :rank]
    left *= np.sign(left[np.abs(left).argmax(axis=0), np.arange(rank)])
    vectors = np.zeros((len(titles), size))
    vectors[:, :rank] = left * strengths[:rank]
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = np.where(lengths > 1e-9, vectors / np.maximum(lengths, 1e-9), 0).astype(np.float32)
    return scaled


def share_words(titles: Sequence[str]) -> bool:
    """Whether any word stands in two titles and not in all, so that some titles are more alike than others.

    >>> share_words(["red shoe", "red hat", "cap"]), share_words(["item 1", "item 2", "item 3"])
    (True, False)
    """
    words = title_vectors(titles)
    return bool(np.bincount(words.indices[words.data > 0]).max(initial=0) > 1)


def most_similar(
    vectors_of: Callable[[np.ndarray], np.ndarray],
    group_N: np.ndarray,
    among_M: np.ndarray,
    num: int,
    asked_Q: np.ndarray | None = None,
) -> np.ndarray:
    """For each of N vectors, or of those asked for, the numbers of those with the greatest cosines, the greatest first:
    int64[N or Q, num].

    `vectors_of` gives vectors by number, float32[..., F]; those of `among_M` are looked at that are of another group. A
    zero vector has the cosine 0 with all; ties stand in any order. Raises Unsuitable where some group has fewer than
    `num` vectors beside it.

    >>> points = np.array([[1, 0], [2, 1], [1, 2], [0, 1]], dtype=np.float32)
    >>> most_similar(points.__getitem__, np.arange(4), np.arange(4), num=1).ravel().tolist()
    [1, 0, 3, 2]
    """
    others = len(among_M) - np.bincount(group_N[among_M]).max(initial=0)
    if others < num:
        raise Unsuitable(f"{num} neighbours are asked for, and some items or users have only {others}: ask for fewer")
    among_MF = F.normalize(torch.from_numpy(vectors_of(among_M)), dim=1)
    asked_Q = np.arange(len(group_N)) if asked_Q is None else asked_Q
    group_M, found = torch.from_numpy(group_N[among_M]), np.empty((len(asked_Q), num), dtype=np.int64)
    for start in range(0, len(asked_Q), _COMPARED):
        rows = asked_Q[start : start + _COMPARED]
        cosines = F.normalize(torch.from_numpy(vectors_of(rows)), dim=1) @ among_MF.T
        cosines.masked_fill_(torch.from_numpy(group_N[rows])[:, None] == group_M, -torch.inf)
        found[start : start + _COMPARED] = among_M[cosines.topk(num, dim=1).indices.numpy()]
    return found


def mean_vectors(
    histories_of: Callable[[np.ndarray], Ragged], vectors_VF: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """What gives the means of the vectors of histories' items, by the histories' numbers; no history is empty."""

    def means(rows: np.ndarray) -> np.ndarray:
        histories = histories_of(rows)
        sums: np.ndarray = np.add.reduceat(vectors_VF[histories.values], histories.offsets[:-1])
        return sums / histories.lengths[:, None].astype(np.float32)

    return means
