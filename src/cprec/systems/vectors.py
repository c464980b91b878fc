"""Dense vectors of item texts, made without a language model or a download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cprec.data.titles import title_vectors

_OVERSAMPLES = 10
_POWER_STEPS = 4


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
