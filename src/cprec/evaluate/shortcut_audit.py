"""The shortcut audit: how much of a data set's held-out events a rule without learning would find.

Three shortcuts make a benchmark easy without user modelling (the graph-heuristic audit of 2026; see docs/shortcuts.md):
few items follow an item, the next item resembles the last one, and older history changes nothing. Beside them stand the
traps that belong to a file rather than to behaviour: targets that the order of equal times decided, repeats, items that
training never saw, and too few queries. Everything is learnt from the training part; test events are only targets.

Suffixes: Q queries, N items of the domain, in catalogue order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist

import numpy as np
from scipy import sparse

from cprec.data.leakage import find_ties
from cprec.data.queries import ranking_queries, sampled_rows
from cprec.data.ragged import Ragged
from cprec.data.splits import Queries, Split
from cprec.data.titles import title_vectors
from cprec.errors import ConfigError
from cprec.evaluate.results import Interval
from cprec.evaluate.slices import training_events
from cprec.evaluate.statistics import ALPHA, POWER, SAMPLES, bootstrap_interval
from cprec.progress import track
from cprec.ranks import count_rankings, ndcg, recall
from cprec.recommender import Recommender
from cprec.schema import TEST, Item

K = 10
"""Where NDCG is cut."""
BATCH = 256
"""Queries worked on at once."""
NUM_BINS = 20
"""Bins of the histograms of percentiles; each holds 5 % of the items."""

WHOLE, REVERSED, SHUFFLED = "whole history", "reversed", "shuffled"
VARIANTS = {WHOLE: None, "last 5": 5, "last 2": 2, "last 1": 1, REVERSED: None, SHUFFLED: None}
"""Parts of a history that a model is shown: so many of the latest events, or all of them (None)."""

ONE_STEP, TWO_STEPS, BACKWARD, FROM_ANY = "one step", "two steps", "one step backward", "one step from any event"
USERS, TITLES = "shared users", "titles"


@dataclass(frozen=True, kw_only=True)
class Reach:
    """A set of items for each query, and how often the target is in it. All are means over queries."""

    targets: float
    """Share of queries whose target is in their set."""
    catalogue: float
    """Share of the domain's items in a set: what a target drawn evenly from the catalogue would reach."""
    popular: float
    """Share of the training events whose item is in a set: what a target drawn by popularity would reach."""

    @property
    def lift(self) -> float:
        """How many times as many targets as by popularity; NaN where the sets are empty."""
        return self.targets / self.popular if self.popular else math.nan


@dataclass(frozen=True, kw_only=True)
class OutDegree:
    """Different items that follow a query's last item in training, over queries."""

    none: float
    """Share of queries whose last item nothing follows."""
    quartiles: tuple[float, float, float]
    effective: float
    """Median of exp(entropy) of what follows: the number of equally likely followers that would be as uncertain."""
    histogram: dict[str, float]
    """Share of queries by out-degree."""


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """Where the target stands among all other items when these are ordered by similarity to the last item.

    100 is the most similar item, 0 the least; a target drawn evenly has 50 on average.
    """

    mean: float
    nearest: float
    """Share of targets among the nearest 1 % of the items."""
    unrelated: float
    """Share of targets of similarity 0."""
    histogram: tuple[float, ...]
    """Share of targets by percentile, in `NUM_BINS` equal bins from 0 to 100."""


@dataclass(frozen=True, kw_only=True)
class Dependence:
    """How well a model ranks when it is shown only a part of each history."""

    model: str
    ndcg: Interval
    """NDCG@10 on whole histories, full catalogue without the items of the history."""
    shares: dict[str, Interval | None]
    """NDCG@10 of each variant over that on whole histories; None where the model finds too little to say."""
    smallest_difference: float
    """The least difference in NDCG@10 that all queries of the domain would show; see `smallest_difference`."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Shares of the targets."""

    cold: float
    """Without a training event."""
    repeated: float
    """In the history already."""
    repeat_last: float
    """The same item as the event before."""
    popular_10: float
    """Among the 10 items with the most training events; ties count with their expected share."""
    popular_percent: float
    """Among the 1 % of the items with the most training events, one item at least."""
    tied: float | None
    """Decided by the order of events of equal time; None where the times are only an order, so that nobody knows."""


