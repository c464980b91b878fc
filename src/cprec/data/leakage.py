"""Proves from written documents that no held-out event is in them. It reads tokens, not the code that wrote them.

Every document is taken apart again into its lines; each line's tokens are looked up among the catalogue's titles; and
the events found are held against the log and its split. A line that is no known title is a violation too, so nothing
in a document escapes the check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cprec.data.ragged import Ragged, offsets_of

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


def title_numbers(grammar: Grammar) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Number equal titles of a domain alike: (number of each catalogue row, sorted hashes, their numbers)."""
    keys = _with_domain(row_hashes(grammar.titles), grammar.domain)
    hashes, numbers = np.unique(keys, return_inverse=True)
    return numbers, hashes, np.arange(len(hashes))


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
    _, hashes, numbers = title_numbers(grammar)
    keys = _with_domain(row_hashes(body), line_domain)
    at = np.minimum(np.searchsorted(hashes, keys), len(hashes) - 1)
    known = (hashes[at] == keys) & (line_domain >= 0)
    return Events(document=owner, title=np.where(known, numbers[at], -1))


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


def _count_pairs(pool: np.ndarray, key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The key and the number of occurrences of each distinct (pool, key) pair."""
    order = np.lexsort((key, pool))
    pool, key = pool[order], key[order]
    first = np.flatnonzero(np.r_[True, (pool[1:] != pool[:-1]) | (key[1:] != key[:-1])][: len(key)])
    return key[first], np.diff(np.r_[first, len(key)])


def check_absent(name: str, present: np.ndarray, forbidden: np.ndarray, labels: Mapping[int, str]) -> Property:
    """No number of `forbidden` occurs in `present`; `labels` names the numbers in examples."""
    wrong = np.isin(present, forbidden)
    examples = [labels[number] for number in _first(np.unique(present[wrong]))]
    return Property(name=name, checked=len(present), violations=int(wrong.sum()), examples=examples)


def _first(values: np.ndarray) -> list[int]:
    return [int(value) for value in values[:MAX_EXAMPLES]]
