"""Splits: which events train, which validate and which test, and the queries that the held-out events ask.

This module imports only the standard library until a split is made, because `SplitSpec` is part of configurations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC
from typing import TYPE_CHECKING, Literal

from cprec.errors import ConfigError
from cprec.schema import SPECIFIC, SPLITS, TEST, TRAIN, DomainInfo

if TYPE_CHECKING:
    import numpy as np

    from cprec.data.catalogue import Catalogue
    from cprec.data.interactions import Interactions
    from cprec.data.ragged import Ragged

LEAVE_ONE_OUT = "leave-one-out"
GLOBAL_TIME = "global-time"

MIN_EVENTS_TO_HOLD_OUT = 3
"""A user with fewer events in a domain stays wholly in train: one to learn from, one to validate, one to test."""


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """What is held out of training, in every domain."""

    method: Literal["leave-one-out", "global-time"] = "leave-one-out"
    """leave-one-out: of each user and domain the last event tests and the one before validates. global-time: two dates,
    the same in all domains."""
    validation_fraction: float | None = None
    """global-time: share of all events that validate, 0.1 unless the dates are given."""
    test_fraction: float | None = None
    """global-time: share of all events that test, the latest ones, 0.1 unless the dates are given."""
    validation_from: str | None = None
    """global-time: first moment of validation, ISO date or date and time (UTC), in place of the fractions."""
    test_from: str | None = None
    """global-time: first moment of test, ISO date or date and time (UTC), in place of the fractions."""

    def __post_init__(self) -> None:
        if self.method not in (LEAVE_ONE_OUT, GLOBAL_TIME):
            raise ConfigError(f"method={self.method!r}: expected {LEAVE_ONE_OUT} or {GLOBAL_TIME}")
        fractions = {name: getattr(self, name) for name in ("validation_fraction", "test_fraction")}
        dates = {name: getattr(self, name) for name in ("validation_from", "test_from")}
        given = [name for name, value in (fractions | dates).items() if value is not None]
        if self.method == LEAVE_ONE_OUT and given:
            raise ConfigError(f"{given[0]} means something for method={GLOBAL_TIME} only, not for {LEAVE_ONE_OUT}")
        for name, fraction in fractions.items():
            if fraction is not None and not 0 < fraction < 1:
                raise ConfigError(f"{name}={fraction} must lie between 0 and 1")
        if sum(self.fractions()) >= 1:
            raise ConfigError(
                f"validation_fraction and test_fraction sum to {sum(self.fractions())}: nothing would train"
            )
        has_date = [name for name, value in dates.items() if value is not None]
        if len(has_date) == 1 or (has_date and len(given) > len(has_date)):
            raise ConfigError("give validation_from and test_from together, and no fractions beside them; or no dates")
        if has_date:
            validation, test = self.dates()
            if not validation < test:
                raise ConfigError(f"validation_from={self.validation_from} must be before test_from={self.test_from}")

    def fractions(self) -> tuple[float, float]:
        """Shares of events that validate and that test."""
        return (
            0.1 if self.validation_fraction is None else self.validation_fraction,
            0.1 if self.test_fraction is None else self.test_fraction,
        )

    def dates(self) -> tuple[int, int]:
        """`validation_from` and `test_from` in seconds UTC."""
        return _seconds("validation_from", self.validation_from), _seconds("test_from", self.test_from)


def _seconds(name: str, text: str | None) -> int:
    from datetime import datetime

    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        raise ConfigError(f"{name}={text!r} is no ISO date; write 2014-07-23 or 2014-07-23T18:00:00") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


@dataclass(frozen=True)
class Queries:
    """Held-out events asked for, one row each: suffix Q. Rows follow the order of events: by user, then time."""

    domain: str
    part: str
    """validation or test."""
    query_id: np.ndarray
    """object[Q] of str: domain/platform/user_id/part, and with global-time /n, the n-th of that user from 0."""
    user: np.ndarray
    """int64[Q]: rows of the table of users."""
    event: np.ndarray
    """int64[Q]: rows of the interactions; the event to be predicted."""
    history: Ragged
    """Q rows of catalogue rows, oldest first."""
    target: np.ndarray
    """int64[Q]: catalogue rows."""
    timestamp: np.ndarray
    """int64[Q]: when the target happened."""

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

    @property
    def train(self) -> Interactions:
        """The training events."""
        return self.interactions.select(self.events(TRAIN))

    def events(self, part: str) -> np.ndarray:
        """A mask over all events: bool[num_events]."""
        mask: np.ndarray = self.part == SPLITS.index(part)
        return mask

    def queries(
        self,
        domain: str,
        part: str,
        *,
        history_kind: str = SPECIFIC,
        max_history: int,
        min_history: int = 1,
    ) -> Queries:
        """One query for each event of a domain in a held-out part.

        The history is what the user did before the target: in the domain (`specific`), or in every domain with real
        times (`mixed`); the latest `max_history` events of it. With leave-one-out it never holds a test event, of any
        domain. With global-time it holds all that came before, the user's earlier held-out events too, as they would
        be known by then. Queries with fewer than `min_history` events of history are left out.

        Raises ConfigError for a mixed history where the domain's times are not real.
        """
        import numpy as np

        from cprec.data.ragged import Ragged, offsets_of

        log, catalogue = self.interactions, self.catalogue
        if part == TRAIN or part not in SPLITS:
            raise ConfigError(f"part={part!r}: expected one of {', '.join(SPLITS[1:])}")
        event_domain = catalogue.domain[log.item]
        of_domain = event_domain == catalogue.domain_index(domain)
        if history_kind == SPECIFIC:
            eligible = of_domain
        else:
            eligible = comparable_domains(catalogue, self.domains)[event_domain]
            if not self.domains[domain].has_times:
                raise ConfigError(
                    f"domain {domain!r} has no real times, so its events cannot be put in order with those of other "
                    "domains: use history specific"
                )
        if self.spec.method == LEAVE_ONE_OUT:
            eligible = eligible & (self.part != SPLITS.index(TEST))

        event = np.flatnonzero(of_domain & self.events(part))
        user = log.user[event]
        known = np.flatnonzero(eligible)
        stop = np.searchsorted(known, event)
        start = np.maximum(np.searchsorted(known, log.offsets()[user]), stop - max_history)
        serial = np.arange(len(user)) - np.searchsorted(user, user)
        kept = stop - start >= max(min_history, 0)
        event, user, start, stop, serial = event[kept], user[kept], start[kept], stop[kept], serial[kept]

        offsets = offsets_of(stop - start)
        place = np.repeat(start - offsets[:-1], stop - start) + np.arange(offsets[-1])
        return Queries(
            domain=domain,
            part=part,
            query_id=self._query_ids(domain, part, user, serial),
            user=user,
            event=event,
            history=Ragged(log.item[known[place]], offsets),
            target=log.item[event],
            timestamp=log.timestamp[event],
        )

    def _query_ids(self, domain: str, part: str, user: np.ndarray, serial: np.ndarray) -> np.ndarray:
        import numpy as np

        log = self.interactions
        platforms = [log.platforms[index] for index in log.user_platform[user]]
        ids = [
            f"{domain}/{platform}/{name}/{part}" for platform, name in zip(platforms, log.user_id[user], strict=True)
        ]
        if self.spec.method == GLOBAL_TIME:
            ids = [f"{name}/{number}" for name, number in zip(ids, serial.tolist(), strict=True)]
        return np.array(ids, dtype=object)


def comparable_domains(catalogue: Catalogue, domains: Mapping[str, DomainInfo]) -> np.ndarray:
    """Which domains have real times, so that their events can be put in one order: bool[num_domains]."""
    import numpy as np

    return np.array([domains[name].has_times for name in catalogue.domains], dtype=bool)


def make_split(
    catalogue: Catalogue, interactions: Interactions, domains: Mapping[str, DomainInfo], spec: SplitSpec
) -> Split:
    """Decide each event's part.

    leave-one-out counts from the end of each user's events in a domain, in their order (time, then tie order); users
    with fewer than three events there stay in train. global-time: an event tests from the test cut on, validates from
    the validation cut on. Cuts taken from fractions fall on a time that occurs; all events of one time go the same way,
    so the held-out shares may be a little larger than asked.

    Raises ConfigError where global-time meets a domain without real times, or a cut leaves a part empty.
    """
    if spec.method == LEAVE_ONE_OUT:
        part = _leave_one_out(catalogue, interactions)
    else:
        part = _by_time(interactions, domains, spec)
    return Split(catalogue, interactions, part, spec, dict(domains))


def _leave_one_out(catalogue: Catalogue, interactions: Interactions) -> np.ndarray:
    import numpy as np

    from cprec.data.interactions import stable_order

    domain = catalogue.domain[interactions.item]
    order = stable_order(interactions.user, domain)  # stable: time order stays inside each (user, domain)
    user, domain = interactions.user[order], domain[order]
    _, length, from_end = runs(user, domain)
    held_out = length >= MIN_EVENTS_TO_HOLD_OUT
    part = np.zeros(len(interactions), dtype=np.int8)
    part[order[held_out & (from_end == 1)]] = 1
    part[order[held_out & (from_end == 0)]] = 2
    return part


def runs(*keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Runs of equal keys: for each row its place in its run, the run's length, and the rows after it in the run.

    >>> import numpy as np
    >>> [a.tolist() for a in runs(np.array([4, 4, 4, 9]))]
    [[0, 1, 2, 0], [3, 3, 3, 1], [2, 1, 0, 0]]
    """
    import numpy as np

    size = len(keys[0])
    if not size:
        empty = np.empty(0, dtype=np.int64)
        return empty, empty, empty
    changes = np.zeros(size, dtype=bool)
    changes[0] = True
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    starts = np.flatnonzero(changes)
    lengths = np.diff(np.append(starts, size))
    place = np.arange(size) - np.repeat(starts, lengths)
    length = np.repeat(lengths, lengths)
    return place, length, length - 1 - place


