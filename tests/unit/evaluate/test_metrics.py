"""Metrics against values worked by hand, a slow average over all orders of ties, and slow loops over pairs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from cprec.evaluate.metrics import coverage, first_k, gini, head, intra_list_diversity, novelty, tail_share, valid_ratio
from cprec.ranks import average_precision, ndcg, precision, recall, reciprocal_rank


def one(function, better, tied, *arguments):
    return float(function(np.array([better]), np.array([tied]), *arguments)[0])


def test_known_values_without_ties() -> None:
    assert one(recall, 4, 1, 5) == 1 and one(recall, 5, 1, 5) == 0
    assert one(ndcg, 0, 1, 5) == 1
    assert one(ndcg, 1, 1, 5) == pytest.approx(1 / math.log2(3))
    assert one(reciprocal_rank, 3, 1) == pytest.approx(0.25)
    assert one(reciprocal_rank, 3, 1, 4) == pytest.approx(0.25) and one(reciprocal_rank, 3, 1, 3) == 0
    assert one(precision, 4, 1, 5) == pytest.approx(0.2) and one(precision, 5, 1, 5) == 0
    assert one(average_precision, 2, 1, 3) == pytest.approx(1 / 3) and one(average_precision, 3, 1, 3) == 0


def test_a_target_that_was_not_returned_is_a_miss() -> None:
    assert one(recall, 0, 0, 10) == one(ndcg, 0, 0, 10) == one(reciprocal_rank, 0, 0) == 0
    assert one(precision, 0, 0, 10) == one(average_precision, 0, 0, 10) == one(reciprocal_rank, 0, 0, 10) == 0


def test_a_tie_of_three_across_the_cut_worked_by_hand() -> None:
    # the target's rank is 2, 3 or 4, each with probability 1/3; K is 3
    assert one(recall, 1, 3, 3) == pytest.approx(2 / 3)
    assert one(ndcg, 1, 3, 3) == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / 3)
    assert one(reciprocal_rank, 1, 3) == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert one(reciprocal_rank, 1, 3, 3) == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert one(average_precision, 1, 3, 3) == pytest.approx((1 / 2 + 1 / 3) / 3)
    assert one(precision, 1, 3, 3) == pytest.approx(2 / 9)


@pytest.mark.parametrize("metric", [recall, precision, ndcg, reciprocal_rank, average_precision])
def test_a_cut_below_1_is_refused_and_no_queries_give_no_values(metric) -> None:
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        one(metric, 0, 1, 0)
    assert metric(np.zeros(0, int), np.zeros(0, int), 5).shape == (0,)


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
    cut = np.mean([1 / rank if rank <= k else 0 for rank in ranks])
    assert one(reciprocal_rank, better, tied, k) == pytest.approx(cut)
    assert one(average_precision, better, tied, k) == pytest.approx(cut)
    assert one(precision, better, tied, k) == pytest.approx(np.mean([(rank <= k) / k for rank in ranks]))


@given(better=st.integers(0, 100), tied=st.integers(0, 20), k=st.integers(1, 50))
def test_metrics_lie_in_0_1_and_grow_with_k(better, tied, k) -> None:
    for metric in (recall, ndcg, reciprocal_rank, average_precision):
        small, large = one(metric, better, tied, k), one(metric, better, tied, k + 1)
        assert 0 <= small <= large <= 1 + 1e-12
    assert one(ndcg, better, tied, k) <= one(recall, better, tied, k) + 1e-12


def test_valid_ratio_counts_answers_with_an_item_that_may_be_named() -> None:
    assert valid_ratio(np.array([0, 1, 3, 0, 0])) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="no queries"):
        valid_ratio(np.array([]))


def test_first_k_keeps_the_order_of_each_list_wherever_its_entries_stand() -> None:
    assert first_k(np.array([1, 0, 1, 1, 0, 2]), 2).tolist() == [True, True, True, False, True, True]
    assert first_k(np.array([], dtype=int), 3).tolist() == []
    with pytest.raises(ValueError, match="k=0"):
        first_k(np.array([0]), 0)


def test_coverage_and_gini_worked_by_hand() -> None:
    assert coverage(np.array([3, 1, 3, 3]), 4) == 0.5
    assert coverage(np.array([], dtype=int), 4) == 0
    # shares 0.1, 0.3, 0.6: the mean absolute difference of two draws is 2/9 (0.2 + 0.5 + 0.3), halved over the mean 1/3
    assert gini(np.array([3, 6, 1])) == pytest.approx((0.2 + 0.5 + 0.3) / 9 / (1 / 3))
    assert gini(np.array([7])) == 0
    with pytest.raises(ValueError, match="num_items=0"):
        coverage(np.array([0]), 0)
    with pytest.raises(ValueError, match="at least one"):
        gini(np.zeros(3))


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any))
def test_gini_is_half_the_relative_mean_difference(counts) -> None:
    slow = np.mean([abs(a - b) for a in counts for b in counts]) / (2 * np.mean(counts))
    assert gini(np.array(counts)) == pytest.approx(slow, abs=1e-12)


def test_novelty_worked_by_hand() -> None:
    # of 16 users 16, 4 and 0 had the items: 0, 2 and, counted as one user, 4 bits
    lists, items, users = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 2, 2]), np.array([16, 4, 0])
    assert novelty(lists, items, 2, users, 16).tolist() == pytest.approx([1, (2 + 4 + 4) / 3])
    with pytest.raises(ValueError, match="num_users=15"):
        novelty(lists, items, 2, users, 15)


def test_the_head_is_a_fifth_of_the_items_rounded_up_and_ties_go_by_position() -> None:
    assert np.flatnonzero(head(np.array([0, 5, 5, 5, 1, 0]))).tolist() == [1, 2]  # a fifth of six is 1.2
    assert np.flatnonzero(head(np.arange(10))).tolist() == [8, 9]
    assert np.flatnonzero(head(np.arange(10), 0.5)).tolist() == [5, 6, 7, 8, 9]
    with pytest.raises(ValueError, match=r"share=1\.5"):
        head(np.arange(10), 1.5)
    popularity = np.arange(10)
    shares = tail_share(np.array([0, 0, 0, 0, 2]), np.array([9, 8, 7, 0, 9]), 3, popularity)
    assert shares.tolist() == pytest.approx([0.5, math.nan, 0.0], nan_ok=True)


def test_diversity_of_zero_rows_and_of_rows_that_are_not_of_length_1() -> None:
    vectors = csr_array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert intra_list_diversity(np.array([0, 0, 0]), np.array([0, 1, 2]), 1, vectors).tolist() == pytest.approx([2 / 3])
    with pytest.raises(ValueError, match="row 2 of vectors_ID has length 2"):
        intra_list_diversity(np.array([0]), np.array([0]), 1, csr_array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]))


@given(seed=st.integers(0, 1000), lists=st.lists(st.lists(st.integers(0, 5), unique=True, max_size=5), max_size=4))
def test_diversity_equals_a_loop_over_pairs(seed, lists) -> None:
    vectors = np.random.default_rng(seed).random((6, 3)) + 0.01
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    list_N = np.array([number for number, items in enumerate(lists) for _ in items], dtype=int)
    item_N = np.array([item for items in lists for item in items], dtype=int)
    slow = [
        np.mean([1 - vectors[a] @ vectors[b] for a, b in itertools.combinations(items, 2)])
        if len(items) > 1
        else math.nan
        for items in lists
    ]
    fast = intra_list_diversity(list_N, item_N, len(lists), csr_array(vectors))
    assert fast.tolist() == pytest.approx(slow, abs=1e-12, nan_ok=True)
