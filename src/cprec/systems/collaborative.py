"""Vectors of items by the users who had them."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import svds

from cprec.data.ragged import Ragged


def collaborative_vectors(sequences: Ragged, num_items: int, size: int, seed: int = 0) -> np.ndarray:
    """Vectors of length one, alike for items that the same users had: float32[num_items, size].

    They are the strongest singular directions of the matrix of events by item and user, each event over the roots of
    the numbers of events of both. Items that nobody had are zero, and so are the columns beyond the rank of the matrix.

    >>> vectors = collaborative_vectors(Ragged.of([[0, 1], [0, 1], [2, 3], [2, 3]]), num_items=5, size=2)
    >>> (vectors @ vectors.T > 0.99).astype(int).tolist()
    [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    """
    user, item = sequences.row_of, sequences.values
    weight = 1 / np.sqrt(np.bincount(item, minlength=num_items)[item] * sequences.lengths[user])
    events = sparse.csr_array((weight, (item, user)), (num_items, len(sequences)))
    vectors, rank = np.zeros((num_items, size)), min(size, min(events.shape) - 1)
    if rank:
        start = np.random.default_rng(seed).standard_normal(min(events.shape))
        left, strengths, _ = svds(events, k=rank, v0=start)
        vectors[:, :rank] = (left * strengths)[:, ::-1]
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = np.where(lengths > 1e-9, vectors / np.maximum(lengths, 1e-9), 0).astype(np.float32)
    return scaled
