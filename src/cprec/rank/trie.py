"""The token trie of a catalogue's titles, in flat arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cprec.data.ragged import Ragged, offsets_of


@dataclass(frozen=True)
class Trie:
    """Prefixes of titles as nodes; node 0 is the root, nodes of one depth stand together, children by rising token.

    Every title ends with the end-of-sequence token, so a title that is a prefix of another has a leaf of its own, and
    items with equal titles share one.
    """

    token: np.ndarray
    """int64[num_nodes]: the token that leads to a node (-1 for the root)."""
    parent: np.ndarray
    """int64[num_nodes]: the node before it (-1 for the root)."""
    first_child: np.ndarray
    """int64[num_nodes + 1]: the children of node n are first_child[n] .. first_child[n + 1] - 1."""
    items: Ragged
    """Per node, the items whose title ends there: positions in the titles the trie was built from."""
    leaf: np.ndarray
    """int64[num_items]: the node where each item's title ends."""
    num_leaves: np.ndarray
    """int64[num_nodes]: leaves below a node, itself included."""

    @property
    def num_nodes(self) -> int:
        return len(self.token)

    @classmethod
    def build(cls, titles: Ragged) -> Trie:
        """From title tokens, each row closed by the end-of-sequence token, which occurs nowhere else in it.

        Vectorised: titles are sorted once, then each depth starts a node wherever the prefix changes.
        Raises ValueError for an empty title.
        """
        lengths = titles.lengths
        if not len(titles):
            raise ValueError("a trie needs at least one title")
        if (lengths < 2).any():
            raise ValueError(f"the title of item {int(np.flatnonzero(lengths < 2)[0])} has no tokens")
        depth = int(lengths.max())
        grid = np.full((len(titles), depth), -1, dtype=np.int64)
        grid[titles.row_of, np.arange(len(titles.values)) - np.repeat(titles.offsets[:-1], lengths)] = titles.values
        order = np.lexsort(grid.T[::-1])
        grid, lengths = grid[order], lengths[order]

        node = np.zeros(len(grid), dtype=np.int64)  # the node each title has reached
        end = np.zeros(len(grid), dtype=np.int64)
        tokens, parents, count = [np.array([-1])], [np.array([-1])], 1
        for level in range(depth):
            alive = grid[:, level] >= 0
            here, before = grid[alive, level], node[alive]
            new = np.r_[True, (before[1:] != before[:-1]) | (here[1:] != here[:-1])]
            number = count - 1 + np.cumsum(new)
            tokens.append(here[new])
            parents.append(before[new])
            count += int(new.sum())
            node[alive] = number
            ends = alive & (lengths == level + 1)
            end[ends] = node[ends]
        token, parent = np.concatenate(tokens), np.concatenate(parents)
        leaf = np.empty_like(end)
        leaf[order] = end
        by_leaf = np.argsort(leaf, kind="stable")
        items = Ragged(by_leaf, offsets_of(np.bincount(leaf, minlength=count)))
        num_leaves = (items.lengths > 0).astype(np.int64)
        for nodes in reversed(_levels(parent)):
            num_leaves += np.bincount(parent[nodes], weights=num_leaves[nodes], minlength=count).astype(np.int64)
        first_child = 1 + offsets_of(np.bincount(parent[1:], minlength=count))
        return cls(token, parent, first_child, items, leaf, num_leaves)

    def dead_nodes(self, excluded: np.ndarray) -> np.ndarray:
        """Nodes below which every item is excluded: no search for the others needs them. Sorted.

        `excluded` holds item positions.
        """
        hit, count = np.unique(self.leaf[np.unique(excluded)], return_counts=True)
        above = hit[count == self.items.lengths[hit]]  # leaves none of whose items is left
        passed = []
        while len(above):
            passed.append(above)
            above = self.parent[above]
            above = above[above >= 0]
        if not passed:
            return np.empty(0, dtype=np.int64)
        node, dead_leaves = np.unique(np.concatenate(passed), return_counts=True)
        return node[dead_leaves == self.num_leaves[node]]


def _levels(parent: np.ndarray) -> list[np.ndarray]:
    """Nodes of each depth below the root, nearest first; they are numbered level by level."""
    levels, start, stop = [], 0, 1
    while stop < len(parent):
        following = int(np.searchsorted(parent, stop))
        start, stop = stop, following
        levels.append(np.arange(start, stop))
    return levels
