from __future__ import annotations

import numpy as np
import pytest

from cprec.errors import ConfigError
from cprec.text.packing import pack


def test_best_fit_by_hand() -> None:
    # 7 and 3 fill a row, 6 and 4 another; 5 stays alone.
    rows = pack(np.array([3, 4, 5, 6, 7]), 10, seed=0)
    assert sorted(sorted(rows[row].tolist()) for row in range(len(rows))) == [[0, 4], [1, 3], [2]]


def test_realistic_lengths_fill_rows() -> None:
    lengths = np.random.default_rng(0).lognormal(5.3, 0.5, 4000).clip(20, 1024).astype(np.int64)
    rows = pack(lengths, 1024, seed=0)
    assert lengths.sum() / (len(rows) * 1024) > 0.98


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
