"""Diag-LinUCB: sums, scores and clusters by hand, and by LinUCB with whole matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cprec.errors import ConfigError, DataError
from cprec.online.bandit import DiagLinUCB, UserClusters, cluster_users

TWO = UserClusters(np.array([[-1.0], [1.0]]), 2, 4.0)
"""Users at 0 have half their weight on each; the weights of others differ by exp(4 x / 4)."""


def users(*places: float) -> np.ndarray:
    return np.array(places)[:, None]


# ---- clusters --------------------------------------------------------------------------------------------------------


def test_weights_are_a_softmax_of_squared_distances() -> None:
    """From 1/2 the squared distances are 9/4 and 1/4, so over 4 the logits differ by 1/2."""
    cluster_UM, weight_UM = TWO.weights(users(0.0, 0.5))
    assert cluster_UM.tolist() == [[0, 1], [1, 0]]
    near = 1 / (1 + math.exp(-0.5))
    np.testing.assert_allclose(weight_UM, [[0.5, 0.5], [near, 1 - near]])


def test_only_the_nearest_have_weight() -> None:
    centre_KD = np.random.default_rng(0).normal(size=(9, 3))
    users_UD = np.random.default_rng(1).normal(size=(20, 3))
    cluster_UM, weight_UM = UserClusters(centre_KD, 4, 0.7).weights(users_UD)
    distance_UK = ((users_UD[:, None] - centre_KD) ** 2).sum(2)
    for user, distance_K in enumerate(distance_UK):
        nearest = sorted(range(9), key=distance_K.__getitem__)[:4]
        weight = np.exp(-distance_K[nearest] / 0.7)
        assert cluster_UM[user].tolist() == nearest
        np.testing.assert_allclose(weight_UM[user], weight / weight.sum())


def test_groups_of_users_are_found_whatever_their_scale() -> None:
    """Three groups at the corners of a triangle; the temperature is the mean squared distance from their centres."""
    generator = np.random.default_rng(0)
    group_U = np.repeat([0, 1, 2], 30)
    spread_UD = generator.normal(size=(90, 2)) * 0.1
    corners = np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    for scale in (1.0, 1000.0):
        users_UD = (corners[group_U] + spread_UD) * scale
        clusters = cluster_users(users_UD, 3, 1, seed=0)
        own_U = clusters.weights(users_UD)[0][:, 0]
        assert len({(own, group) for own, group in zip(own_U, group_U, strict=True)}) == 3
        means_KD = np.array([users_UD[own_U == cluster].mean(0) for cluster in range(3)])
        np.testing.assert_allclose(clusters.centre_KD, means_KD)
        assert clusters.temperature == pytest.approx(((users_UD - means_KD[own_U]) ** 2).sum(1).mean())


def test_every_user_may_be_a_cluster() -> None:
    clusters = cluster_users(users(3.0, 1.0, 2.0), 3, 1)
    assert sorted(clusters.centre_KD[:, 0]) == [1.0, 2.0, 3.0] and clusters.temperature == 1.0


@pytest.mark.parametrize(("num_clusters", "num_nearest"), [(3, 1), (2, 3), (0, 0), (2, 0)])
def test_settings_that_do_not_fit_the_users_are_refused(num_clusters: int, num_nearest: int) -> None:
    with pytest.raises(ConfigError, match=f"num_nearest={num_nearest} and num_clusters={num_clusters} for 2 different"):
        cluster_users(users(1.0, 1.0, 2.0), num_clusters, num_nearest)


def test_other_bad_clusters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"temperature=0.0 must be above 0"):
        cluster_users(users(1.0, 2.0), 2, 1, 0.0)
    with pytest.raises(DataError, match=r"shape \(2,\): expected one row a user"):
        cluster_users(np.ones(2), 1, 1)
    with pytest.raises(DataError, match="the vector of user 1 is not finite"):
        cluster_users(users(1.0, np.nan), 1, 1)
    with pytest.raises(DataError, match=r"shape \(1, 2\): expected one row a user, of width 1"):
        TWO.weights(np.ones((1, 2)))


# ---- what is learnt --------------------------------------------------------------------------------------------------


def test_sums_and_scores_by_hand() -> None:
    """A user with half the weight on each of two clusters gave item 1 the rewards 1, 1 and 0: for both edges n = 3/4
    and b = 1, so that t = 1 / (1 + 3/4) = 4/7. The mean is 4/7; the variance 2 * 1/4 / (7/4) = 2/7. Without events the
    mean is 0 and the variance 1/2."""
    bandit = DiagLinUCB(TWO, 3)
    bandit.update(users(0.0, 0.0, 0.0), np.array([1, 1, 1]), np.array([1.0, 1.0, 0.0]))
    assert bandit.count_KV.tolist() == [[0, 0.75, 0]] * 2
    assert bandit.reward_KV.tolist() == [[0, 1, 0]] * 2
    believed = bandit.posterior(users(0.0))
    np.testing.assert_allclose(believed.mean_UV, [[0, 4 / 7, 0]])
    np.testing.assert_allclose(believed.deviation_UV**2, [[1 / 2, 2 / 7, 1 / 2]])
    np.testing.assert_allclose(believed.upper(3.0)[0, :2], [3 * math.sqrt(1 / 2), 4 / 7 + 3 * math.sqrt(2 / 7)])
    assert np.array_equal(believed.upper(0.0), believed.mean_UV)


def test_with_one_cluster_it_is_plain_ucb_of_each_item() -> None:
    """The mean is the sum of rewards over the number of events plus one, the deviation one over the root of that."""
    generator = np.random.default_rng(0)
    users_ED, items_E, rewards_E = generator.normal(size=(50, 4)), generator.integers(0, 5, 50), generator.random(50)
    bandit = DiagLinUCB(cluster_users(users_ED, 1, 1), 6)
    bandit.update(users_ED, items_E, rewards_E)
    expected = [
        rewards_E[items_E == item].sum() / (1 + (items_E == item).sum()) + 0.8 / math.sqrt(1 + (items_E == item).sum())
        for item in range(6)
    ]
    np.testing.assert_allclose(bandit.posterior(users_ED[:3]).upper(0.8), [expected] * 3)


@pytest.mark.parametrize("num_nearest", [1, 3])
def test_it_is_linucb_with_nothing_off_the_diagonal(num_nearest: int) -> None:
    """With one cluster a user, there is nothing off the diagonal to leave out."""
    generator = np.random.default_rng(1)
    users_ED, items_E, rewards_E = generator.normal(size=(60, 2)), generator.integers(0, 3, 60), generator.random(60)
    clusters = cluster_users(users_ED, 4, num_nearest)
    bandit = DiagLinUCB(clusters, 3)
    bandit.update(users_ED, items_E, rewards_E)
    context_EK = np.zeros((60, 4))
    np.put_along_axis(context_EK, *clusters.weights(users_ED), axis=1)
    for item in range(3):
        of_item_EK = context_EK[items_E == item]
        matrix_KK = np.eye(4) + of_item_EK.T @ of_item_EK
        if num_nearest > 1:
            assert not np.array_equal(matrix_KK, np.diag(np.diag(matrix_KK)))
            matrix_KK = np.diag(np.diag(matrix_KK))
        inverse_KK = np.linalg.inv(matrix_KK)
        mean_E = context_EK @ inverse_KK @ (of_item_EK.T @ rewards_E[items_E == item])
        deviation_E = np.sqrt(np.einsum("ek,kl,el->e", context_EK, inverse_KK, context_EK))
        found = bandit.posterior(users_ED)
        np.testing.assert_allclose(found.mean_UV[:, item], mean_E)
        np.testing.assert_allclose(found.deviation_UV[:, item], deviation_E)


def test_means_between_clusters_tend_to_twice_the_reward() -> None:
    bandit = DiagLinUCB(TWO, 1)
    bandit.update(users(*[0.0] * 10_000), np.zeros(10_000, dtype=int), np.full(10_000, 0.25))
    assert bandit.posterior(users(0.0)).mean_UV.item() == pytest.approx(0.5, rel=1e-3)


def test_events_count_in_any_order_and_on_any_machine() -> None:
    generator = np.random.default_rng(2)
    events = generator.normal(size=(40, 1)), generator.integers(0, 3, 40), generator.random(40)
    whole, single, left, right = (DiagLinUCB(TWO, 3) for _ in range(4))
    whole.update(*events)
    for event in generator.permutation(40):
        single.update(*(column[event : event + 1] for column in events))
    left.update(*(column[:15] for column in events))
    right.update(*(column[15:] for column in events))
    left.merge(right)
    for other in (single, left):
        np.testing.assert_allclose(other.count_KV, whole.count_KV)
        np.testing.assert_allclose(other.reward_KV, whole.reward_KV)


def test_new_items_have_the_prior() -> None:
    """Of mean 1/2 and four events: variance 2 * 1/4 / 4."""
    bandit = DiagLinUCB(TWO, 1, prior_mean=0.5, prior_precision=4.0)
    bandit.update(users(0.0), np.array([0]), np.array([1.0]))
    known = bandit.posterior(users(0.0))
    bandit.extend(2)
    both = bandit.posterior(users(0.0))
    np.testing.assert_allclose(both.mean_UV, [[known.mean_UV.item(), 0.5, 0.5]])
    np.testing.assert_allclose(both.deviation_UV, [[known.deviation_UV.item(), *[math.sqrt(1 / 8)] * 2]])
    assert known.mean_UV.item() == pytest.approx((4 * 0.5 + 0.5) / 4.25)


def test_candidates_are_scored_alone() -> None:
    generator = np.random.default_rng(3)
    bandit = DiagLinUCB(TWO, 8)
    bandit.update(generator.normal(size=(40, 1)), generator.integers(0, 8, 40), generator.random(40))
    asked = users(-1.0, 0.3)
    whole = bandit.posterior(asked)
    for items in (np.array([6, 2]), np.array([[6, 2, 1], [0, 3, 3]])):
        rows = np.broadcast_to(items, (2, items.shape[-1]))
        for found, all_items in zip(bandit.posterior(asked, items), whole, strict=True):
            assert np.array_equal(found, np.take_along_axis(all_items, rows, axis=1))


def test_bad_events_are_refused_and_leave_no_trace() -> None:
    bandit = DiagLinUCB(TWO, 3)
    for item, reward in ((3, 1.0), (-1, 1.0), (0, np.nan)):
        with pytest.raises(
            DataError, match=f"event 1 has item {item} and reward {reward}: expected an item from 0 to 2"
        ):
            bandit.update(users(0.0, 0.0), np.array([0, item]), np.array([1.0, reward]))
    with pytest.raises(DataError, match="2 users, 1 items, 1 rewards: expected one each"):
        bandit.update(users(0.0, 0.0), np.array([0]), np.array([1.0]))
    assert not bandit.count_KV.any() and not bandit.reward_KV.any()
    with pytest.raises(ConfigError, match="prior_precision=0.0 must be above 0"):
        DiagLinUCB(TWO, 3, prior_precision=0.0)
    for other in (DiagLinUCB(TWO, 4), DiagLinUCB(UserClusters(TWO.centre_KD + 1, 2, 4.0), 3)):
        with pytest.raises(ConfigError, match="both need the same"):
            bandit.merge(other)
