"""Warmup-Stable-Annealing: the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from cprec.errors import ConfigError

Shape = Literal["1-sqrt", "linear", "cosine", "exponential"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WSA:
    """Warm-up to the peak, a stable phase at it, annealing down to the floor.

    Source: CPRec (Ma et al. 2025) names the schedule; formulas are our reconstruction after MiniCPM's WSD (Hu et al.
    2024) and the 1-sqrt cooldown of Hägele et al. (2024). With W warm-up, A annealing steps of N, step t in 0..N-1:

        t < W            peak * (t + 1) / W
        W <= t < N - A   peak
        t >= N - A       floor + (peak - floor) * g(p),  p = (t - (N - A) + 1) / A in (0, 1]
        g(p)             1 - sqrt(p) | 1 - p | (1 + cos(pi p)) / 2;  exponential: peak * (floor / peak) ** p

    So the first step trains, the last warm-up step is at the peak and the last step exactly at the floor.

    Raises ConfigError if the phases do not fit the steps, or an exponential annealing has no floor above zero.
    """

    num_steps: int
    peak: float
    warmup_steps: int
    anneal_steps: int
    floor: float = 0.0
    shape: Shape = "1-sqrt"

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.warmup_steps < 0 or self.anneal_steps < 0:
            raise ConfigError(f"num_steps must be at least 1 and the phases at least 0, got {self}")
        if self.warmup_steps + self.anneal_steps > self.num_steps:
            raise ConfigError(
                f"warm-up ({self.warmup_steps}) and annealing ({self.anneal_steps}) take more than the "
                f"{self.num_steps} steps there are: lower one of them"
            )
        if not 0 <= self.floor <= self.peak:
            raise ConfigError(f"floor={self.floor} must lie in [0, peak={self.peak}]")
        if self.shape not in get_args(Shape):
            raise ConfigError(f"shape={self.shape!r} is not one of {', '.join(get_args(Shape))}")
        if self.shape == "exponential" and self.anneal_steps and self.floor == 0:
            raise ConfigError("exponential annealing needs a floor above zero")

    @classmethod
    def fractions(
        cls, num_steps: int, peak: float, *, warmup: float, anneal: float, floor_ratio: float, shape: Shape = "1-sqrt"
    ) -> WSA:
        """Phases as fractions of the steps; a warm-up above zero has at least one step."""
        warmup_steps = max(1, round(warmup * num_steps)) if warmup > 0 else 0
        anneal_steps = min(round(anneal * num_steps), max(0, num_steps - warmup_steps))
        return cls(
            num_steps=num_steps,
            peak=peak,
            warmup_steps=warmup_steps,
            anneal_steps=anneal_steps,
            floor=floor_ratio * peak,
            shape=shape,
        )

    @property
    def anneal_start(self) -> int:
        """The first annealing step; num_steps if there is none."""
        return self.num_steps - self.anneal_steps

    def __call__(self, step: int) -> float:
        """The learning rate of a step in 0..num_steps-1.

        >>> wsa = WSA(num_steps=10, peak=1.0, warmup_steps=2, anneal_steps=4, floor=0.1, shape="linear")
        >>> [round(wsa(step), 3) for step in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.775, 0.55, 0.325, 0.1]
        """
        if not 0 <= step < self.num_steps:
            raise ValueError(f"step {step} is outside 0..{self.num_steps - 1}")
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if step < self.anneal_start:
            return self.peak
        progress = (step - self.anneal_start + 1) / self.anneal_steps
        if self.shape == "exponential":
            return self.peak * (self.floor / self.peak) ** progress
        remaining = {
            "1-sqrt": 1 - math.sqrt(progress),
            "linear": 1 - progress,
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
        }[self.shape]
        return self.floor + (self.peak - self.floor) * remaining
