"""What systems learn from: the training sequences of a domain, and streams of rows made of them.

A stream says which rows are learnt from together and what each is to predict: the next item everywhere, masked items,
an item of the user, the item after a prefix, the same item after two prefixes. Items are numbered 0 to V - 1 as they
stand in the domain's part of the catalogue; V pads. Suffixes: R rows, T positions.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cprec.batch import IGNORE, Batch
from cprec.data.catalogue import Catalogue
from cprec.data.interactions import Interactions, stable_order
from cprec.data.ragged import Ragged, gather, offsets_of
from cprec.data.splits import Split
from cprec.errors import Unsuitable
from cprec.systems.items import MASK

DAY = 86_400_000_000
"""Microseconds."""
EQUAL = 1e-6
"""Deviations of logarithms that are no larger say that all are equal."""
POOL = 32
"""Batches among which rows are sorted by length by default: enough that a batch holds hardly any padding."""


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
        return [str(title) for title in self.catalogue.title[self.catalogue.rows_of(self.domain)]]

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
        content = (
            *(self.sequences.values.tobytes(), self.sequences.offsets.tobytes(), "\n".join(self.users).encode()),
            *("\n".join(texts).encode() for texts in (self.item_ids, self.titles, self.categories)),
            b"" if self.times is None else self.times.tobytes(),
        )
        return hashlib.sha256(b"\0".join(content)).hexdigest()


def user_names(log: Interactions, rows: np.ndarray) -> list[str]:
    """platform/user_id of users by row, as queries name them."""
    return [f"{log.platforms[log.user_platform[row]]}/{log.user_id[row]}" for row in rows]


class Gaps:
    """How long after the event before it each event of a history was: the logarithm of 1 + days, less its mean over the
    training events, in their standard deviations. 0 stands for what is not known, like the gap of a first event."""

    def __init__(self, data: TrainingSequences) -> None:
        assert data.times is not None, "gaps are those of a split's events"
        items, sequences = data.sequences.values, data.sequences
        is_known = sequences.place_of > 0
        logs = np.log1p(np.diff(data.times, prepend=data.times[0]) / DAY, where=is_known, out=np.zeros(len(items)))
        deviation = logs[is_known].std()
        # Where there are no real times, or all gaps are equal, they say nothing.
        is_known &= deviation > EQUAL
        gaps = np.where(is_known, (logs - logs[is_known].mean()) / deviation, 0) if is_known.any() else 0 * logs
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
        return Ragged(np.where(is_known, self._gaps[places], np.float32(0)), histories.offsets)


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


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often, and in which order, a stream reads its rows."""

    batch_size: int
    num_epochs: float
    seed: int
    pool: int = POOL
    """Batches among which rows are sorted by length; 1: a batch is a random sample of all rows."""


