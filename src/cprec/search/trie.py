"""A trie over the token sequences of items, in flat arrays: one structure for exact ranking, beams and filters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import DataError

LONGEST = 512
"""A sequence of more tokens than this is taken for a mistake."""


@dataclass(frozen=True)
class Block:
    """The prefixes of some sequences as nodes. Node 0 is the root, nodes of one depth stand together, and the children
    of a node stand side by side, ordered by token."""

    token: np.ndarray
    """int32[num_nodes]: the token that leads to a node (-1 for the root)."""
    first_child: np.ndarray
    """int32[num_nodes + 1]: the children of node n are first_child[n] .. first_child[n + 1] - 1."""


def build_block(sequences: Ragged) -> tuple[Block, np.ndarray]:
    """A block, and the node where each sequence ends: int32[num_sequences].

    Vectorised: sequences are sorted once, then each depth begins a node wherever the prefix changes.
    """
    order = sort_sequences(sequences)
    starts, lengths, values = sequences.offsets[:-1][order], sequences.lengths[order], sequences.values
    node = np.zeros(len(order), dtype=np.int32)  # the node that each sequence has reached
    end = np.empty(len(order), dtype=np.int32)
    tokens = [np.array([-1], dtype=np.int32)]
    sizes: list[np.ndarray] = []
    total, level = 1, 0
    rows = np.arange(len(order))  # sequences that go on
    while len(rows):
        # A node begins at each row whose prefix or next token differs from the row before.
        here, before = values[starts[rows] + level].astype(np.int32), node[rows]
        first = np.flatnonzero(_changes(before) | _changes(here))
        # Rows between two beginnings belong to the first of the two: number the beginnings and carry them forward.
        number = np.full(len(rows), total - 1, dtype=np.int32)
        number[first] += 1 + np.arange(len(first), dtype=np.int32)
        np.maximum.accumulate(number, out=number)
        # How many children each node of the depth above has.
        sizes.append(np.bincount(before[first] - (total - len(tokens[-1])), minlength=len(tokens[-1])))
        tokens.append(here[first])
        total += len(first)
        node[rows] = number
        level += 1
        ends = lengths[rows] == level
        end[rows[ends]] = number[ends]
        rows = rows[~ends]
    sizes.append(np.zeros(len(tokens[-1]), dtype=np.int64))
    leaf = np.empty_like(end)
    leaf[order] = end
    first_child = (1 + offsets_of(np.concatenate(sizes))).astype(np.int32)
    return Block(np.concatenate(tokens), first_child), leaf


def levels_of(first_child: np.ndarray) -> list[tuple[int, int]]:
    """The nodes of each depth, the root's first: from the first up to the last (not included)."""
    levels, start, stop = [], 0, 1
    while stop > start:
        levels.append((start, stop))
        start, stop = stop, int(first_child[stop])
    return levels


def _changes(values: np.ndarray) -> np.ndarray:
    """bool: True for the first value and wherever one differs from the one before."""
    out = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=out[1:])
    return out


def sort_sequences(sequences: Ragged) -> np.ndarray:
    """The order of sequences by their tokens; of those that begin alike the shorter comes first.

    Compares two tokens at a time, and only sequences that are not told apart yet.
    """
    starts, lengths, values = sequences.offsets[:-1], sequences.lengths, sequences.values
    group = np.zeros(len(sequences), dtype=np.int64)  # sequences of one group agree so far; groups stand in order
    rows = np.arange(len(sequences))  # those in groups of several
    place = np.arange(len(sequences))  # where the sequences of a group go
    order = np.arange(len(sequences))
    depth = 0
    width = int(values.max(initial=0)) + 2
    while len(rows):
        # One number holds the group and the next two tokens; 0 stands for the end.
        key = group[rows]
        for column in (depth, depth + 1):
            within = column < lengths[rows]
            at = np.minimum(starts[rows] + column, len(values) - 1)
            key = key * width + np.where(within, values[at] + 1, 0)
        sort = np.argsort(key, kind="stable")
        key, rows = key[sort], rows[sort]
        order[place] = rows
        # Equal numbers make the groups of the next round.
        number = np.cumsum(_changes(key)) - 1
        size = np.bincount(number)
        depth += 2
        goes_on = (size[number] > 1) & (lengths[rows] > depth)  # sequences of one group end together only if equal
        group[rows] = number
        place, rows = place[goes_on], rows[goes_on]
        if len(rows):
            _, group[rows] = np.unique(group[rows], return_inverse=True)
    return order


