"""The documents that training reads: those of several shard folders as one list, in groups that a mixture weighs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from cprec.data.ragged import Ragged, offsets_of, places
from cprec.schema import MIXED, SPECIFIC
from cprec.text.shards import Choices, Shards

TEXT, EXAMPLES = "general text", "examples"
WALKS, RULES, ITEM_TEXTS = CURRICULUM = ("walks", "rules", "item texts")
"""Kinds of documents beside behaviour sequences; those of the curriculum no user wrote."""


@dataclass(frozen=True, eq=False)
class Group:
    """Documents with one weight in a mixture: a domain's specific ones, all mixed ones, or those of another source."""

    name: str
    """For example `books (specific)`, `mixed`, `text of wiki`, `examples of books` or `walks of books`."""
    kind: str
    """specific, mixed, general text, examples, walks, rules or item texts."""
    shards: Shards
    documents: np.ndarray
    """Their row numbers in the shards: int64[D]."""
    domain: str = ""
    """The domain of specific documents, examples and the curriculum, the file of text in a folder of text; empty for
    others."""
    targets_only: bool = False
    """Whether the loss covers the target's tokens alone."""

    @cached_property
    def lengths(self) -> np.ndarray:
        return self.shards.column("length")[self.documents]

    @cached_property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @cached_property
    def num_events(self) -> int:
        return int(self.shards.column("num_events")[self.documents].sum())


NAMES = {SPECIFIC: "{} (specific)", MIXED: MIXED, TEXT: "text of {}"}
"""What the groups of a data folder are called, by their kind and in their order; {} is the domain, or the file."""


def groups_of(shards: Shards) -> list[Group]:
    """The groups of a shard folder: specific sequences by domain, then mixed ones; or texts by file.

    They are read from the manifest, which lists the pieces (runs of documents of one domain and kind).
    """
    rows: dict[tuple[str, str], list[np.ndarray]] = {}
    start = 0
    for piece in shards.manifest["pieces"]:
        stop, kind = start + piece["num_documents"], piece["kind"]
        rows.setdefault((kind, "" if kind == MIXED else piece["domain"]), []).append(np.arange(start, stop))
        start = stop
    kinds = list(NAMES)
    return [
        Group(NAMES[kind].format(domain), kind, shards, np.concatenate(rows[kind, domain]), domain)
        for kind, domain in sorted(rows, key=lambda group: (kinds.index(group[0]), group[1]))
    ]


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents as they are read, one after the other; arrays along their tokens."""

    tokens: Ragged
    """int64"""
    first_target: np.ndarray
    """The place of each document's first token that is a target: int64[len(tokens)]."""
    is_target: np.ndarray
    """Whether the loss covers each token: bool."""
    until: np.ndarray | None
    """The place in its document before which the tokens that read each token end: int64. None where no document of the
    corpus is a tree: then it is the end."""
    choices: Choices | None
    """What the loss asks in the place of some tokens. None where no group of these documents has any."""

    @property
    def depth(self) -> np.ndarray:
        """How many tokens each token goes on from: its place in a document that is no tree: int64."""
        if self.until is None:
            return self.tokens.place_of
        # All tokens before it, less those whose readers end before it.
        closed = np.bincount(self.until + np.repeat(self.tokens.offsets[:-1], self.tokens.lengths))
        return np.arange(len(self.until)) - np.cumsum(closed)[:-1]


class Corpus:
    """The documents of several groups as one list, group after group; D is the number of documents in all."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)
        self._starts = np.cumsum([0, *(len(group.documents) for group in groups)])
        self.lengths = np.concatenate([np.empty(0, np.int64), *(group.lengths for group in groups)])
        """int64[D]"""
        self.group = np.repeat(np.arange(len(groups), dtype=np.int16), np.diff(self._starts))
        """The place of each document's group: int16[D]."""

    @classmethod
    def of(cls, shards: Shards, *, targets_only: bool = False) -> Corpus:
        """All documents of one shard folder as one group."""
        return cls([Group("", "", shards, np.arange(len(shards)), targets_only=targets_only)])

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def names(self) -> list[str]:
        return [group.name for group in self.groups]

    @property
    def has_trees(self) -> bool:
        """Whether any document may be a tree."""
        return any(group.shards.branches is not None for group in self.groups)

    def take(self, documents: np.ndarray) -> Documents:
        """Some documents, given by their places."""
        offsets = offsets_of(self.lengths[documents])
        tokens = np.empty(offsets[-1], dtype=np.int64)
        first_target = np.ones(len(documents), dtype=np.int64)
        until = np.repeat(np.diff(offsets), np.diff(offsets)) if self.has_trees else None
        of_trees = np.zeros(len(tokens) if self.has_trees else 0, dtype=bool)
        asked, choices = of_trees.copy(), []
        group_of = self.group[documents]
        for number in np.unique(group_of):
            group, mine = self.groups[number], np.flatnonzero(group_of == number)
            rows = group.documents[documents[mine] - self._starts[number]]
            found = group.shards.take(rows)
            # The tokens of the i-th document found go where the documents asked for have their mine[i]-th.
            place = np.repeat(offsets[mine], found.lengths) + found.place_of
            tokens[place] = found.values
            if (branches := group.shards.branches) is not None:
                at = places(group.shards.column("offset")[rows], found.lengths)
                assert until is not None
                until[place], asked[place], of_trees[place] = branches.until[at], branches.is_target[at], True
                if (every := branches.choices) is not None:
                    first = np.searchsorted(every.of, at)
                    several = np.searchsorted(every.of, at, side="right") - first
                    of = places(first, several)
                    choices.append(Choices(np.repeat(place, several), every.token[of], every.chance[of]))
            if group.targets_only:
                first_target[mine] = group.shards.column("target_start")[rows]
        read = Ragged(tokens, offsets)
        is_target = read.place_of >= np.repeat(first_target, read.lengths)
        if until is not None:
            is_target = np.where(of_trees, asked, is_target)
        parts = [[getattr(each, field.name) for each in choices] for field in fields(Choices)]
        joined = Choices(*map(np.concatenate, parts)) if choices else None
        return Documents(read, first_target, is_target, until, joined)
