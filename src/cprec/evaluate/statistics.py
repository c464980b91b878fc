"""How sure a result is: intervals, paired tests on the same queries, several seeds, many comparisons at once.

A value belongs to one query. Queries of one user are not independent: `groups` names the user of each query, and users
are resampled, flipped and counted whole. Without it every query counts as its own user.
Suffixes: Q queries, S seeds, G groups (users).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from scipy.special import stdtr, stdtrit

MIN_QUERIES = 1000
"""With fewer queries than this no recommender is said to beat another, whatever the test says."""
ALPHA = 0.05
"""The chance of a false claim in a whole table, after Holm's correction."""
POWER = 0.8
"""The chance of finding a difference of the size that is called detectable."""
LEVEL = 0.95
"""Of an interval: the share of intervals that hold what they estimate."""
SAMPLES = 2000
"""Bootstrap samples of an interval."""
PERMUTATIONS = 9999
"""Random sign flips of a permutation test, unless told otherwise; the smallest p value is 1 / (this + 1)."""
CELLS = 4_000_000
"""Numbers that are drawn at once; this bounds memory."""
FEW = 8
"""Where each distinct value is that of more queries than this, on average, samples are drawn by how often each value
occurs. Metrics of ranks take few values, so this is the usual case, and it is faster."""

Groups = Sequence[object] | np.ndarray | None
"""The user of each query."""


# ---- intervals -------------------------------------------------------------------------------------------------------


