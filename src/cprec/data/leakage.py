"""Proves from written documents that no held-out event is in them. It reads tokens, not the code that wrote them.

Every document is taken apart again into its lines; each line's tokens are looked up among the catalogue's titles; and
the events found are held against the log and its split. A line that is no known title is a violation too, so nothing
in a document escapes the check.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.data.interactions import stable_order
from cprec.data.ragged import Ragged, offsets_of
from cprec.data.splits import Split, runs

MAX_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Property:
    """One thing that was checked: how many, how many were wrong, and some of those."""

    name: str
    checked: int
    violations: int
    examples: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def plus(self, other: Property) -> Property:
        return Property(
            name=self.name,
            checked=self.checked + other.checked,
            violations=self.violations + other.violations,
            examples=[*self.examples, *other.examples][:MAX_EXAMPLES],
        )


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Something a reader of results should know, though it is no leak: among how many, how often, and examples."""

    name: str
    checked: int
    found: int
    examples: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def plus(self, other: Observation) -> Observation:
        return Observation(
            name=self.name,
            checked=self.checked + other.checked,
            found=self.found + other.found,
            examples=[*self.examples, *other.examples][:MAX_EXAMPLES],
        )


Finding = TypeVar("Finding", Property, Observation)


def add_up(parts: Sequence[Sequence[Finding]]) -> list[Finding]:
    """What several parts of the log have together: numbers of one name are added, and the first examples kept."""
    total: dict[str, Finding] = {}
    for entry in itertools.chain(*parts):
        total[entry.name] = total[entry.name].plus(entry) if entry.name in total else entry
    return list(total.values())


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """How documents are written, as token ids: enough to take them apart again."""

    heads: Ragged
    """What stands before the first line: in specific documents of each domain, then (the last row) in mixed ones."""
    line: np.ndarray
    """Opens a line of the history; its first token occurs in no title."""
    next: np.ndarray
    """Stands before the target."""
    eos: int
    tags: Ragged
    """The tag of each domain, before each title of a mixed document."""
    titles: Ragged
    """The title of each catalogue row."""
    domain: np.ndarray
    """The domain index of each catalogue row."""

    @property
    def title_of_row(self) -> np.ndarray:
        """A number for each catalogue row; equal titles of a domain have the same."""
        return self._numbered[1]

    @property
    def title_hashes(self) -> np.ndarray:
        """The hash of each number's (domain, title), rising."""
        return self._numbered[0]

    @cached_property
    def _numbered(self) -> tuple[np.ndarray, np.ndarray]:
        keys = _with_domain(row_hashes(self.titles), self.domain)
        hashes, numbers = np.unique(keys, return_inverse=True)
        return hashes, numbers


@dataclass(frozen=True, kw_only=True)
class Events:
    """Events read from documents: suffix E; one title stands for every item that has it."""

    document: np.ndarray
    title: np.ndarray
    """int64[E]: a number for each distinct (domain, title tokens), -1 where the line is no title of the catalogue."""


_RANDOM = np.random.default_rng(20250411).integers(1, 1 << 63, 4096, dtype=np.uint64) | np.uint64(1)


def row_hashes(rows: Ragged) -> np.ndarray:
    """A 64-bit multilinear hash of each row: sum of (token + 1) * r[place], so rows of other tokens or length
    differ."""
    place = np.arange(len(rows.values)) - np.repeat(rows.offsets[:-1], rows.lengths)
    with np.errstate(over="ignore"):
        terms = (rows.values.astype(np.uint64) + np.uint64(1)) * _RANDOM[place % len(_RANDOM)]
        total = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(terms, dtype=np.uint64)])
        return total[rows.offsets[1:]] - total[rows.offsets[:-1]]


