"""Proves from written documents that no held-out event is in them. It reads their tokens and shares no code with what
wrote them.

Every document is taken apart again into its lines; each line's tokens are looked up among the catalogue's titles; and
the events found are compared with the log and its split. A line without a known title is a violation too, so nothing
in a document escapes the check.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.data.config import GLOBAL_TIME
from cprec.data.interactions import stable_order
from cprec.data.ragged import Ragged, gather
from cprec.data.splits import Split, comparable_domains, runs
from cprec.schema import TEST

MAX_EXAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Property:
    """One thing that was checked: how many, how many were wrong, and some of those."""

    name: str
    checked: int
    violations: int
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Something a reader of results should know, though it is not a leak: among how many, how often, and examples."""

    name: str
    checked: int
    found: int
    examples: list[str] = field(default_factory=list)


Finding = TypeVar("Finding", Property, Observation)


def add_up(parts: Sequence[Sequence[Finding]]) -> list[Finding]:
    """The findings of several parts of the log as one: numbers of the same name are added, the first examples kept."""
    total: dict[str, Finding] = {}
    for entry in itertools.chain(*parts):
        total[entry.name] = _sum(total[entry.name], entry) if entry.name in total else entry
    return list(total.values())


def _sum(one: Finding, other: Finding) -> Finding:
    counts = ("checked", "found" if isinstance(one, Observation) else "violations")
    sums: Any = {name: getattr(one, name) + getattr(other, name) for name in counts}
    return replace(one, **sums, examples=[*one.examples, *other.examples][:MAX_EXAMPLES])


@dataclass(frozen=True)
class Labels:
    """How examples name documents and events; by number where there is no better name."""

    document: Callable[[int], str] = lambda document: f"document {document}"
    event: Callable[[int, int], str] = lambda user, title: f"user row {user}, title number {title}"
    """Called with a row of users and the number of a title."""


NUMBERS = Labels()


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """How documents are written, as token ids: enough to take them apart again."""

    heads: Ragged
    """The text before the first line: a row for specific documents of each domain, and a last one for mixed ones."""
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
        return self.numbered_titles[1]

    @cached_property
    def numbered_titles(self) -> tuple[np.ndarray, np.ndarray]:
        """The hash of each number's (domain, title), rising; and the number of each catalogue row."""
        hashes, numbers = np.unique(_with_domain(row_hashes(self.titles), self.domain), return_inverse=True)
        return hashes, numbers


@dataclass(frozen=True, kw_only=True)
class Events:
    """Events read from documents: suffix E; one title stands for every item that has it."""

    document: np.ndarray
    title: np.ndarray
    """int64[E]: a number for each distinct (domain, title tokens), -1 where the catalogue has no such title."""


_MULTIPLIERS = np.random.default_rng(20250411).integers(1, 1 << 63, 4096, dtype=np.uint64) | np.uint64(1)
"""Odd random numbers, one for each position, repeated after 4,096; the seed is arbitrary."""

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
"""2 ** 64 divided by the golden ratio: multiples of it are spread evenly over all 64-bit numbers."""


def row_hashes(rows: Ragged) -> np.ndarray:
    """A 64-bit multilinear hash of each row: the sum of (token + 1) * multiplier[place], modulo 2 ** 64.

    Rows of other tokens or another length have another hash, but for a chance that is negligible.
    """
    with np.errstate(over="ignore"):
        terms = (rows.values.astype(np.uint64) + np.uint64(1)) * _MULTIPLIERS[rows.place_of & (len(_MULTIPLIERS) - 1)]
        # A row's sum is the difference of the running sums at its end and its start.
        total = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(terms, dtype=np.uint64)])
        return total[rows.offsets[1:]] - total[rows.offsets[:-1]]


