"""Documents as trees: what a branch reads is an example, token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cprec.batch import IGNORE
from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged
from cprec.text import trees
from cprec.text.corpus import Corpus, Documents, Group
from cprec.text.encoding import PromptEncoder
from cprec.text.shards import Shards
from cprec.text.stream import TokenStream, one_phase
from cprec.text.trees import Drawn, grow

BOOKS = 0
EMPTY: list[int] = []


@pytest.fixture(scope="module")
def encoder(tokenizer: Any, make_catalogue: Any) -> PromptEncoder:
    catalogue: Catalogue = make_catalogue(books=["Dune", "Emma", "Go 19x19"], games=["Ludo!", "Go"])
    return PromptEncoder(tokenizer, catalogue)


def read(shards: Shards) -> Documents:
    return Corpus.of(shards).take(np.arange(len(shards)))


def paths(documents: Documents, row: int) -> list[tuple[list[int], bool]]:
    """For each token of a document: all tokens that it reads, itself the last, and whether the loss covers it."""
    begin, end = documents.tokens.offsets[row : row + 2]
    assert documents.until is not None
    tokens, until, is_target = (
        array[begin:end].tolist() for array in (documents.tokens.values, documents.until, documents.is_target)
    )
    out = []
    for at in range(len(tokens)):
        before = [place for place in range(at + 1) if until[place] > at]
        assert len(before) - 1 == documents.depth[begin + at]
        if is_target[at]:
            assert before[-2] == at - 1, "a target stands right behind what predicts it"
        out.append(([tokens[place] for place in before], is_target[at]))
    return out


def examples_in(encoder: PromptEncoder, documents: Documents, row: int) -> list[list[int]]:
    """The paths of a tree that end with an end-of-sequence: its branches."""
    return [path for path, _ in paths(documents, row) if path[-1] == encoder.eos_id]


def example(encoder: PromptEncoder, kind: str, history: list[int], target: int) -> list[int]:
    prompt = encoder.prompts(kind, np.array([BOOKS]), Ragged.of([history]))[0]
    return [*prompt.tolist(), *encoder.titles(np.array([target]), end=True)[0].tolist()]


@pytest.mark.parametrize(("kind", "history"), [("specific", [0, 1, 2]), ("mixed", [0, 4, 2])])
def test_branches_are_examples(encoder: PromptEncoder, kind: str, history: list[int]) -> None:
    shards = grow(encoder, kind, BOOKS, Ragged.of([history, [1]]), Ragged.of([[1], EMPTY, [0, 1], [2]]), 1000, 20)
    documents = read(shards)
    # The branches of the last event stand first.
    expected = [example(encoder, kind, history, item) for item in (0, 1)]
    expected.append(example(encoder, kind, history[:1], 1))
    assert examples_in(encoder, documents, 0) == expected
    assert examples_in(encoder, documents, 1) == [example(encoder, kind, [1], 2)]
    assert shards.column("num_events").tolist() == [3, 1]


def test_the_history_and_titles_are_learnt_and_how_a_prompt_ends_is_not(encoder: PromptEncoder) -> None:
    shards = grow(encoder, "specific", BOOKS, Ragged.of([[0, 1]]), Ragged.of([[1], [2, 0]]), 1000, 20)
    ending = len(trees._ending(encoder, "specific", BOOKS))
    history = len(encoder.prompts("specific", np.array([BOOKS]), Ragged.of([[0, 1]]))[0]) - ending
    of_one, of_two, of_zero = (
        np.ones(size, dtype=bool) for size in encoder.titles(np.array([1, 2, 0]), end=True).lengths
    )
    shared, last = [False] * (ending - 1), [False]
    branches = [shared, last, of_two, last, of_zero, shared, last, of_one]
    # Nothing stands before the first token.
    expected = np.concatenate([[False], np.ones(history - 1, dtype=bool), *branches])
    assert read(shards).is_target.tolist() == expected.tolist()


@given(
    events=st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=3)), min_size=1, max_size=20),
    most=st.integers(1, 700),
    most_events=st.integers(1, 25),
    kind=st.sampled_from(["specific", "mixed"]),
)
@settings(max_examples=60, deadline=None)
def test_a_history_is_halved_until_its_trees_have_room(
    encoder: PromptEncoder, events: list[tuple[int, list[int]]], most: int, most_events: int, kind: str
) -> None:
    items, branches = [item for item, _ in events], [after for _, after in events]
    lines = encoder.event_tokens(kind, np.array(items))
    titles = encoder.titles(np.arange(3), end=True).lengths
    ending = len(trees._ending(encoder, kind, BOOKS))
    head = int(encoder.frame_tokens(kind, np.array([BOOKS]))[0]) - ending

    def size(start: int, first: int, stop: int) -> int:
        blocks = [ending - 1 + sum(titles[item] + 1 for item in after) for after in branches[first:stop] if after]
        return head + int(sum(lines[start:stop])) + sum(blocks)

    def cut(first: int, stop: int) -> list[tuple[int, int, int]]:
        start = max(0, first - most_events // 2)
        if (size(start, first, stop) > most or stop - start > most_events) and stop - first > 1:
            middle = (first + stop + 1) // 2
            return [*cut(first, middle), *cut(middle, stop)]
        while size(start, first, stop) > most and start < first:
            start += 1
        return [(start, first, stop)]

    shards = grow(encoder, kind, BOOKS, Ragged.of([items]), Ragged.of(branches), most, most_events)
    documents, expected = read(shards), cut(0, len(items))
    assert shards.column("length").tolist() == [size(*each) for each in expected]
    for row, (start, first, stop) in enumerate(expected):
        assert examples_in(encoder, documents, row) == [
            example(encoder, kind, items[start : place + 1], item)
            for place in range(stop - 1, first - 1, -1)
            for item in branches[place]
        ]
        # What is repeated is not learnt again.
        learnt = (
            head - 1 + sum(lines[first:stop]) + sum(titles[item] for after in branches[first:stop] for item in after)
        )
        assert documents.is_target[slice(*documents.tokens.offsets[row : row + 2])].sum() == learnt


def test_a_tree_has_no_more_tokens_than_it_may(encoder: PromptEncoder) -> None:
    history, branches = Ragged.of([[0, 1, 2] * 10]), Ragged.of([[1, 2]] * 30)
    for most in range(60, 400, 7):
        shards = grow(encoder, "specific", BOOKS, history, branches, most, 100)
        assert shards.column("length").max() <= most
    assert len(grow(encoder, "specific", BOOKS, history, branches, 10_000, 100)) == 1


def test_a_divided_history_begins_with_the_events_before_it(encoder: PromptEncoder) -> None:
    history, branches = Ragged.of([[0, 1, 2, 1] * 5]), Ragged.of([[2]] * 20)
    shards = grow(encoder, "specific", BOOKS, history, branches, 150, 10)
    documents, seen = read(shards), 0
    for row, events in enumerate(shards.column("num_events").tolist()):
        found = examples_in(encoder, documents, row)
        repeated = events - len(found)
        assert repeated == (5 if row else 0) and events <= 10
        seen += len(found)
        items = history.values[seen - events : seen].tolist()
        assert found[0] == example(encoder, "specific", items, 2)
    assert seen == 20 and len(shards) > 2


def conditional(encoder: PromptEncoder, drawn: Drawn, item: int, row: int) -> list[dict[int, float]]:
    """For each token of an item's title: the chance of each token to go on there, among items that begin alike."""
    titles = [title.tolist() for title in map(encoder.titles(np.arange(5), end=True).__getitem__, range(5))]
    out = []
    for place in range(len(titles[item])):
        chances: dict[int, float] = {}
        for other, chance in zip(drawn.among[row], drawn.chance[row], strict=True):
            if titles[other][:place] == titles[item][:place]:
                chances[titles[other][place]] = chances.get(titles[other][place], 0) + float(chance)
        out.append({token: chance / sum(chances.values()) for token, chance in chances.items()})
    return out


