"""Interactions: every event of every user, in time order, as flat arrays.

Tables hold a time as `timestamp`, whole seconds, and `microsecond`, the rest; arrays hold it as one number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cprec.data.ragged import offsets_of

SECOND = 1_000_000
"""Microseconds."""


@dataclass(frozen=True)
class Interactions:
    """Events sorted by (user, time, tie order); users sorted by (platform, user_id).

    A user's events of all domains stand in one run. Where a domain's times are real (`DomainInfo.has_times`) they are
    comparable with those of other domains; elsewhere only the order within one user and domain means anything.
    """

    platforms: tuple[str, ...]
    """Sorted; `user_platform` holds indices into it."""
    user_platform: np.ndarray
    """int16[num_users]."""
    user_id: np.ndarray
    """object[num_users] of str."""
    user: np.ndarray
    """int64[num_events]: the row of the user, never falling."""
    item: np.ndarray
    """int64[num_events]: the row of the item in the catalogue."""
    time: np.ndarray
    """int64[num_events]: microseconds since 1970 UTC, or a position where the domain has no times."""
    rating: np.ndarray
    """float64[num_events], NaN where absent."""

    def __len__(self) -> int:
        return len(self.user)

    def select(self, mask: np.ndarray) -> Interactions:
        """The events under a mask (or at given rows, rising); the table of users stays whole."""
        return replace(self, user=self.user[mask], item=self.item[mask], time=self.time[mask], rating=self.rating[mask])

    def offsets(self) -> np.ndarray:
        """Where each user's events start, and the end: int64[num_users + 1]."""
        return offsets_of(np.bincount(self.user, minlength=len(self.user_id)))


def join_time(timestamp: np.ndarray, microsecond: np.ndarray, has_times: bool) -> np.ndarray:
    """The two columns of a table as one time: microseconds since 1970 UTC, or the position unchanged."""
    return timestamp * SECOND + microsecond if has_times else timestamp


def split_time(time: np.ndarray, has_times: bool) -> tuple[np.ndarray, np.ndarray]:
    """A time as the two columns of a table, `timestamp` and `microsecond`.

    >>> [part.tolist() for part in split_time(np.array([1_500_000, -1]), has_times=True)]
    [[1, -1], [500000, 999999]]
    """
    timestamp, microsecond = np.divmod(time, SECOND) if has_times else (time, np.zeros_like(time))
    return timestamp, microsecond.astype(np.int32)


def stable_order(*keys: np.ndarray) -> np.ndarray:
    """Rows sorted by integer keys, the first one first; rows equal in all keys stay as they are.

    As many bits of them as fit are packed into one number, whose argsort is several times faster than one per key; only
    rows that are equal so far are sorted by the rest.

    >>> stable_order(np.array([1, 0, 1, 0]), np.array([5, 9, -7, 2])).tolist()
    [3, 1, 2, 0]
    """
    size = len(keys[0])
    assert size < 1 << 32
    if not size:
        return np.empty(0, dtype=np.int64)
    # Pack the keys, first key first, until 63 bits are full: of each key the difference from its minimum.
    packed, bits, rest = np.zeros(size, dtype=np.int64), 0, list(keys)
    while rest and bits < 63:
        key = rest.pop(0).astype(np.int64)
        low, high = int(key.min()), int(key.max())
        width = (high - low).bit_length()
        offset = key.view(np.uint64) - np.uint64(low % (1 << 64))  # unsigned: it may need all 64 bits
        kept = min(width, 63 - bits)
        if kept < width:  # only its highest bits fit; the others become a key of their own
            rest.insert(0, (offset & np.uint64((1 << (width - kept)) - 1)).view(np.int64))
            offset >>= np.uint64(width - kept)
        packed = (packed << kept) | offset.view(np.int64)
        bits += kept
    order = np.argsort(packed)
    # Rows of equal packed keys (`tied`, numbered by `run`) come in any order: sort them by what is left of the keys, or
    # back into the order in which they came.
    packed = packed[order]
    same = packed[1:] == packed[:-1]
    if same.any():
        tied = np.flatnonzero(np.r_[False, same] | np.r_[same, False])
        run = np.cumsum(np.r_[True, packed[tied][1:] != packed[tied][:-1]])
        rows = np.sort(order[tied] | run << 32) & 0xFFFFFFFF  # by run (upper 32 bits), then by row (lower 32 bits)
        if rest:
            rows = rows[stable_order(run, *(key[rows] for key in rest))]
        order[tied] = rows
    return order
