"""What systems learn from: the training sequences of a domain, what else is known of their events, and rows of them.

Items are numbered 0 to V - 1 as they stand in the domain's part of the catalogue; V pads. Suffix P: pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.data.interactions import Interactions, stable_order
from cprec.data.ragged import Ragged, gather, offsets_of
from cprec.data.splits import Split
from cprec.errors import Unsuitable

DAY = 86_400_000_000
"""Microseconds."""
EQUAL = 1e-6
"""Deviations of logarithms that are no larger say that all are equal."""


@dataclass(frozen=True)
class TrainingSequences:
    """The training events of a domain as sequences of item numbers."""

    catalogue: Catalogue
    domain: str
    sequences: Ragged
    """One row for each user with a training event, in time order."""
    users: tuple[str, ...]
    """platform/user_id of each row."""
    times: np.ndarray | None = None
    """When each event of `sequences` was, as in the interactions; None where they were not made of a split."""

    @property
    def num_items(self) -> int:
        return len(self.catalogue.rows_of(self.domain))

    @property
    def titles(self) -> list[str]:
        return self.catalogue.titles_of(self.domain)

    @property
    def categories(self) -> list[str]:
        """Of each item; empty where it has none."""
        return [str(category) for category in self.catalogue.categories[self.catalogue.rows_of(self.domain)]]

    @property
    def item_ids(self) -> list[str]:
        return [str(item) for item in self.catalogue.item_id[self.catalogue.rows_of(self.domain)]]

    @classmethod
    def of(cls, split: Split, domain: str) -> TrainingSequences:
        """Raises Unsuitable if no user has two training events in the domain."""
        log, mine = split.train, split.catalogue.rows_of(domain)
        chosen = np.flatnonzero(split.catalogue.domain[log.item] == split.catalogue.domain_index(domain))
        chosen = chosen[stable_order(log.user[chosen])]
        user, first, counts = np.unique(log.user[chosen], return_index=True, return_counts=True)
        if not len(counts) or counts.max() < 2:
            raise Unsuitable(f"domain {domain!r} has no user with two training events: there is nothing to train on")
        sequences = Ragged(log.item[chosen] - mine[0], offsets_of(counts))
        return cls(split.catalogue, domain, sequences, tuple(user_names(log, user)), log.time[chosen])

    def digest(self) -> str:
        """SHA-256 of everything there is to learn from."""
        brands = map(str, self.catalogue.brand[self.catalogue.rows_of(self.domain)])
        content = (
            *(self.sequences.values.tobytes(), self.sequences.offsets.tobytes(), "\n".join(self.users).encode()),
            *("\n".join(texts).encode() for texts in (self.item_ids, self.titles, brands, self.categories)),
            b"" if self.times is None else self.times.tobytes(),
        )
        return hashlib.sha256(b"\0".join(content)).hexdigest()


def user_names(log: Interactions, rows: np.ndarray) -> list[str]:
    """platform/user_id of users by row, as queries name them."""
    return [f"{log.platforms[log.user_platform[row]]}/{log.user_id[row]}" for row in rows]


class Gaps:
    """How long after the event before it each event of a history was: the logarithm of 1 + days, less its mean over the
    training events, in their standard deviations. 0 stands for what is not known, like the gap of a first event.

    With `linear` it is the time itself, over the median of all that are above zero, so that a typical gap is 1. That
    stands for what is not known, too, and is each gap where times are only an order; that of a first event is 0.
    """

    def __init__(self, data: TrainingSequences, *, linear: bool = False) -> None:
        assert data.times is not None, "gaps are those of a split's events"
        items, sequences = data.sequences.values, data.sequences
        is_known, self._unknown = sequences.place_of > 0, np.float32(linear)
        logs = np.log1p(np.diff(data.times, prepend=data.times[0]) / DAY, where=is_known, out=np.zeros(len(items)))
        deviation = logs[is_known].std()
        # Where there are no real times, or all gaps are equal, they say nothing.
        is_known &= deviation > EQUAL
        gaps = np.where(is_known, (logs - logs[is_known].mean()) / deviation, 0) if is_known.any() else 0 * logs
        if linear:
            gaps = np.diff(data.times, prepend=data.times[0]) * (sequences.place_of > 0)
            gaps = gaps / np.median(gaps[gaps > 0]) if (gaps > 0).any() else gaps
        self.training = Ragged(gaps.astype(np.float32), sequences.offsets)
        """Of the training sequences: float32."""
        keys = sequences.row_of * data.num_items + items
        order = np.argsort(keys, kind="stable")
        self._keys, self._gaps, self._num_items = keys[order], self.training.values[order], data.num_items
        self._row_of = {user: row for row, user in enumerate(data.users)}

    def of(self, histories: Ragged, users: Sequence[str]) -> Ragged:
        """Of histories of item numbers, of users by name: float32. Known are those of training events; where a user had
        an item several times, the last of them counts."""
        rows = np.array([self._row_of.get(user, -1) for user in users], dtype=np.int64)[histories.row_of]
        keys = rows * self._num_items + histories.values
        places = np.searchsorted(self._keys, keys, side="right") - 1
        is_known = (rows >= 0) & (self._keys[places] == keys)
        return Ragged(np.where(is_known, self._gaps[places], self._unknown), histories.offsets)


class Baskets:
    """What users had at one time. Where no user had two events at one time, as where times are only an order, each run
    of `window` events of a user counts as a basket, and runs overlap."""

    def __init__(self, data: TrainingSequences, window: int) -> None:
        self._sequences, self._window = data.sequences, window
        self._row_of = {user: row for row, user in enumerate(data.users)}
        values, lengths, place = data.sequences.values, data.sequences.lengths, data.sequences.place_of
        times = np.arange(len(values)) if data.times is None else data.times
        self._begins = (place == 0) | (np.diff(times, prepend=times[0]) != 0)
        self._has_times = not self._begins.all()
        if self._has_times:
            runs = Ragged(values, np.append(np.flatnonzero(self._begins), len(values)))
        else:
            starts = np.flatnonzero(place <= (lengths - window).clip(min=0)[data.sequences.row_of])
            runs = gather(values, starts, np.minimum(window, lengths)[data.sequences.row_of[starts]])
        keys = np.unique(runs.row_of * data.num_items + runs.values)
        counts = np.bincount(keys // data.num_items, minlength=len(runs))
        self.training = Ragged(keys % data.num_items, offsets_of(counts)).take(np.flatnonzero(counts > 1))
        """The different items of each basket of training that has two or more of them."""

    def gaps(self, histories: Ragged, users: Sequence[str]) -> Ragged:
        """Which events of histories of item numbers, of users by name, begin a basket that another one stands before:
        1, and 0 for others: float32.

        Times are those of training: they are known where a history begins with the latest training events of its user.
        What comes after these belongs to the last basket, and so does all of a history that begins otherwise. Where
        runs are baskets, the latest `window` events are the last one.
        """
        if not self._has_times:
            begins = histories.place_of == (histories.lengths - self._window)[histories.row_of]
            return Ragged((begins & (histories.place_of > 0)).astype(np.float32), histories.offsets)
        gaps = np.zeros(len(histories.values), dtype=np.float32)
        for row, user in enumerate(users):
            history, start = histories[row], histories.offsets[row]
            mine = self._row_of.get(user, -1)
            stop = self._sequences.offsets[mine + 1]
            longest = min(len(history), self._sequences.lengths[mine]) if mine >= 0 else 0
            for num in range(longest, 0, -1):
                if np.array_equal(history[:num], self._sequences.values[stop - num : stop]):
                    gaps[start + 1 : start + num] = self._begins[stop - num + 1 : stop]
                    break
        return Ragged(gaps, histories.offsets)


def windows(sequences: Ragged, max_targets: int) -> Ragged:
    """Sequences cut from their ends into windows of at most `max_targets` targets: each item but a sequence's first is
    a target once, and the last item of a window is the first of the next.

    >>> cut = windows(Ragged.of([[0, 1, 2, 3, 4], [5]]), 2)
    >>> [cut[row].tolist() for row in range(len(cut))]
    [[0, 1, 2], [2, 3, 4]]
    """
    targets = sequences.lengths - 1
    counts = -(-np.maximum(targets, 0) // max_targets)
    row = np.repeat(np.arange(len(sequences)), counts)
    windows_after = np.repeat(offsets_of(counts)[1:], counts) - 1 - np.arange(len(row))
    stop = sequences.offsets[row + 1] - windows_after * max_targets
    start = np.maximum(stop - max_targets - 1, sequences.offsets[row])
    return gather(sequences.values, start, stop - start)


def consecutive(sequences: Ragged) -> np.ndarray:
    """Each item with the one right after it in its row, where they differ: int64[P, 2].

    >>> consecutive(Ragged.of([[4, 4, 5], [6], [5, 4]])).tolist()
    [[4, 5], [5, 4]]
    """
    pairs_P2 = np.stack([sequences.values[:-1], sequences.values[1:]], axis=1)
    same_row = np.diff(sequences.row_of) == 0
    return pairs_P2[same_row & (pairs_P2[:, 0] != pairs_P2[:, 1])]


def padded(rows: Ragged, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of equal length, one position at least, filled up on the right, and their true lengths.

    >>> padded(Ragged.of([[1, 2], [], [3]]), 9)[0].tolist()
    [[1, 2], [9, 9], [3, 9]]
    """
    lengths = rows.lengths
    dtype = np.int64 if rows.values.dtype.kind == "i" else rows.values.dtype
    out = np.full((len(rows), max(1, int(lengths.max(initial=0)))), fill, dtype=dtype)
    out[rows.row_of, np.arange(len(rows.values)) - np.repeat(rows.offsets[:-1], lengths)] = rows.values
    return out, lengths


def recent(rows: Ragged, most: int) -> Ragged:
    """The last `most` values of each row.

    >>> recent(Ragged.of([[1, 2, 3], [4]]), 2).values.tolist()
    [2, 3, 4]
    """
    lengths = np.minimum(rows.lengths, most)
    return gather(rows.values, rows.offsets[1:] - lengths, lengths)
