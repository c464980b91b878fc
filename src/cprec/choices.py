"""Ranges that tuning may choose settings from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Real:
    """Real numbers from low to high, both possible; with `log` even on a logarithmic scale."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Whole numbers from low to high, both possible; with `log` even on a logarithmic scale."""

    low: int
    high: int
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class OneOf:
    """Some values in no order."""

    values: tuple[str | int | float | bool, ...]


Choice = Real | Whole | OneOf


def can_be(choice: Choice, value: object) -> bool:
    """Whether a value is among those that tuning may choose.

    >>> can_be(Real(low=0.1, high=1), 0), can_be(OneOf(values=("a", "b")), "b")
    (False, True)
    """
    if isinstance(choice, OneOf):
        return value in choice.values
    return isinstance(value, (int, float)) and choice.low <= value <= choice.high
