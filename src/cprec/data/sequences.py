"""Behaviour sequences: what a user did in one domain, and in all domains in time order, cut into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cprec.data.interactions import stable_order
from cprec.data.ragged import offsets_of
from cprec.data.splits import Split, comparable_domains, runs
from cprec.errors import ConfigError
from cprec.schema import KINDS, MIXED, SPECIFIC, TRAIN

TIME, INTERLEAVE = "time", "interleave"
MIXED_ORDERS = (TIME, INTERLEAVE)


@dataclass(frozen=True)
class Sequences:
    """Sequences of events; row i holds event[offsets[i]:offsets[i + 1]], oldest first."""

    kind: np.ndarray
    """int8[num_sequences]: the position in `schema.KINDS`."""
    domain: np.ndarray
    """int16[num_sequences]: index into the catalogue's domains, -1 for a mixed sequence."""
    user: np.ndarray
    """int64[num_sequences]: rows of the table of users."""
    offsets: np.ndarray
    """int64[num_sequences + 1]."""
    event: np.ndarray
    """int64: rows of the interactions."""

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def lengths(self) -> np.ndarray:
        """Events of each sequence: int64[num_sequences]."""
        return np.diff(self.offsets)


def build_sequences(
    split: Split,
    domains: Sequence[str],
    users_mask: np.ndarray | None = None,
    *,
    min_events: int = 5,
    max_events: int = 20,
    kinds: Sequence[str] = KINDS,
    pooled: bool = False,
    mixed_order: str = TIME,
) -> Sequences:
    """The behaviour sequences of the training events of some domains and users.

    Domain-specific: a user's events in one domain, where there are at least `min_events`. Mixed: the user's events of
    all these domains that have real times, in one order; it draws on the same events, that is on those domains where
    the user has at least `min_events` of them, or with `pooled` on all. With `mixed_order="interleave"` domains without
    real times take part too, see `interleaved`. Longer sequences are cut into
    ceil(length / max_events) contiguous chunks whose sizes differ by at most one, the longer ones first. A mixed chunk
    is kept if it has at least `min_events` events of at least two domains.

    `users_mask` is bool[num_users]; None takes all. Sequences come domain by domain and by user, the mixed ones last.
    """
    _check(min_events, max_events, kinds, mixed_order)
    log, catalogue = split.interactions, split.catalogue
    event_domain = catalogue.domain[log.item]
    chosen = np.zeros(len(catalogue.domains), dtype=bool)
    chosen[[catalogue.domain_index(domain) for domain in domains]] = True
    mask = split.events(TRAIN) & chosen[event_domain]
    if users_mask is not None:
        mask &= users_mask[log.user]
    event = np.flatnonzero(mask)
    # Whether the user of each event has at least `min_events` events in its domain.
    _, group, counts = np.unique(
        log.user[event] * len(catalogue.domains) + event_domain[event], return_inverse=True, return_counts=True
    )
    is_enough = counts[group] >= min_events if len(event) else np.zeros(0, dtype=bool)
    parts = []
    if SPECIFIC in kinds:
        parts.append(_specific(event[is_enough], log.user, event_domain, max_events))
    if MIXED in kinds:
        comparable = comparable_domains(catalogue, split.domains)[event_domain]
        mixed = event[is_enough | pooled]
        if mixed_order == INTERLEAVE:
            # One run for all domains with real times, and one for each of the others.
            run = np.where(comparable[mixed], -1, event_domain[mixed])
            mixed = mixed[interleaved(log.user[mixed], run)]
        else:
            mixed = mixed[comparable[mixed]]
        parts.append(_mixed(mixed, log.user, event_domain, min_events, max_events))
    return _joined(parts)


def _check(min_events: int, max_events: int, kinds: Sequence[str], mixed_order: str) -> None:
    if not 1 <= min_events <= max_events:
        raise ConfigError(f"min_events={min_events} must be at least 1 and at most max_events={max_events}")
    if mixed_order not in MIXED_ORDERS:
        raise ConfigError(f"mixed_order={mixed_order!r}: expected {', '.join(MIXED_ORDERS)}")
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ConfigError(f"kinds holds {', '.join(unknown)}; expected {', '.join(KINDS)}")


