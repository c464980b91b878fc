"""Codes of vectors: a few whole numbers for each, which near vectors share. A quantiser is fitted once, to the vectors
of training, and codes any others by the same centres.

Suffixes: N vectors, D width, K codes of a level, L levels, C width of what a level codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cprec.errors import ConfigError
from cprec.systems.clusters import k_means, nearest

ROUNDS = 20
"""Rounds of k-means."""
STEPS_OF_A_DIRECTION = 5
"""About as many a scalar quantiser makes (Mentzer et al. 2024 advise five or more)."""


class Quantiser(ABC):
    """Centres of each level, the nearest of which is a vector's code."""

    centres: Sequence[np.ndarray]
    """float64[K, C] of each level."""

    @abstractmethod
    def points(self, vectors_ND: np.ndarray, code_NL: np.ndarray) -> np.ndarray:
        """What the level after those of `code_NL` codes of each vector: float64[N, C]."""

    def encode(self, vectors_ND: np.ndarray) -> np.ndarray:
        """Codes of vectors, which need not be those that it was fitted to: int64[N, L]."""
        code_NL = np.empty((len(vectors_ND), 0), dtype=np.int64)
        for centre_KC in self.centres:
            points_NC = torch.from_numpy(self.points(vectors_ND, code_NL))
            code_NL = np.column_stack([code_NL, nearest(points_NC, torch.from_numpy(centre_KC)).numpy()])
        return code_NL

    def last_distances(self, vectors_ND: np.ndarray, code_NL: np.ndarray) -> np.ndarray:
        """Squared distances from all centres of the last level, after the other codes: float64[N, K]."""
        points_NC, centre_KC = self.points(vectors_ND, code_NL[:, :-1]), self.centres[-1]
        squares_NK = (points_NC**2).sum(1)[:, None] - 2 * points_NC @ centre_KC.T + (centre_KC**2).sum(1)
        return np.maximum(squares_NK, 0)


# ---- from coarse to fine ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Residual(Quantiser):
    """The first code is a vector's cluster; each further code is the cluster of what the centres so far leave of it."""

    centres: tuple[np.ndarray, ...]

    def points(self, vectors_ND: np.ndarray, code_NL: np.ndarray) -> np.ndarray:
        left_NC = self.latent(vectors_ND.astype(np.float64))
        for centre_KC, code_N in zip(self.centres, code_NL.T, strict=False):
            left_NC = left_NC - centre_KC[code_N]
        return left_NC

    def latent(self, vectors_ND: np.ndarray) -> np.ndarray:
        """What the first level codes: the vectors themselves."""
        return vectors_ND

    @classmethod
    def fit(cls, vectors_ND: np.ndarray, num_levels: int, num_codes: int, seed: int) -> Residual:
        """By k-means, level by level."""
        generator = np.random.default_rng(seed)
        residual_ND, centres = torch.from_numpy(vectors_ND), []
        for _ in range(num_levels):
            centre_KD, code_N = clusters_of(residual_ND, num_codes, generator)
            residual_ND = residual_ND - centre_KD[code_N]
            centres.append(centre_KD.numpy())
        return cls(tuple(centres))


# ---- side by side ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product(Quantiser):
    """Each code is the cluster of a slice of the vector, so that codes have no order (product quantisation, Jegou et
    al. 2011).

    Slices are of principal directions, the strongest first, so that it does not matter how vectors are turned.
    """

    centres: tuple[np.ndarray, ...]
    mean_D: np.ndarray
    directions: tuple[np.ndarray, ...]
    """float64[D, C] of each slice."""

    def points(self, vectors_ND: np.ndarray, code_NL: np.ndarray) -> np.ndarray:
        points_NC: np.ndarray = (vectors_ND - self.mean_D) @ self.directions[code_NL.shape[1]]
        return points_NC

    @classmethod
    def fit(cls, vectors_ND: np.ndarray, num_levels: int, num_codes: int, seed: int) -> Product:
        """By k-means of each slice."""
        generator, mean_D = np.random.default_rng(seed), vectors_ND.mean(0)
        directions = np.array_split(_principal(vectors_ND, num_levels)[0], num_levels, axis=1)
        points = [torch.from_numpy((vectors_ND - mean_D) @ direction_DC) for direction_DC in directions]
        centres = [clusters_of(points_NC, num_codes, generator)[0].numpy() for points_NC in points]
        return cls(tuple(centres), mean_D, tuple(directions))


@dataclass(frozen=True)
class Scalar(Product):
    """Finite scalar quantisation (Mentzer et al. 2024) without training: a few directions, dealt out to the slices in
    turn, are cut into steps that equally many vectors lie in; a code says the step in each, the first counting most.

    A point says where in its steps a vector lies, and centres are the middles of steps. Theirs are steps of equal width
    of what an autoencoder gives.

    >>> vectors = np.array([[0.0], [1], [2], [3]])
    >>> Scalar.fit(vectors, num_levels=1, num_codes=2, seed=0).encode(vectors).tolist()
    [[0], [0], [1], [1]]
    """

    bounds: tuple[tuple[np.ndarray, ...], ...]
    """Where the steps of each direction of each slice begin, and the last one ends."""

    def points(self, vectors_ND: np.ndarray, code_NL: np.ndarray) -> np.ndarray:
        # Rounded, so that equal vectors lie on one side of a bound wherever they stand among others.
        along_NC = super().points(vectors_ND, code_NL).round(6)
        return np.stack([_place(*each) for each in zip(along_NC.T, self.bounds[code_NL.shape[1]], strict=True)], 1)

    @classmethod
    def fit(cls, vectors_ND: np.ndarray, num_levels: int, num_codes: int, seed: int) -> Scalar:
        """In steps as equal as can be; nothing is random. See `of`."""
        return cls.of(vectors_ND, num_levels, _steps(num_codes))

    @classmethod
    def of(cls, vectors_ND: np.ndarray, num_levels: int, each: Sequence[int]) -> Scalar:
        """By quantiles, in `each` so many steps of a slice's directions. One with fewer directions takes the first."""
        mean_D, directions, bounds, centres = vectors_ND.mean(0), [], [], []
        direction_DD, deviation_D = _principal(vectors_ND, num_levels)
        for level in range(num_levels):
            scaled_DC = (direction_DD / deviation_D)[:, level::num_levels]
            steps = each[: scaled_DC.shape[1]]
            directions.append(scaled_DC[:, : len(steps)])
            along_NC = ((vectors_ND - mean_D) @ directions[-1]).round(6)
            cuts = zip(steps, along_NC.T, strict=True)
            bounds.append(tuple(np.quantile(along_N, np.arange(num + 1) / num) for num, along_N in cuts))
            middles = np.meshgrid(*(np.arange(num) + 0.5 for num in steps), indexing="ij")
            centres.append(np.stack(middles, -1).reshape(-1, len(steps)))
        return cls(tuple(centres), mean_D, tuple(directions), tuple(bounds))


