"""Candidate sets of the second protocol: the target and others, drawn once per query and frozen to disk.

The others are drawn uniformly, or by popularity: the chance of an item is its share of the domain's training events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from cprec.evaluate.saved import read_saved, write_saved

UNIFORM, POPULARITY = "uniform", "popularity"
MAX_TRIES = 50


def draw_candidates(
    query_id: str,
    target: int,
    taken: np.ndarray,
    titles: Sequence[str],
    size: int,
    seed: int,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """`size` item positions, the target among them, in random order; fewer where there are no more to draw.

    The others are outside `taken` (the user's whole history), none with a title that equals, contains or is contained
    in another's (after lower-casing): such answers could not be told apart in text. They are uniform over these items,
    or drawn by `weights`, one for each item (0: never drawn). The draw is seeded by (seed, query id), never by the
    target, so that co-candidates say nothing about it.
    """
    digest = hashlib.sha256(f"{seed}/{query_id}".encode()).digest()
    generator = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    drawable = np.ones(len(titles), dtype=bool) if weights is None else np.asarray(weights) > 0
    drawable[np.union1d(taken, [target])] = False
    upto = None if weights is None else np.cumsum(weights, dtype=float)
    chosen, names = [target], [titles[target].lower()]

    def choose(drawn: np.ndarray) -> bool:
        """Take what may be taken, in order; whether there are enough."""
        for item in drawn.tolist():
            name = titles[item].lower()
            if not drawable[item] or any(name in other or other in name for other in names):
                continue
            chosen.append(item)
            names.append(name)
            drawable[item] = False
            if len(chosen) == size:
                return True
        return False

    if drawable.sum() >= size - 1:
        for _ in range(MAX_TRIES):
            if upto is None:
                drawn = generator.integers(0, len(titles), 4 * size)
            else:
                drawn = np.searchsorted(upto, generator.random(4 * size) * upto[-1], side="right")
            if choose(drawn):
                return generator.permutation(np.array(chosen))
    left = np.flatnonzero(drawable)  # each once: what draws without replacement, by the same weights, would give
    if weights is None:
        choose(generator.permutation(left))
    else:
        choose(left[np.argsort(generator.exponential(size=len(left)) / np.asarray(weights)[left])])
    return generator.permutation(np.array(chosen))


def write_candidates(path: Path, query_ids: Sequence[str], candidates: Sequence[Sequence[str]]) -> None:
    """Freeze candidate sets: one row per query; the file appears complete or not at all."""
    columns = {"query_id": pa.array(query_ids, pa.string()), "candidates": pa.array(candidates, pa.list_(pa.string()))}
    write_saved(pa.table(columns), path)


def read_candidates(path: Path) -> dict[str, tuple[str, ...]]:
    """Candidate item ids of each query. Raises DataError for a damaged file."""
    table = read_saved(path, "delete it, and it is drawn anew")
    return dict(zip(table["query_id"].to_pylist(), map(tuple, table["candidates"].to_pylist()), strict=True))
