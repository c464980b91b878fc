"""How the loss falls with data: a power law through the ends of runs, L(D) = E + B D^-b.

The points must be ends of runs that were annealed alike. Checkpoints on the way of one run with a falling learning rate
are no such ends: late ones have a lower rate as well as more data, and the fit takes both for data. From one stable run
each point costs an annealing only (Hägele et al. 2024).

Suffix: P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.special import stdtrit

from cprec.errors import ConfigError

FEWEST = 4
"""Points of a fit: it finds three numbers, so that fewer say nothing of how well it fits."""
EXPONENTS = np.geomspace(0.01, 5, 120)
"""Where the search for the exponent begins."""


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class PowerLaw:
    """L(D) = E + B D^-b, for D tokens."""

    floor: Interval
    """E: what no amount of data takes away."""
    scale: Interval
    """B"""
    exponent: Interval
    """b"""
    error: float
    """The standard deviation of the points around the law."""

    def __call__(self, tokens: float) -> float:
        """The loss after so many tokens."""
        return float(self.floor.value + self.scale.value * tokens**-self.exponent.value)

    def __str__(self) -> str:
        return f"E = {self.floor}, B = {self.scale}, b = {self.exponent}"


def fit_power_law(tokens: Sequence[float], losses: Sequence[float], confidence: float = 0.95) -> PowerLaw:
    """The law through losses after so many tokens, by least squares, with E at least 0.

    The intervals are those of the linearised fit, by Student's t with as many degrees of freedom as there are points
    more than numbers to find; that of B is one of log B. So few points seldom tell E and b apart: the intervals then
    are wide, and are the answer.

    Raises ConfigError for fewer than `FEWEST` different numbers of tokens, for numbers of tokens that are not positive,
    for losses that are not finite, and where the loss does not fall.
    """
    token_P, loss_P = np.asarray(tokens, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if token_P.shape != loss_P.shape or len(np.unique(token_P)) < FEWEST:
        raise ConfigError(
            f"{len(np.unique(token_P))} different numbers of tokens and {len(loss_P)} losses: a power law has three "
            f"numbers to find, so give {FEWEST} points at least, a loss for each"
        )
    if not ((token_P > 0).all() and np.isfinite(token_P).all() and np.isfinite(loss_P).all()):
        raise ConfigError("tokens must be above 0, and losses finite")
    middle = np.log(token_P).mean()
    x_P = np.log(token_P) - middle  # so that B is told where the points are, and not at one token

    def law(found: np.ndarray) -> np.ndarray:
        floor, log_scale, exponent = found
        return np.asarray(floor + np.exp(log_scale - exponent * x_P))

    best = least_squares(
        lambda found: law(found) - loss_P,
        _start(x_P, loss_P),
        bounds=([0, -np.inf, 0], np.inf),
        **dict.fromkeys(("ftol", "xtol", "gtol"), 1e-12),
    )
    floor, _, exponent = best.x.round(9)  # a floor at its bound becomes 0
    freedom = len(loss_P) - 3
    error = np.sqrt(2 * best.cost / freedom)
    covariance = error**2 * np.linalg.pinv(best.jac.T @ best.jac)
    student = float(stdtrit(freedom, 0.5 + confidence / 2))
    # log B = log_scale + exponent * middle
    at_one = np.array([0.0, 1.0, middle])
    half = [student * np.sqrt(row @ covariance @ row) for row in (np.array([1.0, 0, 0]), at_one, np.array([0, 0, 1.0]))]
    log_b = at_one @ best.x
    with np.errstate(over="ignore"):  # where nothing is known of B its interval ends at infinity
        scale = np.exp([log_b, log_b - half[1], log_b + half[1]]).tolist()
    return PowerLaw(
        Interval(float(floor), float(max(floor - half[0], 0)), float(floor + half[0])),
        Interval(*scale),
        Interval(float(exponent), float(max(exponent - half[2], 0)), float(exponent + half[2])),
        float(error),
    )


def _start(x_P: np.ndarray, loss_P: np.ndarray) -> np.ndarray:
    """Floor, log of the scale and exponent: the best of some exponents, for each of which the others are linear."""
    found = []
    for exponent in EXPONENTS:
        columns = np.stack([np.ones_like(x_P), np.exp(-exponent * x_P)], axis=1)
        (floor, scale), *_ = np.linalg.lstsq(columns, loss_P, rcond=None)
        if scale > 0:
            squares = ((columns @ [floor, scale] - loss_P) ** 2).sum()
            found.append((squares, max(floor, 1e-9), np.log(scale), exponent))
    if not found:
        raise ConfigError("the loss does not fall with more tokens: there is no power law to fit")
    return np.array(min(found)[1:])
