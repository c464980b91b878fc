"""The sentence at the end: the model is worth having, it is not, or nobody knows."""

from __future__ import annotations

import pytest

from cprec.evaluate.results import FULL, Arm, Cost, Difference, DomainResult, Interval, Kind, Metric
from cprec.evaluate.statistics import Comparison
from cprec.fit.answer import answer

NDCG, RECALL = Metric("ndcg", 10, FULL), Metric("recall", 10, FULL)


def arm(name: str, kind: Kind, ndcg: float) -> Arm:
    cells = {NDCG: Interval(ndcg, 0, 1), RECALL: Interval(2 * ndcg, 0, 1)}
    return Arm(name=name, kind=kind, metrics=cells, seconds={FULL: 1.0}, cost=Cost(milliseconds_per_query=1.0))


def result(low: float, high: float, *, num_queries: int = 2000) -> DomainResult:
    mean = (low + high) / 2
    arms = [arm("popularity", "baseline", 0.04), arm("EASE", "baseline", 0.08), arm("oracle", "bound", 0.9)]
    test = Comparison(
        mean=mean, low=low, high=high, p_value=0.01, p_adjusted=0.02, num_queries=num_queries, detectable=None
    )
    return DomainResult(
        domain="shop",
        num_items=100,
        num_queries=num_queries,
        certified=True,
        main=NDCG,
        pools={},
        arms={one.name: one for one in [*arms, arm("the model", "model", 0.08 + mean)]},
        differences=[Difference(a="EASE", b="the model", metric=NDCG, test=test.reversed())],
    )


@pytest.mark.parametrize(
    ("told", "begins", "holds"),
    [
        (
            result(0.004, 0.012),
            "Use the model: its lists of ten are 10% better (95 % interval 5% to 15%)",
            "176 of 1,000",
        ),
        (result(-0.002, 0.004), "Use EASE: the simple recommender is enough", "interval -0.0020 to +0.0040"),
        (result(-0.012, -0.004), "Use EASE: the simple recommender is better than the model", "for 160 of 1,000"),
        (
            result(0.004, 0.012, num_queries=250),
            "the model seems better",
            "250 customers are too few to be sure: use EASE",
        ),
    ],
)
def test_the_sentence(told: DomainResult, begins: str, holds: str) -> None:
    sentence = answer(told)
    assert sentence.startswith(begins) and holds in sentence
    assert sentence.endswith(".") and "\n" not in sentence