@pytest.mark.parametrize("at_once", [1, 100])
def test_a_drawn_title_is_asked_by_the_chances_of_all_that_begin_as_it(
    tokenizer: Any, make_catalogue: Any, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "AT_ONCE", at_once)
    names = ["Dune", "Dune 2", "Emma", "Dune 2 (wood)", "Go 19x19"]
    encoder = PromptEncoder(tokenizer, make_catalogue(books=names), max_title_tokens=8)
    among, chance = np.array([[0, 1, 3, 2], [4, 3, 2, 1]]), np.array([[0.4, 0.3, 0.2, 0.1], [0.25] * 4], np.float32)
    # After the first event what came, and two draws; after the second one, in another tree, a draw; the third is alone.
    after = Ragged.of([[2, 1, 3], [4], [1]])
    drawn = Drawn(np.array([-1, 0, 0, 1, -1]), among, chance)
    shards = grow(encoder, "specific", BOOKS, Ragged.of([[0], [2, 4]]), after, 1000, 20, drawn)
    documents = read(shards)
    assert documents.choices is not None and np.isfinite(documents.choices.chance).all()
    asked: dict[int, dict[int, float]] = {}
    for place, token, weight in zip(
        documents.choices.of, documents.choices.token, documents.choices.chance, strict=True
    ):
        here = asked.setdefault(int(place), {})
        here[int(token)] = here.get(int(token), 0) + float(weight)
    # The titles of the branches in order: of the first tree 2, 1, 3; of the second, last event first, 1, then 4.
    order, found = [(2, -1), (1, 0), (3, 0), (1, -1), (4, 1)], []
    ends = np.flatnonzero(documents.tokens.values == encoder.eos_id)
    for (item, row), end in zip(order, ends, strict=True):
        title = encoder.titles(np.array([item]), end=True)[0]
        assert documents.tokens.values[end + 1 - len(title) : end + 1].tolist() == title.tolist()
        for place, token in enumerate(title.tolist()):
            at = int(end) + 1 - len(title) + place
            expected = conditional(encoder, drawn, item, row)[place] if row >= 0 else {token: 1.0}
            assert asked.get(at, {token: 1.0}) == pytest.approx(expected, abs=1e-6)
            found.append(at)
    assert set(asked) < set(found)
    assert len(asked) >= 4, "where all go on alike, nothing is noted"


