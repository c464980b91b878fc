"""Candidate sets of the second protocol: the target and others, drawn once per query.

The others are drawn uniformly, or by popularity: the chance of an item is its share of the domain's training events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

UNIFORM, POPULARITY = "uniform", "popularity"
MAX_TRIES = 50
"""Rounds of draws with replacement before the items that are left are tried one by one."""


def draw_candidates(
    query_id: str,
    target: int,
    taken: np.ndarray,
    titles: Sequence[str],
    size: int,
    seed: int,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """Draw `size` item positions, the target among them, in random order; fewer where there are no more to draw.

    The others are outside `taken` (the user's whole history). No title equals, contains or is contained in another one
    (after lower-casing), since such answers could not be told apart in text. Items are drawn uniformly, or by
    `weights`, one for each item (0: never drawn). The draw is seeded by (seed, query id) and never by the target, so
    that the other candidates say nothing about it.
    """
    digest = hashlib.sha256(f"{seed}/{query_id}".encode()).digest()
    generator = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    weights = None if weights is None else np.asarray(weights)
    drawable = np.ones(len(titles), dtype=bool) if weights is None else weights > 0
    drawable[np.union1d(taken, [target])] = False
    chosen = [target]
    if drawable.sum() >= size - 1:
        # Draws with replacement, four times as many as needed: repeats and unusable items are passed over.
        for _ in range(MAX_TRIES):
            _choose(_drawn(generator, len(titles), 4 * size, weights), chosen, drawable, titles, size)
            if len(chosen) == size:
                return generator.permutation(np.array(chosen))
    # Few items are left. All of them are tried, in the order in which draws without replacement would name them: with
    # weights that is the order of exponential waiting times.
    left = np.flatnonzero(drawable)
    if weights is None:
        order = generator.permutation(left)
    else:
        order = left[np.argsort(generator.exponential(size=len(left)) / weights[left])]
    _choose(order, chosen, drawable, titles, size)
    return generator.permutation(np.array(chosen))


def _drawn(generator: np.random.Generator, num_items: int, size: int, weights: np.ndarray | None) -> np.ndarray:
    """Item positions drawn with replacement, uniformly or by weight."""
    if weights is None:
        return generator.integers(0, num_items, size)
    upto = np.cumsum(weights, dtype=float)
    return np.searchsorted(upto, generator.random(size) * upto[-1], side="right")


def _choose(drawn: np.ndarray, chosen: list[int], drawable: np.ndarray, titles: Sequence[str], size: int) -> None:
    """Add drawn items to the `chosen` ones, in order, until there are `size`; what was chosen is not drawable again."""
    names = [titles[item].lower() for item in chosen]
    for item in drawn.tolist():
        if len(chosen) == size:
            return
        name = titles[item].lower()
        if drawable[item] and not any(name in other or other in name for other in names):
            chosen.append(item)
            names.append(name)
            drawable[item] = False