def _with_domain(hashes: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """The hashes of (domain, title), from those of titles."""
    with np.errstate(over="ignore"):
        return hashes ^ ((domain.astype(np.uint64) + np.uint64(1)) * _GOLDEN_RATIO)


BATCH = 1 << 22
"""About how many tokens are taken apart at once: each needs some hundred bytes meanwhile."""


def _batches(documents: Ragged) -> Iterator[tuple[slice, Ragged]]:
    """Documents one after the other, about `BATCH` tokens at a time: which rows, and these."""
    edges = np.searchsorted(documents.offsets, np.arange(0, documents.offsets[-1] + BATCH, BATCH))
    for start, stop in itertools.pairwise(_distinct(np.append(edges, len(documents)).clip(0, len(documents))).tolist()):
        offsets = documents.offsets[start : stop + 1]
        yield slice(start, stop), Ragged(documents.values[offsets[0] : offsets[-1]], offsets - offsets[0])


def read_events(documents: Ragged, domain: np.ndarray, grammar: Grammar) -> Events:
    """The events written in documents; `domain` is each document's domain index, -1 for mixed ones (tags tell)."""
    found = [_read_batch(batch, domain[rows], grammar, rows.start) for rows, batch in _batches(documents)]
    nothing = np.empty(0, dtype=np.int64)
    document, title = (np.concatenate(columns) for columns in zip((nothing, nothing), *found, strict=True))
    return Events(document=document, title=title)


def _read_batch(documents: Ragged, domain: np.ndarray, grammar: Grammar, first: int) -> tuple[np.ndarray, np.ndarray]:
    """The columns of `Events`; documents are counted from `first` on."""
    tokens = documents.values
    # A line runs from the end of its opening to the next opening, or to the end of its document without the EOS token.
    starts, ends = _separators(tokens, grammar)
    owner = np.searchsorted(documents.offsets, starts, side="right") - 1
    following = np.append(starts[1:], len(tokens))
    stop = np.minimum(following, documents.offsets[owner + 1])
    stop = stop - ((stop > ends) & (tokens[np.maximum(stop - 1, 0)] == grammar.eos))
    # In mixed documents the tag after the opening tells the domain; the title begins behind it.
    line_domain = domain[owner].copy()
    for number in range(len(grammar.tags)):
        tag = grammar.tags[number]
        tagged = (line_domain < 0) & (ends + len(tag) <= stop)  # one tag a line: a title may begin like another
        for place, token in enumerate(tag):
            tagged &= tokens[np.minimum(ends + place, len(tokens) - 1)] == token
        line_domain[tagged] = number
        ends = np.where(tagged, ends + len(tag), ends)
    # The number of each title is the place of its hash among those of the catalogue.
    body = gather(tokens, ends, np.maximum(stop - ends, 0))
    at = _place(grammar.numbered_titles[0], _with_domain(row_hashes(body), line_domain))
    return owner + first, np.where(line_domain >= 0, at, -1)


def _separators(tokens: np.ndarray, grammar: Grammar) -> tuple[np.ndarray, np.ndarray]:
    """The openings of lines in the order of tokens: where each starts, and where it ends."""
    found = []
    for mark in (grammar.line, grammar.next):
        # Places of the mark's first token that are followed by its other tokens.
        at = np.flatnonzero(tokens[: len(tokens) - len(mark) + 1] == mark[0])
        for place, token in enumerate(mark):
            at = at[tokens[at + place] == token]
        found.append((at, at + len(mark)))
    starts = np.concatenate([start for start, _ in found])
    order = np.argsort(starts, kind="stable")
    return starts[order], np.concatenate([end for _, end in found])[order]


def check_heads(
    name: str, documents: Ragged, domain: np.ndarray, grammar: Grammar, labels: Labels = NUMBERS
) -> Property:
    """Before its first line a document has its head and nothing else; `domain` as in `read_events`."""
    heads = row_hashes(grammar.heads)
    wrong = np.zeros(len(documents), dtype=bool)
    for rows, batch in _batches(documents):
        tokens, begin, end = batch.values, batch.offsets[:-1], batch.offsets[1:]
        # The first line of each document, or its end where it has no line.
        starts, _ = _separators(tokens, grammar)
        first = np.minimum(np.append(starts, len(tokens))[np.searchsorted(starts, begin)], end)
        # The head of mixed documents is the last one, which the domain index -1 finds.
        wrong[rows] = row_hashes(gather(tokens, begin, first - begin)) != heads[domain[rows]]
    text = "before its lines every document has the head of the template and nothing else"
    return _of_documents(f"{name}: {text}", len(documents), np.flatnonzero(wrong), labels)


def _of_documents(name: str, checked: int, wrong: np.ndarray, labels: Labels) -> Property:
    examples = [labels.document(document) for document in _first(wrong)]
    return Property(name=name, checked=checked, violations=len(wrong), examples=examples)


def check_users(name: str, document_user: np.ndarray, labels: Labels = NUMBERS) -> Property:
    """Every document belongs to a user of the log; `document_user` is -1 where it does not."""
    wrong = np.flatnonzero(document_user < 0)
    return _of_documents(f"{name}: every document is of a user of the log", len(document_user), wrong, labels)


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
    labels: Labels = NUMBERS,
) -> list[Property]:
    """Compare the events of documents with the log.

    `document_user` is each document's user, -1 where the log has none such; `allowed_*` are the training events and
    `held_out_*` the validation and test events as (user, title number) pairs. A user's title may occur at most as often
    as the training events have it: in all documents of a `group` together (domain-specific and mixed documents tell the
    same events), or (`per_document`, for examples, which share their histories) in each one. A title that occurs more
    often is a leak where it was held out, and else a fault of the writer: the log does not have it.
    """
    known = events.title >= 0
    title, document = events.title[known], events.document[known]
    width = _width(title, allowed_title, held_out_title)
    allowed_keys, allowed_counts = np.unique(allowed_user * width + allowed_title, return_counts=True)
    held_out_keys = _distinct(held_out_user * width + held_out_title)
    pool_of_document, user_of_pool = _pools(document_user.astype(np.int64), None if per_document else group)
    # How often each title occurs in each pool, and how often the user's training events have it.
    places = pool_of_document[document] * width + title
    codes, counts = np.unique(places, return_counts=True)
    keys = user_of_pool[codes // width] * width + codes % width
    at = _place(allowed_keys, keys)
    excess = counts > np.where(at < 0, 0, np.append(allowed_counts, 0)[at])
    leaked = excess.copy()
    leaked[excess] = _place(held_out_keys, keys[excess]) >= 0

    def property_of(text: str, wrong: np.ndarray) -> Property:
        examples = []
        for number in _first(np.flatnonzero(wrong)):
            where = int(document[np.argmax(places == codes[number])])
            examples.append(f"{labels.event(*divmod(int(keys[number]), width))} in {labels.document(where)}")
        return Property(
            name=f"{name}: {text}", checked=int(counts.sum()), violations=int(wrong.sum()), examples=examples
        )

    return [
        _check_lines(name, events, num_documents, labels),
        property_of("no held-out event", leaked),
        property_of("no event that the training part of the log does not have", excess & ~leaked),
    ]


def _pools(document_user: np.ndarray, group: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Numbers for the documents whose lines are counted together: (pool of each document, user of each pool).

    Without groups every document is a pool of its own; with them it is all documents of a user and a group.
    """
    if group is None:
        return np.arange(len(document_user)), document_user
    num_groups = int(group.max(initial=0)) + 1
    pool = (document_user + 1) * num_groups + group  # an unknown user, -1, comes first
    return pool, np.arange(int(document_user.max(initial=0)) + 2).repeat(num_groups) - 1


def _check_lines(name: str, events: Events, num_documents: int, labels: Labels) -> Property:
    """Every document has lines, and every line is a title that the catalogue has."""
    unread = events.title < 0
    empty = np.bincount(events.document, minlength=num_documents) == 0
    return Property(
        name=f"{name}: every document has lines, and each is a title of the catalogue",
        checked=len(events.title) + num_documents,
        violations=int(unread.sum() + empty.sum()),
        examples=[labels.document(d) for d in _first(events.document[unread])]
        + [f"{labels.document(d)} has no line" for d in _first(np.flatnonzero(empty))],
    )


def check_repeated_targets(
    name: str,
    events: Events,
    num_documents: int,
    document_user: np.ndarray,
    log_user: np.ndarray,
    log_title: np.ndarray,
    labels: Labels = NUMBERS,
) -> Property:
    """No example shows its target (its last title) in its own prompt, unless the user's log has that title twice."""
    is_last, target = _targets(events, num_documents)
    shown = ~is_last & (events.title == target[events.document]) & (events.title >= 0)
    width = _width(log_title, target)
    keys, counts = np.unique(log_user * width + log_title, return_counts=True)
    documents = _distinct(events.document[shown])
    repeated = np.isin(document_user[documents] * width + target[documents], keys[counts > 1])
    text = "no target inside its own prompt, except where the user had it before"
    return _of_documents(f"{name}: {text}", num_documents, documents[~repeated], labels)


def check_examples(
    name: str,
    events: Events,
    num_documents: int,
    document_user: np.ndarray,
    log_user: np.ndarray,
    log_title: np.ndarray,
    *,
    asked: np.ndarray,
    shown: np.ndarray,
    labels: Labels = NUMBERS,
) -> Property:
    """Every example ends with an event that it may ask for, and shows only what its user did before that.

    `asked` and `shown` are masks over the log, whose events stand in the order of time. Where a user has the target's
    title more than once, the last one counts.
    """
    is_last, target = _targets(events, num_documents)
    width = _width(log_title, events.title)
    # The event that each example asks for: the last one of its user and title that it may ask for.
    event = _Occurrences(log_user * width + log_title, asked).last(document_user * width + target)
    # How often each example shows a title, against how often its user had it before that event.
    history = ~is_last & (events.title >= 0)
    seen, times_seen = np.unique(events.document[history] * width + events.title[history], return_counts=True)
    document, title = np.divmod(seen, width)
    before = _Occurrences(log_user * width + log_title, shown)
    late = times_seen > before.count(document_user[document] * width + title, event[document])
    bad = event < 0
    bad[document[late]] = True
    # Documents without lines, and targets that are not titles, are violations of `check_documents`.
    bad[np.bincount(events.document, minlength=num_documents) == 0] = False
    bad[target < 0] = False
    text = "each ends with an event that it may ask for and shows only what came before it"
    return _of_documents(f"{name}: {text}", num_documents, np.flatnonzero(bad), labels)


def _targets(events: Events, num_documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Which lines are the last of their document, and the title of each document's last line; -1 without one."""
    is_last = np.r_[events.document[1:] != events.document[:-1], True][: len(events.document)]
    target = np.full(num_documents, -1, dtype=np.int64)
    target[events.document[is_last]] = events.title[is_last]
    return is_last, target


def _width(*numbers: np.ndarray) -> int:
    """The factor that packs pairs into one integer key: user * width + number."""
    return int(max(column.max(initial=0) for column in numbers)) + 1


class _Occurrences:
    """Where keys occur in the log, under a mask."""

    def __init__(self, keys: np.ndarray, mask: np.ndarray) -> None:
        event = np.flatnonzero(mask)
        order = stable_order(keys[event])
        self._keys, self._event = keys[event][order], event[order]

    def last(self, keys: np.ndarray) -> np.ndarray:
        """The last event of each key, -1 where it has none."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        at = np.searchsorted(self._keys, keys, side="right") - 1
        return np.where((at >= 0) & (self._keys[at] == keys), self._event[at], -1)

    def count(self, keys: np.ndarray, before: np.ndarray) -> np.ndarray:
        """How many events of each key come before an event."""
        # Number the distinct keys; (number, event) as one integer is sorted, so that a range of it can be searched.
        is_new = np.r_[True, self._keys[1:] != self._keys[:-1]][: len(self._keys)]
        distinct, number = self._keys[is_new], np.cumsum(is_new) - 1
        size = int(max(self._event.max(initial=0), before.max(initial=0))) + 2
        at = _place(distinct, keys)
        codes = number * size + self._event
        first, stop = np.searchsorted(codes, at * size), np.searchsorted(codes, at * size + np.maximum(before, 0))
        return np.where(at < 0, 0, stop - first)


def check_times(
    name: str,
    events: Events,
    document_user: np.ndarray,
    log_user: np.ndarray,
    log_title: np.ndarray,
    log_time: np.ndarray,
    cut: int,
    labels: Labels = NUMBERS,
) -> Property:
    """No event from the cut on, of any domain: the user had every title before, by the clock of the log alone."""
    known = events.title >= 0
    early = log_time < cut
    width = _width(log_title, events.title)
    before = _distinct(log_user[early] * width + log_title[early])
    title, document = events.title[known], events.document[known]
    user = document_user[document]
    wrong = np.flatnonzero(_place(before, user * width + title) < 0)
    return Property(
        name=f"{name}: no event from the cut on, in any domain",
        checked=len(title),
        violations=len(wrong),
        examples=[
            f"{labels.event(int(user[e]), int(title[e]))} in {labels.document(int(document[e]))}" for e in _first(wrong)
        ],
    )


def check_queries(split: Split, domain: str, part: str, queries: Mapping[str, Any]) -> Property:
    """Every query asks for an event of its domain and part, and shows only what the user did before it.

    `queries` has query_id, user (rows of the log's users), target (catalogue rows), time and history (Ragged of
    catalogue rows). An item may stand in the history as often as the user had it before the event asked for: in the
    domain, or in others with real times, but for their test events (these too with global-time, where they are past).
    """
    log, catalogue, history = split.interactions, split.catalogue, queries["history"]
    of_domain = catalogue.domain[log.item] == catalogue.domain_index(domain)
    elsewhere = comparable_domains(catalogue, split.domains)[catalogue.domain[log.item]]
    if split.spec.method != GLOBAL_TIME:
        elsewhere = elsewhere & ~split.events(TEST)
    width, user = len(catalogue), queries["user"]
    # The event asked for: the last one of the part with this user, item and time; -1 where there is none.
    askable = np.flatnonzero(of_domain & split.events(part))
    times, key = _distinct(log.time[askable]), log.user[askable] * width + log.item[askable]
    pairs = _distinct(key)
    asked_pair = _place(pairs, np.where(queries["target"] < 0, -1, user * width + queries["target"]))
    asked_time = _place(times, queries["time"])
    asked = np.where((asked_pair < 0) | (asked_time < 0), -1, asked_pair * len(times) + asked_time)
    moments = _place(pairs, key) * len(times) + _place(times, log.time[askable])
    found = _Occurrences(moments, np.ones(len(moments), dtype=bool)).last(asked)
    event = np.where(found < 0, -1, np.append(askable, -1)[found])
    # How often each query shows an item, and how often its user had that item before the event asked for.
    # An item outside the catalogue gets a number that no user had.
    items = np.where(history.values < 0, width, history.values)
    shown, times_shown = np.unique(history.row_of * (width + 1) + items, return_counts=True)
    row, item = np.divmod(shown, width + 1)
    known = np.where((item == width) | (user[row] < 0), -1, user[row] * width + item)
    had = _Occurrences(log.user * width + log.item, of_domain | elsewhere).count(known, event[row])
    bad = event < 0
    bad[row[times_shown > had]] = True
    wrong = np.flatnonzero(bad)
    return Property(
        name=f"queries/{domain}/{part}: each asks for a held-out event and shows only what came before it",
        checked=len(asked),
        violations=len(wrong),
        examples=[str(queries["query_id"][q]) for q in _first(wrong)],
    )


def _distinct(values: np.ndarray) -> np.ndarray:
    """The distinct values, rising; `np.unique` hashes them, which takes several times longer than a sort."""
    values = np.sort(values)
    return values[np.r_[True, values[1:] != values[:-1]][: len(values)]]


def _place(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where values stand among rising ones; -1 where they are not there."""
    if not len(known):
        return np.full(len(values), -1)
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[at] == values, at, -1)


def find_ties(split: Split, domain: str, part: str, tie_order: str) -> list[Observation]:
    """How many targets share their time with an event of their user and domain that plays another part, so that the
    order of ties alone decided which is held out; and how many of those have the greatest item id among them, which is
    what files sorted by item id give.
    """
    if not split.domains[domain].has_times:
        return []
    log, catalogue = split.interactions, split.catalogue
    rows = np.flatnonzero(catalogue.domain[log.item] == catalogue.domain_index(domain))
    user, item, part_of = log.user[rows], catalogue.item_id_rank[log.item[rows]], split.part[rows]
    place, size, _ = runs(user, log.time[rows])
    first = np.flatnonzero(place == 0)

    # A group is all events of one user and time: its smallest or its largest value, for each of its events.
    def of_group(reduce: np.ufunc, values: np.ndarray) -> np.ndarray:
        return reduce.reduceat(values, first).repeat(size[first]) if len(values) else values

    is_target = split.events(part)[rows]
    tied = is_target & (of_group(np.maximum, part_of) != of_group(np.minimum, part_of))
    last = tied & (item == of_group(np.maximum, item))
    users = user[_first(np.flatnonzero(tied))]
    names = [f"{log.platforms[log.user_platform[row]]}/{log.user_id[row]}" for row in users]
    num_tied, where = int(tied.sum()), f"queries/{domain}/{part}"
    decided = (
        f"{where}: targets that tie order ({tie_order}) alone decided: at that time the user has another event, of "
        "another part of the split"
    )
    greatest = "of the targets that tie order decided, those with the greatest item id (chance has 1 of each group)"
    return [
        Observation(name=decided, checked=int(is_target.sum()), found=num_tied, examples=names),
        Observation(name=f"{where}: {greatest}", checked=num_tied, found=int(last.sum())),
    ]


def normalised_title(title: str) -> str:
    """A title without case, accents, marks and spaces: what is equal is the same thing to a reader.

    >>> normalised_title("L'Oréal  Crème (50ml)")
    'lorealcreme50ml'
    """
    plain = title.casefold()
    if not plain.isascii():
        plain = "".join(c for c in unicodedata.normalize("NFKD", plain) if not unicodedata.combining(c))
    return re.sub(r"[\W_]+", "", plain)


def find_near_duplicates(catalogue: Catalogue, domain: str, pretrained: Sequence[str]) -> Observation:
    """How many items of a domain have the title, but for case, accents and marks, of an item of another domain that is
    pre-trained on."""
    rows = [catalogue.rows_of(other) for other in pretrained if other != domain]
    others = {normalised_title(catalogue.title[row]) for row in itertools.chain(*rows)}
    titles = catalogue.title[catalogue.rows_of(domain)]
    found = [str(title) for title in titles if normalised_title(title) in others]
    return Observation(
        name=f"{domain}: items whose normalised title is that of an item of another pre-training domain",
        checked=len(titles),
        found=len(found),
        examples=found[:MAX_EXAMPLES],
    )


def check_absent(
    name: str, present: np.ndarray, forbidden: np.ndarray, labels: Mapping[int, str] | np.ndarray
) -> Property:
    """No number of `forbidden` occurs in `present`, where -1 stands for nothing known; `labels` names the numbers."""
    wrong = np.isin(present, forbidden) & (present >= 0)
    examples = [str(labels[number]) for number in _first(_distinct(present[wrong]))]
    return Property(name=name, checked=len(present), violations=int(wrong.sum()), examples=examples)


def _first(values: np.ndarray) -> list[int]:
    return [int(value) for value in values[:MAX_EXAMPLES]]