def _specific(event: np.ndarray, user: np.ndarray, domain: np.ndarray, max_events: int) -> Sequences:
    """The sequences of single domains; `user` and `domain` are those of every event of the log."""
    # A stable sort of few values: one pass, and each domain keeps the order of users and times.
    event = event[np.argsort(domain[event], kind="stable")]
    first, sizes = _chunks(runs(domain[event], user[event]), max_events)
    first_event = event[first]
    return Sequences(
        kind=np.full(len(first), KINDS.index(SPECIFIC), dtype=np.int8),
        domain=domain[first_event],
        user=user[first_event],
        offsets=offsets_of(sizes),
        event=event,
    )


def _mixed(event: np.ndarray, user: np.ndarray, domain: np.ndarray, min_events: int, max_events: int) -> Sequences:
    """The sequences of all domains that are long enough and have events of two domains or more."""
    first, sizes = _chunks(runs(user[event]), max_events)
    chunk = np.repeat(np.arange(len(sizes)), sizes)  # of each event
    # A chunk has two domains or more where an event's differs from that of the chunk's first event.
    differs = domain[event] != domain[event[first]][chunk]
    kept = (np.bincount(chunk[differs], minlength=len(first)) > 0) & (sizes >= min_events)
    num_kept = int(kept.sum())
    return Sequences(
        kind=np.full(num_kept, KINDS.index(MIXED), dtype=np.int8),
        domain=np.full(num_kept, -1, dtype=np.int16),
        user=user[event[first[kept]]],
        offsets=offsets_of(sizes[kept]),
        event=event[kept[chunk]],
    )


def _joined(parts: Sequence[Sequences]) -> Sequences:
    """The sequences of several parts, one part after the other."""
    types = {"kind": np.int8, "domain": np.int16, "user": np.int64, "event": np.int64, "lengths": np.int64}
    joined = {
        name: np.concatenate([np.empty(0, kind), *(getattr(part, name) for part in parts)])
        for name, kind in types.items()
    }
    return Sequences(offsets=offsets_of(joined.pop("lengths")), **joined)


def interleaved(user: np.ndarray, run: np.ndarray) -> np.ndarray:
    """An order of events that spreads each run evenly over its user's sequence: rows, int64[num_events].

    `user` never falls; events of equal `run` (a domain without real times, or all domains that have them) keep their
    order: the k-th of n stands at (k - 1/2) / n, and where two runs meet the smaller number comes first. The order
    does not say when things happened.

    >>> interleaved(np.array([0, 0, 0, 0, 0, 0]), np.array([-1, -1, -1, -1, 2, 2])).tolist()
    [0, 4, 1, 2, 5, 3]
    """
    # Each event's place in its user's run, as a share of the run.
    order = stable_order(user, run)
    place, length, _ = runs(user[order], run[order])
    position = np.empty(len(order))
    position[order] = (2 * place + 1) / (2 * length)
    return np.lexsort((run, position, user))


def _chunks(places: tuple[np.ndarray, np.ndarray, np.ndarray], max_events: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut runs into near-equal chunks: (row of each chunk's first event, size of each chunk)."""
    place, length, _ = places
    run_lengths = length[place == 0]
    num_chunks = -(-run_lengths // max_events)  # of each run, rounded up
    # For every chunk its number within its run, the length of the run and the run's number of chunks: the first
    # length % count chunks have one event more.
    within, _, _ = runs(np.repeat(np.arange(len(run_lengths)), num_chunks))
    lengths, counts = np.repeat(run_lengths, num_chunks), np.repeat(num_chunks, num_chunks)
    sizes = lengths // counts + (within < lengths % counts)
    return offsets_of(sizes)[:-1], sizes
