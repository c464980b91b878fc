"""Splits: which events train, which validate and which test, and the queries that the held-out events ask."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.data.config import GLOBAL_TIME, LEAVE_ONE_OUT, SplitSpec
from cprec.data.interactions import Interactions, stable_order
from cprec.data.ragged import Ragged, gather
from cprec.errors import ConfigError
from cprec.schema import CONTEXT, SPECIFIC, SPLITS, TEST, TRAIN, VALIDATION, DomainInfo


def in_seconds(time: int) -> int | float:
    """Microseconds as seconds, as files have cuts: whole where they are. Exact until the year 2106.

    >>> in_seconds(1_577_836_802_535_001), in_seconds(1_577_836_802_000_000)
    (1577836802.535001, 1577836802)
    """
    return time / 1_000_000 if time % 1_000_000 else time // 1_000_000


def from_seconds(seconds: int | float) -> int:
    """Microseconds again, from the number that `in_seconds` gave."""
    return round(seconds * 1_000_000)


def format_time(time: int) -> str:
    """Microseconds since 1970 as people read them, in UTC.

    >>> format_time(1_577_836_802_535_000)
    '2020-01-01 00:00:02.535000'
    """
    return str(datetime(1970, 1, 1) + timedelta(microseconds=time))


@dataclass(frozen=True)
class Queries:
    """Held-out events asked for, one row each: suffix Q. Rows follow the order of events: by user, then time."""

    domain: str
    part: str
    """validation or test."""
    query_id: np.ndarray
    """object[Q] of str: domain/platform/user_id/part; not with leave-one-out, /n after it: the user's n-th, from 0."""
    user: np.ndarray
    """int64[Q]: rows of the table of users."""
    event: np.ndarray
    """int64[Q]: rows of the interactions; the event to be predicted."""
    history: Ragged
    """Q rows of catalogue rows, oldest first."""
    target: np.ndarray
    """int64[Q]: catalogue rows."""
    time: np.ndarray
    """int64[Q]: when the target happened, as in the interactions."""

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True)
class Split:
    """Interactions with the part that each event plays. Everything that learns takes a split, never a raw log."""

    catalogue: Catalogue
    interactions: Interactions
    part: np.ndarray
    """int8[num_events]: the position in `schema.SPLITS`."""
    spec: SplitSpec
    domains: Mapping[str, DomainInfo]
    validates: bool = True
    """Whether validation events choose among the weights that training passes through. Where they are learnt as well,
    the last weights are kept."""

    def learning(self, *parts: str) -> Split:
        """The split in which events of some parts are learnt, too, by recommenders whose settings are chosen.

        Users with context events are kept out of training, so theirs are not, unless context is one of the parts.
        """
        is_learnt = np.isin(self.part, [SPLITS.index(name) for name in parts])
        if CONTEXT not in parts:
            is_learnt &= ~np.isin(self.interactions.user, self.interactions.user[self.events(CONTEXT)])
        part = np.where(is_learnt, SPLITS.index(TRAIN), self.part).astype(self.part.dtype)
        return replace(self, part=part, validates=self.validates and VALIDATION not in parts)

    @property
    def train(self) -> Interactions:
        """The training events."""
        return self.interactions.select(self.events(TRAIN))

    def events(self, part: str) -> np.ndarray:
        """A mask over all events: bool[num_events]."""
        mask: np.ndarray = self.part == SPLITS.index(part)
        return mask

    def queries(
        self, domain: str, part: str, *, history_kind: str = SPECIFIC, max_history: int, min_history: int = 1
    ) -> Queries:
        """One query for each event of a domain in a held-out part.

        The history is what the user did before the target: in the domain (`specific`), or in every domain with real
        times (`mixed`); the latest `max_history` events of it, the user's earlier held-out events in the domain too,
        as they would be known by then. With leave-one-out and last-n it never holds a test event of another domain.
        Queries with fewer than `min_history` events of history are left out.

        Raises ConfigError for a mixed history where the domain's times are not real.
        """
        log = self.interactions
        if part not in (VALIDATION, TEST):
            raise ConfigError(f"part={part!r}: expected {VALIDATION} or {TEST}")
        event_domain = self.catalogue.domain[log.item]
        of_domain = event_domain == self.catalogue.domain_index(domain)
        event = np.flatnonzero(of_domain & self.events(part))
        user = log.user[event]
        serial = np.arange(len(user)) - np.searchsorted(user, user)  # the how-many-th of the user's, from 0
        # Of the events that may be shown, those between the start of the user's events and the target, at most the last
        # `max_history`: shown[start:stop].
        shown = np.flatnonzero(self._may_be_shown(domain, event_domain, of_domain, history_kind))
        stop = np.searchsorted(shown, event)
        start = np.maximum(np.searchsorted(shown, log.offsets()[user]), stop - max_history)
        kept = stop - start >= max(min_history, 0)
        event, user, start, stop, serial = event[kept], user[kept], start[kept], stop[kept], serial[kept]
        return Queries(
            domain=domain,
            part=part,
            query_id=self._query_ids(domain, part, user, serial),
            user=user,
            event=event,
            history=gather(log.item[shown], start, stop - start),
            target=log.item[event],
            time=log.time[event],
        )

    def _may_be_shown(
        self, domain: str, event_domain: np.ndarray, of_domain: np.ndarray, history_kind: str
    ) -> np.ndarray:
        """Events that a query of a domain may have in its history, whatever their time: bool[num_events]."""
        if history_kind == SPECIFIC:
            return of_domain
        if not self.domains[domain].has_times:
            raise ConfigError(
                f"domain {domain!r} has no real times, so its events cannot be put in order with those of other "
                "domains: use history specific"
            )
        is_comparable: np.ndarray = comparable_domains(self.catalogue, self.domains)[event_domain]
        if self.spec.method == GLOBAL_TIME:
            return is_comparable
        return is_comparable & (of_domain | ~self.events(TEST))

    def _query_ids(self, domain: str, part: str, user: np.ndarray, serial: np.ndarray) -> np.ndarray:
        log = self.interactions
        platforms = [log.platforms[index] for index in log.user_platform[user]]
        ids = [
            f"{domain}/{platform}/{name}/{part}" for platform, name in zip(platforms, log.user_id[user], strict=True)
        ]
        if self.spec.method != LEAVE_ONE_OUT:
            ids = [f"{name}/{number}" for name, number in zip(ids, serial.tolist(), strict=True)]
        return np.array(ids, dtype=object)


