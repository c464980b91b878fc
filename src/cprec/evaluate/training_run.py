"""A training run as its log tells it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

GENERAL_TEXT = "general text"
"""The held-out perplexity that is the forgetting meter; see `cprec.train.forgetting`."""
WARMUP, STABLE, ANNEALING = "warm-up", "stable", "annealing"

Points = Sequence[tuple[float, float]]
Phase = tuple[str, float, float]
"""A name, and the first and last tokens of what it names."""


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A run as its folder tells it; what the log lacks is left out of the report."""

    name: str
    records: Sequence[Mapping[str, Any]]
    """Lines of its log: step and tokens in all, then loss, learning_rate, heldout and so on, each in some."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """The content of `cprec.json`, once the run is finished."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps logged so far."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def num_tokens(self) -> int:
        """Tokens read so far."""
        return max((record["tokens"] for record in self.records), default=0)

    @property
    def seconds(self) -> float:
        """Training time; of an unfinished run by its last rate, NaN where it has none."""
        if "seconds" in self.about:
            return float(self.about["seconds"])
        rate = self.last("tokens_per_second")
        return self.num_tokens / rate if rate > 0 else math.nan

    def points(self, name: str) -> list[tuple[float, float]]:
        """The finite values of a field over tokens."""
        return _finite([(record["tokens"], record[name]) for record in self.records if name in record])

    def last(self, name: str) -> float:
        """The last finite value of a field; NaN where there is none."""
        points = self.points(name)
        return points[-1][1] if points else math.nan

    @cached_property
    def heldout(self) -> dict[str, list[tuple[float, float]]]:
        """Held-out perplexity over tokens, by domain and kind; the general text is not among them."""
        return {name: points for name, points in self.members("heldout").items() if name != GENERAL_TEXT}

    @cached_property
    def general_text(self) -> list[tuple[float, float]]:
        """Perplexity on the general text over tokens."""
        return self.members("heldout").get(GENERAL_TEXT, [])

    @property
    def mixture_asked(self) -> dict[str, float]:
        """The share of each group that the settings ask for, where the log has it."""
        return next((dict(record["mixture_asked"]) for record in self.records if "mixture_asked" in record), {})

    @cached_property
    def relative_forgetting(self) -> list[tuple[float, float]]:
        """Perplexity on the general text over tokens, as a multiple of the first."""
        start = self.general_text[0][1] if self.general_text else 0.0
        return [(tokens, value / start) for tokens, value in self.general_text] if start > 0 else []

    @property
    def forgetting(self) -> float:
        """The last perplexity on the general text over the first; NaN where it was not measured twice."""
        return self.relative_forgetting[-1][1] if len(self.relative_forgetting) > 1 else math.nan

    def members(self, name: str) -> dict[str, list[tuple[float, float]]]:
        """The finite values over tokens of each member of a field that is a mapping: `heldout` or `mixture`."""
        lines: dict[str, list[tuple[float, float]]] = {}
        for record in self.records:
            for member, value in (record.get(name) or {}).items():
                lines.setdefault(member, []).append((record["tokens"], value))
        return {member: _finite(points) for member, points in lines.items()}


def _finite(points: Sequence[tuple[float, Any]]) -> list[tuple[float, float]]:
    return [(x, float(y)) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y)]


def phases_of(learning_rates: Points) -> list[Phase]:
    """Where the rate rises to its peak, where it stays there, and where it falls: name, first and last tokens.

    A rate that never changes has no phases.

    >>> phases_of([(10, 0.5), (20, 1.0), (30, 1.0), (40, 1.0), (50, 0.4)])
    [('warm-up', 0, 20), ('stable', 20, 40), ('annealing', 40, 50)]
    >>> phases_of([(10, 1.0), (20, 1.0)])
    []
    """
    if not learning_rates:
        return []
    peak = max(rate for _, rate in learning_rates)
    at_peak = [place for place, (_, rate) in enumerate(learning_rates) if rate >= peak * (1 - 1e-9)]
    first, last, end = learning_rates[at_peak[0]][0], learning_rates[at_peak[-1]][0], learning_rates[-1][0]
    found: list[Phase] = [(WARMUP, 0, first)] if at_peak[0] else []
    if last > first:
        found.append((STABLE, first, last))
    if end > last:
        found.append((ANNEALING, last, end))
    return found if [name for name, _, _ in found] != [STABLE] else []
