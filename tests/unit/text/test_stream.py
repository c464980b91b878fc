from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cprec.batch import IGNORE
from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.text.config import Mixture
from cprec.text.corpus import Corpus, groups_of
from cprec.text.mixture import shares
from cprec.text.shards import Shards, open_shards, write_shards
from cprec.text.stream import NEXT_TOKEN, Phase, TokenStream, one_phase

PAD = 0
MakeShards = Callable[..., Shards]


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Documents of distinct tokens; `groups` names the domain of each, '' for mixed ones."""

    def make(groups: list[str], low: int = 1, high: int = 30, seed: int = 0) -> Shards:
        random = np.random.default_rng(seed)
        lengths = random.integers(low, high, len(groups))
        rows = [list(range(100 * number + 1, 100 * number + 1 + size)) for number, size in enumerate(lengths)]
        columns = {
            "domain": groups,
            "kind": ["specific" if group else "mixed" for group in groups],
            "num_events": (lengths // 2).astype(np.int32),
            "target_start": (lengths * 2 // 3).astype(np.int64),
        }
        write_shards(tmp_path / f"shards{seed}", Ragged.of(rows), columns, {"vocabulary_size": 1 << 20})
        return open_shards(tmp_path / f"shards{seed}")

    return make


def stream_of(shards: Shards, **changes: Any) -> TokenStream:
    settings: dict[str, Any] = {"rows_per_step": 4, "row_tokens": 32, "seed": 3, "pad_id": PAD}
    plan = one_phase(changes.pop("num_tokens", shards.manifest["num_tokens"]))
    return TokenStream(Corpus.of(shards, targets_only=changes.pop("targets_only", False)), plan, **settings | changes)


def mixed_stream(shards: Shards, phases: list[Phase], **changes: Any) -> TokenStream:
    settings: dict[str, Any] = {"rows_per_step": 4, "row_tokens": 64, "seed": 3, "pad_id": PAD}
    return TokenStream(Corpus(groups_of(shards)), phases, **settings | changes)


def phase(name: str, num_tokens: float, *share: float, num_steps: int = 0) -> Phase:
    return Phase(name=name, num_tokens=num_tokens, share=np.array(share), num_steps=num_steps)


def reference_row(shards: Shards, documents: list[int], row_tokens: int, targets_only: bool) -> list[list[int]]:
    """Input ids, positions and targets of a row, token by token."""
    ids, positions, targets = [], [], []
    for document in documents:
        tokens = shards.rows[document].tolist()
        first = int(shards.column("target_start")[document]) if targets_only else 1
        for place, token in enumerate(tokens):
            ids.append(token)
            positions.append(place)
            follows = place + 1 < len(tokens) and place + 1 >= first
            targets.append(tokens[place + 1] if follows else IGNORE)
    padding = row_tokens - len(ids)
    return [ids + [PAD] * padding, positions + list(range(padding)), targets + [IGNORE] * padding]


@pytest.mark.parametrize("targets_only", [False, True])
def test_a_batch_is_what_a_slow_reference_writes(make_shards: MakeShards, targets_only: bool) -> None:
    shards = make_shards(["books"] * 40)
    stream = stream_of(shards, targets_only=targets_only)
    for step in range(stream.num_steps):
        batch = stream.batch(step)
        documents, row = iter(batch.examples.tolist()), 0
        for ids, positions, targets in zip(
            batch.rows["input_ids"].tolist(),
            batch.rows["position_ids"].tolist(),
            batch.rows["targets"].tolist(),
            strict=True,
        ):
            starts = sum(1 for token in ids if token % 100 == 1)  # documents begin with such tokens
            expected = reference_row(shards, [next(documents) for _ in range(starts)], 32, targets_only)
            assert [ids, positions, targets] == expected
            row += 1
        assert next(documents, None) is None
        assert row == len(batch.rows["input_ids"]) in (3, 4), "rows are divided evenly over the steps"
        assert batch.num_tokens == shards.column("length")[batch.examples].sum()
        assert batch.counts[NEXT_TOKEN] == sum(
            token != IGNORE for row in batch.rows["targets"].tolist() for token in row
        )


def test_no_token_is_lost_or_invented(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 57)
    stream = stream_of(shards)
    tokens = np.concatenate([batch.rows["input_ids"].ravel() for batch in stream])
    assert sorted(tokens[tokens != PAD].tolist()) == sorted(shards.tokens.tolist())
    documents = np.concatenate([batch.examples for batch in stream])
    assert sorted(documents.tolist()) == list(range(57))
    assert sum(batch.num_tokens for batch in stream) == stream.num_tokens == shards.manifest["num_tokens"]
    assert stream.fill == pytest.approx((tokens != PAD).mean())


def test_epochs_repeat_every_document_in_another_order(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 30)
    stream = stream_of(shards, num_tokens=3 * shards.manifest["num_tokens"], rows_per_step=1)
    documents = [batch.examples.tolist() for batch in stream]
    assert Counter(sum(documents, [])) == dict.fromkeys(range(30), 3)


def test_a_step_depends_on_seed_and_step_alone(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 40)
    forwards, backwards = stream_of(shards), stream_of(shards)
    steps = range(forwards.num_steps)
    seen = {step: forwards.batch(step) for step in steps}
    for step in reversed(steps):
        again = backwards.batch(step)
        assert np.array_equal(again.rows["input_ids"], seen[step].rows["input_ids"])
        assert np.array_equal(again.examples, seen[step].examples)
    other = stream_of(shards, seed=4)
    assert not np.array_equal(other.batch(0).examples, seen[0].examples)


def test_rows_do_not_depend_on_how_many_a_step_takes(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 40)
    rows = {
        size: np.concatenate([batch.rows["input_ids"] for batch in stream_of(shards, rows_per_step=size)])
        for size in (1, 4, 7)
    }
    assert np.array_equal(rows[1], rows[4]) and np.array_equal(rows[4], rows[7])


def test_shares_by_hand(tmp_path: Path) -> None:
    columns = {
        "domain": ["books", "games", "games", ""],
        "kind": ["specific", "specific", "specific", "mixed"],
        "num_events": [4, 6, 10, 7],
        "target_start": [1, 1, 1, 1],
    }
    write_shards(tmp_path / "s", Ragged.of([[1], [2], [3], [4]]), columns, {"vocabulary_size": 9})
    shards = open_shards(tmp_path / "s")
    groups = groups_of(shards)
    assert [group.name for group in groups] == ["books (specific)", "games (specific)", "mixed"]
    assert [group.documents.tolist() for group in groups] == [[0], [1, 2], [3]]

    def share(**settings: Any) -> list[float]:
        return shares(groups, Mixture(**settings)).tolist()

    # sqrt(4) to sqrt(16) of the 0.6 that specific documents share
    assert share(mixed_share=0.4, domain_temperature=0.5) == pytest.approx([0.2, 0.4, 0.4])
    assert share(mixed_share=0.0, domain_temperature=1.0) == pytest.approx([0.2, 0.8, 0.0])
    assert share(mixed_share=0.4, domain_temperature=0.5, domain_weights={"books": 4}) == pytest.approx([0.4, 0.2, 0.4])
    assert share(mixed_share=0.4, domain_weights={"games": 0}) == pytest.approx([0.6, 0.0, 0.4])
    assert share(mixed_share=0.4, domain_weights={"games": 0, "books": 0}) == pytest.approx([0.0, 0.0, 1.0])
    with pytest.raises(ConfigError, match=r"domain_weights.toys: no such domain in the shards; there are books, games"):
        share(domain_weights={"toys": 1})
    with pytest.raises(ConfigError, match=r"asks for 5.0% general text, but there are none: name files .* in `replay`"):
        share(text_share=0.05)
    with pytest.raises(ConfigError, match=r"asks for 10.0% examples, but there are none: prepare the data with"):
        share(examples_share=0.1)


@pytest.mark.parametrize(("groups", "expected"), [(["books", "games"], [0.5, 0.5]), (["", ""], [1.0])])
def test_an_absent_kind_leaves_its_share_to_the_other(
    make_shards: MakeShards, groups: list[str], expected: list[float]
) -> None:
    found = groups_of(make_shards(groups, low=10, high=11))
    assert shares(found, Mixture(mixed_share=0.3)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("passes", [0, 100])
def test_the_mixture_comes_out_as_asked_all_along(make_shards: MakeShards, passes: int) -> None:
    shards = make_shards(["books"] * 900 + ["games"] * 300 + [""] * 300)
    asked = np.array([0.2, 0.3, 0.5])
    stream = mixed_stream(shards, one_phase(60_000, asked), rows_per_step=1, max_passes=passes)
    assert stream.group_tokens[0] / stream.num_tokens == pytest.approx(asked, abs=0.001)
    assert stream.mixture_until(stream.num_steps) == pytest.approx(
        {"books (specific)": 0.2, "games (specific)": 0.3, "mixed": 0.5}, abs=0.001
    )
    documents = np.concatenate([stream.documents(step) for step in range(stream.num_steps)])
    for part in np.array_split(documents, 3):  # each third, too, up to how far packing moves documents
        of = stream.corpus.group[part]
        found = np.bincount(of, weights=stream.corpus.lengths[part]) / stream.corpus.lengths[part].sum()
        assert found == pytest.approx(asked, abs=0.05)


def test_each_phase_has_its_mixture_and_goes_on_with_the_pass(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 400 + ["games"] * 400 + [""] * 400)
    sizes = [group.num_tokens for group in groups_of(shards)]
    plan = [phase("stable", 6000, 0.5, 0.5, 0.0), phase("annealing", 4000, 0.0, 0.5, 0.5)]
    stream = mixed_stream(shards, plan)
    shares_of = stream.group_tokens / stream.group_tokens.sum(1, keepdims=True)
    assert shares_of[0] == pytest.approx([0.5, 0.5, 0.0], abs=0.01)
    assert shares_of[1] == pytest.approx([0.0, 0.5, 0.5], abs=0.01)
    assert stream.group_tokens.sum(1) == pytest.approx([6000, 4000], rel=0.01)
    of_games = [d for step in range(stream.num_steps) for d in stream.documents(step) if stream.corpus.group[d] == 1]
    assert max(Counter(of_games).values()) == 1, f"{sizes[1]:,} tokens last for both phases"


def test_runs_whose_first_phase_is_the_same_read_the_same_in_it(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 300 + [""] * 300)
    first = phase("stable", 5000, 0.5, 0.5)
    short = mixed_stream(shards, [first, phase("annealing", 500, 0.5, 0.5)])
    long = mixed_stream(shards, [first, phase("annealing", 3000, 0.1, 0.9)])
    assert short.phase_steps[0] == long.phase_steps[0] > 5
    for step in range(short.phase_steps[0]):
        assert np.array_equal(short.batch(step).rows["input_ids"], long.batch(step).rows["input_ids"])
        assert np.array_equal(short.documents(step), long.documents(step))


def test_a_phase_takes_the_steps_it_is_given(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 400)
    stream = mixed_stream(shards, [phase("warm-up", 900, 1.0, num_steps=7), phase("stable", 3000, 1.0)])
    assert stream.phase_steps[0] == 7
    rows = [len(stream.batch(step).rows["input_ids"]) for step in range(7)]
    assert max(rows) - min(rows) <= 1


@pytest.mark.parametrize("cap", [1.0, 1.5, 2.0])
def test_no_group_is_read_more_often_than_the_cap(make_shards: MakeShards, cap: float) -> None:
    shards = make_shards(["books"] * 500 + ["games"] * 50)
    sizes = np.array([group.num_tokens for group in groups_of(shards)])
    wanted = 0.9 * sizes.sum()
    plan = [phase("stable", wanted / 2, 0.5, 0.5), phase("annealing", wanted / 2, 0.5, 0.5)]
    stream = mixed_stream(shards, plan, max_passes=cap)
    passes = stream.group_tokens.sum(0) / sizes
    assert passes[1] == pytest.approx(cap, abs=0.05), "the small one is read as often as it may"
    assert passes[0] < cap
    assert stream.num_tokens == pytest.approx(wanted, rel=0.01), "the other takes what is over"
    times = Counter(np.concatenate([stream.documents(step) for step in range(stream.num_steps)]).tolist())
    assert max(times.values()) <= np.ceil(cap)


def test_where_all_are_capped_less_is_read(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 100 + ["games"] * 100)
    stream = mixed_stream(shards, one_phase(5 * shards.manifest["num_tokens"], [0.3, 0.7]), max_passes=2)
    assert stream.num_tokens == pytest.approx(2 * shards.manifest["num_tokens"], rel=0.01)


def test_a_group_without_weight_does_not_occur(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 20 + ["games"] * 20)
    stream = mixed_stream(shards, one_phase(300, [0.0, 1.0]))
    assert min(d for step in range(stream.num_steps) for d in stream.documents(step)) >= 20
    assert stream.group_tokens[0, 0] == 0


def test_documents_of_several_folders_are_one_list(make_shards: MakeShards) -> None:
    first, second = make_shards(["books", ""], seed=1), make_shards(["games"] * 3, seed=2)
    corpus = Corpus([*groups_of(first), *groups_of(second)])
    read = corpus.take(np.array([4, 0, 1, 2]))
    expected = [second.rows[2], first.rows[0], first.rows[1], second.rows[0]]
    assert [read.tokens[row].tolist() for row in range(4)] == [row.tolist() for row in expected]
    assert read.first_target.tolist() == [1] * 4 and read.until is None
    assert np.flatnonzero(~read.is_target).tolist() == read.tokens.offsets[:-1].tolist()


def test_tokens_after_each_step_are_what_the_batches_hold(make_shards: MakeShards) -> None:
    stream = stream_of(make_shards(["books"] * 57))
    assert stream.tokens_after().tolist() == np.cumsum([batch.num_tokens for batch in stream]).tolist()


def test_nothing_to_train_on_is_refused(make_shards: MakeShards) -> None:
    with pytest.raises(ConfigError, match=r"no documents to train on: 3 in the shards, 0 tokens asked for"):
        stream_of(make_shards(["books"] * 3), num_tokens=0)


def test_a_document_longer_than_a_row_is_refused(make_shards: MakeShards) -> None:
    with pytest.raises(ConfigError, match=r"does not fit a row of 16: raise max_length"):
        stream_of(make_shards(["books"] * 20), row_tokens=16)


def test_a_group_wanted_at_all_has_a_document(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 5, low=20, high=30)
    stream = stream_of(shards, num_tokens=1)
    assert stream.num_steps == 1 and len(stream.batch(0).examples) == 1