def as_one_domain(split: Split, name: str, domains: Sequence[str], is_kept: np.ndarray) -> Split:
    """Some domains as one, `name`: the items of all of them, in the order of the catalogue, and the events of theirs
    that are under a mask, each as the part that it was. A user is what a user did in one of the domains.
    """
    catalogue, log, num_domains = split.catalogue, split.interactions, len(split.catalogue.domains)
    rows = np.concatenate([catalogue.rows_of(domain) for domain in sorted(domains)])
    place = np.full(len(catalogue), -1)
    place[rows] = np.arange(len(rows))
    event = np.flatnonzero(is_kept & (place[log.item] >= 0))
    pair = log.user[event] * num_domains + catalogue.domain[log.item[event]]
    order = stable_order(pair)
    event, (pairs, user) = event[order], np.unique(pair[order], return_inverse=True)
    of_user, of_domain = np.divmod(pairs, num_domains)
    names = [f"{log.user_id[u]}/{catalogue.domains[d]}" for u, d in zip(of_user, of_domain, strict=True)]
    # Ids that rise with the rows, as those of a domain do.
    ids = [f"{catalogue.domain[row]:05}/{catalogue.item_id[row]}" for row in rows]
    texts = (column[rows] for column in (catalogue.title, catalogue.brand, catalogue.categories))
    return Split(
        Catalogue((name,), np.zeros(len(rows), dtype=np.int16), np.array(ids, dtype=object), *texts),
        Interactions(
            log.platforms,
            *(log.user_platform[of_user], np.array(names, dtype=object), user, place[log.item[event]]),
            *(log.time[event], log.rating[event]),
        ),
        split.part[event],
        split.spec,
        {name: DomainInfo(name, "", has_times=False)},
        split.validates,
    )


def comparable_domains(catalogue: Catalogue, domains: Mapping[str, DomainInfo]) -> np.ndarray:
    """Which domains have real times, so that their events can be put in one order: bool[num_domains]."""
    return np.array([domains[name].has_times for name in catalogue.domains], dtype=bool)


def make_split(
    catalogue: Catalogue,
    interactions: Interactions,
    domains: Mapping[str, DomainInfo],
    spec: SplitSpec,
    *,
    cuts: tuple[int, int] | None = None,
    seed: int = 0,
) -> Split:
    """Decide each event's part.

    leave-one-out and last-n count from the end of each user's events in a domain, in their order (time, then tie
    order); users with too few events to leave one to learn from stay in train there. global-time: an event tests from
    the test cut on, validates from the validation cut on; `cuts` are those of the whole log where `interactions` are a
    part of it (None: they are taken from `interactions`). Users whose hash with `seed` falls into `unseen_user_share`
    have context in place of training events.

    Raises ConfigError where global-time meets a domain without real times, or a cut leaves a part empty.
    """
    if spec.method == GLOBAL_TIME:
        if cuts is None:
            cuts = cut_times(spec, domains, *np.unique(interactions.time, return_counts=True))
        first_validation, first_test = cuts
        part = (interactions.time >= first_validation).astype(np.int8)
        part[interactions.time >= first_test] = SPLITS.index(TEST)
    else:
        part = _from_the_end(catalogue, interactions, *spec.numbers())
    if spec.unseen_user_share:
        unseen = user_shares(interactions, f"{seed}/unseen") < spec.unseen_user_share
        part[(part == SPLITS.index(TRAIN)) & unseen[interactions.user]] = SPLITS.index(CONTEXT)
    return Split(catalogue, interactions, part, spec, dict(domains))


