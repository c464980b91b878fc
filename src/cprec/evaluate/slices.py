"""Slices: groups of queries with results of their own. The training part and the query alone decide the group.

A query is in one group of each slice. Suffix Q: queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from cprec.data.splits import Split
from cprec.evaluate.metrics import head
from cprec.recommender import RankingQuery
from cprec.schema import TRAIN

NEW, COLD, TAIL, HEAD = "new", "cold", "tail", "head"
COLD_EVENTS = 4
"""An item with at most this many training events is cold: too few for collaborative models to learn much of it."""
LENGTHS = (5, 10, 20)
"""Upper ends of the groups of history length."""
ABOUT = {
    "target": f"training events of the target: none (new), up to {COLD_EVENTS} (cold), the most popular 20 % of items "
    "(head), the rest (tail)",
    "first seen": "when the target first occurred in training: thirds of the training span",
    "history": "events of the query's history",
    "user activity": "training events of the user in all domains of the platform: thirds of the queries",
    "repeat": "whether the target is in the history",
}
"""What each slice is, for people. A slice of one group is left out, and so is one by time where times are not real."""


def training_events(split: Split, domain: str) -> tuple[np.ndarray, np.ndarray]:
    """User and item (from 0 in the domain) of each training event of a domain, by user, then in order of time."""
    log, mine = split.train, split.catalogue.rows_of(domain)
    at = np.flatnonzero(split.catalogue.domain[log.item] == split.catalogue.domain_index(domain))
    return log.user[at], log.item[at] - mine[0]


def slices_of(
    split: Split, domain: str, queries: Sequence[RankingQuery], targets: Sequence[str], events_N: np.ndarray
) -> dict[str, np.ndarray]:
    """Slice -> the group of each query: object[Q] of str. `events_N` are the training events of the domain's items."""
    log, mine = split.interactions, split.catalogue.rows_of(domain)
    trained = split.events(TRAIN)
    target_Q = split.catalogue.find(domain, targets) - mine[0]
    events_Q = events_N[target_Q]
    kinds = [events_Q == 0, events_Q <= COLD_EVENTS, head(events_N)[target_Q]]
    found = {"target": np.select(kinds, [NEW, COLD, HEAD], default=TAIL).astype(object)}
    if split.domains[domain].has_times:
        of_domain = trained & (split.catalogue.domain[log.item] == split.catalogue.domain_index(domain))
        first_N = np.full(len(mine), np.iinfo(np.int64).max)
        np.minimum.at(first_N, log.item[of_domain] - mine[0], log.time[of_domain])
        edges = np.quantile(log.time[of_domain], [0, 1]) if of_domain.any() else np.zeros(2)
        thirds = edges[0] + (edges[1] - edges[0]) * np.array([1, 2]) / 3
        names = np.array(["first third", "middle third", "last third"], dtype=object)
        when = names[np.searchsorted(thirds, first_N[target_Q])]
        found["first seen"] = np.where(events_Q == 0, "never", when)
    length_Q = np.array([sum(item.domain == domain for item in query.history) for query in queries], dtype=np.int64)
    spans = np.array([f"{low + 1}-{high}" for low, high in pairwise((0, *LENGTHS))] + [f"over {LENGTHS[-1]}"], object)
    found["history"] = np.where(length_Q == 0, "none", spans[np.searchsorted(LENGTHS, length_Q)])
    row_of: dict[str | None, int] = {
        f"{log.platforms[platform]}/{user}": row
        for row, (platform, user) in enumerate(zip(log.user_platform, log.user_id, strict=True))
    }
    activity = np.bincount(log.user[trained], minlength=len(log.user_id))
    found["user activity"] = _thirds(activity[np.array([row_of[query.user] for query in queries], dtype=np.int64)])
    repeats = [target in query.uncounted for query, target in zip(queries, targets, strict=True)]
    found["repeat"] = np.where(repeats, "repeat", "new to the user").astype(object)
    return {name: groups for name, groups in found.items() if len(set(groups)) > 1}


def _thirds(value_Q: np.ndarray) -> np.ndarray:
    """Groups of nearly equal size by value, named by their smallest and largest."""
    edges = np.unique(np.quantile(value_Q, [1 / 3, 2 / 3])) if len(value_Q) else np.empty(0)
    group_Q = np.searchsorted(edges, value_Q)
    names = {}
    for group in np.unique(group_Q):
        inside = value_Q[group_Q == group]
        names[group] = f"{inside.min()}-{inside.max()}" if inside.min() < inside.max() else f"{inside.min()}"
    return np.array([names[group] for group in group_Q], dtype=object)


def ordered(group_Q: np.ndarray) -> list[str]:
    """The groups of a slice in their natural order."""
    known = [NEW, COLD, TAIL, HEAD, "never", "first third", "middle third", "last third", "repeat", "new to the user"]

    def place(group: str) -> tuple[float, str]:
        if group in known:
            return known.index(group), group
        number = group.removeprefix("over ").partition("-")[0]
        return (float(number) + group.startswith("over ") if number.isdecimal() else -1.0), group

    return sorted(set(group_Q), key=place)
