"""Second-order walks: chances worked out by hand, exact entropies, and samples that agree with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import sparse

from cprec.data.random_walks import SecondOrderWalks
from cprec.errors import ConfigError


def h(*chances: float) -> float:
    return -sum(chance * np.log(chance) for chance in chances)


def graph(*links: tuple[int, int], both_ways: bool = True) -> sparse.csr_array:
    size = 1 + max(max(link) for link in links)
    weights = np.zeros((size, size))
    for one, other in links:
        weights[one, other] = 1
        weights[other, one] += both_ways
    return sparse.csr_array(weights)


KITE = graph((0, 1), (0, 2), (1, 2), (2, 3))
"""A triangle, and item 3 behind item 2."""


def test_the_entropy_on_a_path_by_hand() -> None:
    """0 - 1 - 2 with p = 2. At either end there is one way; in the middle the way back weighs 1/2, the other 1, as 0
    and 2 have no link: 1/3 and 2/3. Every other step is in the middle.

    A walk begins with one of four links: in the middle with a chance of 1/2, where it then has two ways."""
    walks = SecondOrderWalks(graph((0, 1), (1, 2)), p=2, q=1)
    middle = np.log(3) - 2 / 3 * np.log(2)
    assert walks.entropy_rate() == pytest.approx(middle / 2, rel=1e-9)
    expected = [1.5 * np.log(2), 0.5 * np.log(2), middle / 2, middle / 2]
    np.testing.assert_allclose(walks.entropies(4), expected, rtol=1e-12)


def test_the_entropy_on_four_items_by_hand() -> None:
    """p = 1/2, q = 2: back weighs 2, to a neighbour of the item before 1, elsewhere 1/2. By the symmetry of 0 and 1:

        after 0 > 1 and after 2 > 0: 2/3 back, 1/3 on        after 0 > 2: 4/7 back, 2/7 to 1, 1/7 to 3
        after 3 > 2: 2/3 back, 1/6 to 0, 1/6 to 1            after 2 > 3: back

    In the long run the six links of the triangle are equally likely, and those with item 3 are 6/7 as likely: 7/54 and
    6/54. At first all eight are equally likely."""
    walks = SecondOrderWalks(KITE, p=0.5, q=2)
    in_triangle, to_two, from_three = h(2 / 3, 1 / 3), h(4 / 7, 2 / 7, 1 / 7), h(2 / 3, 1 / 6, 1 / 6)
    expected = 7 / 54 * (4 * in_triangle + 2 * to_two) + 6 / 54 * from_three
    assert walks.entropy_rate() == pytest.approx(expected, rel=1e-9)
    of_place = walks.entropies(300)
    assert of_place[2] == pytest.approx((4 * in_triangle + 2 * to_two + from_three) / 8, rel=1e-12)
    assert of_place[299] == pytest.approx(expected, rel=1e-9) and abs(of_place[2] - expected) > 0.005


def test_without_p_and_q_a_step_depends_on_the_last_item_alone() -> None:
    """Then the stationary chance of an item of a symmetric graph is its share of the weights."""
    weights = np.array([[5.0, 1, 2, 0], [1, 0, 3, 0], [2, 3, 0, 4], [0, 0, 4, 0]])  # the loop does not count
    walks = SecondOrderWalks(sparse.csr_array(weights), p=1, q=1)
    np.fill_diagonal(weights, 0)
    expected = sum(row.sum() / weights.sum() * h(*(row[row > 0] / row.sum())) for row in weights)
    assert walks.entropy_rate() == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(walks.entropies(5)[1:], expected, rtol=1e-9)


def test_parts_without_links_between_them_keep_their_shares() -> None:
    both = sparse.block_diag([graph((0, 1), (1, 2)), 3 * KITE]).tocsr()
    found = SecondOrderWalks(sparse.csr_array(both), p=0.5, q=2).entropy_rate()
    path, kite = (SecondOrderWalks(each, p=0.5, q=2).entropy_rate() for each in (graph((0, 1), (1, 2)), KITE))
    assert found == pytest.approx((4 * path + 24 * kite) / 28, rel=1e-9)


def test_a_large_sample_agrees_with_the_exact_entropy() -> None:
    """The last steps of walks that do not know of each other; frequencies stand for chances."""
    num_walks, walks = 20_000, SecondOrderWalks(KITE, p=0.5, q=2)
    items = walks.sample(num_walks, 12, np.random.default_rng(0))
    assert KITE.toarray()[items[:, :-1], items[:, 1:]].all(), "only along links"
    for place in (2, 11):
        before, here, after = items[:, place - 2 : place + 1].T
        counts = np.zeros((4, 4, 4))
        np.add.at(counts, (before, here, after), 1)
        chance = counts / np.maximum(counts.sum(2, keepdims=True), 1)
        surprise = -np.log(chance[before, here, after])
        error = surprise.std() / np.sqrt(num_walks)
        assert abs(surprise.mean() - walks.entropies(12)[place]) < 3 * error
        np.testing.assert_allclose(chance[0, 2], [4 / 7, 2 / 7, 0, 1 / 7], atol=0.02)
        np.testing.assert_allclose(chance[3, 2], [1 / 6, 1 / 6, 0, 2 / 3], atol=0.03)
    assert abs(surprise.mean() - walks.entropy_rate()) < 3 * error
    first = np.bincount(4 * items[:, 0] + items[:, 1], minlength=16).reshape(4, 4) / num_walks
    np.testing.assert_allclose(first, KITE.toarray() / 8, atol=0.01)


def test_weights_decide_and_the_generator_repeats_itself() -> None:
    weights = sparse.csr_array([[0.0, 1, 3], [1, 0, 0], [1, 0, 0]])
    walks = SecondOrderWalks(weights, p=4, q=0.25)
    items = walks.sample(20_000, 3, np.random.default_rng(1))
    np.testing.assert_array_equal(items, walks.sample(20_000, 3, np.random.default_rng(1)))
    # From 1 over 0: back with 1 / 4, to 2 with 3 * 4, so 1 of 49.
    after = items[(items[:, 0] == 1) & (items[:, 1] == 0), 2]
    assert (after == 1).mean() == pytest.approx(1 / 49, abs=0.01)


def test_where_there_is_one_way_it_is_taken_at_once() -> None:
    """On a path of two items every step goes back, which p makes improbable beside others that are not there."""

    class Counting:
        def __init__(self) -> None:
            self.generator, self.number = np.random.default_rng(0), 0

        def random(self, size: int) -> np.ndarray:
            self.number += 1
            return self.generator.random(size)

    counting: Any = Counting()
    items = SecondOrderWalks(graph((0, 1)), p=100, q=1).sample(50, 6, counting)
    assert (np.diff(items) != 0).all() and counting.number == 1 + 2 * 4  # the first link; then a link and a trial each


@pytest.mark.parametrize(
    ("weights", "settings", "message"),
    [
        (KITE, {"p": 0}, "p=0 must be a number above 0"),
        (KITE, {"q": -1.0}, "q=-1.0 must be a number above 0"),
        (KITE, {"q": np.inf}, "q=inf must be a number above 0"),
        (KITE, {"p": np.nan}, "p=nan must be a number above 0"),
        (sparse.csr_array([[2.0, 0], [0, 0]]), {}, "no item leads to another one"),
        (graph((0, 1), (1, 2), both_ways=False), {}, "1 items are reached and lead nowhere, as number 2"),
    ],
)
def test_walks_that_cannot_be_are_refused(weights: sparse.csr_array, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SecondOrderWalks(weights, **{"p": 1.0, "q": 1.0} | settings)


def test_a_graph_too_large_for_exact_entropies_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item with n links has n * n pairs of them: 4 + 4 + 9 + 1 in the kite."""
    monkeypatch.setattr("cprec.data.random_walks.MOST_PAIRS", 18)
    SecondOrderWalks(KITE, p=1, q=1).entropies(3)
    monkeypatch.setattr("cprec.data.random_walks.MOST_PAIRS", 17)
    with pytest.raises(ConfigError, match="18 pairs of links follow each other"):
        SecondOrderWalks(KITE, p=1, q=1).entropies(3)
