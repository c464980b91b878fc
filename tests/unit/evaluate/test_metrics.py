"""Metrics against values worked by hand and against a slow average over all orders of ties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cprec.evaluate.metrics import bootstrap_interval, ndcg, recall, reciprocal_rank


def one(function, better, tied, *arguments):
    return float(function(np.array([better]), np.array([tied]), *arguments)[0])


def test_known_values_without_ties() -> None:
    assert one(recall, 4, 1, 5) == 1 and one(recall, 5, 1, 5) == 0
    assert one(ndcg, 0, 1, 5) == 1
    assert one(ndcg, 1, 1, 5) == pytest.approx(1 / math.log2(3))
    assert one(reciprocal_rank, 3, 1) == pytest.approx(0.25)


def test_a_target_that_was_not_returned_is_a_miss() -> None:
    assert one(recall, 0, 0, 10) == one(ndcg, 0, 0, 10) == one(reciprocal_rank, 0, 0) == 0


def test_a_tie_of_three_across_the_cut_worked_by_hand() -> None:
    # the target's rank is 2, 3 or 4, each with probability 1/3; K is 3
    assert one(recall, 1, 3, 3) == pytest.approx(2 / 3)
    assert one(ndcg, 1, 3, 3) == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / 3)
    assert one(reciprocal_rank, 1, 3) == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)


@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=6), k=st.integers(1, 7), data=st.data())
def test_expected_values_equal_the_average_over_all_orders(scores, k, data) -> None:
    target = data.draw(st.integers(0, len(scores) - 1))
    ranks = []
    for order in itertools.permutations(range(len(scores))):
        ranked = sorted(order, key=lambda item: -scores[item])  # stable: ties keep the order of the permutation
        ranks.append(ranked.index(target) + 1)
    better = sum(score > scores[target] for score in scores)
    tied = scores.count(scores[target])
    assert one(recall, better, tied, k) == pytest.approx(np.mean([rank <= k for rank in ranks]))
    assert one(ndcg, better, tied, k) == pytest.approx(
        np.mean([1 / math.log2(rank + 1) if rank <= k else 0 for rank in ranks])
    )
    assert one(reciprocal_rank, better, tied) == pytest.approx(np.mean([1 / rank for rank in ranks]))


@given(better=st.integers(0, 100), tied=st.integers(0, 20), k=st.integers(1, 50))
def test_metrics_lie_in_0_1_and_grow_with_k(better, tied, k) -> None:
    for metric in (recall, ndcg):
        small, large = one(metric, better, tied, k), one(metric, better, tied, k + 1)
        assert 0 <= small <= large <= 1 + 1e-12
    assert one(ndcg, better, tied, k) <= one(recall, better, tied, k) + 1e-12


def test_bootstrap_interval_covers_the_mean_of_known_samples() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for number in range(100):
        _, low, high = bootstrap_interval(generator.random(200), samples=400, seed=number)
        covered += low <= 0.5 <= high
    assert 88 <= covered <= 100  # nominally 95; a binomial(100, 0.95) is in this range but for one time in 200


def test_bootstrap_interval_is_seeded_and_exact_for_constants() -> None:
    values = np.arange(10.0)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(np.full(7, 0.25)) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="no queries"):
        bootstrap_interval(np.array([]))
