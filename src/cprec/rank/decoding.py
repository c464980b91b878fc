"""Beam search over the trie of a catalogue's titles: every result is an item, no item comes twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cprec.rank.attention import PromptTree
from cprec.rank.trie import Trie


@dataclass(frozen=True)
class Found:
    """The items found for one user, best first: positions in the trie's titles, with log-probabilities."""

    items: np.ndarray
    scores: np.ndarray


def beam_search(
    tree: PromptTree, trie: Trie, *, k: int, width: int, excluded: Sequence[np.ndarray] | None = None
) -> list[Found]:
    """The `k` best items for each prompt of `tree`, by the log-probability of title and end of sequence.

    At each depth the `width` best prefixes go on; every title that ends is kept, so completed titles take no beam. A
    user's search ends when no prefix is as good as the k-th item, for a title's log-probability only falls. Items with
    equal titles tie, and all of those tied with the k-th are returned. `excluded` holds item positions per user;
    prefixes of nothing else are never entered. Width of at least the number of prefixes at any depth makes the search
    exact.
    """
    device = tree.prompt_hidden_UD.device
    num_users = len(tree.prompt_hidden_UD)
    dead = _dead_keys(trie, excluded, num_users)
    first_child, token, num_items = trie.first_child, trie.token, trie.items.lengths
    found = [Found(np.empty(0, dtype=np.int64), np.empty(0)) for _ in range(num_users)]
    threshold = np.full(num_users, -np.inf)  # the k-th best complete score so far

    nodes = np.zeros((num_users, 1), dtype=np.int64)
    scores = np.zeros((num_users, 1))
    hidden = tree.prompt_hidden_UD[:, None]
    ancestors = torch.zeros(num_users, 1, 0, dtype=torch.bool, device=device)
    depth = 0
    while True:
        # every child of every live prefix, with its score
        counts = np.where(np.isfinite(scores), first_child[nodes + 1] - first_child[nodes], 0).ravel()
        beam = np.repeat(np.arange(counts.size), counts)
        child = first_child[nodes.ravel()][beam] + np.arange(len(beam)) - np.repeat(np.cumsum(counts) - counts, counts)
        user = beam // nodes.shape[1]
        if dead is not None:
            alive = ~np.isin(user * trie.num_nodes + child, dead)
            beam, child, user = beam[alive], child[alive], user[alive]
        step = _gather(tree, hidden, beam, token[child])
        score = scores.ravel()[beam] + step

        ends = num_items[child] > 0
        for number in np.unique(user[ends]):
            mine = ends & (user == number)
            ended = trie.items.take(child[mine])
            new = Found(ended.values, np.repeat(score[mine], ended.lengths))
            found[number] = _best(found[number], new, k, excluded[number] if excluded is not None else ())
            if len(found[number].items) >= k:
                threshold[number] = found[number].scores[k - 1]
        going = ~ends & (score >= threshold[user])
        beam, child, user, score = beam[going], child[going], user[going], score[going]
        if not len(child):
            return found

        # the best `width` of each user, in a grid; empty places have score -inf
        order = np.lexsort((child, -score, user))
        place = np.arange(len(order)) - np.searchsorted(user[order], user[order])
        order, place = order[place < width], place[place < width]
        size = int(place.max()) + 1
        shape = (num_users, size)
        parent = np.zeros(shape, dtype=np.int64)
        nodes, scores = np.zeros(shape, dtype=np.int64), np.full(shape, -np.inf)
        row = user[order]
        nodes[row, place], scores[row, place] = child[order], score[order]
        parent[row, place] = beam[order] % ancestors.shape[1]

        inherited = ancestors.gather(
            1, torch.from_numpy(parent).to(device)[..., None].expand(-1, -1, ancestors.shape[2])
        )
        itself = torch.eye(size, dtype=torch.bool, device=device).expand(num_users, -1, -1)
        ancestors = torch.cat([inherited, itself], dim=2)
        tokens = torch.from_numpy(np.maximum(token[nodes], 0)).to(device)
        hidden = tree.extend(tokens, torch.full(shape, depth, device=device), ancestors)
        # nodes of the next block are numbered after all nodes so far
        depth += 1


def _gather(tree: PromptTree, hidden_UND: torch.Tensor, beam: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Log-probabilities of (prefix, next token) pairs, float64; prefixes numbered over users and beams."""
    out = np.empty(len(beam))
    flat = hidden_UND.flatten(0, 1)
    rows, inverse = np.unique(beam, return_inverse=True)
    size = max(1, (1 << 25) // tree.vocabulary_size)
    for start in range(0, len(rows), size):
        chosen = rows[start : start + size]
        logp = tree.log_probabilities(flat[torch.from_numpy(chosen).to(flat.device)])
        mine = np.flatnonzero((inverse >= start) & (inverse < start + size))
        index = torch.from_numpy(inverse[mine] - start).to(flat.device), torch.from_numpy(token[mine]).to(flat.device)
        out[mine] = logp[index].double().cpu().numpy()
    return out


def _dead_keys(trie: Trie, excluded: Sequence[np.ndarray] | None, num_users: int) -> np.ndarray | None:
    """user * num_nodes + node of every prefix that leads to excluded items only."""
    if excluded is None:
        return None
    assert len(excluded) == num_users
    keys = [user * trie.num_nodes + trie.dead_nodes(items) for user, items in enumerate(excluded) if len(items)]
    return np.concatenate(keys) if keys else None


def _best(found: Found, new: Found, k: int, excluded: np.ndarray | tuple[()]) -> Found:
    """The `k` best items of both, and those tied with the k-th; items of equal score by position."""
    left = ~np.isin(new.items, excluded)  # an excluded item may share its title with others
    items = np.concatenate([found.items, new.items[left]])
    scores = np.concatenate([found.scores, new.scores[left]])
    order = np.lexsort((items, -scores))
    order = order[: np.searchsorted(-scores[order], -scores[order[k - 1]], side="right")] if len(order) > k else order
    return Found(items[order], scores[order])
