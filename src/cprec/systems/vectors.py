"""Dense vectors of item texts, made without a language model or a download, and what is alike by such vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch.nn import functional as F

from cprec.data.links import followers
from cprec.data.ragged import Ragged
from cprec.data.titles import TitleWords, title_vectors
from cprec.errors import Unsuitable

_OVERSAMPLES = 10
_POWER_STEPS = 4
WINDOW = 5
"""Events within which items stand near each other."""
_COMPARED = 1024
"""Vectors whose cosines exist at once."""
DIRECTIONS = 384
_RIDGE = 1e-3


class TitleSpace:
    """Directions of titles' words, in which these and other titles have vectors.

    The TF-IDF matrix of the titles is projected on its `size` strongest singular directions (Deerwester et al. 1990).
    """

    def __init__(self, titles: Sequence[str], size: int, seed: int = 0) -> None:
        self.words = TitleWords(titles)
        left, strengths, self._right = _strongest(self.words.of_titles, size, seed)
        self.vectors = _of_length_one(left * strengths)
        """Of the titles, as `text_vectors` has them: float32[N, size]."""

    def of(self, titles: Sequence[str]) -> np.ndarray:
        """Vectors of any titles, whose words count as far as they stand in those of the space: float32[N, size]."""
        return _of_length_one(self.words.vectors(titles) @ self._right)


def text_vectors(titles: Sequence[str], size: int, seed: int = 0) -> np.ndarray:
    """Latent semantic vectors of titles, of length one: float32[N, size]; see `TitleSpace`.

    Titles with no word that tells them apart are zero, and so are the columns beyond the rank of the matrix.

    >>> vectors = text_vectors(["red shoe", "red boot", "green tea", "black tea"], size=2)
    >>> (vectors @ vectors.T).round(2).tolist()
    [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]
    """
    return TitleSpace(titles, size, seed).vectors


@dataclass(frozen=True)
class Directions:
    """Where the titles of a domain differ most: their principal components, each scaled to nearly equal strength."""

    mean_F: np.ndarray
    axes_FK: np.ndarray

    @classmethod
    def of(cls, states_NF: np.ndarray, most: int = DIRECTIONS) -> Directions:
        """The strongest directions of some states, `most` at most."""
        mean_F = states_NF.mean(0)
        covariance_FF = np.cov(states_NF - mean_F, rowvar=False, bias=True)
        strength_F, axes_FF = np.linalg.eigh(np.atleast_2d(covariance_FF).astype(np.float64))
        strongest = np.argsort(-strength_F)[: min(most, len(states_NF))]
        # The ridge keeps directions of next to no strength, which are noise, from being blown up.
        scale_K = np.sqrt(np.maximum(strength_F[strongest], 0) + _RIDGE * max(strength_F.max(), 1e-12))
        return cls(mean_F.astype(np.float32), (0.3 * axes_FF[:, strongest] / scale_K).astype(np.float32))

    def around(self, states_NF: np.ndarray) -> Directions:
        """The same axes, through the mean of other states: what all titles of a domain share is no difference."""
        return replace(self, mean_F=states_NF.mean(0))

    def project(self, states_NF: np.ndarray) -> np.ndarray:
        """Coordinates along the directions: float32[N, K]."""
        projected: np.ndarray = (states_NF - self.mean_F) @ self.axes_FK
        return projected


def collaborative_vectors(sequences: Ragged, num_items: int, size: int, seed: int = 0) -> np.ndarray:
    """Vectors of items by what they stand near in training sequences, of length one: float32[num_items, size].

    The matrix of positive pointwise mutual information of items within `WINDOW` events, of which each counts 1 over the
    distance, in its strongest singular directions, weighed by the roots of their strengths (Levy and Goldberg 2014,
    section 3.3; Levy, Goldberg and Dagan 2015). Items that stand near no other are zero.

    >>> vectors = collaborative_vectors(Ragged.of([[0, 1, 2], [4, 3, 5], [6]]), 7, size=2)
    >>> (vectors @ vectors.T).round(2).tolist()[0]
    [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    near = sparse.csr_array((num_items, num_items))
    for distance in range(1, WINDOW + 1):
        near = near + followers(sequences.row_of, sequences.values, num_items, distance)
    near = (near + near.T).tocoo()
    row, column = near.coords
    apart = row != column
    row, column, count = row[apart], column[apart], near.data[apart]
    of_item = np.bincount(row, count, num_items)
    information = np.log(count * of_item.sum() / (of_item[row] * of_item[column])).clip(min=0)
    positive = sparse.csr_array((information, (row, column)), (num_items, num_items))
    left, strengths, _ = _strongest(positive, size, seed)
    return _of_length_one(left * np.sqrt(strengths))


def _strongest(matrix: sparse.csr_array, size: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The strongest singular directions of a matrix: left [N, size], strengths [size] and right [M, size].

    They are found by random projection and power steps (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1). What
    lies beyond the rank of the matrix is zero. Each pair's sign is such that the largest left entry is positive.
    """
    rank = min(size, *matrix.shape)
    start = np.random.default_rng(seed).standard_normal((matrix.shape[1], min(rank + _OVERSAMPLES, *matrix.shape)))
    # An orthonormal basis of the strongest left singular directions, sharpened by each power step.
    basis, _ = np.linalg.qr(matrix @ start)
    for _ in range(_POWER_STEPS):
        across, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ across)
    # Singular vectors inside the basis.
    inner, strengths, right = np.linalg.svd((matrix.T @ basis).T, full_matrices=False)
    left = basis @ inner[:, :rank]
    sign = np.sign(left[np.abs(left).argmax(axis=0), np.arange(rank)])
    found = np.zeros((matrix.shape[0], size)), np.zeros(size), np.zeros((matrix.shape[1], size))
    found[0][:, :rank], found[1][:rank] = left * sign, strengths[:rank]
    found[2][:, :rank] = right[:rank].T * sign * (strengths[:rank] > 1e-9)
    return found


def _of_length_one(vectors: np.ndarray) -> np.ndarray:
    """Vectors scaled to length one, float32; those that are next to nothing are zero."""
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