@dataclass(frozen=True, kw_only=True)
class ShortcutAudit:
    """The measurements of one domain."""

    domain: str
    num_items: int
    num_train_events: int
    num_queries: int
    sample: int
    """Queries that similarity and models were measured on."""
    seed: int
    tie_order: str
    """How events of equal time were put in order: source, item_id or shuffle."""
    median_history: float
    longer: dict[int, float]
    """Share of queries with a history of more than so many events."""
    targets: Targets
    immediate_repeats: float
    """Share of training events, first ones aside, of the same item as the user's event before."""
    out_degree: OutDegree
    reach: dict[str, Reach]
    similarity: dict[str, Similarity]
    dependence: tuple[Dependence, ...]


def shortcut_audit(
    split: Split,
    domain: str,
    models: Mapping[str, Recommender],
    *,
    max_queries: int = 2000,
    seed: int = 0,
    tie_order: str = "source",
) -> ShortcutAudit:
    """Measure the shortcuts of a domain on its test queries, and how models, by name, rank with parts of histories.

    A history is all that the user did in the domain before. Similarity and models are measured on a sample of at most
    `max_queries` queries drawn by `seed`, everything else on all queries. `tie_order` is that of the data's rules.

    Raises ConfigError where the domain has no test query with a history, or `max_queries` is below 1.
    """
    queries = _queries(split, domain, max_queries)
    rows = split.catalogue.rows_of(domain)
    # Items are counted from 0 in the domain.
    history, target_Q = Ragged(queries.history.values - int(rows[0]), queries.history.offsets), queries.target - rows[0]
    last_Q = history.values[history.offsets[1:] - 1]
    user, item = training_events(split, domain)
    count_N = np.bincount(item, minlength=len(rows))
    graph = transitions(user, item, len(count_N))
    chosen = sampled_rows(len(queries), max_queries, seed)
    titles = [str(title) for title in split.catalogue.title[rows]]
    vectors = {USERS: user_vectors(user, item, len(count_N)), TITLES: title_vectors(titles)}
    work = len(queries) + len(chosen) * (len(vectors) + len(VARIANTS) * len(models))
    with track(work, f"{domain}: shortcuts", unit="queries") as progress:
        reach = reaches(graph, count_N, history, target_Q, progress.advance)
        of_sample = partial(similarity_of, last_Q=last_Q[chosen], target_Q=target_Q[chosen], done=progress.advance)
        similarity = {name: of_sample(kind) for name, kind in vectors.items()}
        depends = partial(dependence_of, split=split, queries=queries, chosen=chosen, seed=seed, done=progress.advance)
        dependence = tuple(depends(name, model) for name, model in models.items())
    return ShortcutAudit(
        domain=domain,
        num_items=len(count_N),
        num_train_events=len(item),
        num_queries=len(queries),
        sample=len(chosen),
        seed=seed,
        tie_order=tie_order,
        median_history=float(np.median(history.lengths)),
        longer={size: float((history.lengths > size).mean()) for size in (1, 2, 5)},
        targets=targets_of(split, domain, history, target_Q, count_N),
        immediate_repeats=immediate_repeats(user, item),
        out_degree=out_degree_of(graph, last_Q),
        reach=reach,
        similarity=similarity,
        dependence=dependence,
    )


def _queries(split: Split, domain: str, max_queries: int) -> Queries:
    if max_queries < 1:
        raise ConfigError(f"max_queries={max_queries} must be at least 1")
    queries = split.queries(domain, TEST, max_history=max(len(split.interactions), 1))
    if not len(queries):
        raise ConfigError(f"domain {domain!r} has no test event with a history before it: nothing can be asked of it")
    return queries


# ---- the training part -----------------------------------------------------------------------------------------------


def immediate_repeats(user: np.ndarray, item: np.ndarray) -> float:
    """Share of events, first ones of a user aside, of the same item as the event before.

    >>> immediate_repeats(np.array([0, 0, 0, 1]), np.array([5, 5, 6, 6]))
    0.5
    """
    same_user = user[1:] == user[:-1]
    return float((item[1:] == item[:-1])[same_user].mean()) if same_user.any() else 0.0


