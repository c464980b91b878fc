from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cprec.batch import IGNORE, Batch
from cprec.errors import ConfigError


def batch_of(num_rows: int, **changes: Any) -> Batch:
    numbers = np.arange(num_rows)
    settings: dict[str, Any] = {
        "rows": {"users": numbers, "items": numbers[:, None] * 10, "targets": numbers[:, None] + 100},
        "counts": {"next_item": num_rows},
        "num_tokens": num_rows,
        "examples": numbers,
        "blank": {"targets": IGNORE},
    }
    return Batch(**settings | changes)


def test_all_arrays_are_split_alike_whatever_their_shape() -> None:
    first, second, third = batch_of(5).micro_batches(2)
    assert [part["users"].tolist() for part in (first, second, third)] == [[0, 1], [2, 3], [4]]
    assert second["items"].tolist() == [[20], [30]] and third["targets"].tolist() == [[104]]


def test_a_process_without_rows_gets_one_that_teaches_nothing() -> None:
    shares = [batch_of(2).micro_batches(0, rank, 3) for rank in range(3)]
    assert [part["users"].tolist() for (part,) in shares] == [[0], [1], [0]]
    assert [part["targets"].tolist() for (part,) in shares] == [[[100]], [[101]], [[IGNORE]]]
    with pytest.raises(ConfigError, match="a step of 2 rows has none left for one of the processes"):
        batch_of(2, blank={}).micro_batches(0, 2, 3)


def test_rows_that_are_compared_with_each_other_stay_together() -> None:
    (part,) = batch_of(4, whole=True).micro_batches()
    assert len(part["users"]) == 4
    for max_rows, num_ranks in ((2, 1), (0, 2)):
        with pytest.raises(ConfigError, match="compares all 4 rows of a step with each other"):
            batch_of(4, whole=True).micro_batches(max_rows, 0, num_ranks)