def _by_time(interactions: Interactions, domains: Mapping[str, DomainInfo], spec: SplitSpec) -> np.ndarray:
    import numpy as np

    timeless = sorted(name for name, info in domains.items() if not info.has_times)
    if timeless:
        raise ConfigError(
            f"method={GLOBAL_TIME} needs real times in every domain, but {', '.join(timeless)} only "
            f"{'has' if len(timeless) == 1 else 'have'} an order: use method={LEAVE_ONE_OUT}, or leave "
            f"{'it' if len(timeless) == 1 else 'them'} out"
        )
    if spec.test_from is not None:
        validation_from, test_from = spec.dates()
    else:
        times = np.sort(interactions.timestamp)
        validation, test = spec.fractions()
        first_test = int(len(times) * (1 - test))
        first_validation = int(len(times) * (1 - test - validation))
        validation_from, test_from = int(times[first_validation]), int(times[first_test])
    part = (interactions.timestamp >= validation_from).astype(np.int8)
    part[interactions.timestamp >= test_from] = 2
    counts = np.bincount(part, minlength=3)
    if not counts.all():
        empty = ", ".join(name for name, count in zip(SPLITS, counts, strict=True) if not count)
        raise ConfigError(
            f"method={GLOBAL_TIME} with validation from {_day(validation_from)} and test from {_day(test_from)} "
            f"leaves no "
            f"event for {empty}; the log runs from {_day(int(interactions.timestamp.min()))} to "
            f"{_day(int(interactions.timestamp.max()))}: choose other dates or fractions"
        )
    return part


def _day(seconds: int) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
