from __future__ import annotations

import numpy as np
import pytest

from cprec.errors import ConfigError
from cprec.text.packing import pack


def test_pairs_that_fill_a_row_by_hand() -> None:
    # 7 and 3 fill a row, 6 and 4 another; 5 stays alone.
    rows = pack(np.array([3, 4, 5, 6, 7]), 10, seed=0)
    assert sorted(sorted(rows[row].tolist()) for row in range(len(rows))) == [[0, 4], [1, 3], [2]]


def test_what_fits_exactly_comes_before_what_is_longest() -> None:
    # The longest first would be 6 and 3, with no room for the 2; the pair 5 and 5 or the exact 4 and 6 waste nothing.
    rows = pack(np.array([6, 3, 2, 4, 5, 5]), 10, seed=0)
    assert sorted(sorted(rows[row].tolist()) for row in range(len(rows))) == [[0, 3], [1, 2], [4, 5]]
    rows = pack(np.array([5]), 10, seed=0)
    assert rows[0].tolist() == [0], "a document makes no pair with itself"


def best_fit_decreasing(lengths: np.ndarray, row_tokens: int) -> int:
    """How many rows the usual way takes, document by document."""
    room: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [row for row in range(len(room)) if room[row] >= length]
        if fitting:
            best = min(fitting, key=lambda row: room[row])
            room[best] -= length
        else:
            room.append(row_tokens - length)
    return len(room)


@pytest.mark.parametrize("row_tokens", [256, 1024])
@pytest.mark.parametrize(("low", "median"), [(20, 200), (31, 47)])
def test_realistic_lengths_fill_rows(row_tokens: int, low: int, median: int) -> None:
    lengths = np.random.default_rng(0).lognormal(np.log(median), 0.5, 3000).clip(low, row_tokens).astype(np.int64)
    rows = pack(lengths, row_tokens, seed=0)
    full = lengths.sum() / (len(rows) * row_tokens)
    assert len(rows) <= best_fit_decreasing(lengths, row_tokens)
    assert full > (0.99 if median < row_tokens / 4 else 0.9)


def test_the_seed_decides_the_order_of_rows_only() -> None:
    lengths = np.random.default_rng(1).integers(1, 60, 300)

    def rows(seed: int) -> list[list[int]]:
        packed = pack(lengths, 64, seed)
        return [packed[row].tolist() for row in range(len(packed))]

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)
    assert sorted(rows(0)) == sorted(rows(1))


def test_documents_stay_in_their_window() -> None:
    lengths = np.random.default_rng(2).integers(1, 60, 100)
    rows = pack(lengths, 64, seed=0, window=25)
    assert [set((rows[row] // 25).tolist()) for row in range(len(rows))] == sorted(
        (set((rows[row] // 25).tolist()) for row in range(len(rows))), key=min
    )
    assert all(len(set((rows[row] // 25).tolist())) == 1 for row in range(len(rows)))


def test_nothing_packs_to_nothing() -> None:
    assert len(pack(np.array([], dtype=np.int64), 8, seed=0)) == 0


def test_a_document_longer_than_a_row_is_refused() -> None:
    assert len(pack(np.array([8]), 8, seed=0)) == 1
    with pytest.raises(ConfigError, match=r"a document of 1,025 tokens does not fit a row of 1,024: raise max_length"):
        pack(np.array([3, 1025]), 1024, seed=0)
