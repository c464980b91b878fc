"""The end of `cprec fit`: one sentence that says which recommender to use."""

from __future__ import annotations

from dataclasses import replace

from cprec.evaluate.results import Arm, Difference, DomainResult
from cprec.evaluate.statistics import MIN_QUERIES


def answer(result: DomainResult) -> str:
    """Which recommender to use, and how much better than the best simple one it is on the same customers.

    Raises ValueError for a result without a model or without a baseline.
    """
    model, simple = _best(result, "model"), _best(result, "baseline")
    told = _difference(result, model.name, simple.name)
    means = f"NDCG@10 {_mean(result, model):.4f} against {_mean(result, simple):.4f}"
    if told.test.low > 0 and result.num_queries >= MIN_QUERIES:
        return (
            f"Use {model.name}: its lists of ten are {_gain(told, _mean(result, simple))} than those of the best "
            f"simple recommender, {simple.name} ({means}); the item that a customer took next is among the ten for "
            f"{_found(result, model)} of 1,000 customers, against {_found(result, simple)}."
        )
    if told.test.low > 0:
        return (
            f"{model.name} seems better than the best simple recommender, {simple.name} ({means}), but "
            f"{result.num_queries:,} customers are too few to be sure: use {simple.name}, and try again with a log of "
            f"more than {MIN_QUERIES:,} customers."
        )
    why = "is better than" if told.test.high < 0 else "is enough, because no gain over it is shown by"
    return (
        f"Use {simple.name}: the simple recommender {why} {model.name} ({means}; difference {told.test.mean:+.4f}, "
        f"95 % interval {told.test.low:+.4f} to {told.test.high:+.4f}); it finds the item that a customer took next "
        f"among ten for {_found(result, simple)} of 1,000 customers."
    )


def _best(result: DomainResult, kind: str) -> Arm:
    return max((arm for arm in result.arms.values() if arm.kind == kind), key=lambda arm: _mean(result, arm))


def _mean(result: DomainResult, arm: Arm) -> float:
    return arm.metrics[result.main].mean


def _found(result: DomainResult, arm: Arm) -> int:
    """Of 1,000 customers, those whose next item is in the list."""
    return round(1000 * arm.metrics[replace(result.main, name="recall")].mean)


def _difference(result: DomainResult, a: str, b: str) -> Difference:
    """a less b, as the report has it, whichever of them it names first."""
    for line in result.differences:
        if (line.a, line.b) == (a, b):
            return line
        if (line.a, line.b) == (b, a):
            return replace(line, a=a, b=b, test=line.test.reversed())
    raise ValueError(f"the report does not compare {a} with {b}")


def _gain(told: Difference, simple: float) -> str:
    """A difference as a share of what the simple recommender reaches."""
    if not simple:
        return f"better by {told.test.mean:.4f} (95 % interval {told.test.low:.4f} to {told.test.high:.4f})"
    mean, low, high = (f"{value / simple:.0%}" for value in (told.test.mean, told.test.low, told.test.high))
    return f"{mean} better (95 % interval {low} to {high})"
