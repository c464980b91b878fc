"""Intervals and tests against values worked by hand, and against worlds whose true variances are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cprec.evaluate import statistics
from cprec.evaluate.statistics import MIN_QUERIES, adjusted, bootstrap_interval, compare_pair, holm, seed_variance


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
    with pytest.raises(ValueError, match="NaN or infinity"):
        bootstrap_interval(np.array([0.0, math.nan]))


def test_queries_of_one_user_are_resampled_together() -> None:
    values = np.random.default_rng(1).random(40)
    alone = bootstrap_interval(values)
    fourfold = bootstrap_interval(np.repeat(values, 4), groups=[f"u{n:02}" for n in range(40) for _ in range(4)])
    assert fourfold == pytest.approx(alone)  # four equal queries of a user tell no more than one
    independent = bootstrap_interval(np.repeat(values, 4))
    assert independent[2] - independent[1] < 0.6 * (alone[2] - alone[1])
    with pytest.raises(ValueError, match="names 3 users for 40 queries"):
        bootstrap_interval(values, groups=["a", "b", "c"])


def test_a_user_with_many_queries_weighs_as_many() -> None:
    # users a (1, 1, 1) and b (0): draws aa, ab, ba, bb have the means 1, 3/4, 3/4 and 0
    mean, low, high = bootstrap_interval(np.array([1.0, 1.0, 1.0, 0.0]), groups=["a", "a", "a", "b"])
    assert (mean, low, high) == (0.75, 0.0, 1.0)


def test_five_equal_differences_have_the_p_value_of_a_sign_test() -> None:
    comparison = compare_pair(np.full(5, 0.7), np.full(5, 0.2))
    assert comparison.mean == pytest.approx(0.5)
    assert comparison.p_value == pytest.approx(2 / 32, abs=0.01)  # all five signs alike: two of 32 ways
    assert compare_pair(np.full(5, 0.2), np.full(5, 0.7)) == comparison.reversed()
    assert comparison.reversed().mean == pytest.approx(-0.5) and comparison.reversed().reversed() == comparison
    clustered = compare_pair(np.full(5, 0.7), np.full(5, 0.2), groups=["u"] * 5)
    assert clustered.p_value == 1 and clustered.detectable is None  # one user shows nothing


def test_queries_that_both_arms_miss_do_not_change_the_p_value_much() -> None:
    a, b = np.zeros(3000), np.zeros(3000)
    a[:5] = 1
    assert compare_pair(a, b).p_value == pytest.approx(2 / 32, abs=0.01)


def test_the_permutation_test_is_seeded_bounded_in_memory_and_never_zero(monkeypatch) -> None:
    generator = np.random.default_rng(2)
    b = generator.random(500)
    a = b + 0.3 + 0.1 * generator.random(500)
    once = compare_pair(a, b, seed=5)
    assert once == compare_pair(a, b, seed=5)
    assert once.p_value == 1 / (statistics.PERMUTATIONS + 1)
    mixed = generator.normal(0.05, 1, 500)
    whole = compare_pair(mixed, np.zeros(500)).p_value
    monkeypatch.setattr(statistics, "CELLS", 7_000)  # 14 flips at a time
    assert compare_pair(mixed, np.zeros(500)).p_value == pytest.approx(whole, abs=0.02)


def test_arms_that_are_alike_are_told_apart_at_the_rate_of_the_level() -> None:
    generator = np.random.default_rng(3)
    found = sum(compare_pair(*generator.random((2, 60)), seed=n).p_value < 0.05 for n in range(200))
    assert 2 <= found <= 21  # binomial(200, 0.05) is in this range but for one time in 500


def test_what_could_be_detected_worked_by_hand() -> None:
    # differences 1, -1, 1, -1: variance 4/3, squared error of the mean 1/3; 1.9600 + 0.8416 errors are found in 80 %
    comparison = compare_pair(np.array([1.0, 0.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0, 1.0]))
    assert comparison.detectable == pytest.approx((1.95996 + 0.84162) / math.sqrt(3), abs=1e-4)


def test_a_difference_of_the_detectable_size_is_found_four_times_in_five() -> None:
    generator = np.random.default_rng(4)
    size = compare_pair(generator.normal(0, 1, 10_000), np.zeros(10_000), permutations=99).detectable * 10  # for 100
    tests = (compare_pair(generator.normal(size, 1, 100), np.zeros(100), permutations=999) for _ in range(150))
    found = sum(test.p_value < 0.05 for test in tests)
    assert 105 <= found <= 135  # binomial(150, 0.8) is in this range but for one time in 400


@pytest.mark.parametrize(("queries", "claimed"), [(MIN_QUERIES, True), (MIN_QUERIES - 1, False)])
def test_no_claim_under_1000_queries(queries: int, claimed: bool) -> None:
    comparison = compare_pair(np.ones(queries), np.zeros(queries))
    assert comparison.p_value < 0.001
    assert comparison.claim is claimed


def test_a_claim_needs_the_p_value_of_its_whole_table() -> None:
    a, b = np.zeros(1000), np.zeros(1000)
    a[:30], b[30:45] = 1, 1  # 30 wins and 15 losses: 36 in 1,000 sign tests of 45 are as uneven
    one = compare_pair(a, b)
    assert one.p_value == pytest.approx(0.036, abs=0.006) and one.claim
    table = adjusted([one] * 40)
    assert all(c.p_adjusted == pytest.approx(min(1, 40 * one.p_value)) and not c.claim for c in table)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2 queries"):
        compare_pair(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="no queries"):
        compare_pair(np.zeros(0), np.zeros(0))


def test_one_seed_beside_several_is_given_their_luck() -> None:
    # Seed means 0.2, 0.3, 0.4 on every query: variance 0.01, so the mean of three errs by 0.01 / 3 and one by 0.01
    three, one = np.array([[0.2], [0.3], [0.4]]) + np.zeros((3, 2000)), np.full(2000, 0.1)
    normal = 1.95996 + 0.84162
    assert compare_pair(three, one).detectable == pytest.approx(normal * math.sqrt(0.01 / 3 + 0.01), abs=1e-4)
    assert compare_pair(one, three) == compare_pair(three, one).reversed()
    alone = compare_pair(three, one, stochastic=(True, False))  # popularity, say
    assert alone.detectable == pytest.approx(normal * math.sqrt(0.01 / 3), abs=1e-4)


def test_one_seed_against_several_is_told_apart_at_the_rate_of_the_level() -> None:
    generator = np.random.default_rng(7)
    found = 0
    for _ in range(300):
        users = generator.normal(0, 0.3, 200)
        a, b = (users + generator.normal(0, 0.03, (n, 1)) + generator.normal(0, 0.2, (n, 200)) for n in (4, 1))
        found += compare_pair(a, b).p_value < 0.05
    assert 4 <= found <= 27  # binomial(300, 0.05) is in this range but for one time in 1,000; without it there are 60


def test_holm_worked_by_hand() -> None:
    assert holm([0.02, 0.01, 0.9, 0.03]).tolist() == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.6, 0.7]).tolist() == [1, 1]
    assert holm([]).tolist() == []
    with pytest.raises(ValueError, match=r"p value 1\.2"):
        holm([0.1, 1.2])


def test_errors_of_users_and_seeds_worked_by_hand() -> None:
    # mean squares over 2 seeds and 3 queries: seeds 3/2, queries 1/2, rest 1/2
    both = seed_variance(np.array([[0.0, 0.0, 0.0], [1.0, 2.0, 0.0]]))
    assert both.mean == 0.5
    # seeds: 3 * 2 * 0.25 / 1 = 1.5; query means 0.5, 1, 0: 2 * 0.5 / 2 = 0.5; rest: 4 * 0.25 / 2 = 0.5
    assert both.error_users == pytest.approx(math.sqrt(0.5 / 6))
    assert both.error_seeds == pytest.approx(math.sqrt((1.5 - 0.5) / 6))
    # Satterthwaite: (1.5 / 6)^2 / ((0.5 / 6)^2 / 2 + (1.5 / 6)^2 / 1 + (0.5 / 6)^2 / 2) = 0.9 degrees
    assert both.high - both.low > 2 * 12.7 * 0.5  # wider than Student's with one degree: two seeds tell next to nothing


def test_seeds_that_only_reorder_queries_add_no_error() -> None:
    both = seed_variance(np.array([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]]))
    assert both.error_seeds == 0
    with pytest.raises(ValueError, match="1 seed"):
        seed_variance(np.zeros((1, 5)))
    with pytest.raises(ValueError, match="2 dimension"):
        seed_variance(np.zeros(5))


@pytest.mark.parametrize("per_user", [1, 3])
def test_estimated_errors_are_those_of_the_world_they_come_from(per_user: int) -> None:
    """Four seeds (variance 0.5), 30 users (variance 2) with queries of their own, interaction by user (1)."""
    generator = np.random.default_rng(7)
    groups = np.repeat(np.arange(30), per_user)
    results = []
    for _ in range(400):
        by_user = generator.normal(0, math.sqrt(2), 30) + generator.normal(0, 1, (4, 30))
        values = np.repeat(by_user, per_user, axis=1) + generator.normal(0, math.sqrt(0.5), (4, 1))
        results.append(seed_variance(values, groups=groups))
    assert np.mean([r.error_users**2 for r in results]) == pytest.approx((2 + 1 / 4) / 30, rel=0.05)
    assert np.mean([r.error_seeds**2 for r in results]) == pytest.approx(0.5 / 4, rel=0.12)
    assert np.mean([r.low <= 0 <= r.high for r in results]) == pytest.approx(0.95, abs=0.03)


def test_a_comparison_of_several_seeds_holds_their_error() -> None:
    generator = np.random.default_rng(8)
    users = generator.normal(0, 0.1, 2000)
    luck = np.array([[-0.05], [0.0], [0.06]])
    a, b = users + luck + 0.02, users + generator.normal(0, 0.1, 2000)
    single = compare_pair(a[2], b)
    assert single.claim  # one lucky seed
    several = compare_pair(a, b)
    assert several.mean == pytest.approx(0.02 + 0.01 / 3, abs=0.01)
    assert several.low < 0 < several.high and several.p_value > 0.05 and not several.claim
    assert several.detectable > 0.05 > single.detectable
    same = compare_pair(np.ones((2, 4)), np.zeros((2, 4)))
    assert (same.low, same.high, same.p_value) == (1, 1, 0)
    assert compare_pair(np.ones((2, 4)), np.ones((3, 4))).p_value == 1


@pytest.mark.parametrize("users", [None, 300])
def test_drawing_values_by_how_often_they_occur_changes_no_chance(users, monkeypatch) -> None:
    generator = np.random.default_rng(9)
    a, b = generator.choice([0, 0, 0.5, 1], (2, 900))
    groups = None if users is None else np.repeat(np.arange(users), 900 // users)
    often = compare_pair(a, b, groups=groups)
    monkeypatch.setattr(statistics, "FEW", 1000)  # each user is drawn for itself
    singly = compare_pair(a, b, groups=groups)
    assert often != singly
    assert often.p_value == pytest.approx(singly.p_value, abs=0.02)
    assert (often.low, often.high) == pytest.approx((singly.low, singly.high), abs=0.003)
