"""The settings of a baseline as those see them who make and tune it, and the ranges that tuning may choose from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from cprec.scoring import ScoringRecommender
    from cprec.data.splits import Split


@dataclass(frozen=True, kw_only=True)
class Real:
    """Real numbers from low to high, both possible."""

    low: float
    """The smallest."""
    high: float
    """The largest."""
    log: bool = False
    """Even on a logarithmic scale, for what matters by its order of magnitude."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Whole numbers from low to high, both possible."""

    low: int
    """The smallest."""
    high: int
    """The largest."""
    log: bool = False
    """Even on a logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class OneOf:
    """Some values in no order."""

    values: tuple[str | int | float | bool, ...]
    """All of them."""


Choice = Real | Whole | OneOf


def can_be(choice: Choice, value: object) -> bool:
    """Whether a value is among those that tuning may choose.

    >>> can_be(Real(low=0.1, high=1), 0), can_be(OneOf(values=("a", "b")), "b")
    (False, True)
    """
    if isinstance(choice, OneOf):
        return value in choice.values
    return isinstance(value, (int, float)) and choice.low <= value <= choice.high


class Settings(Protocol):
    """The settings of a baseline: a frozen dataclass that makes its recommender."""

    SEARCH: ClassVar[Mapping[str, Choice]]
    """What tuning may choose, by the name of the field; empty where there is nothing to tune. A field whose value lies
    outside its range is part of what the baseline is, and stays as it is."""

    def make(self, split: Split, domain: str, *, seed: int = 0, folder: Path | None = None) -> ScoringRecommender:
        """A recommender for a domain, which has learnt from the training part of the split only.

        `seed` decides what is random in learning; `folder` is where one that is trained keeps its log and weights.
        Raises ConfigError where it cannot be made of this data.
        """
        ...
