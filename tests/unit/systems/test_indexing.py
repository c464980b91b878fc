"""Numbers of items, and what gives away that they know held-out events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, LeakageError, Unsuitable
from cprec.systems.codes import END
from cprec.systems.given_numbers import (
    check_numbers,
    check_places,
    places_of,
    read_numbers,
    steps_not_in_training,
    write_numbers,
)
from cprec.systems.graph import ItemGraph
from cprec.systems.indexing import (
    category_paths,
    collaborative_paths,
    digits,
    item_codes,
    numbers_along,
    numbers_of,
    spectral_clusters,
    with_own_tokens,
    with_running_numbers,
)
from cprec.systems.signals import TrainingSequences

NUM_THINGS = 900
"""Of the shop."""


def lists(rows: Ragged) -> list[list[int]]:
    return [rows[row].tolist() for row in range(len(rows))]


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [2, 10, 100])
def test_digits_are_those_of_the_number(base: int) -> None:
    numbers = np.random.default_rng(0).permutation(1200)
    for number, written in zip(numbers.tolist(), lists(digits(numbers, base)), strict=True):
        assert sum(digit * base**place for place, digit in enumerate(reversed(written))) == number
        assert max(written) < base
        assert written[0] > 0 or written == [0]


def test_numbers_follow_the_training_events_of_one_user_after_the_other() -> None:
    along = numbers_along(Ragged.of([[4, 2, 4], [2, 0]]), 7, np.random.default_rng(1))
    assert along[[4, 2, 0]].tolist() == [0, 1, 2]
    assert sorted(along[[1, 3, 5, 6]].tolist()) == [3, 4, 5, 6]
    orders = {tuple(numbers_along(Ragged.of([]), 7, np.random.default_rng(seed)).tolist()) for seed in range(5)}
    assert len(orders) == 5, "what events do not decide is drawn"


def test_running_numbers_tell_the_items_of_each_path_apart_and_begin_anew() -> None:
    paths = Ragged.of([[0], [1, 2], [0], [], [0]])
    found = lists(with_running_numbers(paths, np.random.default_rng(0)))
    assert [row[:-1] for row in found] == lists(paths)
    assert sorted(found[item][-1] for item in (0, 2, 4)) == [3, 4, 5]
    assert found[1][-1] == found[3][-1] == 3


def test_categories_are_paths_that_part_where_their_words_do() -> None:
    everything = ["Shop Hand Tools Saws", "Shop Hand Tools Files", "Shop Hand Cream", "Shop Tea", "Shop Tea"]
    # Below what all share: Hand, Hand Cream, Hand Tools, its Files and Saws, Tea.
    assert lists(category_paths(everything)) == [[0, 2, 4], [0, 2, 3], [0, 1], [5], [5]]
    for alike in (["Shop Tea"] * 3, ["", ""]):
        with pytest.raises(Unsuitable, match=r"indexing='semantic' needs categories that tell items apart"):
            category_paths(alike)


# ---- clusters --------------------------------------------------------------------------------------------------------


def two_triangles(bridge: float) -> sparse.csr_array:
    """Items 0, 2, 4 and 1, 3, 5 are linked among themselves, and 0 with 1 by a bridge."""
    matrix = np.array([[float((row + column) % 2 == 0 and row != column) for column in range(6)] for row in range(6)])
    matrix[0, 1] = matrix[1, 0] = bridge
    return sparse.csr_array(matrix)


@pytest.mark.parametrize("bridge", [0.0, 0.5])
def test_spectral_clusters_are_the_two_triangles(bridge: float) -> None:
    cluster = spectral_clusters(two_triangles(bridge), 2)
    assert len(set(cluster[::2])) == len(set(cluster[1::2])) == 1 and cluster[0] != cluster[1]


def test_spectral_clusters_follow_the_two_leading_eigenvectors() -> None:
    """Without a bridge all is known: each item has degree 2, so t = 2 and the matrix is (A + 2/6) / (2 + 2). Equal
    entries are its leading eigenvector, with the value (2 + 2) / 4; opposite ones on the triangles the next, with 2 / 4
    (the share of all links sums to zero); all others have -1 / 4."""
    links = two_triangles(0.0)
    matrix = (links.toarray() + 2 / 6) / 4
    opposite = np.array([1.0, -1, 1, -1, 1, -1])
    assert np.allclose(matrix @ np.ones(6), np.ones(6)) and np.allclose(matrix @ opposite, opposite / 2)
    assert np.linalg.eigvalsh(matrix)[:4] == pytest.approx([-0.25] * 4)
    cluster = spectral_clusters(links, 2)
    assert np.array_equal(cluster == cluster[0], opposite > 0)


def test_small_components_do_not_make_clusters_of_their_own() -> None:
    """Two cliques that two links join, and three pairs apart. Without a share of all links each component would have an
    eigenvalue of 1, and a pair be one of the two clusters."""
    matrix = np.zeros((26, 26))
    matrix[:10, :10] = matrix[10:20, 10:20] = 1
    for first, second in ((0, 10), (1, 11), (20, 21), (22, 23), (24, 25)):
        matrix[first, second] = matrix[second, first] = 1
    np.fill_diagonal(matrix, 0)
    cluster = spectral_clusters(sparse.csr_array(matrix), 2)
    assert len(set(cluster[:10])) == len(set(cluster[10:20])) == 1 and cluster[0] != cluster[10]


def test_sparse_and_full_matrices_give_the_same_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    home = np.repeat(np.arange(4), 15)
    chance = np.where(home[:, None] == home, 0.6, 0.02)
    drawn = np.triu(generator.random((60, 60)) < chance, 1)
    links = sparse.csr_array((drawn | drawn.T).astype(float))
    full = spectral_clusters(links, 4)
    assert len({(a, b) for a, b in zip(full.tolist(), home.tolist(), strict=True)}) == 4
    monkeypatch.setattr("cprec.systems.indexing.DENSE", 10)
    assert np.array_equal(spectral_clusters(links, 4), full)


def test_clusters_are_cut_until_they_are_small() -> None:
    """Two halves of two circles each; ten items have no link."""
    circles = [[8 * circle + n % 8 for n in range(60)] for circle in range(4)]
    halves = [[*circles[0][:8], *circles[1][:8]] * 3, [*circles[2][:8], *circles[3][:8]] * 3]
    graph = ItemGraph(Ragged.of([*circles, *halves]), 42, 4)
    paths, num_leaves = collaborative_paths(graph, 2, 10, np.random.default_rng(0))
    of_item = lists(paths)
    leaves = {tuple(path): [item for item in range(42) if of_item[item] == path] for path in of_item}
    assert num_leaves == len(leaves)
    assert max(map(len, leaves.values())) <= 10 and max(map(len, of_item)) <= 4
    for circle in range(4):
        assert len({tuple(of_item[8 * circle + n]) for n in range(8)}) == 1
    every = [path[:place] for path in of_item for place in range(1, len(path) + 1)]
    assert all(a == b for a in every for b in every if a[-1] == b[-1]), "a code is that of one cluster"


def test_a_group_that_nothing_parts_is_cut_at_random() -> None:
    graph = ItemGraph(Ragged.of([[0], [1]]), 20, 3)
    paths, num_leaves = collaborative_paths(graph, 3, 6, np.random.default_rng(0))
    assert sorted(np.bincount(paths.values).tolist()) == [2, 6, 6, 6] and num_leaves == 4
    assert paths.values[:6].tolist() != [0] * 6


def test_own_tokens_stand_last() -> None:
    codes = with_own_tokens(item_codes(Ragged.of([[0, 1], [0], []])))
    assert lists(codes.sequences) == [[3, 4, 5, END], [3, 6, END], [7, END]]
    assert codes.vocabulary_size == 8


# ---- numbers that know held-out events -------------------------------------------------------------------------------


def test_numbers_along_whole_histories_are_refused(shop: Split, along_whole_histories: np.ndarray) -> None:
    steps = steps_not_in_training(shop, "shop")
    assert 250 < len(steps) <= 300
    found = along_whole_histories[steps[:, 1]] - along_whole_histories[steps[:, 0]]
    near, following = (np.abs(found) <= 5).sum(), (found == 1).sum()
    with pytest.raises(
        LeakageError,
        match=rf"numbers of domain 'shop' know held-out events: of {near} held-out steps .* {following} go to the very",
    ):
        check_places(along_whole_histories, shop, "shop")
    with pytest.raises(LeakageError):  # as pieces of digits, in a language model's way, as well
        check_places(places_of(digits(1000 + along_whole_histories, 100)), shop, "shop")


@pytest.mark.parametrize("kind", ["sequential", "random", "collaborative"])
def test_numbers_of_training_events_pass(kind: Any, shop: Split, shopped: TrainingSequences) -> None:
    sizes = {"num_codes": 10, "num_clusters": 5, "leaf_size": 20, "num_neighbours": 5}
    check_places(places_of(numbers_of(shopped, kind, 0, **sizes, runs=True)), shop, "shop")


def test_numbers_by_likeness_pass_although_next_items_stand_near(shop: Split) -> None:
    """Users stay with their kinds, and things of a kind have numbers side by side."""
    kind = np.array([int(item[1:]) % 30 for item in shop.catalogue.item_id])
    place = np.empty(NUM_THINGS, dtype=np.int64)
    place[np.lexsort((np.random.default_rng(1).permutation(NUM_THINGS), kind))] = np.arange(NUM_THINGS)
    before, after = place[steps_not_in_training(shop, "shop")].T
    assert (np.abs(after - before) <= 5).sum() > 30 and (after - before == 1).sum() > 3
    check_places(place, shop, "shop")


def test_steps_are_those_that_no_training_user_had_both_items_of(shop: Split) -> None:
    """Each user's fourth to fifth and fifth to sixth event, as sets say."""
    histories = shop.interactions.item.reshape(-1, 6).tolist()
    had = [set(history[:4]) for history in histories]
    asked = [*((row[3], row[4]) for row in histories), *((row[4], row[5]) for row in histories)]
    expected = [step for step in asked if not any(set(step) <= items for items in had)]
    assert len(expected) < len(asked)
    assert list(map(tuple, steps_not_in_training(shop, "shop").tolist())) == expected


