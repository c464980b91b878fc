"""How well another policy would have done, from the log of one that chose at random with known chances.

    inverse propensity    mean of w r, with w = chance that the policy shows the same / propensity
    self-normalised       sum of w r / sum of w
    replay                mean of r over the events in which the policy chooses the same, and learns from them

The first is unbiased (Horvitz and Thompson 1952), the second nearly so, with less variance (Swaminathan and Joachims
2015). Replay (Li et al. 2011) is for policies that learn as they go, and needs a log in which all was shown with one
chance; a policy that does not learn has the same self-normalised estimate. All of it holds only for what the log's
policy could show: `possible` says it, and anything else is refused. Without it the mean of w tells: it is 1 in
expectation, less the share of such choices. Suffixes: N events, P places, V items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cprec.errors import DataError
from cprec.evaluate.statistics import SAMPLES, Groups, bootstrap_interval

ROUNDING = 1e-6
"""By how much chances may be off."""


class Log:
    """What was shown, with which chance (`propensity`, float[N]), and what came of it (`reward`, float[N])."""

    def __init__(
        self, shown: np.ndarray, propensity: np.ndarray, reward: np.ndarray, *, possible: np.ndarray | None = None
    ) -> None:
        """`shown` has items by number, int64[N], or whole slates, int64[N, P]. `possible` are the items that could be
        shown: bool[V], or bool[N, V] if it varies. Raises DataError for what is not so."""
        self.shown, self.reward = np.asarray(shown), np.asarray(reward, dtype=float)
        self.propensity = np.asarray(propensity, dtype=float)  # None becomes NaN
        size = len(self.shown)
        if not size or not self.propensity.shape == self.reward.shape == (size,):
            raise DataError(
                f"{size} events, propensities of shape {self.propensity.shape}, rewards of shape {self.reward.shape}: "
                "expected one or more events with one number of each"
            )
        is_chance = (self.propensity > 0) & (self.propensity <= 1)
        _refuse(~is_chance, self.propensity, "propensity", "the chance of what was shown is above 0 and at most 1")
        _refuse(~np.isfinite(self.reward), self.reward, "reward", "leave out events whose reward is not known")
        self.possible = None if possible is None else np.broadcast_to(possible, (size, np.shape(possible)[-1]))
        for event in range(size):
            self.check_possible(event, self.shown[event])

    def check_possible(self, event: int, items: np.ndarray | int) -> None:
        """Raises DataError for items that the log's policy could never show then."""
        if self.possible is not None and not np.isin(items, np.flatnonzero(self.possible[event])).all():
            raise DataError(
                f"event {event}: the log's policy could never show all of {items}, so the log cannot tell what comes "
                "of it: leave out such items"
            )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The mean reward of a policy, and how much of the log tells it."""

    value: float
    low: float
    high: float
    """Ends of its 95 % bootstrap interval, over events or over users."""
    num_events: int
    """Events that the policy could have had."""
    effective: float
    """The number of equally weighted events with the same variance: (sum of w)^2 / sum of w^2 (Kish 1965)."""
    mean_weight: float
    """Far from 1 where propensities are wrong, or the log's policy could not show what the other one shows."""


def inverse_propensity(
    log: Log, chance: np.ndarray, *, normalised: bool = False, groups: Groups = None, samples: int = SAMPLES
) -> Estimate:
    """The mean reward of a policy that does not learn. `chance` is its chance of showing what was shown, float[N], or
    each item, float[N, V]; only then can `possible` be checked. `groups` are the users of events.

    Raises DataError for chances that are none, for items that could never be shown, and where nothing was shown that
    the policy shows.
    """
    chance = np.asarray(chance, dtype=float)
    by_item = chance.ndim == 2 and log.shown.shape == chance.shape[:1]
    if by_item and 0 <= log.shown.min() <= log.shown.max() < chance.shape[1]:
        _refuse(~(abs(chance.sum(1) - 1) <= ROUNDING), chance.sum(1), "sum of all items' chances", "expected 1")
        for event, chance_V in enumerate(chance if log.possible is not None else ()):
            log.check_possible(event, np.flatnonzero(chance_V))
        chance = chance[np.arange(len(chance)), log.shown]
    if chance.shape != log.propensity.shape:
        raise DataError(f"chances of shape {chance.shape} for shown ones of {log.shown.shape}: expected N, or N and V")
    _refuse(~((chance >= 0) & (chance <= 1)), chance, "chance", "a probability is expected")
    return _estimate(log, chance / log.propensity, normalised, groups, samples)


def replay(
    log: Log,
    choose: Callable[[int], np.ndarray | int],
    learn: Callable[[int], None] = lambda event: None,
    *,
    groups: Groups = None,
    samples: int = SAMPLES,
) -> Estimate:
    """The mean reward of a policy that learns, while it learns from as many events as are used. `choose` is asked for
    an item or a slate at each event, by number; where it is the one shown, the event goes to `learn`. The interval
    takes events as independent.

    Raises DataError for propensities that differ, choices that could never be shown, and no choice that was shown.
    """
    least, most = log.propensity.min(), log.propensity.max()
    if most > least * (1 + ROUNDING):
        raise DataError(f"propensities are {least:.4g} to {most:.4g}, and replay needs equal: take inverse_propensity")
    matched_N = np.zeros(len(log.shown))
    for event, shown in enumerate(log.shown):
        chosen = choose(event)
        log.check_possible(event, chosen)
        if np.array_equal(chosen, shown):
            matched_N[event] = 1
            learn(event)
    return _estimate(log, matched_N / log.propensity, True, groups, samples)


def _estimate(log: Log, weight_N: np.ndarray, normalised: bool, groups: Groups, samples: int) -> Estimate:
    total, values_N = weight_N.sum(), weight_N * log.reward
    if not total > 0:
        raise DataError(f"the policy would have shown nothing of the {len(weight_N):,} shown: the log cannot judge it")
    if normalised:  # the ratio as the mean of its linear approximation (Cochran 1977, section 6.4)
        ratio = values_N.sum() / total
        values_N = ratio + weight_N * (log.reward - ratio) / weight_N.mean()
    value, low, high = bootstrap_interval(values_N, groups=groups, samples=samples)
    num_events, effective = int((weight_N > 0).sum()), float(total**2 / (weight_N**2).sum())
    return Estimate(
        value=value, low=low, high=high, num_events=num_events, effective=effective, mean_weight=float(weight_N.mean())
    )


def _refuse(wrong_N: np.ndarray, values_N: np.ndarray, name: str, accepted: str) -> None:
    for event in np.flatnonzero(wrong_N)[:1]:
        raise DataError(f"{name} of event {event} is {values_N[event]}: {accepted} ({wrong_N.sum():,} such events)")
