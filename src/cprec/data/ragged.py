"""Rows of unequal length in two flat arrays: the form of every sequence between the log and the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Ragged:
    """Rows of unequal length: row i is values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray
    """int64[num_rows + 1], from 0 to len(values)."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def row_of(self) -> np.ndarray:
        """The row of each value: int64[len(values)]."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @property
    def place_of(self) -> np.ndarray:
        """The place of each value in its row, from 0: int64[len(values)].

        >>> Ragged.of([[7, 8], [], [9]]).place_of.tolist()
        [0, 1, 0]
        """
        return np.arange(len(self.values)) - np.repeat(self.offsets[:-1], self.lengths)

    def take(self, rows: np.ndarray) -> Ragged:
        """The given rows, one after the other, in one vectorised gather.

        >>> Ragged(np.array([1, 2, 3]), np.array([0, 2, 3])).take(np.array([1, 0])).values.tolist()
        [3, 1, 2]
        """
        return gather(self.values, self.offsets[rows], self.lengths[rows])

    def kept(self, mask: np.ndarray) -> Ragged:
        """The values that a mask over all of them keeps, in their rows.

        >>> Ragged.of([[1, 2], [3]]).kept(np.array([False, True, False])).offsets.tolist()
        [0, 1, 1]
        """
        return Ragged(self.values[mask], offsets_of(mask)[self.offsets])

    def numbers(self) -> np.ndarray:
        """A number for each row, which equal rows share: from 0, in the order in which they first occur.

        >>> Ragged.of([[1, 2], [3], [], [1, 2], [1]]).numbers().tolist()
        [0, 1, 2, 0, 3]
        """
        values = np.ascontiguousarray(self.values)
        offsets = np.ascontiguousarray(self.offsets, dtype=np.int64) * values.itemsize
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(values)]
        rows = pa.Array.from_buffers(pa.large_binary(), len(self), buffers)
        numbers: np.ndarray = rows.dictionary_encode().indices.to_numpy()
        return numbers

    @classmethod
    def of(cls, rows: Sequence[Sequence[int] | np.ndarray], dtype: Any = np.int64) -> Ragged:
        """From a list of rows."""
        values = np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if len(rows) else np.empty(0, dtype)
        return cls(values.astype(dtype, copy=False), offsets_of(np.array([len(row) for row in rows], dtype=np.int64)))

    @classmethod
    def concatenate(cls, parts: Sequence[Ragged]) -> Ragged:
        """The rows of several arrays, one array after the other."""
        lengths = np.concatenate([part.lengths for part in parts]) if parts else np.empty(0, dtype=np.int64)
        values = np.concatenate([part.values for part in parts]) if parts else np.empty(0, dtype=np.int64)
        return cls(values, offsets_of(lengths))


def gather(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Ragged:
    """Runs of a flat array, one after the other: row i is values[starts[i]:starts[i] + lengths[i]]."""
    offsets = offsets_of(lengths)
    # Half as wide an index is gathered twice as fast; nearly always it is wide enough.
    index = np.int32 if max(len(values), offsets[-1]) < 1 << 31 else np.int64
    return Ragged(values[places(starts, lengths, index)], offsets)


def places(starts: np.ndarray, lengths: np.ndarray, index: type[np.integer[Any]] = np.int64) -> np.ndarray:
    """The places of runs, one run after the other: starts[i], starts[i] + 1, ..., starts[i] + lengths[i] - 1.

    >>> places(np.array([7, 2]), np.array([2, 3])).tolist()
    [7, 8, 2, 3, 4]
    """
    offsets = offsets_of(lengths)
    place = np.repeat((starts - offsets[:-1]).astype(index), lengths)
    place += np.arange(offsets[-1], dtype=index)
    return place


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """Row starts (and the end) of rows with these lengths: int64[len(lengths) + 1]."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
