"""What clusters of users and exploration bring a bandit, in worlds where the chances of rewards are known.

    python benchmarks/exploration.py [--worlds 20] [--events 1500] [--items 40]

Users are mixtures of four tastes, seen with a little noise; an item has a chance of a reward with each taste. A bandit
shows an item to each user in turn and learns from its reward. The figures are the mean chance of what it showed, and
by how much that is above the row before, with the standard error over worlds.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np

from cprec.online.bandit import DiagLinUCB, cluster_users
from cprec.online.slates import thompson


class Row(NamedTuple):
    name: str
    num_clusters: int
    num_nearest: int
    alpha: float
    draws: bool = False
    """By Thompson sampling with `alpha` as noise, not by upper bounds."""


ROWS = (
    Row("greedy, one cluster", 1, 1, 0.0),
    Row("one cluster", 1, 1, 0.3),
    Row("eight clusters, one a user", 8, 1, 0.3),
    Row("eight clusters, two a user", 8, 2, 0.3),
    Row("eight clusters, three a user", 8, 3, 0.3),
    Row("the same, Thompson sampling", 8, 3, 0.3, draws=True),
)


def world(seed: int, num_events: int, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """User vectors, and the chance of a reward for each user and item."""
    generator = np.random.default_rng(seed)
    taste_UT = generator.dirichlet(np.full(4, 0.3), num_events)
    chance_UV = taste_UT @ generator.beta(1, 4, (4, num_items))
    return taste_UT + generator.normal(0, 0.05, taste_UT.shape), chance_UV


def mean_chance(row: Row, users_UT: np.ndarray, chance_UV: np.ndarray, seed: int) -> float:
    generator = np.random.default_rng(seed)
    clusters = cluster_users(users_UT, row.num_clusters, row.num_nearest, seed=seed)
    bandit, total = DiagLinUCB(clusters, chance_UV.shape[1]), 0.0
    for user_T, chance_V in zip(users_UT, chance_UV, strict=True):
        believed = bandit.posterior(user_T[None])
        drawn = thompson(believed, 1, generator, noise=row.alpha)[0] if row.draws else None
        item_1 = believed.upper(row.alpha).argmax(1) if drawn is None else drawn
        bandit.update(user_T[None], item_1, generator.random(1) < chance_V[item_1])
        total += float(chance_V[item_1[0]])
    return total / len(users_UT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--events", type=int, default=1500)
    parser.add_argument("--items", type=int, default=40)
    settings = parser.parse_args()
    worlds = [world(seed, settings.events, settings.items) for seed in range(settings.worlds)]
    print(f"at random {np.mean([chance_UV.mean() for _, chance_UV in worlds]):.3f}")
    before = None
    for row in ROWS:
        found = np.array([mean_chance(row, *each, seed) for seed, each in enumerate(worlds)])
        more = found - (found if before is None else before)
        error = more.std(ddof=1) / np.sqrt(len(worlds))
        print(f"{row.name:30} {found.mean():.3f}" + ("" if before is None else f"  {more.mean():+.3f} +- {error:.3f}"))
        before = found
    print(f"the best items {np.mean([chance_UV.max(1).mean() for _, chance_UV in worlds]):.3f}")


if __name__ == "__main__":
    main()
