"""Exact log-likelihood of given sequences: each prefix that they share is read once, and many in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from cprec.data.ragged import offsets_of
from cprec.search.normaliser import Normaliser, OverVocabulary
from cprec.search.reading import Tree
from cprec.search.trie import Block, Trie, levels_of

SEQUENCES = 128
"""Sequences of all users together whose prefixes are read in one pass."""


def score_candidates(
    tree: Tree, trie: Trie, candidates: Sequence[np.ndarray], normaliser: Normaliser | None = None
) -> list[np.ndarray]:
    """Summed log-probability of the tokens of each candidate's sequence, the end included.

    `candidates` holds, for each prompt of `tree`, positions of items in the trie, in stock or not. Returns
    float64[number of candidates] for each prompt. The nodes of `tree` are dropped. `normaliser` is that of `search`.
    """
    normaliser = normaliser or OverVocabulary(trie)
    out = [np.empty(len(items)) for items in candidates]
    users = np.repeat(np.arange(len(candidates)), [len(items) for items in candidates])
    items = np.concatenate([np.empty(0, dtype=np.int64), *candidates])
    rows = np.concatenate([np.empty(0, dtype=np.int64), *(np.arange(len(mine)) for mine in candidates)])
    for start in range(0, len(users), SEQUENCES):
        mine = slice(start, start + SEQUENCES)
        for user, chosen, scores in _score(tree, trie, normaliser, users[mine], items[mine]):
            out[user][rows[mine][chosen]] = scores
    return out


def _score(
    tree: Tree, trie: Trie, normaliser: Normaliser, users: np.ndarray, items: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Log-probabilities of some users' candidates (users ascending) by one pass over the block of each user's: the
    user, where the candidates stand, and their log-probabilities."""
    present, first = np.unique(users, return_index=True)
    chosen = np.split(np.arange(len(users)), first[1:])
    parts = [trie.part(items[mine]) for mine in chosen]
    nodes = np.concatenate([nodes for _, nodes, _ in parts])
    certain = trie.tail[nodes] > 0 if normaliser.only_way_is_certain else np.zeros(len(nodes), dtype=bool)
    scores = _token_log_probs(tree, normaliser, present, [block for block, _, _ in parts], nodes, certain)
    start = 0
    for user, mine, (block, _, leaf) in zip(present, chosen, parts, strict=True):
        below = scores[start : start + len(block.token)]
        start += len(block.token)
        # Summed along each path, depth by depth.
        parent = _parents(block)
        for low, high in levels_of(block.first_child)[1:]:
            below[low:high] += below[parent[low:high]]
        yield int(user), mine, below[leaf]


def _token_log_probs(
    tree: Tree,
    normaliser: Normaliser,
    users: np.ndarray,
    blocks: Sequence[Block],
    nodes: np.ndarray,
    certain: np.ndarray,
) -> np.ndarray:
    """The log-probability of each node's token after its prefix, 0 for roots: float64, for each user's block in turn.

    `nodes` are the trie's, of all blocks in turn, and `certain` says behind which of them everything has probability
    one. The nodes of `tree` are dropped.
    """
    device = tree.prompt_hidden_UD.device
    # All blocks one after the other: a node is its block's root plus its number there.
    root = offsets_of(np.array([len(block.token) for block in blocks]))
    token = np.concatenate([block.token for block in blocks]).astype(np.int64)
    children = np.concatenate([np.diff(block.first_child) for block in blocks])
    parent = np.concatenate([start + _parents(block) for start, block in zip(root, blocks, strict=False)])
    user = np.repeat(users, np.diff(root))
    is_root = np.zeros(len(token), dtype=bool)
    is_root[root[:-1]] = True
    # The model reads inner nodes only: nothing is open behind others, and the root is the prompt.
    opens = (children > 0) & ~certain
    read = opens & ~is_root
    place = np.cumsum(read) - 1
    place[is_root] = -1
    tree.forget()
    hidden = tree.prompt_hidden_UD[torch.from_numpy(users).to(device)]
    if read.any():
        new = tree.extend(*(torch.from_numpy(a[read]).to(device) for a in (token, user, place[parent])))
        hidden = torch.cat([hidden, new])
    # Each child is asked for after its parent's state; children follow each other as their parents do.
    inner = np.flatnonzero(opens)
    state = np.where(is_root, np.cumsum(is_root) - 1, len(users) + place)[inner]
    row = np.repeat(np.arange(len(inner)), children[inner])
    follows = ~is_root & opens[parent]
    at = (torch.from_numpy(each).to(device) for each in (nodes[inner], row, nodes[follows]))
    scores = np.zeros(len(token))
    states = hidden[torch.from_numpy(state).to(device)]
    scores[follows] = normaliser.log_probs(tree, states, *at).cpu().numpy()
    tree.forget()
    return scores


def _parents(block: Block) -> np.ndarray:
    """The node before each node of a block; the root's is itself: int64[num_nodes]."""
    return np.append(0, np.repeat(np.arange(len(block.token)), np.diff(block.first_child)))
