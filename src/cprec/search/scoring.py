"""Exact log-likelihood of given sequences: each prefix that they share is read once, and many in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from cprec.data.ragged import Ragged, offsets_of
from cprec.search.reading import Tree
from cprec.search.trie import build_block, levels_of

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
    """Log-probabilities of some users' candidates (users ascending) by one pass over the trie of each user's."""
    device = tree.prompt_hidden_UD.device
    # A block of prefixes for each user, and all blocks one after the other: a node of a user is block start + node.
    present, first = np.unique(users, return_index=True)
    blocks, leaves, chosen = [], [], np.split(rows, first[1:])
    for user, mine in zip(present, chosen, strict=True):
        block, leaf = build_block(candidates[user].take(mine))
        blocks.append(block)
        leaves.append(leaf)
    root = offsets_of(np.array([len(block.token) for block in blocks]))
    token = np.concatenate([block.token for block in blocks])
    children = np.concatenate([np.diff(block.first_child) for block in blocks])
    parent = np.concatenate(
        [np.append(start, start + np.repeat(np.arange(len(b.token)), np.diff(b.first_child)))
         for start, b in zip(root, blocks, strict=False)]
    )  # fmt: skip
    user = np.repeat(present, np.diff(root))
    is_root = np.zeros(len(token), dtype=bool)
    is_root[root[:-1]] = True
    # The model reads inner nodes only: nothing follows a leaf, and the root is the prompt.
    read = (children > 0) & ~is_root
    place = np.cumsum(read) - 1
    place[is_root] = -1
    tree.forget()
    hidden = tree.prompt_hidden_UD[torch.from_numpy(present).to(device)]
    if read.any():
        new = tree.extend(
            *(torch.from_numpy(a[read]).to(device) for a in (token.astype(np.int64), user, place[parent]))
        )
        hidden = torch.cat([hidden, new])
    # The log-probability of each node's token after its parent; children follow each other as their parents do.
    inner = np.flatnonzero(children)
    state = np.where(is_root, np.cumsum(is_root) - 1, len(present) + place)[inner]
    child = np.flatnonzero(~is_root)
    row = np.repeat(np.arange(len(inner)), children[inner])
    states = hidden[torch.from_numpy(state).to(device)]
    at = (torch.from_numpy(each).to(device) for each in (row, token[child].astype(np.int64)))
    step = tree.log_probs(states, *at).cpu().numpy()
    tree.forget()
    # Summed along each path, depth by depth.
    total = np.zeros(len(token))
    total[child] = step
    for number, (start, block, leaf) in enumerate(zip(root[:-1], blocks, leaves, strict=True)):
        below = total[start : start + len(block.token)]
        above = parent[start : start + len(block.token)] - start
        for low, high in levels_of(block.first_child)[1:]:
            below[low:high] += below[above[low:high]]
        yield int(present[number]), chosen[number], below[leaf]
