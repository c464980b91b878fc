"""Documents to fixed-length rows: best fit within a window, so that no document is cut and rows are nearly full."""

from __future__ import annotations

import numpy as np

from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError

WINDOW = 4096
"""Documents packed together. A wider window fills rows better; a narrower one keeps closer to the given order."""


def pack(lengths: np.ndarray, row_tokens: int, seed: int, window: int = WINDOW) -> Ragged:
    """Assign documents, in their given order, to rows of `row_tokens` tokens.

    Each window of consecutive documents is packed by best-fit decreasing (Johnson 1973): longest first, each into the
    fullest row with room. The rows of a window come out in an order shuffled by `seed`, for packing puts long documents
    first. Returns, per row, the positions in `lengths` of its documents; every position occurs exactly once.

    Raises ConfigError if a document is longer than a row.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and lengths.max() > row_tokens:
        raise ConfigError(
            f"a document of {lengths.max():,} tokens does not fit a row of {row_tokens:,}: raise max_length, or "
            "prepare the data with a smaller max_document_tokens"
        )
    rows: list[list[int]] = []
    for start in range(0, len(lengths), window):
        packed = _best_fit(lengths[start : start + window], row_tokens)
        order = np.random.default_rng([seed, start]).permutation(len(packed))
        rows += [[start + document for document in packed[row]] for row in order]
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.fromiter((document for row in rows for document in row), dtype=np.int64, count=int(counts.sum()))
    return Ragged(flat, offsets_of(counts))


def _best_fit(lengths: np.ndarray, row_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]  # rows by the room left in them
    occupied = 0  # bit r is set while by_room[r] holds a row
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                occupied ^= 1 << room
            rows[row].append(document)
        else:
            room, row = row_tokens, len(rows)
            rows.append([document])
        by_room[room - length].append(row)
        occupied |= 1 << (room - length)
    return rows
