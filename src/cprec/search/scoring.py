"""Exact log-likelihood of given sequences: each prefix that they share is read once, and many in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from cprec.data.ragged import Ragged, offsets_of
from cprec.search.reading import Tree
from cprec.search.trie import Block, build_block, levels_of

SEQUENCES = 128
"""Sequences of all users together whose prefixes are read in one pass."""


def score_candidates(tree: Tree, candidates: Sequence[Ragged]) -> list[np.ndarray]:
    """Summed log-probability of each candidate's tokens, the end included.

    `candidates` holds, for each prompt of `tree`, its candidates' sequences, of one or more tokens each. Returns
    float64[number of candidates] for each prompt. The nodes of `tree` are dropped.
    """
    out = [np.empty(len(sequences)) for sequences in candidates]
    users = np.repeat(np.arange(len(candidates)), [len(sequences) for sequences in candidates])
    rows = np.concatenate([np.arange(len(sequences)) for sequences in candidates]) if len(users) else users
    for start in range(0, len(users), SEQUENCES):
        mine = slice(start, start + SEQUENCES)
        for user, chosen, scores in _score(tree, candidates, users[mine], rows[mine]):
            out[user][chosen] = scores
    return out


def _score(
    tree: Tree, candidates: Sequence[Ragged], users: np.ndarray, rows: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Log-probabilities of some users' candidates (users ascending) by one pass over the block of each user's."""
    present, first = np.unique(users, return_index=True)
    chosen = np.split(rows, first[1:])
    built = [build_block(candidates[user].take(mine)) for user, mine in zip(present, chosen, strict=True)]
    scores = _token_log_probs(tree, present, [block for block, _ in built])
    start = 0
    for user, mine, (block, leaf) in zip(present, chosen, built, strict=True):
        below = scores[start : start + len(block.token)]
        start += len(block.token)
        # Summed along each path, depth by depth.
        parent = _parents(block)
        for low, high in levels_of(block.first_child)[1:]:
            below[low:high] += below[parent[low:high]]
        yield int(user), mine, below[leaf]


def _token_log_probs(tree: Tree, users: np.ndarray, blocks: Sequence[Block]) -> np.ndarray:
    """The log-probability of each node's token after its prefix, 0 for roots: float64, for each user's block in turn.

    The nodes of `tree` are dropped.
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
    # The model reads inner nodes only: nothing follows a leaf, and the root is the prompt.
    read = (children > 0) & ~is_root
    place = np.cumsum(read) - 1
    place[is_root] = -1
    tree.forget()
    hidden = tree.prompt_hidden_UD[torch.from_numpy(users).to(device)]
    if read.any():
        new = tree.extend(*(torch.from_numpy(a[read]).to(device) for a in (token, user, place[parent])))
        hidden = torch.cat([hidden, new])
    # Each child is asked for after its parent's state; children follow each other as their parents do.
    inner = np.flatnonzero(children)
    state = np.where(is_root, np.cumsum(is_root) - 1, len(users) + place)[inner]
    row = np.repeat(np.arange(len(inner)), children[inner])
    at = (torch.from_numpy(each).to(device) for each in (row, token[~is_root]))
    scores = np.zeros(len(token))
    scores[~is_root] = tree.log_probs(hidden[torch.from_numpy(state).to(device)], *at).cpu().numpy()
    tree.forget()
    return scores


def _parents(block: Block) -> np.ndarray:
    """The node before each node of a block; the root's is itself: int64[num_nodes]."""
    return np.append(0, np.repeat(np.arange(len(block.token)), np.diff(block.first_child)))