@dataclass(frozen=True)
class SideBySide(Quantiser):
    """Codes of several kinds of vectors, one kind's after the other's; the vectors stand side by side as well."""

    parts: tuple[Quantiser, ...]
    widths: tuple[int, ...]
    """Of the vectors of each."""

    @property
    def centres(self) -> Sequence[np.ndarray]:  # type: ignore[override]
        return [centre_KC for part in self.parts for centre_KC in part.centres]

    def points(self, vectors_ND: np.ndarray, code_NL: np.ndarray) -> np.ndarray:
        level, start = code_NL.shape[1], 0
        for part, width in zip(self.parts, self.widths, strict=True):
            if level < len(part.centres):
                break
            level, start = level - len(part.centres), start + width
        return part.points(vectors_ND[:, start : start + width], code_NL[:, code_NL.shape[1] - level :])


# ---- by one call -----------------------------------------------------------------------------------------------------


def residual_codes(vectors_ND: np.ndarray, num_levels: int, num_codes: int, seed: int) -> np.ndarray:
    """Codes of vectors, from coarse to fine: int64[N, L]; see `Residual`.

    >>> residual_codes(np.array([[0.0], [1], [10], [11]]), num_levels=2, num_codes=2, seed=0).tolist()
    [[0, 1], [0, 0], [1, 1], [1, 0]]
    """
    return Residual.fit(vectors_ND.astype(np.float64), num_levels, num_codes, seed).encode(vectors_ND)


def product_codes(vectors_ND: np.ndarray, num_levels: int, num_codes: int, seed: int) -> np.ndarray:
    """Codes of slices of vectors, which have no order: int64[N, L]; see `Product`.

    >>> product_codes(np.array([[0.0, 5], [9, 5], [0, 7], [9, 7]]), num_levels=2, num_codes=2, seed=0).tolist()
    [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    return Product.fit(vectors_ND.astype(np.float64), num_levels, num_codes, seed).encode(vectors_ND)


def clusters_of(
    points_NC: torch.Tensor, num_codes: int, generator: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres of points by k-means, and the cluster of each: [K, C], int64[N].

    Centres begin at points drawn without replacement; of fewer points than codes each is a centre.
    """
    drawn_K = generator.choice(len(points_NC), min(num_codes, len(points_NC)), replace=False)
    return k_means(points_NC, points_NC[drawn_K], ROUNDS, moves_empty=True)


def _principal(vectors_ND: np.ndarray, num_slices: int) -> tuple[np.ndarray, np.ndarray]:
    """The principal directions of vectors, strongest first, and the deviations along them (1 where there is none):
    [D, D] and [D]. Raises ConfigError for fewer directions than slices."""
    width = vectors_ND.shape[1]
    if width < num_slices:
        raise ConfigError(
            f"vectors of {width} numbers cannot be cut into num_levels={num_slices} slices: lower num_levels, or give "
            "wider vectors"
        )
    centred_ND = vectors_ND - vectors_ND.mean(0)
    variance_D, direction_DD = (each[..., ::-1] for each in np.linalg.eigh(centred_ND.T @ centred_ND / len(centred_ND)))
    # The sign of a direction is free: its largest entry is positive.
    direction_DD = direction_DD * np.sign(direction_DD[np.abs(direction_DD).argmax(0), np.arange(width)])
    there_D = variance_D > 1e-9 * max(variance_D[0], 1e-30)
    return direction_DD, np.sqrt(variance_D, where=there_D, out=np.ones(width))


def _place(along_N: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The number of each one's step and where in it it lies, never on its edge: float64[N]."""
    step_N = np.searchsorted(bounds[1:-1], along_N, side="right")
    low_N, wide_N = bounds[step_N], np.diff(bounds)[step_N]
    inside_N = np.divide(along_N - low_N, wide_N, where=wide_N > 0, out=np.full(len(along_N), 0.5))
    return step_N + inside_N.clip(1e-6, 1 - 1e-6)


def _steps(num_codes: int) -> list[int]:
    """Steps of some directions, as equal as can be, with `num_codes` codes at most.

    >>> _steps(256), _steps(8), _steps(1)
    ([7, 6, 6], [8], [1])
    """
    num_directions = max(1, round(np.log(num_codes) / np.log(STEPS_OF_A_DIRECTION)))
    steps = [int(num_codes ** (1 / num_directions) + 1e-9)] * num_directions
    for place in range(num_directions):
        if np.prod(steps) // steps[place] * (steps[place] + 1) <= num_codes:
            steps[place] += 1
    return steps
