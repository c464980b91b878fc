"""Slices: groups of queries with results of their own. The training part and the query alone decide the group.

A query is in one group of each slice. Suffix Q: queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from cprec.data.ragged import Ragged, gather, offsets_of
from cprec.data.splits import Split
from cprec.evaluate.metrics import head
from cprec.recommender import RankingQuery
from cprec.schema import TRAIN

NEW, COLD, TAIL, HEAD = "new", "cold", "tail", "head"
COLD_EVENTS = 4
"""An item with at most this many training events is cold: too few for collaborative models to learn much of it."""
LENGTHS = (5, 10, 20)
"""Upper ends of the groups of history length."""
FEW, REGULAR, IRREGULAR, FREQUENT, RARE = "under 3 events", "regular", "irregular", "frequent", "rare"
IRREGULAR_SHARE, FREQUENT_SHARE = 0.4, 0.3
"""Shares of queries with irregular gaps, and of items with frequent events, in the code of UniRec (Liu et al. 2024)."""
DAY = 86_400_000_000
"""Microseconds."""
ABOUT = {
    "target": f"training events of the target: none (new), up to {COLD_EVENTS} (cold), the most popular 20 % of items "
    "(head), the rest (tail)",
    "first seen": "when the target first occurred in training: thirds of the training span",
    "history": "events of the query's history",
    "gaps": f"days between the events of the history: the {IRREGULAR_SHARE * 100:.0f} % of the queries where they vary "
    "most are irregular (variance; fewer than 3 events have none)",
    "target gaps": f"days between the target's training events: the {FREQUENT_SHARE * 100:.0f} % of the items where "
    "they vary least are frequent (variance; fewer than 3 events have none)",
    "user activity": "training events of the user in all domains of the platform: thirds of the queries",
    "repeat": "whether the target is in the history",
}
"""What each slice is, for people. One of a single group is left out, and so are those by time where it is not real."""


def training_events(split: Split, domain: str) -> tuple[np.ndarray, np.ndarray]:
    """User and item (from 0 in the domain) of each training event of a domain, by user, then in order of time."""
    log, mine = split.train, split.catalogue.rows_of(domain)
    at = np.flatnonzero(split.catalogue.domain[log.item] == split.catalogue.domain_index(domain))
    return log.user[at], log.item[at] - mine[0]


def slices_of(
    split: Split,
    domain: str,
    part: str,
    queries: Sequence[RankingQuery],
    targets: Sequence[str],
    events_N: np.ndarray,
) -> dict[str, np.ndarray]:
    """Slice -> the group of each query of a part: object[Q] of str. `events_N` are the training events of the domain's
    items."""
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
    if split.domains[domain].has_times:
        variance_Q = gap_variance(_history_times(split, domain, part, queries, length_Q))
        found["gaps"] = _parted(variance_Q, 1 - IRREGULAR_SHARE, REGULAR, IRREGULAR)
        by_item = _parted(gap_variance(_item_times(split, domain)), FREQUENT_SHARE, FREQUENT, RARE)
        found["target gaps"] = by_item[target_Q]
    found["user activity"] = _thirds(events_of_users(split, queries))
    repeats = [target in query.uncounted for query, target in zip(queries, targets, strict=True)]
    found["repeat"] = np.where(repeats, "repeat", "new to the user").astype(object)
    return {name: groups for name, groups in found.items() if len(set(groups)) > 1}


def events_of_users(split: Split, queries: Sequence[RankingQuery]) -> np.ndarray:
    """Training events of each query's user in all domains of the platform: int64[Q]."""
    log = split.interactions
    row_of: dict[str | None, int] = {
        f"{log.platforms[platform]}/{user}": row
        for row, (platform, user) in enumerate(zip(log.user_platform, log.user_id, strict=True))
    }
    activity: np.ndarray = np.bincount(log.user[split.events(TRAIN)], minlength=len(log.user_id))
    return activity[np.array([row_of[query.user] for query in queries], dtype=np.int64)]


def _history_times(
    split: Split, domain: str, part: str, queries: Sequence[RankingQuery], length_Q: np.ndarray
) -> Ragged:
    """When the events of each query's history in the domain were, the last `length_Q` before its target: Q rows."""
    log = split.interactions
    asked = split.queries(domain, part, max_history=1, min_history=0)
    event_of = dict(zip(asked.query_id.tolist(), asked.event.tolist(), strict=True))
    of_domain = np.flatnonzero(split.catalogue.domain[log.item] == split.catalogue.domain_index(domain))
    event_Q = np.array([event_of[query.query_id] for query in queries], dtype=np.int64)
    return gather(log.time[of_domain], np.searchsorted(of_domain, event_Q) - length_Q, length_Q)


def _item_times(split: Split, domain: str) -> Ragged:
    """When the training events of each item of a domain were, in order: N rows."""
    log, mine = split.train, split.catalogue.rows_of(domain)
    of_domain = split.catalogue.domain[log.item] == split.catalogue.domain_index(domain)
    item, time = log.item[of_domain] - mine[0], log.time[of_domain]
    return Ragged(time[np.lexsort((time, item))], offsets_of(np.bincount(item, minlength=len(mine))))


def gap_variance(times: Ragged) -> np.ndarray:
    """float[R]: the variance of the days between the events of each row, with one less than the gaps as its divisor;
    not a number for fewer than three events.

    >>> days = Ragged.of([[0, 1, 2], [0, 1, 5], [3, 9], []])
    >>> gap_variance(Ragged(days.values * DAY, days.offsets)).tolist()
    [0.0, 4.5, nan, nan]
    """
    is_gap, num_R = times.place_of > 0, np.maximum(times.lengths - 1, 0)
    gaps, row = np.diff(times.values, prepend=0)[is_gap] / DAY, times.row_of[is_gap]
    mean_R = np.bincount(row, gaps, len(times)) / np.maximum(num_R, 1)
    squares_R = np.bincount(row, (gaps - mean_R[row]) ** 2, len(times))
    return np.where(num_R > 1, squares_R / np.maximum(num_R - 1, 1), np.nan)


def _parted(variance: np.ndarray, share: float, lower: str, upper: str) -> np.ndarray:
    """Two groups: the `share` of the variances that are smallest, and what lies above them; ties are in the lower."""
    is_known = ~np.isnan(variance)
    edge = np.quantile(variance[is_known], share) if is_known.any() else np.nan
    return np.select([~is_known, variance <= edge], [FEW, lower], default=upper).astype(object)


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
    known += [FEW, REGULAR, IRREGULAR, RARE, FREQUENT]

    def place(group: str) -> tuple[float, str]:
        if group in known:
            return known.index(group), group
        number = group.removeprefix("over ").partition("-")[0]
        return (float(number) + group.startswith("over ") if number.isdecimal() else -1.0), group

    return sorted(set(group_Q), key=place)