class RowStream(ABC):
    """Batches of rows in a seeded order that is a pure function of the step: a `cprec.train.trainable.Stream`.

    An epoch holds each row once; a batch holds rows of nearly one length unless `Passes.pool` is 1.
    """

    num_steps: int
    num_tokens: int
    """Events that all steps read, fewer where rows are thinned."""

    def __init__(self, lengths: np.ndarray, terms: Sequence[str], passes: Passes) -> None:
        """`terms` names the loss terms; each is divided by the number of targets."""
        self._lengths, self._terms, self._size, self._seed = lengths, tuple(terms), passes.batch_size, passes.seed
        self._pool = passes.pool * passes.batch_size
        self._per_epoch = -(-len(lengths) // self._size)
        self.num_steps = max(1, round(self._per_epoch * passes.num_epochs))
        self.num_tokens = round(self.num_steps / self._per_epoch * int(lengths.sum()))
        self._order = lru_cache(maxsize=2)(self._order_of)

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The rows of a step; it needs no earlier step."""

    def members(self, step: int) -> np.ndarray:
        """The numbers of a step's rows."""
        epoch, place = divmod(step, self._per_epoch)
        return self._order(epoch)[place]

    def _order_of(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch: rows are shuffled, sorted by length within a pool, and batches are shuffled."""
        generator = np.random.default_rng([self._seed, epoch])
        order = generator.permutation(len(self._lengths))
        batches = []
        for start in range(0, len(order), self._pool):
            pool = order[start : start + self._pool]
            pool = pool[np.argsort(self._lengths[pool], kind="stable")]
            batches += [pool[first : first + self._size] for first in range(0, len(pool), self._size)]
        return [batches[number] for number in generator.permutation(len(batches))]

    def _batch(
        self, members: np.ndarray, num_targets: int, num_tokens: int, *, whole: bool = False, **rows: np.ndarray
    ) -> Batch:
        counts = dict.fromkeys(self._terms, num_targets)
        blank = {"targets": IGNORE} if rows["targets"].ndim == 2 else {}
        return Batch(rows=rows, counts=counts, num_tokens=num_tokens, examples=members, blank=blank, whole=whole)

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(step) for step in range(self.num_steps))


class WindowStream(RowStream):
    """Windows of training sequences; each position predicts the item after it. With `gaps` of all events, float32,
    those of the items that are read stand beside them. `thinned_rows` is the share of a step's rows that are thinned;
    which, and how, depends on seed and step alone."""

    def __init__(
        self,
        data: TrainingSequences,
        terms: Sequence[str],
        max_length: int,
        passes: Passes,
        *,
        gaps: Ragged | None = None,
        whole: bool = False,
        thinned_rows: float = 0.0,
    ) -> None:
        """`whole`: a term compares the targets of a step (see `Batch.whole`)."""
        assert gaps is None or not thinned_rows, "gaps are those between events that stand next to each other"
        self._whole = whole
        self._windows, self._pad = windows(data.sequences, max_length), data.num_items
        self._gaps, self._thinned_rows = None if gaps is None else windows(gaps, max_length), thinned_rows
        super().__init__(self._windows.lengths - 1, terms, passes)

    def batch(self, step: int) -> Batch:
        members = self.members(step)
        taken = self._windows.take(members)
        if self._thinned_rows:
            taken = thinned(taken, self._thinned_rows, np.random.default_rng([self._seed, step, 3]))
        rows, lengths = padded(taken, self._pad)
        has_next = np.arange(1, rows.shape[1]) < lengths[:, None]
        targets = np.where(has_next, rows[:, 1:], IGNORE)
        items = np.where(has_next, rows[:, :-1], self._pad)
        num_targets = int((lengths - 1).sum())
        beside: dict[str, Any] = {} if self._gaps is None else {"gaps": padded(self._gaps.take(members), 0)[0][:, :-1]}
        whole = self._whole
        return self._batch(members, num_targets, num_targets, whole=whole, items=items, targets=targets, **beside)


class MaskedStream(RowStream):
    """Windows of training sequences with masked items, which are the targets; masks depend on seed and step alone."""

    def __init__(
        self,
        data: TrainingSequences,
        terms: Sequence[str],
        max_length: int,
        passes: Passes,
        *,
        mask_share: float,
        last_share: float,
    ) -> None:
        """Masks `mask_share` of a row's items; in `last_share` of the rows the last item alone."""
        self._windows, self._pad = windows(data.sequences, max_length - 1), data.num_items
        self._mask_share, self._last_share = mask_share, last_share
        super().__init__(self._windows.lengths, terms, passes)

    def batch(self, step: int) -> Batch:
        members = self.members(step)
        rows, lengths = padded(self._windows.take(members), self._pad)
        generator = np.random.default_rng([self._seed, step, 1])
        place = np.arange(rows.shape[1])
        is_item, is_last = place < lengths[:, None], place == lengths[:, None] - 1
        masked = is_item & (generator.random(rows.shape) < self._mask_share)
        only_last = generator.random(len(rows)) < self._last_share
        masked[only_last] = is_last[only_last]
        none = ~masked.any(1)
        masked[none] = is_last[none]
        items = np.where(masked, self._pad + MASK, rows)
        targets = np.where(masked, rows, IGNORE)
        return self._batch(members, int(masked.sum()), int(lengths.sum()), items=items, targets=targets)


class UserItemStream(RowStream):
    """A user and an item of theirs in each row; every training event is one pair."""

    def __init__(self, data: TrainingSequences, terms: Sequence[str], passes: Passes) -> None:
        self._user, self._item = data.sequences.row_of, data.sequences.values
        super().__init__(np.ones(len(self._item), dtype=np.int64), terms, passes)

    def batch(self, step: int) -> Batch:
        pairs = self.members(step)
        return self._batch(pairs, len(pairs), len(pairs), users=self._user[pairs], targets=self._item[pairs])


class PairStream(RowStream):
    """Pairs of items: the first of a pair is the history, the second its target. Each row has `hard` negatives of the
    first as well, int64[R, H], and V where there is none: none in the first pass and one more in each pass after it, up
    to `most_hard` (Ying et al. 2018, section 3.3)."""

    def __init__(
        self, pairs_P2: np.ndarray, hard: Ragged, terms: Sequence[str], passes: Passes, *, most_hard: int
    ) -> None:
        """The negatives of each item are drawn from its row of `hard`."""
        self._pairs_P2, self._hard, self._most_hard = pairs_P2, hard, most_hard
        super().__init__(np.ones(len(pairs_P2), dtype=np.int64), terms, passes)

    def batch(self, step: int) -> Batch:
        pairs = self.members(step)
        items_R, targets_R = self._pairs_P2[pairs].T
        num, first = self._hard.lengths[items_R], self._hard.offsets[items_R]
        generator = np.random.default_rng([self._seed, step, 3])
        share_RH = generator.random((len(pairs), min(step // self._per_epoch, self._most_hard)))
        place_RH = first[:, None] + (share_RH * num[:, None]).astype(np.int64)
        padded_values = np.append(self._hard.values, len(self._hard))  # V where an item has none
        hard_RH = padded_values[np.where(num[:, None] > 0, place_RH, -1)]
        return self._batch(pairs, len(pairs), len(pairs), items=items_R[:, None], targets=targets_R, hard=hard_RH)


class BasketStream(RowStream):
    """Pairs of two items of a basket: the first is the history, without a gap, the second its target. A pass reads each
    item of each basket once, with another item of it that is drawn anew."""

    def __init__(self, baskets: Ragged, terms: Sequence[str], passes: Passes) -> None:
        """Each basket holds two different items or more."""
        self._baskets, self._basket, self._place = baskets, baskets.row_of, baskets.place_of
        super().__init__(np.ones(len(baskets.values), dtype=np.int64), terms, passes)

    def batch(self, step: int) -> Batch:
        events = self.members(step)
        first, num = self._baskets.offsets[self._basket[events]], self._baskets.lengths[self._basket[events]]
        generator = np.random.default_rng([self._seed, step, 4])
        other = first + (self._place[events] + generator.integers(1, num)) % num
        items, targets = self._baskets.values[events], self._baskets.values[other]
        gaps = np.zeros((len(events), 1), dtype=np.float32)
        return self._batch(events, len(events), len(events), items=items[:, None], targets=targets, gaps=gaps)


class Prefixes:
    """The prefixes of training sequences, by number: every item but a sequence's first is the target of one."""

    def __init__(self, data: TrainingSequences, max_length: int) -> None:
        """The latest `max_length` events of a prefix are its history."""
        self._values, places = data.sequences.values, data.sequences.place_of
        self._stop = np.flatnonzero(places)
        self.lengths = np.minimum(places[self._stop], max_length)
        self.users = data.sequences.row_of[self._stop]
        self.targets = self._values[self._stop]

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: np.ndarray) -> Ragged:
        """The histories of some prefixes."""
        return gather(self._values, self._stop[rows] - self.lengths[rows], self.lengths[rows])


Views = Callable[[np.ndarray, np.random.Generator], Sequence[Ragged]]
"""More histories for each of some prefixes, given by number, to be contrasted: one row of each for each prefix."""


class PrefixStream(RowStream):
    """Prefixes of training sequences, each with the item after it. With views each row holds several histories: the
    prefix, then those of each view, drawn anew for each step."""

    def __init__(
        self,
        data: TrainingSequences,
        terms: Sequence[str],
        max_length: int,
        passes: Passes,
        views: Sequence[Views] = (),
        *,
        whole: bool = False,
    ) -> None:
        """`whole`: a term compares the rows of a step (see `Batch.whole`), as terms of views do."""
        self.prefixes, self._pad, self._views = Prefixes(data, max_length), data.num_items, views
        self._whole = whole or bool(views)
        super().__init__(self.prefixes.lengths, terms, passes)

    def batch(self, step: int) -> Batch:
        members = self.members(step)
        generator = np.random.default_rng([self._seed, step, 2])
        histories = [self.prefixes.take(members)]
        for view in self._views:
            histories += view(members, generator)
        lengths = np.concatenate([each.lengths for each in histories])
        items, _ = padded(Ragged(np.concatenate([each.values for each in histories]), offsets_of(lengths)), self._pad)
        if self._views:  # of rows view by view, the views row by row
            items = np.ascontiguousarray(items.reshape(len(histories), len(members), -1).swapaxes(0, 1))
        targets, num_tokens = self.prefixes.targets[members], int(self._lengths[members].sum())
        return self._batch(members, len(members), num_tokens, whole=self._whole, items=items, targets=targets)


class SameTarget:
    """A view: for each prefix one with the same target, another one if there is one ("the same intention", Qin et al.
    2024), else the prefix itself."""

    def __init__(self, prefixes: Prefixes, num_items: int) -> None:
        self._prefixes = prefixes
        # Prefixes by target, and where each target's begin.
        self._by_target = np.argsort(prefixes.targets, kind="stable")
        self._first_of = offsets_of(np.bincount(prefixes.targets, minlength=num_items))
        self._rank = np.empty_like(self._by_target)  # where each prefix stands in that order
        self._rank[self._by_target] = np.arange(len(self._rank))

    def __call__(self, members: np.ndarray, generator: np.random.Generator) -> Sequence[Ragged]:
        targets = self._prefixes.targets[members]
        first, stop = self._first_of[targets], self._first_of[targets + 1]
        drawn = self._by_target[first + (generator.random(len(members)) * (stop - first)).astype(np.int64)]
        # A prefix that drew itself takes the one after it among those of its target.
        following = self._rank[members] + 1
        following = self._by_target[np.where(following == stop, first, following)]
        return [self._prefixes.take(np.where(drawn == members, following, drawn))]


class OtherPrefixes:
    """Views: K other prefixes for each, int64[P, K], always the same."""

    def __init__(self, prefixes: Prefixes, others_PK: np.ndarray) -> None:
        self._prefixes, self._others_PK = prefixes, others_PK

    def __call__(self, members: np.ndarray, generator: np.random.Generator) -> Sequence[Ragged]:
        return [self._prefixes.take(others_P[members]) for others_P in self._others_PK.T]


class Substitutions:
    """Views: two copies of each prefix, in which each item gives way with the chance `share` to one of the K items that
    stand in its row, int64[V, K]."""

    def __init__(self, prefixes: Prefixes, alike_VK: np.ndarray, share: float) -> None:
        self._prefixes, self._alike_VK, self._share = prefixes, alike_VK, share

    def __call__(self, members: np.ndarray, generator: np.random.Generator) -> Sequence[Ragged]:
        histories = self._prefixes.take(members)
        copies = []
        for _ in range(2):
            gives_way = generator.random(len(histories.values)) < self._share
            column = generator.integers(self._alike_VK.shape[1], size=len(histories.values))
            values = np.where(gives_way, self._alike_VK[histories.values, column], histories.values)
            copies.append(Ragged(values, histories.offsets))
        return copies


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


def thinned(rows: Ragged, share: float, generator: np.random.Generator) -> Ragged:
    """Rows of which a `share`, drawn at random, lose events at random. Each number of events that may be left, from two
    to all, has the same chance; their order stays."""
    left = np.minimum(rows.lengths, 2 + (generator.random(len(rows)) * (rows.lengths - 1)).astype(np.int64))
    left = np.where(generator.random(len(rows)) < share, left, rows.lengths)
    # Of a row in random order, those that come first are left.
    order = np.lexsort((generator.random(len(rows.values)), rows.row_of))
    is_left = np.empty(len(order), dtype=bool)
    is_left[order] = rows.place_of < left[rows.row_of]
    return rows.kept(is_left)


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
