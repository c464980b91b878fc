"""Slates by Thompson sampling: an item is shown as often as it is believed to be the best (Thompson 1933).

With one draw of all rewards for a slate, its items are the best of that draw. In-slate Thompson sampling (Eide et al.
2022, for the slates of FINN.no) draws anew for each place, so that one slate asks more than one opinion.

Deviations from their code: it takes the first items of all draws, then the second ones, and passes over repeats; here
each place has the best item of its own draw that is not in the slate yet. Theirs are draws of a variational recurrent
network; here they are of any normal posterior, and of each user apart, also where users share clusters.
"""

from __future__ import annotations

import numpy as np

from cprec.errors import ConfigError, DataError
from cprec.online.bandit import Posterior


def thompson(
    posterior: Posterior, size: int, generator: np.random.Generator, *, noise: float = 1.0, in_slate: bool = True
) -> np.ndarray:
    """Slates of users, first place first, by the columns of `posterior`: int64[U, size].

    `noise` is the standard deviation of a single reward; with 0 slates are greedy, and of equal items the first comes
    first. Raises ConfigError for more places than items that may be shown, DataError for NaN and infinity.

    >>> sure = Posterior(np.array([[0.1, 0.5, -np.inf, 0.3]]), np.zeros((1, 4)))
    >>> thompson(sure, 3, np.random.default_rng(0)).tolist()
    [[1, 3, 0]]
    """
    mean_UV, deviation_UV = posterior
    if not (np.isfinite(deviation_UV).all() and (mean_UV < np.inf).all()):
        raise DataError("the posterior has NaN or infinity: expected finite deviations, and means below infinity")
    fewest = int((mean_UV > -np.inf).sum(1).min())
    if not 1 <= size <= fewest:
        raise ConfigError(f"size={size}, but a user has {fewest} items that may be shown: give 1 to that")
    left_UV, moved_UV = mean_UV.copy(), np.zeros_like(mean_UV)
    slates = np.empty((len(mean_UV), size), dtype=np.int64)
    for place in range(size):
        if in_slate or place == 0:
            moved_UV = noise * deviation_UV * generator.standard_normal(mean_UV.shape)
        slates[:, place] = (left_UV + moved_UV).argmax(1)
        np.put_along_axis(left_UV, slates[:, place : place + 1], -np.inf, axis=1)
    return slates
