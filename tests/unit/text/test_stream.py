from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cprec.data.ragged import Ragged
from cprec.errors import ConfigError
from cprec.text.shards import Shards, write_shards
from cprec.text.stream import IGNORE, TokenStream, mixture_weights

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
        return write_shards(tmp_path / f"shards{seed}", Ragged.of(rows), columns, {"vocabulary_size": 1 << 20})

    return make


def stream_of(shards: Shards, **changes: Any) -> TokenStream:
    settings: dict[str, Any] = {
        "rows_per_step": 4,
        "row_tokens": 32,
        "num_tokens": shards.manifest["num_tokens"],
        "seed": 3,
        "pad_id": PAD,
    }
    return TokenStream(shards, **settings | changes)


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
        documents, row = iter(batch.documents.tolist()), 0
        for ids, positions, targets in zip(
            batch.input_ids_RT.tolist(), batch.position_ids_RT.tolist(), batch.targets_RT.tolist(), strict=True
        ):
            starts = sum(1 for token in ids if token % 100 == 1)  # documents begin with such tokens
            expected = reference_row(shards, [next(documents) for _ in range(starts)], 32, targets_only)
            assert [ids, positions, targets] == expected
            row += 1
        assert next(documents, None) is None
        assert row == (4 if step < stream.num_steps - 1 else len(batch.input_ids_RT))
        assert batch.num_tokens == shards.column("length")[batch.documents].sum()
        assert batch.num_targets == sum(token != IGNORE for row in batch.targets_RT.tolist() for token in row)


def test_no_token_is_lost_or_invented(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 57)
    stream = stream_of(shards)
    tokens = np.concatenate([batch.input_ids_RT.ravel() for batch in stream])
    assert sorted(tokens[tokens != PAD].tolist()) == sorted(shards.tokens.tolist())
    documents = np.concatenate([batch.documents for batch in stream])
    assert sorted(documents.tolist()) == list(range(57))
    assert sum(batch.num_tokens for batch in stream) == stream.num_tokens == shards.manifest["num_tokens"]
    assert stream.fill == pytest.approx((tokens != PAD).mean())


def test_epochs_repeat_every_document_in_another_order(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 30)
    stream = stream_of(shards, num_tokens=3 * shards.manifest["num_tokens"], rows_per_step=1)
    documents = [batch.documents.tolist() for batch in stream]
    assert Counter(sum(documents, [])) == dict.fromkeys(range(30), 3)


def test_a_step_depends_on_seed_and_step_alone(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 40)
    forwards, backwards = stream_of(shards), stream_of(shards)
    steps = range(forwards.num_steps)
    seen = {step: forwards.batch(step) for step in steps}
    for step in reversed(steps):
        again = backwards.batch(step)
        assert np.array_equal(again.input_ids_RT, seen[step].input_ids_RT)
        assert np.array_equal(again.documents, seen[step].documents)
    other = stream_of(shards, seed=4)
    assert not np.array_equal(other.batch(0).documents, seen[0].documents)


def test_rows_do_not_depend_on_how_many_a_step_takes(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 40)
    rows = {
        size: np.concatenate([batch.input_ids_RT for batch in stream_of(shards, rows_per_step=size)])
        for size in (1, 4, 7)
    }
    assert np.array_equal(rows[1], rows[4]) and np.array_equal(rows[4], rows[7])


def test_mixture_weights_by_hand(make_shards: MakeShards, tmp_path: Path) -> None:
    columns = {
        "domain": ["books", "games", "games", ""],
        "kind": ["specific", "specific", "specific", "mixed"],
        "num_events": [4, 6, 10, 7],
    }
    shards = write_shards(tmp_path / "s", Ragged.of([[1], [2], [3], [4]]), columns, {"vocabulary_size": 9})
    group, weight = mixture_weights(shards, mixed_share=0.4, domain_temperature=0.5)
    # sqrt(4) to sqrt(16) of the 0.6 that specific documents share; mixed documents are group 0
    assert group.tolist() == [1, 2, 2, 0]
    assert weight.tolist() == pytest.approx([0.4, 0.2, 0.4])
    assert mixture_weights(shards, mixed_share=0.0, domain_temperature=1.0)[1].tolist() == pytest.approx([0, 0.2, 0.8])


@pytest.mark.parametrize(("groups", "expected"), [(["books", "games"], [0.5, 0.5]), (["", ""], [1.0])])
def test_an_absent_kind_leaves_its_share_to_the_other(
    make_shards: MakeShards, groups: list[str], expected: list[float]
) -> None:
    shards = make_shards(groups, low=10, high=11)
    assert mixture_weights(shards, mixed_share=0.3, domain_temperature=0.7)[1].tolist() == pytest.approx(expected)


def test_the_mixture_comes_out_as_asked_all_along(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 900 + ["games"] * 300 + [""] * 300)
    group, _ = mixture_weights(shards, mixed_share=0.5, domain_temperature=1.0)
    asked = np.array([0.5, 0.2, 0.3])  # mixed, books, games
    stream = stream_of(shards, group=group, weight=asked, num_tokens=60_000, rows_per_step=1, row_tokens=64)
    assert stream.group_tokens / stream.num_tokens == pytest.approx(asked, abs=0.01)
    documents = np.concatenate([batch.documents for batch in stream])
    lengths = shards.column("length")
    for part in np.array_split(documents, 3):  # each third, too, up to how far packing moves documents
        shares = np.bincount(group[part], weights=lengths[part]) / lengths[part].sum()
        assert shares == pytest.approx(asked, abs=0.05)


def test_a_group_without_weight_does_not_occur(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 20 + ["games"] * 20)
    stream = stream_of(shards, group=np.repeat([0, 1], 20), weight=np.array([0.0, 1.0]))
    assert np.concatenate([batch.documents for batch in stream]).min() >= 20
    assert stream.group_tokens[0] == 0


def test_nothing_to_train_on_is_refused(make_shards: MakeShards) -> None:
    with pytest.raises(ConfigError, match=r"no documents to train on: 3 in the shards, num_tokens=0"):
        stream_of(make_shards(["books"] * 3), num_tokens=0)


def test_a_document_longer_than_a_row_is_refused(make_shards: MakeShards) -> None:
    with pytest.raises(ConfigError, match=r"does not fit a row of 16: raise max_length"):
        stream_of(make_shards(["books"] * 20), row_tokens=16)


def test_a_group_wanted_at_all_has_a_document(make_shards: MakeShards) -> None:
    shards = make_shards(["books"] * 5, low=20, high=30)
    stream = stream_of(shards, num_tokens=1)
    assert stream.num_steps == 1 and len(stream.batch(0).documents) == 1