@dataclass(frozen=True, eq=False)
class Trie:
    """The token sequences of items: titles, say, or codes.

    Every sequence ends with the end token, so one that is a prefix of another has a leaf of its own; items with equal
    sequences share a leaf. Items are known by position, in the order of `build`. A trie never changes: other items in
    stock make another trie, so a search that is under way keeps the one that it began with.
    """

    end: int
    """The token that leads to leaves and to nothing else."""
    token: np.ndarray
    """int32[num_nodes]: the token that leads to a node (-1 for the root, node 0)."""
    first_child: np.ndarray
    """int32[num_nodes + 1]: the children of node n are first_child[n] .. first_child[n + 1] - 1, by token."""
    leaf: np.ndarray
    """int32[number of items]: the node where each item's sequence ends."""
    in_stock: np.ndarray
    """bool[number of items]: False for items that are not to be found."""
    _tensors: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def build(cls, sequences: Ragged, name: Callable[[int], str] = "item {}".format) -> Trie:
        """The trie of one sequence for each item, all in stock. Each is closed by the same token, which occurs nowhere
        else.

        Raises DataError if there is none, and for sequences that are empty, not closed or of more than `LONGEST`
        tokens, naming the first five by `name`.
        """
        if not len(sequences):
            raise DataError("there is nothing to rank: a trie needs at least one item")
        end = int(sequences.values[-1]) if len(sequences.values) else 0
        _check(sequences, end, name)
        block, leaf = build_block(sequences)
        return cls(end, block.token, block.first_child, leaf, np.ones(len(leaf), dtype=bool))

    def with_stock(self, in_stock: np.ndarray) -> Trie:
        """The same sequences with other items in stock: bool[number of items]."""
        return replace(self, in_stock=in_stock)

    @property
    def num_nodes(self) -> int:
        return len(self.token)

    def parent(self, nodes: np.ndarray) -> np.ndarray:
        """The node before each node, none of which may be the root. By bisection, which takes no memory."""
        return np.searchsorted(self.first_child, nodes.astype(np.int32), side="right") - 1

    def paths(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nodes above (and at) the leaves of items, ascending, and how many of the items are below each."""
        nodes, counts = np.unique(self.leaf[items].astype(np.int64), return_counts=True)
        found_nodes, found_counts = [nodes], [counts]
        while len(nodes):
            # One step up: leaves lie at several depths, so nodes reached twice are added up at the end.
            going = nodes > 0
            above, inverse = np.unique(self.parent(nodes[going]), return_inverse=True)
            counts = np.bincount(inverse, weights=counts[going], minlength=len(above)).astype(np.int64)
            nodes = above.astype(np.int64)
            found_nodes.append(nodes)
            found_counts.append(counts)
        nodes, inverse = np.unique(np.concatenate(found_nodes), return_inverse=True)
        counts = np.bincount(inverse, weights=np.concatenate(found_counts), minlength=len(nodes))
        return nodes, counts.astype(np.int64)

    def part(self, items: np.ndarray) -> tuple[Block, np.ndarray, np.ndarray]:
        """The sequences of one or more items as a block, the node of the trie that each of its nodes is, and the node
        of the block where each item's sequence ends."""
        nodes, _ = self.paths(items)
        # Nodes ascend, so depths stay together and siblings side by side.
        parent = np.searchsorted(nodes, self.parent(nodes[1:]))
        first_child = (1 + offsets_of(np.bincount(parent, minlength=len(nodes)))).astype(np.int32)
        return Block(self.token[nodes], first_child), nodes, np.searchsorted(nodes, self.leaf[items])

    @cached_property
    def num_items(self) -> np.ndarray:
        """int32[num_nodes]: items in stock below a node, or at a leaf."""
        return self._carried_up(np.bincount(self.leaf[self.in_stock], minlength=self.num_nodes), np.add)

    @cached_property
    def num_sharing(self) -> np.ndarray:
        """int32[num_nodes]: at a leaf, the items in stock that share its sequence; above, the fewest that share one of
        the sequences below. Where nothing is in stock, the largest int32."""
        return self._carried_up(np.where(self.num_items > 0, self.num_items, np.iinfo(np.int32).max), np.minimum)

    @cached_property
    def first_item(self) -> np.ndarray:
        """int32[num_nodes]: where the items below a node begin in `by_sequence`; there are `num_items` of them."""
        out = np.zeros(self.num_nodes, dtype=np.int32)
        for (start, stop), (_, end) in pairwise(self._levels):
            below = self.num_items[stop:end]
            before = np.cumsum(below) - below  # items of the same depth before each node
            inner = np.arange(start, stop)[self.token[start:stop] != self.end]
            first = self.first_child[inner]
            # A node's children begin where it does, each behind the one before.
            out[stop:end] = before + np.repeat(out[inner] - before[first - stop], self.first_child[inner + 1] - first)
        return out

    @cached_property
    def by_sequence(self) -> np.ndarray:
        """int32[items in stock]: their positions, in the order of their sequences, so that those below a node stand
        together; items that share a sequence by position."""
        items = np.flatnonzero(self.in_stock).astype(np.int32)
        order: np.ndarray = items[np.argsort(self.first_item[self.leaf[items]], kind="stable")]
        return order

    @cached_property
    def longest(self) -> np.ndarray:
        """int32[num_nodes]: tokens of the longest sequence through a node."""
        return self._carried_up(self._depth, np.maximum)

    @cached_property
    def tail(self) -> np.ndarray:
        """int32[num_nodes]: how many tokens a sequence has behind a node that no other sequence goes through, the end
        included; 0 at other nodes, and at leaves."""
        num_sequences = self._carried_up(np.ones(self.num_nodes, dtype=np.int32), np.add)
        return np.where(num_sequences == 1, self.longest - self._depth, 0).astype(np.int32)

    def log_share(self, items: np.ndarray) -> np.ndarray:
        """What each item has of its sequence's probability, as a logarithm: float64[number of items], -log n.

        n is the number of items in stock that have the sequence. An item out of stock counts itself, as if it were
        back.
        """
        return -np.log(self.num_items[self.leaf[items]] + ~self.in_stock[items])

    def on(self, device: torch.device, name: str) -> torch.Tensor:
        """One of the arrays as a tensor on a device. It is put there once."""
        key = (str(device), name)
        if key not in self._tensors:
            self._tensors[key] = torch.from_numpy(getattr(self, name)).to(device)
        return self._tensors[key]

    def _carried_up(self, values: np.ndarray, combine: np.ufunc) -> np.ndarray:
        """Values at leaves, and at each node above the combination of its children's: int32[num_nodes]."""
        out = values.astype(np.int32)
        for (start, stop), (_, end) in reversed(list(pairwise(self._levels))):
            # Siblings stand side by side, one node's behind those of the node before: one segment for each node.
            inner = np.arange(start, stop)[self.token[start:stop] != self.end]
            out[inner] = combine.reduceat(out[:end], self.first_child[inner])
        return out

    @cached_property
    def _levels(self) -> list[tuple[int, int]]:
        return levels_of(self.first_child)

    @property
    def _depth(self) -> np.ndarray:
        """int64[num_nodes]: tokens that lead to a node."""
        return np.repeat(np.arange(len(self._levels)), [stop - start for start, stop in self._levels])


def _check(sequences: Ragged, end: int, name: Callable[[int], str]) -> None:
    """Raises DataError naming sequences that are empty, of absurd length, or do not end where they should."""
    lengths = sequences.lengths
    closed = np.zeros(len(sequences), dtype=bool)
    closed[lengths > 0] = sequences.values[sequences.offsets[1:][lengths > 0] - 1] == end
    ends = np.bincount(sequences.row_of[sequences.values == end], minlength=len(sequences))
    for problem, wrong in (
        ("has no tokens", closed & (lengths == 1) | (lengths == 0)),
        (f"has more than {LONGEST} tokens", lengths > LONGEST),
        ("does not end with the end token, or has it within", ~closed | (ends != 1)),
    ):
        rows = np.flatnonzero(wrong)
        if len(rows):
            names = ", ".join(name(int(row)) for row in rows[:5])
            more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
            raise DataError(f"{names}{more} {problem}: correct it, or leave the item out")
