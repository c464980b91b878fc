"""Batches of rows that are learnt from together.

A stream says which rows make a batch and what each is to predict: the next item everywhere, masked items, an item of
the user, the item after a prefix, the same item after two prefixes. Items are numbered as in `signals`. Suffixes: R
rows, T positions, P prefixes or pairs, H negatives, K items or prefixes of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cprec.batch import IGNORE, Batch
from cprec.data.ragged import Ragged, gather, offsets_of
from cprec.systems.items import MASK
from cprec.systems.signals import TrainingSequences, padded, windows

POOL = 32
"""Batches among which rows are sorted by length by default: enough that a batch holds hardly any padding."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How often, and in which order, a stream reads its rows."""

    batch_size: int
    num_epochs: float = 1
    num_steps: int = 0
    """Steps, in place of passes; 0: as many as `num_epochs` passes take."""
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
        self.num_steps = passes.num_steps or max(1, round(self._per_epoch * passes.num_epochs))
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