def test_an_item_that_follows_itself_is_no_step(shop: Split) -> None:
    """Also where a part of the split is empty."""
    log = shop.interactions
    again = replace(log, item=np.where(log.time == 5, np.roll(log.item, 1), log.item))
    alone = replace(shop, interactions=again).learning("train", "validation")
    assert steps_not_in_training(alone, "shop").shape == (0, 2)
    check_places(np.arange(NUM_THINGS), alone, "shop")


def test_a_file_of_numbers_comes_back_and_its_numbers_are_checked(
    shop: Split, shopped: TrainingSequences, along_whole_histories: np.ndarray, tmp_path: Path
) -> None:
    """The leak is found although the file says that it was made of training events."""
    clean, leak = digits(np.random.default_rng(0).permutation(NUM_THINGS), 30), digits(along_whole_histories, 30)
    for name, codes in (("clean", clean), ("leak", leak)):
        write_numbers(tmp_path / f"{name}.npz", shopped, codes)
        assert lists(read_numbers(tmp_path / f"{name}.npz", shopped)) == lists(codes)
    check_numbers(tmp_path / "clean.npz", shop, "shop")
    with pytest.raises(LeakageError, match="know held-out events"):
        check_numbers(tmp_path / "leak.npz", shop, "shop")


def test_numbers_of_other_events_are_refused(shop: Split, shopped: TrainingSequences, tmp_path: Path) -> None:
    path, codes = tmp_path / "numbers.npz", digits(np.arange(NUM_THINGS), 30)
    everything = TrainingSequences.of(shop.learning("train", "validation", "test"), "shop")
    write_numbers(path, everything, codes)
    with pytest.raises(LeakageError, match=rf"says {everything.digest()[:12]}... which training events"):
        read_numbers(path, shopped)
    code_VL = np.arange(NUM_THINGS)[:, None]
    np.savez(path, item_id=np.array(shopped.item_ids), codes=code_VL)
    with pytest.raises(LeakageError, match=r"does not say \(fitted_on\) which training events"):
        check_numbers(path, shop, "shop")


