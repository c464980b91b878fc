"""Streams of rows: what is learnt from together, and what is to be predicted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cprec.batch import IGNORE
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.systems.batches import (
    MaskedStream,
    OtherPrefixes,
    Passes,
    Prefixes,
    PrefixStream,
    RowStream,
    SameTarget,
    Substitutions,
    UserItemStream,
    WindowStream,
    thinned,
)
from cprec.systems.items import MASK
from cprec.systems.signals import TrainingSequences, recent, windows

NUM_ITEMS = 12
"""After item n of the ring comes item n + 1."""
ONCE = Passes(batch_size=16, num_epochs=1, seed=0)


def test_windows_make_every_item_but_the_first_a_target_once() -> None:
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 100, size) for size in (1, 2, 9, 10, 11, 30, 0)]
    cut = windows(Ragged.of(rows), 10)
    assert cut.lengths.max() <= 11 and cut.lengths.min() >= 2
    targets = [value for row in range(len(cut)) for value in cut[row][1:].tolist()]
    assert targets == [value for row in rows for value in row[1:].tolist()]


def test_the_latest_values_of_each_row() -> None:
    kept = recent(Ragged.of([[1, 2, 3], [], [4]]), 2)
    assert [kept[row].tolist() for row in range(3)] == [[2, 3], [], [4]]


def test_an_epoch_reads_every_row_once_and_any_step_can_be_had_alone(data: TrainingSequences) -> None:
    def stream(seed: int) -> RowStream:
        return WindowStream(data, ["a", "b"], 50, Passes(batch_size=7, num_epochs=2, seed=seed))

    first, again = stream(3), stream(3)
    per_epoch = first.num_steps // 2
    for epoch in range(2):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        read = np.sort(np.concatenate([first.batch(step).examples for step in steps]))
        assert read.tolist() == list(range(90))
    for step in (first.num_steps - 1, 0):
        one, other = again.batch(step), first.batch(step)
        np.testing.assert_array_equal(one.examples, other.examples)
        for name, rows in one.rows.items():
            np.testing.assert_array_equal(rows, other.rows[name])
    assert sum(first.batch(step).num_tokens for step in range(first.num_steps)) == first.num_tokens
    assert stream(4).batch(0).examples.tolist() != first.batch(0).examples.tolist()
    assert first.batch(0).counts == dict.fromkeys("ab", first.batch(0).num_tokens)


def test_batches_that_are_not_sorted_are_random_samples(data: TrainingSequences) -> None:
    stream = WindowStream(data, ["a"], 50, Passes(batch_size=7, num_epochs=1, seed=3, pool=1))
    order = np.random.default_rng([3, 0]).permutation(90)
    samples = {frozenset(order[start : start + 7].tolist()) for start in range(0, 90, 7)}
    assert {frozenset(batch.examples.tolist()) for batch in stream} == samples


def test_targets_follow_their_inputs_and_padding_has_none(data: TrainingSequences) -> None:
    batch = WindowStream(data, ["a"], 50, ONCE).batch(1)
    real = batch.rows["targets"] != IGNORE
    assert ((batch.rows["items"][real] + 1) % NUM_ITEMS == batch.rows["targets"][real]).all()
    assert (batch.rows["items"][~real] == NUM_ITEMS).all()
    assert real.sum() == batch.num_tokens == batch.counts["a"]


def test_masks_hide_what_they_ask_for(data: TrainingSequences) -> None:
    shares = {"mask_share": 0.4, "last_share": 0.5}
    batch = MaskedStream(data, ["a"], 5, replace(ONCE, batch_size=90), **shares).batch(0)
    masked = batch.rows["items"] == NUM_ITEMS + MASK
    np.testing.assert_array_equal(masked, batch.rows["targets"] != IGNORE)
    assert masked.any(1).all(), "every row asks for something"
    lengths = (batch.rows["items"] != NUM_ITEMS).sum(1)
    only_last = masked.sum(1) == 1
    last = masked[np.arange(90), lengths - 1]
    assert 0.4 < (only_last & last).mean() < 1


def test_every_training_event_is_a_pair(data: TrainingSequences) -> None:
    stream = UserItemStream(data, ["a"], replace(ONCE, batch_size=50))
    pairs = [zip(batch.rows["users"], batch.rows["targets"], strict=True) for batch in stream]
    expected = zip(data.sequences.row_of, data.sequences.values, strict=True)
    assert sorted(pair for of_step in pairs for pair in of_step) == sorted(expected)


def test_prefixes_are_followed_by_their_targets(data: TrainingSequences) -> None:
    stream = PrefixStream(data, ["a"], 3, replace(ONCE, batch_size=20))
    batches = list(stream)
    assert sum(len(batch.examples) for batch in batches) == data.sequences.lengths.sum() - len(data.sequences)
    for batch in batches:
        lengths = (batch.rows["items"] != NUM_ITEMS).sum(1)
        assert lengths.min() >= 1 and lengths.max() <= 3
        last = batch.rows["items"][np.arange(len(lengths)), lengths - 1]
        assert ((last + 1) % NUM_ITEMS == batch.rows["targets"]).all()


def test_the_second_prefix_of_a_row_has_the_same_target() -> None:
    """Item 3 follows twice, item 5 once: a prefix without another of its target stands beside itself."""
    sequences = Ragged.of([[0, 1, 3], [2, 3], [4, 5]])
    data = TrainingSequences(_catalogue(6), "d", sequences, ("u", "v", "w"))
    views = [SameTarget(Prefixes(data, 9), 6)]
    stream = PrefixStream(data, ["a"], 9, Passes(batch_size=9, num_epochs=5, seed=0), views)
    for batch in stream:
        assert batch.whole and batch.rows["items"].shape == (4, 2, 2)
        for row, target in zip(batch.rows["items"].tolist(), batch.rows["targets"].tolist(), strict=True):
            expected = {3: [[0, 1], [2, 6]], 5: [[4, 6], [4, 6]], 1: [[0, 6], [0, 6]]}[target]
            assert sorted(row) == sorted(expected)


def test_views_stand_beside_each_prefix_in_their_order() -> None:
    """Prefixes by number: 0 -> 1, 0 1 -> 3, 2 -> 3, 4 -> 5. Item n may give way to n + 10 alone."""
    sequences = Ragged.of([[0, 1, 3], [2, 3], [4, 5]])
    data = TrainingSequences(_catalogue(20), "d", sequences, ("u", "v", "w"))
    prefixes, passes = Prefixes(data, 9), Passes(batch_size=4, num_epochs=200, seed=0)
    assert prefixes.users.tolist() == [0, 0, 1, 2]
    others = OtherPrefixes(prefixes, np.array([[2, 3], [3, 2], [1, 0], [1, 2]]))
    copies = Substitutions(prefixes, np.arange(10, 30)[:, None], share=0.2)
    given_way = []
    for batch in PrefixStream(data, ["a"], 9, passes, [others, copies]):
        assert batch.whole and batch.rows["items"].shape == (4, 5, 2)
        for number, row in zip(batch.examples, batch.rows["items"].tolist(), strict=True):
            first, *neighbours = {
                0: [[0, 20], [2, 20], [4, 20]],
                1: [[0, 1], [4, 20], [2, 20]],
                2: [[2, 20], [0, 1], [0, 20]],
                3: [[4, 20], [0, 1], [2, 20]],
            }[int(number)]
            assert row[:3] == [first, *neighbours]
            for copy in row[3:]:
                moved = np.subtract(copy, first)
                assert set(moved.tolist()) <= {0, 10} and not moved[np.array(first) == 20].any()
                given_way += moved[np.array(first) != 20].tolist()
    assert 0.17 < np.mean(given_way) / 10 < 0.23, "a share of the items, in each copy"


def _catalogue(num_items: int) -> Catalogue:
    ids = np.array([f"i{number}" for number in range(num_items)], dtype=object)
    text = np.array([""] * num_items, dtype=object)
    return Catalogue(("d",), np.zeros(num_items, dtype=np.int16), ids, ids, text, text)


class Drawn:
    """A generator that draws what it is told, call by call."""

    def __init__(self, *draws: list[float]) -> None:
        self._draws = list(draws)

    def random(self, size: int) -> np.ndarray:
        draw = np.array(self._draws.pop(0))
        assert len(draw) == size
        return draw


def test_a_thinned_row_keeps_as_many_events_as_is_drawn() -> None:
    """Row 0 is chosen (0.1 < 0.5) and keeps 2 + 0.7 * 3 = 4.1, rounded down to 4, of its events, all; row 1 too, and
    keeps 2 + 0.5 * 2 = 3 of 3; row 2 keeps 2 of 4, those with the lowest draws; row 3 is not chosen."""
    rows = Ragged.of([[10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33], [40, 41, 42]])
    left, chosen = [0.7, 0.5, 0.3, 0.0], [0.1, 0.2, 0.3, 0.6]
    places = [*[0.5] * 7, *[0.9, 0.2, 0.8, 0.1], *[0.5] * 3]
    kept = thinned(rows, 0.5, Drawn(left, chosen, places))  # type: ignore[arg-type]
    assert [kept[row].tolist() for row in range(4)] == [[10, 11, 12, 13], [20, 21, 22], [31, 33], [40, 41, 42]]


def test_each_number_of_events_is_left_as_often() -> None:
    """Of five events two, three, four or five are left, each in a quarter of 20,000 rows; of these each event is left
    as often as the others: (2 + 3 + 4 + 5) / 4 / 5 = 0.7 of the time."""
    rows = Ragged.of([range(5)] * 20_000)
    kept = thinned(rows, 1.0, np.random.default_rng(0))
    shares = np.bincount(kept.lengths, minlength=6) / len(rows)
    np.testing.assert_allclose(shares, [0, 0, 0.25, 0.25, 0.25, 0.25], atol=0.01)
    np.testing.assert_allclose(np.bincount(kept.values) / len(rows), 0.7, atol=0.01)
    assert all(np.diff(kept[row]).min() > 0 for row in range(100))


def test_thinned_windows_predict_the_next_event_that_is_left(data: TrainingSequences) -> None:
    """Each target follows, in the window, the items read before it; a step is the same whenever it is asked for."""
    stream, whole = (WindowStream(data, ["a"], 50, ONCE, thinned_rows=share) for share in (1.0, 0.0))
    again = WindowStream(data, ["a"], 50, ONCE, thinned_rows=1.0)
    shorter = 0
    for step in range(stream.num_steps):
        thin, full = stream.batch(step), whole.batch(step)
        np.testing.assert_array_equal(again.batch(step).rows["items"], thin.rows["items"])
        np.testing.assert_array_equal(thin.examples, full.examples)
        assert thin.counts["a"] == (thin.rows["targets"] != IGNORE).sum() <= full.counts["a"]
        shorter += full.counts["a"] - thin.counts["a"]
        for items, targets, one in zip(thin.rows["items"], thin.rows["targets"], full.rows["items"], strict=True):
            read, asked = items[items < NUM_ITEMS].tolist(), targets[targets != IGNORE].tolist()
            assert len(read) == len(asked) >= 1 and read[1:] == asked[:-1]
            later = iter([*one[one < NUM_ITEMS].tolist(), (one[one < NUM_ITEMS][-1] + 1) % NUM_ITEMS])
            assert all(item in later for item in [*read, asked[-1]])  # in this order
    assert shorter > 0