def _with_domain(hashes: np.ndarray, domain: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return hashes ^ ((domain.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def read_events(documents: Ragged, domain: np.ndarray, grammar: Grammar) -> Events:
    """The events written in documents; `domain` is each document's domain index, -1 for mixed ones (tags tell)."""
    tokens = documents.values
    starts, ends = _separators(tokens, grammar)
    owner = np.searchsorted(documents.offsets, starts, side="right") - 1
    following = np.append(starts[1:], len(tokens))
    stop = np.minimum(following, documents.offsets[owner + 1])
    stop = stop - ((stop > ends) & (tokens[np.maximum(stop - 1, 0)] == grammar.eos))
    line_domain = domain[owner].copy()
    for number in range(len(grammar.tags)):
        tag = grammar.tags[number]
        tagged = (line_domain < 0) & (ends + len(tag) <= stop)  # one tag a line: a title may begin like another
        for place, token in enumerate(tag):
            tagged &= tokens[np.minimum(ends + place, len(tokens) - 1)] == token
        line_domain[tagged] = number
        ends = np.where(tagged, ends + len(tag), ends)
    body = _slices(tokens, ends, np.maximum(stop, ends))
    hashes = grammar.title_hashes
    keys = _with_domain(row_hashes(body), line_domain)
    at = np.minimum(np.searchsorted(hashes, keys), len(hashes) - 1)
    known = (hashes[at] == keys) & (line_domain >= 0)
    return Events(document=owner, title=np.where(known, at, -1))


def _separators(tokens: np.ndarray, grammar: Grammar) -> tuple[np.ndarray, np.ndarray]:
    """Where lines open (start of the opening, end of it), in token order."""
    found = []
    for mark in (grammar.line, grammar.next):
        at = np.flatnonzero(tokens[: len(tokens) - len(mark) + 1] == mark[0])
        for place, token in enumerate(mark):
            at = at[tokens[at + place] == token]
        found.append((at, at + len(mark)))
    starts = np.concatenate([start for start, _ in found])
    order = np.argsort(starts, kind="stable")
    return starts[order], np.concatenate([end for _, end in found])[order]


def _slices(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Ragged:
    lengths = stops - starts
    offsets = offsets_of(lengths)
    within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return Ragged(values[np.repeat(starts, lengths) + within], offsets)


def check_heads(name: str, documents: Ragged, domain: np.ndarray, grammar: Grammar) -> Property:
    """Before its first line a document has its head and nothing else; `domain` as in `read_events`."""
    starts, _ = _separators(documents.values, grammar)
    first = np.minimum(
        np.append(starts, len(documents.values))[np.searchsorted(starts, documents.offsets[:-1])], documents.offsets[1:]
    )
    found = row_hashes(_slices(documents.values, documents.offsets[:-1], first))
    wrong = found != row_hashes(grammar.heads)[domain]  # -1, mixed, is the last row
    return Property(
        name=f"{name}: before its lines every document has the head of the template and nothing else",
        checked=len(documents),
        violations=int(wrong.sum()),
        examples=[f"document {number}" for number in _first(np.flatnonzero(wrong))],
    )


def check_documents(
    name: str,
    events: Events,
    num_documents: int,
    document_user: np.ndarray,
    allowed_user: np.ndarray,
    allowed_title: np.ndarray,
    held_out_user: np.ndarray,
    held_out_title: np.ndarray,
    *,
    per_document: bool,
    group: np.ndarray,
) -> list[Property]:
    """Hold the events of documents against the log.

    `document_user` is each document's user; `allowed_*` are the training events and `held_out_*` the validation and
    test events as (user, title number) pairs. A user's title may occur at most as often as the training events have
    it: in all documents of a `group` together (domain-specific and mixed documents tell the same events), or
    (`per_document`, for examples, which share their histories) in each one. What exceeds that and was held out is a
    leak; what exceeds it and is not in the log at all is a fault of the writer.
    """
    known = events.title >= 0
    lines = np.bincount(events.document, minlength=num_documents)
    unread = ~known
    properties = [
        Property(
            name=f"{name}: every document has lines, and each is a title of the catalogue",
            checked=len(events.title) + num_documents,
            violations=int(unread.sum() + (lines == 0).sum()),
            examples=[f"document {d}" for d in _first(events.document[unread])]
            + [f"document {d} has no line" for d in _first(np.flatnonzero(lines == 0))],
        )
    ]
    user = document_user[events.document[known]]
    title = events.title[known]
    document = events.document[known]
    width = int(max([title.max(initial=0), allowed_title.max(initial=0), held_out_title.max(initial=0)])) + 1
    allowed_keys, allowed_counts = np.unique(allowed_user * width + allowed_title, return_counts=True)
    held_out_keys = np.unique(held_out_user * width + held_out_title)
    pool = document if per_document else group[document]
    keys, counts = _count_pairs(pool, user * width + title)
    at = np.minimum(np.searchsorted(allowed_keys, keys), max(len(allowed_keys) - 1, 0))
    in_log = (allowed_keys[at] == keys) if len(allowed_keys) else np.zeros(len(keys), dtype=bool)
    excess = counts > np.where(in_log, allowed_counts[at] if len(allowed_keys) else 0, 0)
    leaked = excess & np.isin(keys, held_out_keys)
    for text, wrong in (
        ("no held-out event", leaked),
        ("no event that the training part of the log does not have", excess & ~leaked),
    ):
        properties.append(
            Property(
                name=f"{name}: {text}",
                checked=int(counts.sum()),
                violations=int(wrong.sum()),
                examples=[f"user row {k // width}, title number {k % width}" for k in _first(keys[wrong])],
            )
        )
    return properties


def check_repeated_targets(
    name: str,
    events: Events,
    num_documents: int,
    document_user: np.ndarray,
    log_user: np.ndarray,
    log_title: np.ndarray,
) -> Property:
    """No example shows its target (its last title) in its own prompt, unless the user's log has that title twice."""
    is_last = np.r_[events.document[1:] != events.document[:-1], True][: len(events.document)]
    target = np.full(num_documents, -1, dtype=np.int64)
    target[events.document[is_last]] = events.title[is_last]
    shown = ~is_last & (events.title == target[events.document]) & (events.title >= 0)
    width = int(max(log_title.max(initial=0), target.max(initial=0))) + 1
    keys, counts = np.unique(log_user * width + log_title, return_counts=True)
    documents = np.unique(events.document[shown])
    repeated = np.isin(document_user[documents] * width + target[documents], keys[counts > 1])
    wrong = documents[~repeated]
    return Property(
        name=f"{name}: no target inside its own prompt, except where the user had it before",
        checked=num_documents,
        violations=len(wrong),
        examples=[f"document {d}" for d in _first(wrong)],
    )


def check_times(
    name: str,
    events: Events,
    document_user: np.ndarray,
    log_user: np.ndarray,
    log_title: np.ndarray,
    log_time: np.ndarray,
    cut: int,
) -> Property:
    """No event from the cut on, of any domain: the user had every title before, by the clock of the log alone."""
    known = events.title >= 0
    early = log_time < cut
    width = int(max(log_title.max(initial=0), events.title.max(initial=0))) + 1
    before = np.unique(log_user[early] * width + log_title[early])
    keys = document_user[events.document[known]] * width + events.title[known]
    wrong = ~np.isin(keys, before)
    return Property(
        name=f"{name}: no event from the first cut on, in any domain",
        checked=len(keys),
        violations=int(wrong.sum()),
        examples=[f"document {d}" for d in _first(events.document[known][wrong])],
    )


def check_queries(split: Split, domain: str, part: str, queries: Mapping[str, Any]) -> Property:
    """Every query asks for a held-out event of its part, and shows only what the user did before it.

    `queries` has query_id, user (rows of the log's users), target (catalogue rows), timestamp and history (Ragged of
    catalogue rows). An item may stand in the history as often as the user had it before the event asked for.
    """
    log, history = split.interactions, queries["history"]
    size, width = len(log) + 1, len(split.catalogue)
    pairs, pair = np.unique(log.user * width + log.item, return_inverse=True)
    times = np.unique(log.timestamp)
    # The event asked for: the latest of the part with this user, item and time; -1 where there is none.
    held_out = np.flatnonzero(split.events(part))
    known = pair[held_out] * len(times) + np.searchsorted(times, log.timestamp[held_out])
    order = stable_order(known)
    asked_pair = _place(pairs, queries["user"] * width + queries["target"])
    asked_time = _place(times, queries["timestamp"])
    asked = np.where((asked_pair < 0) | (asked_time < 0), -1, asked_pair * len(times) + asked_time)
    at = np.searchsorted(known[order], asked, side="right") - 1
    found = (at >= 0) & (known[order][at] == asked) if len(known) else np.zeros(len(asked), dtype=bool)
    event = np.where(found, held_out[order][at], -1) if len(known) else np.full(len(asked), -1)
    # How often each query shows an item, and how often its user had that item before the event asked for.
    shown_pair = _place(pairs, np.repeat(queries["user"], history.lengths) * width + history.values)
    shown, times_shown = np.unique(history.row_of * (len(pairs) + 1) + shown_pair + 1, return_counts=True)
    row, shown_pair = shown // (len(pairs) + 1), shown % (len(pairs) + 1) - 1
    events_of_pair = np.sort(pair * size + np.arange(len(log)))
    had = np.searchsorted(events_of_pair, shown_pair * size + event[row]) - np.searchsorted(
        events_of_pair, shown_pair * size
    )
    bad = ~found
    bad[row[(times_shown > had) | (shown_pair < 0)]] = True
    wrong = np.flatnonzero(bad)
    return Property(
        name=f"queries/{domain}/{part}: each asks for a held-out event and shows only what came before it",
        checked=len(asked),
        violations=len(wrong),
        examples=[str(queries["query_id"][q]) for q in _first(wrong)],
    )


def _place(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where values stand among rising ones; -1 where they are not there."""
    if not len(known):
        return np.full(len(values), -1)
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[at] == values, at, -1)


def find_ties(split: Split, domain: str, part: str, tie_order: str) -> list[Observation]:
    """How many targets share their time with another event of their user in the domain, so that the order of ties
    decided that they are held out; and how many of those have the greatest item id among them, which is what files
    sorted by item id give.
    """
    if not split.domains[domain].has_times:
        return []
    log, catalogue = split.interactions, split.catalogue
    rows = np.flatnonzero(catalogue.domain[log.item] == catalogue.domain_index(domain))
    user, item = log.user[rows], catalogue.item_id_rank[log.item[rows]]
    _, size, _ = runs(user, log.timestamp[rows])
    group = np.cumsum(np.r_[True, (np.diff(user) != 0) | (np.diff(log.timestamp[rows]) != 0)][: len(rows)]) - 1
    greatest = np.full(len(rows), -1, dtype=np.int64)
    np.maximum.at(greatest, group, item)
    is_target = split.events(part)[rows]
    tied = is_target & (size > 1)
    last = tied & (item == greatest[group])
    names = [str(log.user_id[user[event]]) for event in _first(np.flatnonzero(tied))]
    return [
        Observation(
            name=f"queries/{domain}/{part}: targets that share their time with another event of the user, so that tie "
            f"order ({tie_order}) decided",
            checked=int(is_target.sum()),
            found=int(tied.sum()),
            examples=names,
        ),
        Observation(
            name=f"queries/{domain}/{part}: of the targets decided by tie order, those with the greatest item id "
            "(chance has 1 of each group)",
            checked=int(tied.sum()),
            found=int(last.sum()),
            examples=[],
        ),
    ]


def normalised_title(title: str) -> str:
    """A title without case, accents, marks and spaces: what is equal is the same thing to a reader.

    >>> normalised_title("L'Oréal  Crème (50ml)")
    'lorealcreme50ml'
    """
    plain = unicodedata.normalize("NFKD", title.casefold())
    return re.sub(r"[\W_]+", "", "".join(c for c in plain if not unicodedata.combining(c)))


def find_near_duplicates(catalogue: Catalogue, domain: str, pretrained: Sequence[str]) -> Observation:
    """How many items of a domain have the title, but for case, accents and marks, of an item of another domain that is
    pre-trained on."""
    others = {
        normalised_title(catalogue.title[row])
        for other in pretrained
        if other != domain
        for row in catalogue.rows_of(other)
    }
    titles = catalogue.title[catalogue.rows_of(domain)]
    found = [str(title) for title in titles if normalised_title(title) in others]
    return Observation(
        name=f"{domain}: items whose normalised title is that of an item of another pre-training domain",
        checked=len(titles),
        found=len(found),
        examples=found[:MAX_EXAMPLES],
    )


def _count_pairs(pool: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The key and the number of occurrences of each distinct (pool, key) pair."""
    order = np.lexsort((key, pool))
    pool, key = pool[order], key[order]
    first = np.flatnonzero(np.r_[True, (pool[1:] != pool[:-1]) | (key[1:] != key[:-1])][: len(key)])
    return key[first], np.diff(np.r_[first, len(key)])


def check_absent(
    name: str, present: np.ndarray, forbidden: np.ndarray, labels: Mapping[int, str] | np.ndarray
) -> Property:
    """No number of `forbidden` occurs in `present`; `labels` names the numbers in examples."""
    wrong = np.isin(present, forbidden)
    examples = [str(labels[number]) for number in _first(np.unique(present[wrong]))]
    return Property(name=name, checked=len(present), violations=int(wrong.sum()), examples=examples)


def _first(values: np.ndarray) -> list[int]:
    return [int(value) for value in values[:MAX_EXAMPLES]]