def changed_codes(code_VL: np.ndarray, item: int, row: Sequence[int]) -> np.ndarray:
    out = np.pad(code_VL, ((0, 0), (0, 1)), constant_values=-1)
    out[item] = row
    return out


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda ids, codes: {"item_id": ids}, "is not an .npz file with item_id, codes and fitted_on"),
        (lambda ids, codes: {"item_id": ids, "codes": codes * 1.0}, r"codes of shape \[900, 1\], float64"),
        (lambda ids, codes: {"item_id": ids[1:], "codes": codes[1:]}, "has no codes of 1 items, 't000' among them"),
        (lambda ids, codes: {"item_id": ids, "codes": changed_codes(codes, 3, [-1, 4])}, "codes are whole numbers"),
        (lambda ids, codes: {"item_id": ids, "codes": changed_codes(codes, 3, [7, -2])}, "codes are whole numbers"),
        (lambda ids, codes: {"item_id": ids, "codes": changed_codes(codes, 3, [7, -1])}, "but 1 are those of another"),
    ],
)
def test_what_is_no_file_of_numbers_is_refused(
    changed: Callable[..., dict[str, Any]], says: str, shopped: TrainingSequences, tmp_path: Path
) -> None:
    ids, codes = np.array(shopped.item_ids), np.arange(NUM_THINGS)[:, None]
    np.savez(tmp_path / "numbers.npz", fitted_on=shopped.digest(), **changed(ids, codes))
    with pytest.raises(ConfigError, match=says):
        read_numbers(tmp_path / "numbers.npz", shopped)
