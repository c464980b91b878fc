"""Warmup-Stable-Annealing: the learning rate as a pure function of how far training is, in steps or in tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from cprec.errors import ConfigError

Shape = Literal["1-sqrt", "linear", "cosine", "exponential"]
Unit = Literal["steps", "tokens"]
Kind = Literal["wsa", "constant_with_warmup", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WSA:
    """Warm-up to the peak, a stable phase at it, annealing down to the floor.

    Source: CPRec (Ma et al. 2025) names the schedule; formulas are our reconstruction after MiniCPM's WSD (Hu et al.
    2024) and the 1-sqrt cooldown of Hägele et al. (2024). Lengths are in one unit, steps or tokens. After x of `total`
    units, with W of warm-up and A of annealing, the rate of the step that ended there is

        x <= W              peak * x / W
        W < x <= total - A  peak
        x > total - A       floor + (peak - floor) * g(p),  p = (x - (total - A)) / A in (0, 1]
        g(p)                1 - sqrt(p) | 1 - p | (1 + cos(pi p)) / 2;  exponential: peak * (floor / peak) ** p

    So the first step trains, the last of the warm-up is at the peak and the last of all exactly at the floor.

    Raises ConfigError if the phases do not fit, or an exponential annealing has no floor above zero.
    """

    total: int
    peak: float
    warmup: int
    anneal: int
    floor: float = 0.0
    shape: Shape = "1-sqrt"

    def __post_init__(self) -> None:
        if self.total < 1 or self.warmup < 0 or self.anneal < 0:
            raise ConfigError(f"total must be at least 1 and the phases at least 0, got {self}")
        if self.warmup + self.anneal > self.total:
            raise ConfigError(
                f"warm-up ({self.warmup:,}) and annealing ({self.anneal:,}) take more than the {self.total:,} there "
                "are: lower one of them"
            )
        if not 0 <= self.floor <= self.peak:
            raise ConfigError(f"floor={self.floor} must lie in [0, peak={self.peak}]")
        if self.shape not in get_args(Shape):
            raise ConfigError(f"shape={self.shape!r} is not one of {', '.join(get_args(Shape))}")
        if self.shape == "exponential" and self.anneal and self.floor == 0:
            raise ConfigError("exponential annealing needs a floor above zero: raise min_lr_ratio")

    @property
    def anneal_start(self) -> int:
        """Where annealing begins; `total` if there is none."""
        return self.total - self.anneal

    def after(self, done: int) -> float:
        """The learning rate of the step that ends after `done` of the units, in 1..total.

        >>> wsa = WSA(total=10, peak=1.0, warmup=2, anneal=4, floor=0.1, shape="linear")
        >>> [round(wsa.after(done), 3) for done in range(1, 11)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]
        """
        if not 0 < done <= self.total:
            raise ValueError(f"{done:,} is outside 1..{self.total:,}")
        if done < self.warmup:
            return self.peak * done / self.warmup
        if done <= self.anneal_start:
            return self.peak
        progress = (done - self.anneal_start) / self.anneal
        if self.shape == "exponential":
            return self.peak * (self.floor / self.peak) ** progress
        remaining = {
            "1-sqrt": 1 - math.sqrt(progress),
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }[self.shape]
        return self.floor + (self.peak - self.floor) * remaining


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate of each optimizer step."""

    wsa: WSA
    after_step: Sequence[int]
    """Units done by the end of each step: 1, 2, ... where the unit is a step, else tokens."""

    def __call__(self, step: int) -> float:
        """The learning rate of a step in 0..num_steps-1."""
        if not 0 <= step < len(self.after_step):
            raise ValueError(f"step {step} is outside 0..{len(self.after_step) - 1}")
        return self.wsa.after(int(self.after_step[step]))


def make_schedule(
    kind: Kind,
    after_step: Sequence[int],
    peak: float,
    *,
    warmup_steps: int,
    anneal_steps: int,
    floor_ratio: float,
    shape: Shape,
) -> Schedule:
    """A schedule by its Hugging Face name over the units done by the end of each step.

    `wsa` has all three phases; `constant_with_warmup` is warm-up and stable only; `cosine` anneals by a cosine from the
    end of the warm-up on; `constant` is at the peak throughout.
    """
    num_steps = len(after_step)

    def units(steps: int) -> int:
        return int(after_step[steps - 1]) if steps else 0

    total = units(num_steps)
    warmup_steps = 0 if kind == "constant" else warmup_steps
    anneal_steps = {"wsa": anneal_steps, "cosine": num_steps - warmup_steps}.get(kind, 0)
    if warmup_steps + anneal_steps > num_steps:
        raise ConfigError(
            f"warm-up ({warmup_steps:,} steps) and annealing ({anneal_steps:,} steps) take more than the "
            f"{num_steps:,} steps there are: lower one of them"
        )
    return Schedule(
        WSA(
            total=total,
            peak=peak,
            warmup=units(warmup_steps),
            anneal=total - units(num_steps - anneal_steps),
            floor=floor_ratio * peak,
            shape="cosine" if kind == "cosine" else shape,
        ),
        after_step,
    )
