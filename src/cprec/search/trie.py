"""The token trie of a catalogue's titles, in flat arrays: one structure for exact ranking, beams and filters."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cprec.data.ragged import Ragged, gather, offsets_of
from cprec.errors import DataError

LONGEST = 512
"""Tokens from which on a title is taken for a mistake."""
_ARRAYS = ("token", "first_child", "num_items", "leaf", "in_stock", "roots")


@dataclass(frozen=True)
class Block:
    """Prefixes of some titles as nodes; node 0 is the root, nodes of one depth stand together, children by token."""

    token: np.ndarray
    """int32[num_nodes]: the token that leads to a node (-1 for the root)."""
    first_child: np.ndarray
    """int32[num_nodes + 1]: the children of node n are first_child[n] .. first_child[n + 1] - 1."""
    num_items: np.ndarray
    """int32[num_nodes]: titles below a node."""


def build_block(titles: Ragged) -> tuple[Block, np.ndarray]:
    """A block, and the node where each title ends: int32[num_titles].

    Vectorised: titles are sorted once, then each depth begins a node wherever the prefix changes.
    """
    order = sort_titles(titles)
    starts, lengths, values = titles.offsets[:-1][order], titles.lengths[order], titles.values
    node = np.zeros(len(order), dtype=np.int32)  # the node that each title has reached
    end = np.empty(len(order), dtype=np.int32)
    tokens, counts = [np.array([-1], dtype=np.int32)], [np.array([len(order)], dtype=np.int32)]
    sizes: list[np.ndarray] = []
    total, level = 1, 0
    rows = np.arange(len(order))  # titles that go on
    while len(rows):
        here, before = values[starts[rows] + level].astype(np.int32), node[rows]
        first = np.flatnonzero(_changes(before) | _changes(here))
        number = np.full(len(rows), total - 1, dtype=np.int32)
        number[first] += 1 + np.arange(len(first), dtype=np.int32)
        np.maximum.accumulate(number, out=number)
        sizes.append(np.bincount(before[first] - (total - len(tokens[-1])), minlength=len(tokens[-1])))
        tokens.append(here[first])
        counts.append(np.diff(np.append(first, len(rows))).astype(np.int32))
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
    return Block(np.concatenate(tokens), first_child, np.concatenate(counts)), leaf


def levels_of(first_child: np.ndarray, root: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """The nodes of each depth below a root, its own first: from the first up to the last (not included)."""
    end = len(first_child) - 1 if end is None else end
    levels, start, stop = [], root, root + 1
    while stop > start:
        levels.append((start, stop))
        start, stop = stop, int(first_child[stop]) if stop < end else stop
    return levels


def _changes(values: np.ndarray) -> np.ndarray:
    """bool: True for the first value and wherever one differs from the one before."""
    out = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=out[1:])
    return out


def sort_titles(titles: Ragged) -> np.ndarray:
    """Titles in the order of their tokens, those that begin alike with the shorter one first. Two tokens at a time, and
    only where titles are not told apart yet."""
    starts, lengths, values = titles.offsets[:-1], titles.lengths, titles.values
    group = np.zeros(len(titles), dtype=np.int64)  # titles of one group agree so far; groups stand in order
    rows = np.arange(len(titles))  # of groups of several
    place = np.arange(len(titles))  # where the titles of a group go
    order = np.arange(len(titles))
    depth = 0
    width = int(values.max(initial=0)) + 2
    while len(rows):
        key = group[rows]
        for column in (depth, depth + 1):
            within = column < lengths[rows]
            at = np.minimum(starts[rows] + column, len(values) - 1)
            key = key * width + np.where(within, values[at] + 1, 0)
        sort = np.argsort(key, kind="stable")
        key, rows = key[sort], rows[sort]
        order[place] = rows
        number = np.cumsum(_changes(key)) - 1
        size = np.bincount(number)
        depth += 2
        goes_on = (size[number] > 1) & (lengths[rows] > depth)  # titles of one group end together only if equal
        group[rows] = number
        place, rows = place[goes_on], rows[goes_on]
        if len(rows):
            _, group[rows] = np.unique(group[rows], return_inverse=True)
    return order


class Trie:
    """The titles of a catalogue, in which items come and go.

    Every title ends with the end-of-sequence token, so a title that is a prefix of another has a leaf of its own, and
    items with equal titles share one. Items are known by position: those of `build` first, then those added.

    Items added later have nodes behind all others and under a second root: nothing that is there moves. What changes is
    replaced and never written into, so a search that is under way keeps the catalogue that it began with.
    """

    token: np.ndarray
    """int32[num_nodes]: the token that leads to a node (-1 for roots)."""
    first_child: np.ndarray
    """int32[num_nodes + 1]: the children of node n, which must not be a leaf, are first_child[n] ..
    first_child[n + 1] - 1, by token."""
    num_items: np.ndarray
    """int32[num_nodes]: items in stock below a node, or at a leaf."""
    leaf: np.ndarray
    """int32[number of items]: the node where each item's title ends."""
    in_stock: np.ndarray
    """bool[number of items]: False for items that were withdrawn."""
    roots: np.ndarray
    """int64[1 or 2]: the root of the first titles, then that of the ones added."""
    end: int
    """The end-of-sequence token, which leads to leaves and to nothing else."""

    def __init__(self, end: int, **arrays: np.ndarray) -> None:
        self.end = end
        self._tensors: dict[tuple[str, str], Any] = {}
        for name in _ARRAYS:
            setattr(self, name, arrays[name])

    @classmethod
    def build(cls, titles: Ragged, name: Callable[[int], str] = "item {}".format) -> Trie:
        """From title tokens, each row closed by the end-of-sequence token, which occurs nowhere else in it.

        Raises DataError for a catalogue without titles, and for titles that are empty, not closed or of more than
        `LONGEST` tokens, naming the first five by `name`.
        """
        if not len(titles):
            raise DataError("a trie needs at least one title")
        end = int(titles.values[-1]) if len(titles.values) else 0
        _check(titles, end, name)
        block, leaf = build_block(titles)
        return cls(
            end, **vars(block), leaf=leaf, in_stock=np.ones(len(titles), dtype=bool), roots=np.zeros(1, dtype=np.int64)
        )

    @property
    def num_nodes(self) -> int:
        return len(self.token)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(getattr(self, name).nbytes for name in _ARRAYS)

    # ---- looking around ----------------------------------------------------------------------------------------------

    def parent(self, nodes: np.ndarray) -> np.ndarray:
        """The node before each node, none of which may be a root. By bisection, which takes no memory."""
        return np.searchsorted(self.first_child, nodes.astype(np.int32), side="right") - 1

    def find(self, title: np.ndarray) -> int:
        """The leaf of a title, -1 where there is none."""
        for root in self.roots:
            node = int(root)
            for token in title:
                first, last = self.first_child[node], self.first_child[node + 1]
                child = int(first + np.searchsorted(self.token[first:last], token))
                if child == last or self.token[child] != token:
                    node = -1
                    break
                node = child
            if node >= 0:
                return node
        return -1

    def titles(self, leaves: np.ndarray) -> Ragged:
        """The tokens that lead to each leaf, the end included."""
        tokens, going, node = [], np.arange(len(leaves)), leaves.astype(np.int64)
        lengths = np.zeros(len(leaves), dtype=np.int64)
        while len(going):
            tokens.append((going, self.token[node].astype(np.int64)))
            lengths[going] += 1
            node = self.parent(node)
            inside = ~np.isin(node, self.roots)
            going, node = going[inside], node[inside]
        out = Ragged(np.empty(int(lengths.sum()), dtype=np.int64), offsets_of(lengths))
        for before_end, (rows, values) in enumerate(tokens):
            out.values[out.offsets[1:][rows] - 1 - before_end] = values
        return out

    def items_at(self, leaves: np.ndarray) -> Ragged:
        """The items of each leaf, in stock or not, by position."""
        order, sorted_leaf = self._by_leaf
        first = np.searchsorted(sorted_leaf, leaves)
        return gather(order, first, np.searchsorted(sorted_leaf, leaves, side="right") - first)

    def paths(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nodes above (and at) the leaves of items, ascending, and how many of the items are below each."""
        nodes, counts = np.unique(self.leaf[items].astype(np.int64), return_counts=True)
        found_nodes, found_counts = [nodes], [counts]
        while len(nodes):
            going = ~np.isin(nodes, self.roots)
            above, inverse = np.unique(self.parent(nodes[going]), return_inverse=True)
            counts = np.bincount(inverse, weights=counts[going], minlength=len(above)).astype(np.int64)
            nodes = above.astype(np.int64)
            found_nodes.append(nodes)
            found_counts.append(counts)
        nodes, inverse = np.unique(np.concatenate(found_nodes), return_inverse=True)
        counts = np.bincount(inverse, weights=np.concatenate(found_counts), minlength=len(nodes))
        return nodes, counts.astype(np.int64)

    @cached_property
    def longest(self) -> np.ndarray:
        """int16[num_nodes]: tokens of the longest title through a node."""
        out = np.zeros(self.num_nodes, dtype=np.int16)
        for levels in self._levels:
            for depth, (start, stop) in enumerate(levels):
                out[start:stop] = depth
            for start, stop in reversed(levels[1:]):
                np.maximum.at(out, self.parent(np.arange(start, stop)), out[start:stop])
        return out

    @cached_property
    def num_sharing(self) -> np.ndarray:
        """int32[num_nodes]: at a leaf, the items in stock that share its title; above, the fewest that share one of the
        titles below. Where nothing is in stock, the largest int32."""
        out = np.where((self.token == self.end) & (self.num_items > 0), self.num_items, np.iinfo(np.int32).max)
        for levels in self._levels:
            for (start, stop), (_, end) in reversed(list(pairwise(levels))):
                # Siblings stand side by side, one node's behind those of the node before: one segment for each node.
                inner = np.arange(start, stop)[self.token[start:stop] != self.end]
                out[inner] = np.minimum.reduceat(out[:end], self.first_child[inner])
        return out

    def log_share(self, items: np.ndarray) -> np.ndarray:
        """What each item has of its title's probability, as a logarithm: float64[number of items], -log n.

        n is the number of items in stock that have the title. An item out of stock counts itself, as if it were back.
        """
        return -np.log(self.num_items[self.leaf[items]] + ~self.in_stock[items])

    def on(self, device: Any, name: str) -> Any:
        """An array, `longest` and `num_sharing` included, as a tensor on a device. Put there once, until it changes."""
        import torch

        key = (str(device), name)
        if key not in self._tensors:
            with warnings.catch_warnings():  # mapped arrays are not writable, and nobody writes
                warnings.filterwarnings("ignore", message=".*not writable")
                self._tensors[key] = torch.from_numpy(np.asarray(getattr(self, name))).to(device)
        return self._tensors[key]

    @cached_property
    def _by_leaf(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.leaf, kind="stable").astype(np.int32)
        return order, self.leaf[order]

    @property
    def _levels(self) -> list[list[tuple[int, int]]]:
        """Of each root, the nodes of every depth."""
        return [levels_of(self.first_child, int(r), int(e)) for r, e in zip(self.roots, self._block_ends, strict=True)]

    @property
    def _block_ends(self) -> list[int]:
        return [*self.roots[1:].tolist(), self.num_nodes]

    # ---- items come and go -------------------------------------------------------------------------------------------

    def add(self, titles: Ragged, name: Callable[[int], str] = "item {}".format) -> np.ndarray:
        """Put items behind the others, in stock at once; returns their positions. Raises DataError as `build` does.

        Titles that are there already get the same leaf. The others, with those of earlier additions, are built anew
        behind the first titles, so many additions should be made together.
        """
        _check(titles, self.end, name)
        positions = len(self.leaf) + np.arange(len(titles))
        first = int(self.roots[1]) if len(self.roots) > 1 else self.num_nodes  # where added titles begin
        leaf = np.concatenate([self.leaf, np.full(len(titles), first, dtype=np.int32)])
        for row in range(len(titles)):
            known = self.find(titles[row])
            leaf[positions[row]] = known if 0 <= known < first else first
        later = np.flatnonzero(leaf >= first)
        old, new = later[later < len(self.leaf)], later[later >= len(self.leaf)] - len(self.leaf)
        in_stock = np.concatenate([self.in_stock, np.zeros(len(titles), dtype=bool)])
        arrays = {"token": self.token[:first], "first_child": self.first_child[:first], "roots": self.roots[:1]}
        num_items = self.num_items[:first]
        if len(later):
            block, ends = build_block(Ragged.concatenate([self.titles(self.leaf[old]), titles.take(new)]))
            leaf[later] = ends + np.int32(first)
            arrays["token"] = np.concatenate([self.token[:first], block.token])
            arrays["first_child"] = np.concatenate([self.first_child[:first], block.first_child + np.int32(first)])
            arrays["roots"] = np.array([0, first])
            num_items = np.concatenate([num_items, np.zeros(len(block.token), dtype=np.int32)])
        else:
            arrays["first_child"] = self.first_child[: first + 1]
        self._replace(**arrays, leaf=leaf, in_stock=in_stock, num_items=num_items)
        self._count(later[in_stock[later]], 1)
        self._set_stock(positions, True, counted=later)
        return positions

    def withdraw(self, positions: np.ndarray) -> None:
        """These items are not found any more, until they are put back."""
        self._set_stock(positions, False)

    def put_back(self, positions: np.ndarray) -> None:
        """Items that were withdrawn are found again."""
        self._set_stock(positions, True)

    def only(self, kept: np.ndarray) -> Trie:
        """The same nodes, with the items of a mask alone in stock (a domain's, say): bool[number of items]."""
        out = Trie(self.end, **{name: getattr(self, name) for name in _ARRAYS})
        out.in_stock = self.in_stock & kept
        counts = np.bincount(self.leaf[out.in_stock], minlength=self.num_nodes).astype(np.int32)
        for levels in self._levels:
            for start, stop in reversed(levels[1:]):
                parent = self.parent(np.arange(start, stop))
                low = int(parent[0])
                sums = np.bincount(parent - low, weights=counts[start:stop])
                counts[low : low + len(sums)] += sums.astype(np.int32)
        out.num_items = counts
        return out

    def _set_stock(self, positions: np.ndarray, stock: bool, counted: np.ndarray | None = None) -> None:
        changed = np.unique(positions)
        changed = changed[self.in_stock[changed] != stock]
        in_stock = self.in_stock.copy()
        in_stock[changed] = stock
        self._count(changed, 1 if stock else -1)
        self._replace(in_stock=in_stock)

    def _count(self, items: np.ndarray, sign: int) -> None:
        nodes, counts = self.paths(items)
        num_items = np.array(self.num_items)
        num_items[nodes] += sign * counts.astype(np.int32)
        self._replace(num_items=num_items)

    def _replace(self, **arrays: np.ndarray) -> None:
        vars(self).update(arrays)
        derived = {"leaf": {"_by_leaf", "longest"}, "num_items": {"num_sharing"}}
        stale = set().union(*(derived[name] for name in derived.keys() & arrays.keys()))
        for name in stale:
            vars(self).pop(name, None)
        self._tensors = {key: tensor for key, tensor in self._tensors.items() if key[1] not in arrays.keys() | stale}

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the arrays, which `load` maps into memory. The description comes last: without it there is no trie."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "trie.json"
        about.unlink(missing_ok=True)
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name))
        about.write_text(json.dumps({"end": self.end, "sha256": self.sha256()}))

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = False) -> Trie:
        """A saved trie, mapped into memory; `verify` reads it all and compares its hash.

        Raises DataError where there is no whole trie, or its hash is another one.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "trie.json").read_text())
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
            trie = cls(int(about["end"]), **arrays)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder} holds no whole trie ({error}): save it again") from error
        if verify and trie.sha256() != about["sha256"]:
            raise DataError(f"{folder}: the trie is not the one that was saved (another hash): save it again")
        return trie

    def sha256(self) -> str:
        """Hash of everything that rankings depend on."""
        digest = hashlib.sha256(str(self.end).encode())
        for name in _ARRAYS:
            array = np.ascontiguousarray(getattr(self, name))
            digest.update(f"{name} {array.dtype} {len(array)}".encode())
            digest.update(array.data)
        return digest.hexdigest()


def _check(titles: Ragged, end: int, name: Callable[[int], str]) -> None:
    """Raises DataError naming titles that are empty, of absurd length, or do not end where they should."""
    lengths = titles.lengths
    closed = np.zeros(len(titles), dtype=bool)
    closed[lengths > 0] = titles.values[titles.offsets[1:][lengths > 0] - 1] == end
    ends = np.bincount(titles.row_of[titles.values == end], minlength=len(titles))
    for problem, wrong in (
        ("has no tokens", closed & (lengths == 1) | (lengths == 0)),
        (f"has more than {LONGEST} tokens", lengths > LONGEST),
        ("does not end with the end-of-sequence token, or has it within", ~closed | (ends != 1)),
    ):
        rows = np.flatnonzero(wrong)
        if len(rows):
            names = ", ".join(name(int(row)) for row in rows[:5])
            more = f" and {len(rows) - 5:,} more" if len(rows) > 5 else ""
            raise DataError(f"the title of {names}{more} {problem}: correct the catalogue, or leave the item out")
