"""How items get the numbers that a model writes (Hua et al. 2023, "How to Index Item IDs for Recommendation Foundation
Models"), as codes of any length.

Everything is learnt from training sequences. What these do not decide (items without events, the order within a leaf)
a seeded draw decides, and never the order of the catalogue: ids of public files are often handed out along whole
histories, so that their order knows held-out events (see `given_numbers`).

Suffixes: V items, N items of a group, K clusters, L digits.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from scipy import linalg, sparse
from scipy.sparse.linalg import LinearOperator, eigsh

from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import Unsuitable
from cprec.progress import say
from cprec.systems.codes import END, FIRST_CODE, ItemCodes
from cprec.systems.graph import ItemGraph
from cprec.systems.signals import TrainingSequences

Kind = Literal["sequential", "random", "collaborative", "semantic"]

DEEPEST = 6
"""Clusters within clusters; what is still too large then is cut at random."""
DENSE = 500
"""Items of a group at most whose eigenvectors are found from a full matrix."""


def numbers_of(
    data: TrainingSequences,
    kind: Kind,
    seed: int,
    *,
    num_codes: int,
    num_clusters: int,
    leaf_size: int,
    num_neighbours: int,
    runs: bool,
) -> Ragged:
    """The numbers of a domain's items, as codes from 0.

    Sequential and random numbers are written in base `num_codes`; the next three arguments are of collaborative ones.
    Without `runs`, items of one cluster or category have equal codes. Raises Unsuitable where semantic ones find no
    categories.
    """
    generator = np.random.default_rng(seed)
    if kind in ("sequential", "random"):
        along = data.sequences if kind == "sequential" else Ragged.of([])
        return digits(numbers_along(along, data.num_items, generator), num_codes)
    if kind == "semantic":
        paths = category_paths(data.categories)
    else:
        graph = ItemGraph(data.sequences, data.num_items, num_neighbours)
        paths, num_leaves = collaborative_paths(graph, num_clusters, leaf_size, generator)
        say(f"{data.domain}: {num_leaves:,} clusters of at most {leaf_size:,} items, {paths.lengths.max()} levels deep")
    return with_running_numbers(paths, generator) if runs else paths


def item_codes(codes: Ragged) -> ItemCodes:
    """Item codes of rows of codes from 0, which are numbered through: a code is the same token at every place.

    >>> found = item_codes(Ragged.of([[0, 4], [2]]))
    >>> [found.sequences[item].tolist() for item in range(2)], found.vocabulary_size
    ([[3, 7, 1], [5, 1]], 8)
    """
    size = int(codes.values.max(initial=-1)) + 1
    tokens = with_last(Ragged(codes.values + FIRST_CODE, codes.offsets), np.full(len(codes), END))
    return ItemCodes(tokens, FIRST_CODE + size, 0)


def with_own_tokens(codes: ItemCodes) -> ItemCodes:
    """With a token of its own at the end of each item. No further items can get such a token, which a model would know.

    >>> found = with_own_tokens(item_codes(Ragged.of([[0], [0]])))
    >>> [found.sequences[item].tolist() for item in range(2)], found.vocabulary_size
    ([[3, 4, 1], [3, 5, 1]], 6)
    """
    num_items, is_end = len(codes.sequences), codes.sequences.values == END
    others = with_last(codes.sequences.kept(~is_end), codes.vocabulary_size + np.arange(num_items))
    sequences = with_last(others, np.full(num_items, END))
    return ItemCodes(sequences, codes.vocabulary_size + num_items, 0, code_NL=codes.code_NL, num_codes=codes.num_codes)


def with_last(rows: Ragged, value_V: np.ndarray) -> Ragged:
    """Rows with one more value each.

    >>> longer = with_last(Ragged.of([[1, 2], []]), np.array([8, 9]))
    >>> [longer[row].tolist() for row in range(2)]
    [[1, 2, 8], [9]]
    """
    return Ragged(np.insert(rows.values, rows.offsets[1:], value_V), rows.offsets + np.arange(len(rows) + 1))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def numbers_along(sequences: Ragged, num_items: int, generator: np.random.Generator) -> np.ndarray:
    """Numbers of items from 0, in the order in which they first occur, one sequence after the other; then those that do
    not occur, in random order: int64[V].

    >>> numbers_along(Ragged.of([[2, 0], [2, 3]]), 4, np.random.default_rng(0)).tolist()
    [1, 3, 0, 2]
    """
    found, first = np.unique(sequences.values, return_index=True)
    others = np.setdiff1d(np.arange(num_items), found)
    number_V = np.empty(num_items, dtype=np.int64)
    number_V[np.concatenate([found[np.argsort(first)], generator.permutation(others)])] = np.arange(num_items)
    return number_V


def digits(number_V: np.ndarray, base: int) -> Ragged:
    """Numbers written with digits below `base`, the highest first, as few as they need.

    >>> written = digits(np.array([0, 7, 30]), base=10)
    >>> [written[row].tolist() for row in range(3)]
    [[0], [7], [3, 0]]
    """
    num_digits = next(n for n in range(1, 65) if base**n > number_V.max(initial=0))
    power_L = base ** np.arange(num_digits - 1, -1, -1)
    digit_VL = number_V[:, None] // power_L % base
    is_written = (number_V[:, None] >= power_L) | (power_L == 1)
    return Ragged(digit_VL[is_written], offsets_of(is_written.sum(1)))


# ---- paths in a tree of items ----------------------------------------------------------------------------------------


def with_running_numbers(paths: Ragged, generator: np.random.Generator) -> Ragged:
    """Paths, behind each of which stands the item's number among those of one path, in random order. All paths have the
    same numbers, whose codes come after those of the paths."""
    leaf_V, order = paths.numbers(), generator.permutation(len(paths))
    order = order[np.argsort(leaf_V[order], kind="stable")]
    sizes = np.bincount(leaf_V)
    place_V = np.empty(len(paths), dtype=np.int64)
    place_V[order] = np.arange(len(paths)) - np.repeat(offsets_of(sizes)[:-1], sizes)
    return with_last(paths, int(paths.values.max(initial=-1)) + 1 + place_V)


def category_paths(categories: Sequence[str]) -> Ragged:
    """The path of each item in the tree of categories, as codes: one for each node, and none for a node that all items
    share. An item without a category has an empty path.

    A category is a path written as one text, from general to special. A node is a beginning that is a category itself,
    or after which categories go on with different words (a radix tree of words). Raises Unsuitable where there is no
    node that tells items apart.

    >>> paths = category_paths(["Home Tea Pots", "Home Tea Mugs", "Home Garden", ""])
    >>> [paths[item].tolist() for item in range(4)]  # 0 Home, 1 Home Garden, 2 Home Tea, 3 and 4 Mugs and Pots
    [[0, 2, 4], [0, 2, 3], [0, 1], []]
    """
    words = [text.split() for text in categories]
    beginnings = [[tuple(row[:size]) for size in range(1, len(row) + 1)] for row in words]
    following: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for row in beginnings:
        for beginning in row:
            following[beginning[:-1]].add(beginning[-1])
    nodes = {row[-1] for row in beginnings if row}
    nodes |= {beginning for beginning, after in following.items() if beginning and len(after) > 1}
    on_path = [[beginning for beginning in row if beginning in nodes] for row in beginnings]
    nodes -= set(on_path[0]).intersection(*on_path)
    if not nodes:
        raise Unsuitable(
            f"indexing='semantic' needs categories that tell items apart, and the {len(categories):,} items here have "
            "none: give the column categories, or take another indexing"
        )
    code_of = {node: code for code, node in enumerate(sorted(nodes))}
    return Ragged.of([[code_of[node] for node in row if node in code_of] for row in on_path])


def collaborative_paths(
    graph: ItemGraph, num_clusters: int, leaf_size: int, generator: np.random.Generator
) -> tuple[Ragged, int]:
    """The path of each item in a tree of clusters, as codes, one for each cluster; and the number of leaves.

    The graph's items are cut into clusters, and each cluster of more than `leaf_size` items again, within itself. A
    group whose links part nothing is cut at random.
    """
    num_items = graph.num_items
    near_VK = graph.neighbours(torch.arange(num_items)).numpy()
    item, place = np.nonzero(near_VK < num_items)
    links_VV = sparse.csr_array((np.ones(len(item)), (item, near_VK[item, place])), (num_items, num_items))
    links_VV = sparse.csr_array(links_VV.maximum(links_VV.T))
    paths: list[list[int]] = [[] for _ in range(num_items)]
    waiting, num_nodes, num_leaves = deque([(np.arange(num_items), 0)]), 0, 0
    while waiting:
        group_N, depth = waiting.popleft()
        if len(group_N) <= leaf_size:
            num_leaves += 1
            continue
        cluster_N = spectral_clusters(links_VV[group_N][:, group_N], min(num_clusters, len(group_N)))
        if depth == DEEPEST or (cluster_N == cluster_N[0]).all():
            cluster_N = generator.permutation(len(group_N)) // leaf_size
        for cluster in np.unique(cluster_N):
            members = group_N[cluster_N == cluster]
            for member in members.tolist():
                paths[member].append(num_nodes)
            num_nodes += 1
            waiting.append((members, depth + 1))
    return Ragged.of(paths), num_leaves


def spectral_clusters(links_NN: sparse.csr_array, num_clusters: int) -> np.ndarray:
    """Clusters of the items of a symmetric graph: int64[N], below `num_clusters`, some of which may be empty.

    The vectors of an item are its entries in the eigenvectors of the largest eigenvalues of

        (D + t)^-1/2 (A + t / N) (D + t)^-1/2,   t the mean degree,

    over the root of its degree + t (regularised spectral clustering, Amini et al. 2013; without t small components
    come off one by one). A pivoted QR decomposition picks the clusters' items, and each item has the cluster that its
    vector has the most of (Damle, Minden and Ying 2018), so that nothing is random.
    """
    num_items, degree_N = links_NN.shape[0], links_NN.sum(axis=1)
    mean = degree_N.mean()
    if not mean:
        return np.zeros(num_items, dtype=np.int64)
    scale_N = 1 / np.sqrt(degree_N + mean)

    def product(vector_N: np.ndarray) -> np.ndarray:
        scaled_N = scale_N * vector_N.ravel()
        found: np.ndarray = scale_N * (links_NN @ scaled_N + mean / num_items * scaled_N.sum())
        return found

    if num_items <= max(DENSE, 2 * num_clusters):
        matrix_NN = scale_N[:, None] * (links_NN.toarray() + mean / num_items) * scale_N
        last = [num_items - num_clusters, num_items - 1]
        _, vector_NK = linalg.eigh(matrix_NN, subset_by_index=last)
    else:
        start_N = np.random.default_rng(0).normal(size=num_items)
        operator = LinearOperator((num_items, num_items), matvec=product, dtype=np.float64)
        _, vector_NK = eigsh(operator, k=num_clusters, which="LA", v0=start_N)
    vector_NK = scale_N[:, None] * vector_NK
    _, pivots = linalg.qr(vector_NK.T, mode="r", pivoting=True)
    left, _, right = linalg.svd(vector_NK[pivots[:num_clusters]].T)
    cluster_N: np.ndarray = np.abs(vector_NK @ left @ right).argmax(1)
    return cluster_N
