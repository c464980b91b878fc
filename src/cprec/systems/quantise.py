"""Codes of vectors: a few whole numbers for each, which near vectors share.

Suffixes: N vectors, D width, K codes of a level, L levels, C width of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cprec.systems.clusters import k_means


def residual_codes(vectors_ND: np.ndarray, num_levels: int, num_codes: int, seed: int) -> np.ndarray:
    """Codes of vectors, from coarse to fine: int64[N, L].

    The first code is a vector's cluster; each further code is the cluster of what the centres so far leave of it.

    >>> residual_codes(np.array([[0.0], [1], [10], [11]]), num_levels=2, num_codes=2, seed=0).tolist()
    [[0, 1], [0, 0], [1, 1], [1, 0]]
    """
    generator = np.random.default_rng(seed)
    residual_ND, levels = torch.from_numpy(vectors_ND.astype(np.float64)), []
    for _ in range(num_levels):
        # Centres begin at points drawn without replacement; of fewer points than codes each is a centre.
        drawn_K = generator.choice(len(residual_ND), min(num_codes, len(residual_ND)), replace=False)
        centre_KD, code_N = k_means(residual_ND, residual_ND[drawn_K], num_rounds=20, moves_empty=True)
        residual_ND = residual_ND - centre_KD[code_N]
        levels.append(code_N.numpy())
    return np.stack(levels, axis=1)


def product_codes(vectors_ND: np.ndarray, num_levels: int, num_codes: int, seed: int) -> np.ndarray:
    """Codes of slices of vectors, which have no order: int64[N, L].

    A vector is cut into `num_levels` slices of equal width, the first ones one wider where that does not go up, and
    each code is the cluster of a slice (product quantisation, Jegou et al. 2011).

    >>> product_codes(np.array([[0.0, 5], [9, 5], [0, 7], [9, 7]]), num_levels=2, num_codes=2, seed=0).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    generator = np.random.default_rng(seed)
    levels = []
    for slice_NC in np.array_split(vectors_ND.astype(np.float64), num_levels, axis=1):
        drawn_K = generator.choice(len(slice_NC), min(num_codes, len(slice_NC)), replace=False)
        points_NC = torch.from_numpy(slice_NC)
        _, code_N = k_means(points_NC, points_NC[drawn_K], num_rounds=20, moves_empty=True)
        levels.append(code_N.numpy())
    return np.stack(levels, axis=1)


def scalar_codes(vectors_ND: np.ndarray, num_slices: int, steps: Sequence[int]) -> np.ndarray:
    """One code of each slice of vectors, below the product of `steps`: int64[N, L].

    Finite scalar quantisation (Mentzer et al. 2024) without training: the first principal directions of a slice, as
    many as there are `steps`, are each cut into so many steps that equally many vectors lie in. The first direction
    counts most. Vectors that are equal in a direction lie in one step.

    >>> scalar_codes(np.array([[0.0], [1], [2], [3]]), num_slices=1, steps=[2]).tolist()
    [[0], [0], [1], [1]]
    """
    levels = []
    for slice_NC in np.array_split(vectors_ND.astype(np.float64), num_slices, axis=1):
        centred_NC = slice_NC - slice_NC.mean(0)
        directions = np.linalg.svd(centred_NC, full_matrices=False)[2][: len(steps)]
        # The sign of a direction is free: its largest entry is positive.
        largest = np.abs(directions).argmax(1)
        directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
        code_N = np.zeros(len(slice_NC), dtype=np.int64)
        for step, along_N in zip(steps, (centred_NC @ directions.T).T, strict=False):
            bounds = np.quantile(along_N, np.arange(1, step) / step)
            code_N = code_N * step + np.searchsorted(bounds, along_N, side="right")
        levels.append(code_N)
    return np.stack(levels, axis=1)