def user_shares(interactions: Interactions, salt: str) -> np.ndarray:
    """A number in [0, 1) for each user, the same in every log: from SHA-256 of salt, platform and id."""
    names = [interactions.platforms[index] for index in interactions.user_platform]
    digests = (
        hashlib.sha256(f"{salt}/{platform}/{user}".encode()).digest()
        for platform, user in zip(names, interactions.user_id, strict=True)
    )
    return np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests], dtype=np.float64)


def _from_the_end(catalogue: Catalogue, interactions: Interactions, num_validation: int, num_test: int) -> np.ndarray:
    """Each event's part where the last events of every user and domain are held out: int8[num_events]."""
    domain = catalogue.domain[interactions.item]
    # The sort is stable, so the order of time stays inside each user and domain.
    order = stable_order(interactions.user, domain)
    user, domain = interactions.user[order], domain[order]
    _, length, from_end = runs(user, domain)
    held_out = length > num_validation + num_test
    part = np.zeros(len(interactions), dtype=np.int8)
    part[order[held_out & (from_end < num_validation + num_test)]] = SPLITS.index(VALIDATION)
    part[order[held_out & (from_end < num_test)]] = SPLITS.index(TEST)
    return part


def runs(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of equal keys: for each row its place in its run, the run's length, and the rows after it in the run.

    >>> [a.tolist() for a in runs(np.array([4, 4, 4, 9]))]
    [[0, 1, 2, 0], [3, 3, 3, 1], [2, 1, 0, 0]]
    """
    size = len(keys[0])
    # A run begins at the first row, and where any key differs from the row before.
    changes = np.arange(size) == 0
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    starts = np.flatnonzero(changes)
    lengths = np.diff(np.append(starts, size))
    place = np.arange(size) - np.repeat(starts, lengths)
    length = np.repeat(lengths, lengths)
    return place, length, length - 1 - place


def cut_times(
    spec: SplitSpec, domains: Mapping[str, DomainInfo], times: np.ndarray, counts: np.ndarray
) -> tuple[int, int]:
    """The first moment of validation and of test, with global-time: microseconds since 1970 UTC.

    `times` are the distinct times of all events, rising, and `counts` how many events each has. Cuts taken from
    fractions fall on a time that occurs; all events of one time go the same way, so the held-out shares may be a little
    larger than asked.

    Raises ConfigError where a domain has no real times, or a cut leaves a part empty.
    """
    timeless = sorted(name for name, info in domains.items() if not info.has_times)
    if timeless:
        raise ConfigError(
            f"method={GLOBAL_TIME} needs real times in every domain, but {', '.join(timeless)} only "
            f"{'has' if len(timeless) == 1 else 'have'} an order: use method={LEAVE_ONE_OUT}, or leave "
            f"{'it' if len(timeless) == 1 else 'them'} out"
        )
    upto = np.cumsum(counts)  # events up to each time, itself included
    if spec.test_from is not None:
        validation_from, test_from = spec.dates()
    else:
        validation, test = spec.fractions()
        # How many events come before each cut, and the time of the first event after as many.
        places = [int(upto[-1] * (1 - validation - test)), int(upto[-1] * (1 - test))]
        validation_from, test_from = (int(times[np.searchsorted(upto, place, side="right")]) for place in places)
    # Events before the first cut, between the cuts, and from the second cut on.
    edges = np.searchsorted(times, [validation_from, test_from])
    sizes = np.diff(np.concatenate([[0], np.append(0, upto)[edges], upto[-1:]]))
    if not sizes.all():
        empty = ", ".join(name for name, size in zip(SPLITS, sizes, strict=False) if not size)
        raise ConfigError(
            f"method={GLOBAL_TIME} with validation from {format_time(validation_from)} and test from "
            f"{format_time(test_from)} leaves no event for {empty}; the log runs from {format_time(int(times[0]))} to "
            f"{format_time(int(times[-1]))}: choose other dates or fractions"
        )
    return validation_from, test_from
