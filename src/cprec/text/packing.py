"""Packs documents into rows of one length, window by window: no document is cut, and rows are nearly full."""

from __future__ import annotations

import numpy as np

from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError

WINDOW = 4096
"""Documents packed together. A wider window fills rows better; a narrower one keeps closer to the given order."""


def pack(lengths: np.ndarray, row_tokens: int, seed: int, window: int = WINDOW) -> Ragged:
    """Assign documents, in their given order, to rows of `row_tokens` tokens.

    Each window of consecutive documents fills one row after the other: by a document or a pair that fits exactly, else
    by the longest that fits, until none does. (Best-fit decreasing, Johnson 1973, leaves about twice as much padding,
    because it never looks for an exact fit.) Packing puts long documents first, so the rows of a window are shuffled
    by `seed`. Returns, per row, the positions in `lengths` of its documents; every position occurs exactly once.

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
        packed = _filled(lengths[start : start + window], row_tokens)
        order = np.random.default_rng([seed, start]).permutation(len(packed))
        rows += [[start + document for document in packed[row]] for row in order]
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.fromiter((document for row in rows for document in row), dtype=np.int64, count=int(counts.sum()))
    return Ragged(flat, offsets_of(counts))


def _filled(lengths: np.ndarray, row_tokens: int) -> list[list[int]]:
    """Rows of documents, which are places in `lengths`.

    The lengths of the documents left are bits of whole numbers, which makes a step quick: bit n of `left`, and bit
    row_tokens - n of `mirrored`, say that there is a document of n tokens.
    """
    # Documents of each length, the last one first, so that `pop` takes them in order.
    by_length: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    for document in range(len(lengths) - 1, -1, -1):
        by_length[lengths[document]].append(document)
    left = mirrored = 0
    for length, documents in enumerate(by_length):
        if documents:
            left |= 1 << length
            mirrored |= 1 << (row_tokens - length)
    rows = []
    while left:
        row: list[int] = []
        room = row_tokens
        while fitting := left & ((2 << room) - 1):  # the lengths up to `room`
            longest = fitting.bit_length() - 1
            taken = [longest]
            # Bit n of `pairs`: there are documents of n and of room - n tokens, which fill the row exactly.
            pairs = left & (mirrored >> (row_tokens - room))
            if longest < room and pairs:
                long, short = pairs.bit_length() - 1, room - pairs.bit_length() + 1
                if long != short or len(by_length[long]) > 1:
                    taken = [long, short]
            for length in taken:
                row.append(by_length[length].pop())
                if not by_length[length]:
                    left ^= 1 << length
                    mirrored ^= 1 << (row_tokens - length)
                room -= length
        rows.append(row)
    return rows