def test_a_batch_has_the_choices_of_its_tokens(encoder: PromptEncoder) -> None:
    drawn = Drawn(np.array([0, -1]), np.array([[0, 1, 2]]), np.array([[0.5, 0.3, 0.2]], np.float32))
    shards = grow(encoder, "specific", BOOKS, Ragged.of([[0], [1]]), Ragged.of([[2], [0]]), 1000, 20, drawn)
    stream = TokenStream(Corpus.of(shards), one_phase(1e6), rows_per_step=1, row_tokens=128, seed=0)
    plain = replace(shards, branches=replace(shards.branches, choices=None))
    batch = stream.batch(0)
    expected = TokenStream(Corpus.of(plain), one_phase(1e6), rows_per_step=1, row_tokens=128, seed=0).batch(0)
    targets, weights = batch.rows["targets"], batch.rows["weights"]
    assert targets.shape == weights.shape == (1, 128, 3) and batch.counts == expected.counts
    some = np.flatnonzero(weights[0, :, 1])
    first = encoder.titles(np.arange(3)).values[encoder.titles(np.arange(3)).offsets[:-1]].tolist()
    asked = dict(zip(targets[0, some[0]].tolist(), weights[0, some[0]].tolist(), strict=True))
    assert asked == pytest.approx(dict(zip(first, [0.5, 0.3, 0.2], strict=True)))
    rest = np.delete(np.arange(128), some)
    assert targets[0, rest, 0].tolist() == expected.rows["targets"][0, rest].tolist()
    assert weights.sum(2)[0].tolist() == pytest.approx((expected.rows["targets"][0] != IGNORE).astype(float).tolist())


def test_each_tree_of_a_row_has_its_own_positions_and_ends(encoder: PromptEncoder) -> None:
    """From the row's start, behind other trees too; padding is a document of its own."""
    history, after = Ragged.of([[0, 1], [2], [1, 0, 2]]), Ragged.of([[1], [2, 0], [1], EMPTY, [2], [0]])
    shards = grow(encoder, "specific", BOOKS, history, after, 1000, 20)
    stream = TokenStream(Corpus.of(shards), one_phase(1e6), rows_per_step=2, row_tokens=400, seed=0)
    batch = stream.batch(0)
    rows, trees_in_row, number = batch.rows, [0] * batch.num_rows, 0
    for row in range(batch.num_rows):
        at = 0
        while at < 400 and number < len(batch.examples) and rows["until"][row, at] <= 400 - 1:
            documents = Corpus.of(shards).take(batch.examples[number : number + 1])
            assert documents.until is not None
            stop = at + len(documents.until)
            assert rows["input_ids"][row, at:stop].tolist() == documents.tokens.values.tolist()
            assert rows["position_ids"][row, at:stop].tolist() == documents.depth.tolist()
            assert rows["until"][row, at:stop].tolist() == (documents.until + at).tolist()
            at, number, trees_in_row[row] = stop, number + 1, trees_in_row[row] + 1
        assert rows["position_ids"][row, at:].tolist() == list(range(400 - at))
        assert (rows["until"][row, at:] == 400).all()
    assert number == len(batch.examples) and max(trees_in_row) > 1
    assert any((read(shards).depth != read(shards).tokens.place_of).tolist())


def test_trees_and_other_documents_are_read_side_by_side(encoder: PromptEncoder) -> None:
    tree = grow(encoder, "specific", BOOKS, Ragged.of([[0, 1]]), Ragged.of([[1], [2]]), 1000, 20)
    tokens, start = encoder.documents("specific", np.array([BOOKS]), Ragged.of([[0, 1]]))
    columns = tree.documents.set_column(1, "length", [tokens.lengths.tolist()])
    columns = columns.set_column(3, "target_start", [start.tolist()])
    plain = Shards(tokens.values, columns, {})
    one = np.arange(1)
    documents = Corpus([Group("", "", plain, one, targets_only=True), Group("", "", tree, one)]).take(np.array([1, 0]))
    assert documents.until is not None
    assert documents.tokens[1].tolist() == tokens[0].tolist()
    begin = documents.tokens.offsets[1]
    assert documents.until[begin:].tolist() == [len(tokens[0])] * len(tokens[0])
    assert documents.depth[begin:].tolist() == list(range(len(tokens[0])))
    assert np.flatnonzero(documents.is_target[begin:]).tolist() == list(range(start[0], len(tokens[0])))
    assert documents.is_target[:begin].tolist() == read(tree).is_target.tolist()
    assert Corpus.of(plain).take(one).until is None