def transitions(user: np.ndarray, item: np.ndarray, num_items: int) -> sparse.csr_array:
    """How often item j is a user's next event after item i: csr[N, N].

    >>> transitions(np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 1]), 3).toarray().tolist()
    [[0.0, 2.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    # Neighbours in the log make a transition where both belong to one user; equal ones add up in the matrix.
    same = user[1:] == user[:-1]
    start, end = item[:-1][same], item[1:][same]
    return sparse.csr_array((np.ones(len(start)), (start, end)), (num_items, num_items))


def user_vectors(user: np.ndarray, item: np.ndarray, num_items: int) -> sparse.csr_array:
    """Which users have an item in training, each row of length 1: csr[N, users]. Dot products are the cosine of two
    items: users who had both, over the root of the product of those who had each."""
    # One column for each user who trains, a 1 for each item that the user had, however often.
    _, column = np.unique(user, return_inverse=True)
    table = sparse.csr_array((np.ones(len(item)), (item, column)), (num_items, int(column.max(initial=-1)) + 1 or 1))
    table.data[:] = 1
    # Rows are scaled to length 1; those of length 0 stay.
    length = np.sqrt(table.multiply(table).sum(axis=1))
    return sparse.csr_array(sparse.diags_array(1 / np.where(length > 0, length, 1)) @ table)


# ---- reach -----------------------------------------------------------------------------------------------------------


def out_degree_of(graph: sparse.csr_array, last_Q: np.ndarray) -> OutDegree:
    """How many items follow the last items of the queries in `graph`, which `transitions` made."""
    # Entropy of what follows each item: -sum p log p over its row, p the share of each follower.
    degree_N = np.diff(graph.indptr)
    total_N = np.maximum(graph.sum(axis=1), 1)
    chance = graph.data / np.repeat(total_N, degree_N)
    row = np.repeat(np.arange(len(degree_N)), degree_N)
    entropy_N = -np.bincount(row, chance * np.log(chance), minlength=len(degree_N))
    effective_N = np.where(degree_N > 0, np.exp(entropy_N), 0)
    # Queries by the number of followers of their last item, in bins that double.
    degree_Q = degree_N[last_Q]
    edges = (0, 1, 2, 4, 8, 16, 32, 64, 1 << 62)
    names = ("none", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64 or more")
    counts = np.histogram(degree_Q, edges)[0]
    low, middle, high = np.quantile(degree_Q, (0.25, 0.5, 0.75))
    return OutDegree(
        none=float((degree_Q == 0).mean()),
        quartiles=(float(low), float(middle), float(high)),
        effective=float(np.median(effective_N[last_Q])),
        histogram=dict(zip(names, (counts / len(last_Q)).tolist(), strict=True)),
    )


def reaches(
    graph: sparse.csr_array, count_N: np.ndarray, history: Ragged, target_Q: np.ndarray, done: Callable[[int], None]
) -> dict[str, Reach]:
    """How many targets follow in one step of the transition graph, in one or two, backward, and from any past event.

    `history` has Q rows of items, oldest first and none empty; `count_N` are training events; `done` is called with
    the number of queries finished.
    """
    size = len(count_N)
    # Links with weight 1, forward and backward. A set times `weights` gives its share of the catalogue and of events.
    linked = graph.copy()
    linked.data[:] = 1
    backward = sparse.csr_array(linked.T)
    weights = np.column_stack([np.full(size, 1 / size), count_N / max(count_N.sum(), 1)])
    sums: dict[str, np.ndarray] = {}
    for start in range(0, len(history), BATCH):
        rows = np.arange(start, min(start + BATCH, len(history)))
        # Rows of sets of items: had[q, i] where the history of q holds i, step[q, j] where j followed its last item.
        last = history.values[history.offsets[rows + 1] - 1]
        past = history.take(rows)
        had = sparse.csr_array((np.ones(len(past.values)), (past.row_of, past.values)), (len(rows), size))
        step = linked[last]
        two = step + step @ linked
        sets = {ONE_STEP: step, TWO_STEPS: two, BACKWARD: backward[last], FROM_ANY: had @ linked}
        wanted = sparse.csr_array((np.ones(len(rows)), (np.arange(len(rows)), target_Q[rows])), (len(rows), size))
        # A target is hit where its set holds it; paths that lead to an item twice count once.
        for name, found in sets.items():
            found.data[:] = 1
            hit = found.multiply(wanted).sum()
            sums[name] = sums.get(name, 0) + np.array([hit, *(found @ weights).sum(axis=0)])
        done(len(rows))
    means = {name: (total / len(history)).tolist() for name, total in sums.items()}
    return {name: Reach(targets=hit, catalogue=even, popular=mass) for name, (hit, even, mass) in means.items()}


# ---- similarity ------------------------------------------------------------------------------------------------------


def percentiles(similarity_QN: np.ndarray, last_Q: np.ndarray, target_Q: np.ndarray) -> np.ndarray:
    """Where each target stands among the other items, by similarity to the last item: float[Q], from 0 to 100.

    The last item itself is not counted. Items as similar as the target stand half below it and half above, which is the
    expected place over all orders. Fewer than three items leave nothing to stand among: 50.

    >>> percentiles(np.array([[1.0, 0.2, 0.5, 0.2, 0.0]]), np.array([0]), np.array([1])).tolist()
    [50.0]
    """
    rows = np.arange(len(target_Q))
    of_target = similarity_QN[rows, target_Q][:, None]
    # Neither the last item nor the target itself is among the others; half of the ties stand below the target.
    below, same = similarity_QN < of_target, similarity_QN == of_target
    below[rows, last_Q] = same[rows, last_Q] = False
    others = similarity_QN.shape[1] - 2
    if others < 1:
        return np.full(len(target_Q), 50.0)
    return 100 * (below.sum(axis=1) + (same.sum(axis=1) - 1) / 2) / others


def similarity_of(
    vectors: sparse.csr_array, last_Q: np.ndarray, target_Q: np.ndarray, done: Callable[[int], None]
) -> Similarity:
    """Percentiles of the targets by cosine to the last items; `vectors` has rows of length 1 or 0.

    Targets that repeat the last item are left out; where nothing else is left, every share is 0 and the mean 50.
    """
    standing, related = [np.empty(0)], [np.empty(0, dtype=bool)]
    transposed = sparse.csc_array(vectors.T)
    for start in range(0, len(last_Q), BATCH):
        last, target = last_Q[start : start + BATCH], target_Q[start : start + BATCH]
        kept = last != target
        done(len(last))
        last, target = last[kept], target[kept]
        cosine = np.round((vectors[last] @ transposed).toarray(), 9)  # what is equal but for rounding is equal
        standing.append(percentiles(cosine, last, target))
        related.append(cosine[np.arange(len(target)), target] > 0)
    place, is_related = np.concatenate(standing), np.concatenate(related)
    if not len(place):
        return Similarity(mean=50.0, nearest=0.0, unrelated=0.0, histogram=(0.0,) * NUM_BINS)
    counts = np.histogram(place, NUM_BINS, (0, 100))[0]
    return Similarity(
        mean=float(place.mean()),
        nearest=float((place >= 99).mean()),
        unrelated=float(1 - is_related.mean()),
        histogram=tuple((counts / len(place)).tolist()),
    )


# ---- what a model needs of a history ---------------------------------------------------------------------------------


def shown(history: Sequence[Item], variant: str, generator: np.random.Generator) -> tuple[Item, ...]:
    """A history as a variant of `VARIANTS` shows it; only `shuffled` draws from the generator.

    >>> items = [Item("a", name) for name in "wxyz"]
    >>> [item.item_id for item in shown(items, "last 2", np.random.default_rng(0))]
    ['y', 'z']
    >>> [item.item_id for item in shown(items, "reversed", np.random.default_rng(0))]
    ['z', 'y', 'x', 'w']
    """
    if variant == REVERSED:
        return tuple(reversed(history))
    if variant == SHUFFLED:
        return tuple(history[place] for place in generator.permutation(len(history)))
    return tuple(history[-(VARIANTS[variant] or len(history)) :])


def dependence_of(
    name: str,
    recommender: Recommender,
    split: Split,
    queries: Queries,
    chosen: np.ndarray,
    *,
    seed: int,
    done: Callable[[int], None],
) -> Dependence:
    """NDCG@10 of a recommender on some queries (`chosen` are their rows), on whole histories and on parts of them.

    Every variant leaves out the items of the whole history, so that it changes what the model knows and not what it may
    return. Queries name no user: a model that knows users by name would know their histories, whatever it is shown.
    Shuffles are drawn by `seed`; intervals are over users, and paired.
    """
    whole_histories, targets = ranking_queries(split, queries, chosen)
    generator = np.random.default_rng(seed)
    values: dict[str, np.ndarray] = {}
    for variant in VARIANTS:
        asked = [
            replace(query, history=shown(query.history, variant, generator), user=None) for query in whole_histories
        ]
        found = []
        for start in range(0, len(asked), BATCH):
            batch = asked[start : start + BATCH]
            found += recommender.rank(batch, K)
            done(len(batch))
        values[variant] = ndcg(*count_rankings(found, targets), K)
    whole, user_Q = values[WHOLE], queries.user[chosen]
    interval = Interval(*bootstrap_interval(whole, groups=user_Q, seed=seed))
    return Dependence(
        model=name,
        ndcg=interval,
        shares={name: share_interval(part, whole, user_Q, seed=seed) for name, part in values.items() if name != WHOLE},
        smallest_difference=smallest_difference(interval, len(chosen), len(queries)),
    )


def share_interval(part_Q: np.ndarray, whole_Q: np.ndarray, user_Q: np.ndarray, *, seed: int = 0) -> Interval | None:
    """Mean of `part_Q` over the mean of `whole_Q`, with a 95 % percentile bootstrap interval (Efron 1979).

    Users are drawn, each with the values of both sides: the interval is paired. None where a resample holds nothing of
    the whole, so that the share is not known.

    >>> share_interval(np.array([0.5, 0.25]), np.array([1.0, 0.5]), np.array([0, 1]))
    Interval(mean=0.5, low=0.5, high=0.5)
    """
    # Sums of both sides for each user. Most users miss on both, so equal rows are drawn together by their number.
    _, group = np.unique(user_Q, return_inverse=True)
    sums = np.column_stack([np.bincount(group, part_Q), np.bincount(group, whole_Q)])
    distinct, times = np.unique(sums, axis=0, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(sums), times / len(sums), SAMPLES)
    part, whole = (drawn @ distinct).T
    if not whole.all():
        return None
    low, high = np.quantile(part / whole, (0.025, 0.975))
    return Interval(mean=float(part_Q.sum() / whole_Q.sum()), low=float(low), high=float(high))


def smallest_difference(interval: Interval, sample: int, num_queries: int) -> float:
    """The smallest difference of two means that `num_queries` queries show with 80 % power at the 5 % level.

    2.8 standard errors (Cohen 1988), estimated from the `interval` of a mean over `sample` queries. It assumes that the
    difference varies as much as the values of one recommender, which is so if the two correlate at 0.5.

    >>> round(smallest_difference(Interval(mean=0.05, low=0.0402, high=0.0598), 100, 400), 4)
    0.007
    """
    normal = NormalDist()
    two_sided, power = normal.inv_cdf(1 - ALPHA / 2), normal.inv_cdf(POWER)
    error = (interval.high - interval.low) / (2 * two_sided)
    return (two_sided + power) * error * math.sqrt(sample / num_queries)


# ---- targets ---------------------------------------------------------------------------------------------------------


def targets_of(split: Split, domain: str, history: Ragged, target_Q: np.ndarray, count_N: np.ndarray) -> Targets:
    """Shares of the targets that need no model; `history` and `target_Q` count items from 0 in the domain."""
    last_Q = history.values[history.offsets[1:] - 1]
    # A query is marked where any event of its history has its target.
    repeated = np.zeros(len(target_Q), dtype=bool)
    repeated[history.row_of[history.values == target_Q[history.row_of]]] = True
    # The rank of each target by training events: items with more of them, and items with as many, itself among them.
    descending = np.sort(-count_N)
    better = np.searchsorted(descending, -count_N[target_Q])
    tied = np.searchsorted(descending, -count_N[target_Q], side="right") - better
    ties = find_ties(split, domain, TEST, "")
    return Targets(
        cold=float((count_N[target_Q] == 0).mean()),
        repeated=float(repeated.mean()),
        repeat_last=float((last_Q == target_Q).mean()),
        popular_10=float(recall(better, tied, 10).mean()),
        popular_percent=float(recall(better, tied, max(1, len(count_N) // 100)).mean()),
        tied=ties[0].found / ties[0].checked if ties else None,
    )
