"""A batch: the rows that one optimizer step learns from, and how they are shared out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cprec.errors import ConfigError

IGNORE = -100
"""Marks a position that predicts nothing (the value that torch's cross-entropy ignores)."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """All that an optimizer step learns from, in all processes together.

    A step's loss is a sum of terms. Each term is summed over the rows, wherever they are computed, and divided by its
    count; so the result depends neither on the number of micro-batches nor on that of processes.
    """

    rows: Mapping[str, np.ndarray]
    """Arrays by name, all of shape [R, ...]: row r of each belongs to the same example (or packed row of examples)."""
    counts: Mapping[str, int]
    """By loss term, the number that its sum over all rows is divided by: usually that of its targets."""
    num_tokens: int
    """What progress is counted in: tokens or events, without padding."""
    examples: np.ndarray
    """The numbers of the examples or documents in the rows, in order. The running hash of a run covers them."""
    blank: Mapping[str, int] = field(default_factory=dict)
    """What makes a row teach nothing, by array: `{"targets": IGNORE}`. A process that is left without rows computes a
    copy of the first row with these arrays filled so, since all processes work in step."""
    whole: bool = False
    """Rows must stay together, because a loss term compares them (negatives within the batch)."""

    @property
    def num_rows(self) -> int:
        return len(next(iter(self.rows.values())))

    def micro_batches(self, max_rows: int = 0, rank: int = 0, num_ranks: int = 1) -> list[dict[str, np.ndarray]]:
        """The rows of one process, in parts of at most `max_rows`, or with 0 at once; all processes have as many parts.

        Raises ConfigError for rows that must stay together, and for a process without rows where `blank` is empty.
        """
        largest_share = -(-self.num_rows // num_ranks)
        num_parts = -(-largest_share // (max_rows or largest_share))
        if self.whole and (num_parts > 1 or num_ranks > 1):
            raise ConfigError(
                f"a loss term compares all {self.num_rows} rows of a step with each other, so they cannot be divided "
                f"into {num_parts} micro-batches in each of {num_ranks} processes: train in one process, with all rows "
                "of a step in one micro-batch"
            )
        shares = {
            name: np.array_split(np.array_split(array, num_ranks)[rank], num_parts) for name, array in self.rows.items()
        }
        parts = [{name: share[part] for name, share in shares.items()} for part in range(num_parts)]
        return [part if len(next(iter(part.values()))) else self._blank_row() for part in parts]

    def _blank_row(self) -> dict[str, np.ndarray]:
        if not self.blank:
            raise ConfigError(
                f"a step of {self.num_rows} rows has none left for one of the processes: start fewer processes, or "
                "give a step more rows"
            )
        first = {name: array[:1] for name, array in self.rows.items()}
        return first | {name: np.full_like(first[name], value) for name, value in self.blank.items()}