def bootstrap_interval(
    values_Q: np.ndarray, *, groups: Groups = None, samples: int = SAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over queries with a percentile bootstrap interval (Efron 1979): (mean, low, high).

    With `groups` whole users are drawn, all queries of each (cluster bootstrap: Davison and Hinkley 1997, section 3.8).
    Differences of two arms on the same queries are paired by passing their difference per query.

    Raises ValueError without queries, for values that are not finite, or if `groups` has another length.

    >>> bootstrap_interval(np.array([0.25, 0.25, 0.25]))
    (0.25, 0.25, 0.25)
    """
    values = _checked(values_Q)
    # Each group has the sum of its values and the number of its queries; many groups have the same two.
    sums, sizes = _sums(values, groups)
    distinct, times = np.unique(np.column_stack([sums, sizes]), axis=0, return_counts=True)
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    for part in _blocks(samples, len(sums)):
        rows = part.stop - part.start
        if FEW * len(times) < len(sums):
            # How often each distinct pair is drawn is multinomial: the same chances as drawing groups one by one.
            drawn_sums, drawn_sizes = (generator.multinomial(len(sums), times / len(sums), rows) @ distinct).T
        else:
            # As many groups as there are, with replacement, for each sample.
            drawn = generator.integers(0, len(sums), (rows, len(sums)))
            drawn_sums, drawn_sizes = sums[drawn].sum(axis=1), sizes[drawn].sum(axis=1)
        means[part] = drawn_sums / drawn_sizes
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(values.mean()), float(low), float(high)


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of `rows` whose cells fit into memory."""
    step = max(1, CELLS // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _checked(values: np.ndarray, dimensions: int = 1) -> np.ndarray:
    """Values as floats. Raises ValueError where there are none, or not finite ones."""
    checked = np.asarray(values, dtype=float)
    if checked.ndim != dimensions:
        raise ValueError(f"values of shape {checked.shape} must have {dimensions} dimension(s), queries last")
    if not checked.size:
        raise ValueError("no queries to average over")
    if not np.isfinite(checked).all():
        raise ValueError("values hold NaN or infinity: leave out queries that have no value")
    return checked


def _sums(values_Q: np.ndarray, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and number of the queries of each group; every query is one where there are none."""
    if groups is None:
        return values_Q, np.ones(len(values_Q), dtype=np.int64)
    labels = np.asarray(groups)
    if len(labels) != len(values_Q):
        raise ValueError(f"groups names {len(labels):,} users for {len(values_Q):,} queries: give one a query")
    _, group = np.unique(labels, return_inverse=True)
    return np.bincount(group, weights=values_Q), np.bincount(group)


def _squared_error(values_Q: np.ndarray, groups: Groups) -> tuple[float, float]:
    """Squared standard error of the mean, and its degrees of freedom (groups less one).

    The error of a ratio of sums over groups (Cochran 1977, section 6.4): the sample variance over the number of
    queries where every query is its own group. With a single group nothing is known: infinite, with one degree.
    """
    sums, sizes = _sums(values_Q, groups)
    if len(sums) < 2:
        return math.inf, 1.0
    residual = sums - sizes * values_Q.mean()
    return float(residual @ residual * len(sums) / (len(sums) - 1) / sizes.sum() ** 2), len(sums) - 1.0


# ---- several seeds ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SeedVariance:
    """The mean over seeds and queries, and how far it would move with other users and with other seeds."""

    mean: float
    low: float
    high: float
    """Ends of the interval over both users and seeds."""
    error_users: float
    """Standard error from the users: these seeds, other users."""
    error_seeds: float
    """Standard error that the seeds add: these users, other seeds. 0 where seeds differ less than users explain."""


def seed_variance(values_SQ: np.ndarray, *, groups: Groups = None) -> SeedVariance:
    """Split the error of a mean over seeds and queries into what users and what seeds bring.

    Two-way random effects without replication: value = mean + seed + query + rest (the interaction). With mean squares
    MS of S seeds and Q queries, the variance of the mean is (MS_query + MS_seed - MS_rest) / SQ. Its first term,
    MS_query / SQ, is the squared error from users (it holds the rest, as resampling users would);
    (MS_seed - MS_rest) / SQ is the squared error from seeds, 0 where negative. With `groups` the mean squares over
    queries are those over whole users. The interval is Student's, with degrees of freedom by Satterthwaite (1946): with
    few seeds it is wide, as it should be. Source: Searle, Casella and McCulloch (1992), chapter 4.

    Raises ValueError for fewer than two seeds, which say nothing of seeds; use `bootstrap_interval` for one.

    >>> both = seed_variance(np.array([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 2.0, 2.0]]))  # seeds differ by 1 everywhere
    >>> both.mean, round(both.error_users, 4), both.error_seeds
    (1.0, 0.2887, 0.5)
    """
    values = _checked(values_SQ, 2)
    if len(values) < 2:
        raise ValueError(f"values of {len(values)} seed(s) tell no variance of seeds: give two runs at least")
    of_users, freedom = _squared_error(values.mean(axis=0), groups)
    of_seeds, terms = _seed_terms(values, groups)
    low, high = _student_interval(float(values.mean()), of_users + of_seeds, [(of_users, freedom), *terms])
    errors = {"error_users": math.sqrt(of_users), "error_seeds": math.sqrt(of_seeds)}
    return SeedVariance(mean=float(values.mean()), low=low, high=high, **errors)


Terms = list[tuple[float, float]]
"""Parts of an estimated variance, signs aside, with their degrees of freedom."""


def _seed_terms(values_SQ: np.ndarray, groups: Groups) -> tuple[float, Terms]:
    """Squared error of the mean from seeds, and the terms it was estimated from; nothing for a single seed."""
    seeds = len(values_SQ)
    if seeds < 2:
        return 0.0, []
    # How far the means of seeds lie apart, as a squared error of their mean.
    between = float(values_SQ.mean(axis=1).var(ddof=1)) / seeds
    # What neither the seed nor the query explains moves the means of seeds as well: it is subtracted.
    rest_SQ = values_SQ - values_SQ.mean(axis=0) - values_SQ.mean(axis=1, keepdims=True) + values_SQ.mean()
    errors = [_squared_error(rest_Q, groups) for rest_Q in rest_SQ]
    rest = sum(error for error, _ in errors) / (seeds * (seeds - 1))
    if not between > rest:
        return 0.0, []
    return between - rest, [(between, seeds - 1.0), (rest, (seeds - 1) * errors[0][1])]


def _freedom(squared_error: float, terms: Terms) -> float:
    """Degrees of freedom of a variance that is a sum or difference of terms (Satterthwaite 1946)."""
    spread = sum(term**2 / freedom for term, freedom in terms)
    return squared_error**2 / spread if 0 < spread < math.inf else 1.0


def _student_interval(mean: float, squared_error: float, terms: Terms) -> tuple[float, float]:
    """Student's 95 % interval of a mean."""
    half = float(stdtrit(_freedom(squared_error, terms), (1 + LEVEL) / 2)) * math.sqrt(squared_error)
    return mean - half, mean + half


# ---- two arms --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far arm a is above arm b on the same queries, and whether a report may claim it."""

    mean: float
    """Mean of a - b over queries."""
    low: float
    high: float
    """Ends of its 95 % interval."""
    p_value: float
    """Chance of a difference this large or larger, either way, if the arms were alike."""
    p_adjusted: float
    """The p value corrected for all comparisons of its table (`adjusted`); the same where it stands alone."""
    num_queries: int
    detectable: float | None
    """The smallest true difference that these queries find with 80 % power at a level of 5 %, before correction. None
    where it cannot be estimated: the arms differ by the same on all queries, or there is a single user."""

    @property
    def claim(self) -> bool:
        """Whether one arm may be said to beat the other: enough queries, and a corrected p value below 5 %."""
        return self.num_queries >= MIN_QUERIES and self.p_adjusted < ALPHA

    def reversed(self) -> Comparison:
        """The same comparison told from the other arm: b - a."""
        return replace(self, mean=-self.mean, low=-self.high, high=-self.low)


def compare_pair(
    values_a: np.ndarray,
    values_b: np.ndarray,
    *,
    groups: Groups = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    stochastic: tuple[bool, bool] = (True, True),
) -> Comparison:
    """Compare two arms on the same queries, in the same order: values of shape [Q], or [S, Q] for S training seeds.

    **One seed each**: the interval of the difference is a bootstrap's, and p is that of a permutation test with random
    sign flips (Fisher 1935; Noreen 1989): if the arms were alike, each user's difference could as well have the other
    sign. p = (b + 1) / (m + 1) with b of m `permutations` at least as far from 0 (Phipson and Smyth 2010), so it is
    never below 1 / (m + 1). Both hold for these two trained models on other users, not for the luck of training.

    **Several seeds of an arm**: the difference is that of the means over seeds, its error that of users (of the paired
    differences) and of the seeds of each arm together; interval and p are Student's (see `seed_variance`). Where the
    other arm has a single seed, but is `stochastic` (another one would change it), its seeds are taken to vary as those
    of the first: Student's test with samples of S and 1.

    The detectable difference is (z_0.975 + z_0.8) = 2.80 standard errors (Cohen 1988).

    Raises ValueError if the arms have different numbers of queries, none, or values that are not finite.

    >>> alike = compare_pair(np.array([0.5, 0.0]), np.array([0.5, 0.0]))
    >>> alike.mean, alike.p_value, alike.claim
    (0.0, 1.0, False)
    """
    a, b = (_checked(np.atleast_2d(values), 2) for values in (values_a, values_b))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{a.shape[1]:,} and {b.shape[1]:,} queries: both arms must have answered the same ones")
    difference_Q = a.mean(axis=0) - b.mean(axis=0)
    mean = float(difference_Q.mean())
    squared_error, terms = _difference_error(difference_Q, a, b, groups, stochastic)
    if len(a) == len(b) == 1:
        _, low, high = bootstrap_interval(difference_Q, groups=groups, seed=seed)
        p_value = _permutation_p(difference_Q, groups, permutations, seed)
    else:
        low, high = _student_interval(mean, squared_error, terms)
        p_value = _student_p(mean, squared_error, terms)
    normal = NormalDist()
    detectable = (normal.inv_cdf(1 - ALPHA / 2) + normal.inv_cdf(POWER)) * math.sqrt(squared_error)
    return Comparison(
        mean=mean,
        low=low,
        high=high,
        p_value=p_value,
        p_adjusted=p_value,
        num_queries=len(difference_Q),
        detectable=detectable if 0 < detectable < math.inf else None,
    )


def _difference_error(
    difference_Q: np.ndarray, a_SQ: np.ndarray, b_SQ: np.ndarray, groups: Groups, stochastic: tuple[bool, bool]
) -> tuple[float, Terms]:
    """Squared error of the mean difference of two arms, from users and from seeds, and the terms that it is made of."""
    of_users, freedom = _squared_error(difference_Q, groups)
    (seeds_a, terms_a), (seeds_b, terms_b) = (_seed_terms(values, groups) for values in (a_SQ, b_SQ))
    num_a, num_b = len(a_SQ), len(b_SQ)
    # An arm of one seed is taken to vary as the other does: a mean over one seed has S times the error of one over S.
    if num_a == 1 < num_b and stochastic[0]:
        seeds_a, terms_b = seeds_b * num_b, [(term * (1 + num_b), free) for term, free in terms_b]
    if num_b == 1 < num_a and stochastic[1]:
        seeds_b, terms_a = seeds_a * num_a, [(term * (1 + num_a), free) for term, free in terms_a]
    return of_users + seeds_a + seeds_b, [(of_users, freedom), *terms_a, *terms_b]


def _permutation_p(difference_Q: np.ndarray, groups: Groups, permutations: int, seed: int) -> float:
    """The p value of a test that flips the sign of each group's summed difference at random."""
    sums, _ = _sums(difference_Q, groups)
    total = sums.sum()
    # Additions in another order give the same sum but for rounding: such flips count as being as far from 0.
    least = abs(total) * (1 - 1e-9) - 1e-9
    # The sign of a 0 does not matter, and most are 0: both arms missed.
    moving = np.abs(sums[sums != 0])
    distinct, times = np.unique(moving.round(12), return_counts=True)
    generator = np.random.default_rng(seed)
    extreme = 0
    for part in _blocks(permutations, max(len(moving), 1)):
        rows = part.stop - part.start
        # `above` is the sum of what is positive after the flips, so the flipped sum is 2 * above - moving.sum().
        if FEW * len(times) < len(moving):
            # How many of each size stay positive is binomial: the same chances as flipping one by one.
            above = generator.binomial(times, 0.5, (rows, len(times))) @ distinct
        else:
            # One random bit for each sign.
            bits = np.frombuffer(generator.bytes(-(-rows * len(moving) // 8)), dtype=np.uint8)
            above = np.unpackbits(bits, count=rows * len(moving)).reshape(rows, len(moving)) @ moving
        extreme += int((np.abs(2 * above - moving.sum()) >= least).sum())
    return (extreme + 1) / (permutations + 1)


def _student_p(mean: float, squared_error: float, terms: Terms) -> float:
    """The two-sided p value of Student's test of a mean."""
    if squared_error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * stdtr(_freedom(squared_error, terms), -abs(mean) / math.sqrt(squared_error)))


# ---- many comparisons ------------------------------------------------------------------------------------------------


def compare_pairs(
    values: Mapping[str, np.ndarray],
    pairs: Sequence[tuple[str, str]],
    *,
    groups: Groups = None,
    seed: int = 0,
    stochastic: Mapping[str, bool],
) -> list[Comparison]:
    """`compare_pair` of the arms of each pair, by name, and Holm's correction over all of them.

    There are so many flips that the smallest p value stays small when it is corrected.
    """
    flips = max(PERMUTATIONS, 100 * len(pairs))
    return adjusted(
        [
            compare_pair(
                values[a],
                values[b],
                groups=groups,
                permutations=flips,
                seed=seed,
                stochastic=(stochastic[a], stochastic[b]),
            )
            for a, b in pairs
        ]
    )


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """p values adjusted so that the chance of any false claim among all of them stays below the level (Holm 1979).

    The i-th smallest of m is multiplied by m - i + 1, is at least the one before and at most 1. Order is kept.
    Raises ValueError for numbers outside 0..1.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, dtype=float)
    wrong = values[~((values >= 0) & (values <= 1))]
    if len(wrong):
        raise ValueError(f"p value {wrong[0]} must lie in 0..1")
    order = np.argsort(values, kind="stable")
    raised = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    result = np.empty_like(values)
    result[order] = np.minimum(raised, 1.0)
    return result


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of one table with `p_adjusted` by Holm's correction over all of them."""
    corrected = holm([comparison.p_value for comparison in comparisons])
    return [replace(c, p_adjusted=float(p)) for c, p in zip(comparisons, corrected, strict=True)]
