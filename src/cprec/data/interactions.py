"""Interactions: every event of every user, in time order, as flat arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cprec.data.ragged import offsets_of


@dataclass(frozen=True)
class Interactions:
    """Events sorted by (user, timestamp, tie order); users sorted by (platform, user_id).

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
    timestamp: np.ndarray
    """int64[num_events]: seconds UTC, or a position where the domain has no times."""
    rating: np.ndarray
    """float64[num_events], NaN where absent."""

    def __len__(self) -> int:
        return len(self.user)

    def select(self, mask: np.ndarray) -> Interactions:
        """The events under a mask (or at given rows, rising); the table of users stays whole."""
        return replace(
            self,
            user=self.user[mask],
            item=self.item[mask],
            timestamp=self.timestamp[mask],
            rating=self.rating[mask],
        )

    def offsets(self) -> np.ndarray:
        """Where each user's events start, and the end: int64[num_users + 1]."""
        return offsets_of(np.bincount(self.user, minlength=len(self.user_id)))


def stable_order(*keys: np.ndarray) -> np.ndarray:
    """Rows sorted by integer keys, the first one first; rows equal in all keys stay as they are.

    As many keys as fit are packed into one 64-bit number, whose argsort is several times faster than one per key; only
    rows that are equal so far are sorted by the rest.

    >>> stable_order(np.array([1, 0, 1, 0]), np.array([5, 9, -7, 2])).tolist()
    [3, 1, 2, 0]
    """
    size = len(keys[0])
    assert size < 1 << 32
    if not size:
        return np.empty(0, dtype=np.int64)
    packed, used, bits = np.zeros(size, dtype=np.int64), 0, 0
    for key in keys:
        low, high = int(key.min()), int(key.max())
        width = (high - low).bit_length()
        if bits + width > 63:
            break
        packed = (packed << width) | (key.astype(np.int64) - low)
        used, bits = used + 1, bits + width
    if not used:  # the first key needs all 64 bits: its ranks need fewer
        ranks = np.unique(keys[0], return_inverse=True)[1]
        return stable_order(ranks, *keys[1:])
    order = np.argsort(packed)
    packed = packed[order]
    same = packed[1:] == packed[:-1]
    if same.any():
        tied = np.flatnonzero(np.r_[False, same] | np.r_[same, False])
        run = np.cumsum(np.r_[True, packed[tied][1:] != packed[tied][:-1]])
        rows = np.sort(order[tied] | run << 32) & 0xFFFFFFFF  # within a run of equal keys, as they came
        if used < len(keys):
            rows = rows[stable_order(run, *(key[rows] for key in keys[used:]))]
        order[tied] = rows
    return order
