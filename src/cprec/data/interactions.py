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

    The keys are packed into one 64-bit number where they fit: one argsort is several times faster than one per key.

    >>> stable_order(np.array([1, 0, 1, 0]), np.array([5, 9, -7, 2])).tolist()
    [3, 1, 2, 0]
    """
    if not len(keys[0]):
        return np.empty(0, dtype=np.int64)
    lows = [int(key.min()) for key in keys]
    widths = [(int(key.max()) - low).bit_length() for key, low in zip(keys, lows, strict=True)]
    if sum(widths) > 63:
        return np.lexsort(keys[::-1])
    packed = np.zeros(len(keys[0]), dtype=np.int64)
    for key, low, width in zip(keys, lows, widths, strict=True):
        packed = (packed << width) | (key.astype(np.int64) - low)
    return np.argsort(packed, kind="stable")
