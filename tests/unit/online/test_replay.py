"""Estimates from logs: unbiased over all logs of a tiny world, and over many logs of a larger one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from cprec.errors import DataError
from cprec.evaluate.statistics import bootstrap_interval
from cprec.online.bandit import DiagLinUCB, UserClusters
from cprec.online.replay import Log, inverse_propensity, replay

# ---- a world of two contexts and two items ---------------------------------------------------------------------------

CONTEXT = np.array([0.25, 0.75])
"""The share of each context."""
REWARD = np.array([[0.8, 0.3], [0.1, 0.6]])
"""The chance of a reward in a context for an item."""
LOGGED = np.array([[0.5, 0.5], [0.9, 0.1]])
TARGET = np.array([[0.25, 0.75], [0.0, 1.0]])
"""The chance that each policy shows an item in a context."""
TRUTH = 0.25 * (0.25 * 0.8 + 0.75 * 0.3) + 0.75 * 0.6
UNIFORM = np.full((2, 2), 0.5)


def all_logs(size: int, logged: np.ndarray) -> Iterator[tuple[float, np.ndarray, np.ndarray, np.ndarray]]:
    """Every log of some events, with its probability: contexts, items and rewards."""
    for events in itertools.product(itertools.product((0, 1), repeat=3), repeat=size):
        context, item, reward = np.array(events).T
        chance = (
            CONTEXT[context]
            * logged[context, item]
            * np.where(reward, REWARD[context, item], 1 - REWARD[context, item])
        )
        yield float(chance.prod()), context, item, reward


def expected_inverse_propensity(propensity: np.ndarray) -> float:
    """Over all logs of two events in which propensities were written down as given."""
    total = mass = 0.0
    for chance, context, item, reward in all_logs(2, LOGGED):
        mass += chance
        policy = TARGET[context]
        if policy[np.arange(2), item].any():  # where nothing was in common the estimate is 0, and refused
            total += chance * inverse_propensity(Log(item, propensity[context, item], reward), policy, samples=1).value
    assert mass == pytest.approx(1.0)
    return total


def test_inverse_propensity_is_unbiased_over_all_logs() -> None:
    assert expected_inverse_propensity(LOGGED) == pytest.approx(TRUTH, abs=1e-12)


def test_wrong_propensities_bias_it() -> None:
    """By the chances of a uniform policy item 1 has weight 2 in context 1, not 10, so that the context counts for a
    fifth of what it should. Context 0 has the right ones."""
    biased = expected_inverse_propensity(UNIFORM)
    assert biased == pytest.approx(0.25 * (0.25 * 0.8 + 0.75 * 0.3) + 0.75 * 0.6 / 5, abs=1e-12)
    assert abs(biased - TRUTH) > 0.3


def test_replay_is_unbiased_over_all_uniform_logs_with_an_event_in_common() -> None:
    """Which events are in common depends on nothing but the draws of the log, so that the mean over them is exact."""
    choice = np.array([0, 1])
    total = mass = 0.0
    for chance, context, item, reward in all_logs(3, UNIFORM):
        if (choice[context] == item).any():
            log = Log(item, np.full(3, 0.5), reward)
            total += chance * replay(log, lambda event, context=context: choice[context[event]], samples=1).value
            mass += chance
    assert mass == pytest.approx(1 - 0.5**3)
    assert total / mass == pytest.approx(0.25 * 0.8 + 0.75 * 0.6, abs=1e-12)


# ---- a larger world --------------------------------------------------------------------------------------------------


def drawn_log(generator: np.random.Generator, size: int, propensity: np.ndarray = LOGGED) -> tuple[np.ndarray, Log]:
    """Contexts and a log of events, in which propensities are written down as given."""
    context = (generator.random(size) < CONTEXT[1]).astype(int)
    item = (generator.random(size) < LOGGED[context, 1]).astype(int)
    reward = generator.random(size) < REWARD[context, item]
    return context, Log(item, propensity[context, item], reward)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_mean_over_many_logs_is_the_truth_and_intervals_hold_it(normalised: bool) -> None:
    generator, found, holds = np.random.default_rng(0), [], 0
    for _ in range(300):
        context, log = drawn_log(generator, 800)
        estimate = inverse_propensity(log, TARGET[context], normalised=normalised, samples=200)
        found.append(estimate.value)
        holds += estimate.low <= TRUTH <= estimate.high
    error = np.std(found, ddof=1) / np.sqrt(300)
    assert abs(np.mean(found) - TRUTH) < 3 * error < 0.02
    assert 0.90 <= holds / 300 <= 0.99


def test_wrong_propensities_bias_both_forms_and_show_in_the_mean_weight() -> None:
    """Weights of context 1 are a fifth of what they should be: their mean is 1/4 + 3/4 / 5 = 0.4."""
    context, log = drawn_log(np.random.default_rng(1), 20_000, UNIFORM)
    for normalised in (False, True):
        wrong = inverse_propensity(log, TARGET[context], normalised=normalised, samples=200)
        assert wrong.high < TRUTH and wrong.mean_weight == pytest.approx(0.4, abs=0.02)
    context, log = drawn_log(np.random.default_rng(1), 20_000)
    assert inverse_propensity(log, TARGET[context], samples=1).mean_weight == pytest.approx(1.0, abs=0.05)


def test_estimates_by_hand() -> None:
    """Weights 2, 1/2 and 0: mean of w r = (2 * 1 + 1/2 * 3) / 3; over the sum of weights, 3.5 / 2.5."""
    log = Log(np.array([0, 1, 1]), np.array([0.25, 0.5, 0.5]), np.array([1.0, 3.0, 9.0]))
    chance = np.array([0.5, 0.25, 0.0])
    plain, normalised = (inverse_propensity(log, chance, normalised=each) for each in (False, True))
    assert plain.value == pytest.approx(3.5 / 3) and normalised.value == pytest.approx(3.5 / 2.5)
    assert (plain.low, plain.high) == bootstrap_interval(np.array([2.0, 1.5, 0.0]))[1:]
    assert plain.num_events == 2
    assert plain.effective == pytest.approx(2.5**2 / 4.25) and plain.mean_weight == pytest.approx(2.5 / 3)


def test_a_common_factor_of_propensities_does_not_change_the_self_normalised_estimate() -> None:
    context, log = drawn_log(np.random.default_rng(4), 300)
    half = Log(log.shown, log.propensity / 2, log.reward)
    first, second = (inverse_propensity(each, TARGET[context], normalised=True) for each in (log, half))
    found = [(each.value, each.low, each.high, each.mean_weight) for each in (first, second)]
    assert found[1] == pytest.approx((*found[0][:3], 2 * found[0][3]))


def test_users_are_drawn_whole() -> None:
    log = Log(np.zeros(40, dtype=int), np.full(40, 0.5), np.repeat([0.0, 1.0], 20))
    alone, by_user = (
        inverse_propensity(log, np.full(40, 0.5), groups=groups) for groups in (None, np.repeat([0, 1], 20))
    )
    assert by_user.value == alone.value and by_user.low == 0.0 < alone.low


# ---- replay ----------------------------------------------------------------------------------------------------------


def test_replay_of_a_policy_that_does_not_learn_is_the_self_normalised_estimate() -> None:
    generator = np.random.default_rng(2)
    shown, reward, choice = generator.integers(0, 4, 200), generator.random(200), generator.integers(0, 4, 200)
    log = Log(shown, np.full(200, 0.25), reward)
    replayed = replay(log, lambda event: choice[event])
    assert replayed == inverse_propensity(log, np.eye(4)[choice], normalised=True)
    assert replayed.value == pytest.approx(reward[shown == choice].mean())
    assert replayed.num_events == replayed.effective == (shown == choice).sum()


@pytest.mark.parametrize(
    ("places", "least", "most"), [((-1.0, 1.0), 0.95, 1.0), ((0.0,), 0.4, 0.6)], ids=["two", "one"]
)
def test_a_bandit_learns_from_the_events_it_would_have_had(
    places: tuple[float, ...], least: float, most: float
) -> None:
    """Users at -1 like item 0 alone, those at 1 item 3: with a cluster for each it finds both, with one it cannot."""
    generator = np.random.default_rng(3)
    place, shown = generator.choice([-1.0, 1.0], (2000, 1)), generator.integers(0, 4, 2000)
    reward = (shown == np.where(place[:, 0] < 0, 0, 3)).astype(float)
    bandit, events = DiagLinUCB(UserClusters(np.array(places)[:, None], 1, 1.0), 4), []

    def choose(event: int) -> int:
        return int(bandit.posterior(place[event : event + 1]).upper(0.5).argmax())

    def learn(event: int) -> None:
        bandit.update(place[event : event + 1], shown[event : event + 1], reward[event : event + 1])
        events.append(event)

    estimate = replay(Log(shown, np.full(2000, 0.25), reward), choose, learn, samples=1)
    assert len(events) == estimate.num_events == bandit.count_KV.sum()
    assert least < estimate.value <= most


def test_slates_are_in_common_as_a_whole() -> None:
    log = Log(np.array([[0, 1], [1, 0], [0, 1]]), np.full(3, 0.5), np.array([1.0, 5.0, 3.0]))
    assert replay(log, lambda event: np.array([0, 1])).value == pytest.approx(2.0)
    assert inverse_propensity(log, np.array([1.0, 0.0, 1.0])).value == pytest.approx(8 / 3)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.5, np.nan, np.inf, None])
def test_propensities_that_are_none_are_refused(wrong: float | None) -> None:
    with pytest.raises(DataError, match=r"propensity of event 1 is \S+: the chance .* above 0 and at most 1 \(1 such"):
        Log(np.zeros(3, dtype=int), np.array([0.5, wrong, 1.0]), np.ones(3))


def test_other_bad_logs_are_refused() -> None:
    items, ones = np.zeros(2, dtype=int), np.ones(2)
    with pytest.raises(DataError, match="reward of event 0 is inf: leave out"):
        Log(items, ones, np.array([np.inf, 1.0]))
    for shown, propensity in ((items, ones[:1]), (items[:0], ones[:0]), (items, np.ones((2, 2)))):
        with pytest.raises(DataError, match="expected one or more events with one number of each"):
            Log(shown, propensity, np.ones(len(shown)))
    for possible in (np.array([False, True]), np.array([[True, True], [False, True]]), np.zeros((2, 0), dtype=bool)):
        with pytest.raises(DataError, match=r"event \d: the log's policy could never show all of 0"):
            Log(items, ones, ones, possible=possible)


def test_what_the_log_could_never_show_is_refused() -> None:
    log = Log(
        np.array([0, 1]), np.full(2, 0.5), np.ones(2), possible=np.array([[True, True, False], [False, True, True]])
    )
    assert inverse_propensity(log, np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])).value == 1.0
    with pytest.raises(DataError, match=r"event 1: .* could never show all of \[0 1\]"):
        inverse_propensity(log, np.array([[1.0, 0.0, 0.0], [0.1, 0.9, 0.0]]))
    with pytest.raises(DataError, match="event 0: .* could never show all of 2"):
        replay(log, lambda event: 2)
    slates = Log(np.array([[0, 1]]), np.ones(1), np.ones(1), possible=np.array([True, True, False]))
    with pytest.raises(DataError, match=r"could never show all of \[0 2\]"):
        replay(slates, lambda event: np.array([0, 2]))


def test_nothing_in_common_is_refused() -> None:
    log = Log(np.zeros(5, dtype=int), np.full(5, 0.5), np.ones(5))
    with pytest.raises(DataError, match="would have shown nothing of the 5 shown"):
        inverse_propensity(log, np.zeros(5))
    with pytest.raises(DataError, match="would have shown nothing of the 5 shown"):
        replay(log, lambda event: 1)


def test_replay_needs_equal_propensities() -> None:
    log = Log(np.zeros(2, dtype=int), np.array([0.25, 0.5]), np.ones(2))
    with pytest.raises(DataError, match=r"propensities are 0.25 to 0.5, and replay needs equal"):
        replay(log, lambda event: 0)


def test_chances_that_are_none_are_refused() -> None:
    log = Log(np.array([0, 2]), np.full(2, 0.5), np.ones(2))
    with pytest.raises(DataError, match="chance of event 1 is 1.5: a probability is expected"):
        inverse_propensity(log, np.array([0.5, 1.5]))
    with pytest.raises(DataError, match="sum of all items' chances of event 0 is 0.5: expected 1"):
        inverse_propensity(log, np.array([[0.5, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    with pytest.raises(DataError, match="sum of all items' chances of event 1 is nan: expected 1"):
        inverse_propensity(log, np.array([[1.0, 0.0, 0.0], [0.0, np.nan, 1.0]]))
    slates = Log(np.array([[0, 1], [1, 0]]), np.full(2, 0.5), np.ones(2))
    wrong = ((log, np.ones(3)), (log, np.ones((2, 2)) / 2), (slates, np.ones((2, 2, 1))))  # the second has no item 2
    for each, chance in wrong:
        with pytest.raises(DataError, match=r"chances of shape \(.*\) for shown ones of"):
            inverse_propensity(each, chance)
