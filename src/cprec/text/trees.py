"""Documents as trees: a user's events once, and after each of them what may come next, as a prompt asks for it.

An example for each event repeats the whole history before it. In a tree the history is read once: from it, behind each
event, hang branches with the end of the prompt and a title. What a branch reads is the example, token by token.

A tree's tokens stand in preorder, the history first, then the branches of the last event, of the one before, and so on:

    Domain: books History: - Dune - Emma [Next: Ubik] [Next: Emma] [Next: Hyperion]
                                          after Emma   after Dune   after Dune

Suffixes: T trees, E events of all trees, B branches of all events.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from cprec.data.ragged import Ragged, gather, offsets_of
from cprec.schema import MIXED
from cprec.text.encoding import PromptEncoder
from cprec.text.shards import Branches, Shards

CONTEXT = 5
"""Events before its first branch that a tree repeats, where a user's events are too many for one tree."""


def grow(
    encoder: PromptEncoder, kind: str, domain: int, history: Ragged, next_items: Ragged, most_tokens: int
) -> Shards:
    """The trees of users' events, in memory; a tree has at most `most_tokens` tokens, or a single event with branches.

    `history` has each user's events, catalogue rows, oldest first; `next_items` what may follow each of these events,
    one row for each value of `history`, empty for none. Where a user's events are too many they are divided, and all
    trees but the first begin with up to `CONTEXT` events of the one before.

    The loss covers the history, without what is repeated, and the titles of the branches.
    """
    title_tokens = encoder.titles(next_items.values, end=True).lengths
    ending = _ending(encoder, kind, domain)
    # A branch is the last token of the ending and a title; what stands before it in the ending is shared.
    of_branches = np.add.reduceat(np.r_[title_tokens + 1, 0], next_items.offsets[:-1]) * (next_items.lengths > 0)
    branch_tokens_E = of_branches + (len(ending) - 1) * (next_items.lengths > 0)
    line_tokens_E = encoder.event_tokens(kind, history.values)
    head_tokens = int(encoder.frame_tokens(kind, np.array([domain]))[0]) - len(ending)
    start_T, first_T, stop_T = _cut(history, line_tokens_E, branch_tokens_E, most_tokens - head_tokens)
    event = gather(np.arange(len(history.values)), start_T, stop_T - start_T).values
    of_trees = Ragged(history.values[event], offsets_of(stop_T - start_T))
    repeated_E = event < np.repeat(first_T, of_trees.lengths)
    branches = next_items.take(event)
    branches = branches.kept(~np.repeat(repeated_E, branches.lengths))
    return _grown(encoder, kind, domain, of_trees, branches, repeated_E)


def _ending(encoder: PromptEncoder, kind: str, domain: int) -> np.ndarray:
    """How a prompt for an item of the domain ends, behind the last event."""
    empty = encoder.prompts(kind, np.array([domain]), Ragged.of([[]])).values
    heads = encoder.heads().lengths  # of each domain, then of mixed documents
    return empty[heads[-1 if kind == MIXED else domain] :]


def _cut(
    history: Ragged, line_tokens_E: np.ndarray, branch_tokens_E: np.ndarray, room: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each tree's history starts, where its branches start, and where both stop: places in the events.

    Stretches of events are halved until their trees have room.
    """
    lines, branches = offsets_of(line_tokens_E), offsets_of(branch_tokens_E)
    first, stop = history.offsets[:-1][history.lengths > 0], history.offsets[1:][history.lengths > 0]
    begin = first
    while True:
        start = np.maximum(begin, first - CONTEXT)
        long = (lines[stop] - lines[start] + branches[stop] - branches[first] > room) & (stop - first > 1)
        if not long.any():
            break
        # Each long stretch becomes two; the second one, at `second`, gets the events that the first leaves.
        copies = np.where(long, 2, 1)
        middle, second = ((first + stop + 1) // 2)[long], np.cumsum(copies)[long] - 1
        begin, first, stop = begin.repeat(copies), first.repeat(copies), stop.repeat(copies)
        stop[second - 1], first[second] = middle, middle
    # A single event that is still too long for what it repeats repeats less.
    while (long := (lines[stop] - lines[start] + branches[stop] - branches[first] > room) & (start < first)).any():
        start = start + long
    return start, first, stop


def _grown(
    encoder: PromptEncoder, kind: str, domain: int, history: Ragged, next_items: Ragged, repeated_E: np.ndarray
) -> Shards:
    num_trees, ending = len(history), _ending(encoder, kind, domain)
    prompts = encoder.prompts(kind, np.full(num_trees, domain), history)
    trunk = prompts.kept(prompts.place_of < np.repeat(prompts.lengths - len(ending), prompts.lengths))

    # The pieces behind each event, last event first: what the branches share, and for each the last token and a title.
    backwards = np.repeat(history.offsets[:-1] + history.offsets[1:] - 1, history.lengths)
    backwards -= np.arange(len(backwards))
    asked = next_items.take(backwards)
    titles = encoder.titles(asked.values, end=True)
    shared, last = 0, 1
    pieces_of_event = np.where(asked.lengths > 0, 1 + 2 * asked.lengths, 0)
    piece_start = offsets_of(pieces_of_event)
    piece = np.full(piece_start[-1], shared)
    at = np.repeat(piece_start[:-1], asked.lengths) + 1 + 2 * asked.place_of
    piece[at], piece[at + 1] = last, 2 + np.arange(len(titles))
    tokens = Ragged.concatenate([Ragged.of([ending[:-1], ending[-1:]]), titles]).take(piece)
    # Where each piece's readers end, counted over all pieces: what is shared at the end of its event, the rest at the
    # end of their branch.
    end = np.empty(len(piece), dtype=np.int64)
    end[piece_start[:-1][asked.lengths > 0]] = tokens.offsets[piece_start[1:]][asked.lengths > 0]
    end[at] = end[at + 1] = tokens.offsets[at + 2]
    event_start = tokens.offsets[piece_start]  # of each event, last event first
    tree_start = event_start[history.offsets]

    # A trunk's token is read by all later ones of the trunk and by the branches of its own event and the later ones.
    trunk_tokens = trunk.lengths
    length = trunk_tokens + np.diff(tree_start)
    behind = event_start[1:][backwards] - np.repeat(tree_start[:-1], history.lengths)
    lines = encoder.event_tokens(kind, history.values)
    heads = trunk_tokens - np.add.reduceat(np.r_[lines, 0], history.offsets[:-1])
    # Runs of the trunk: the head of a tree, then its events.
    run_tokens = np.insert(lines, history.offsets[:-1], heads)
    run_until = np.insert(behind, history.offsets[:-1], np.diff(tree_start))
    run_target = np.insert(~repeated_E, history.offsets[:-1], True)
    trunk_until = run_until.repeat(run_tokens) + trunk_tokens.repeat(trunk_tokens)
    branch_until = end.repeat(tokens.lengths) + np.repeat(trunk_tokens - tree_start[:-1], np.diff(tree_start))

    def joined(of_trunk: np.ndarray, of_branches: np.ndarray) -> np.ndarray:
        """Values along the tokens of trunks and of branches, tree by tree."""
        both = np.concatenate([of_trunk, of_branches])
        starts = np.stack([trunk.offsets[:-1], len(of_trunk) + tree_start[:-1]], 1).ravel()
        lengths = np.stack([trunk_tokens, np.diff(tree_start)], 1).ravel()
        return both[np.repeat(starts - offsets_of(lengths)[:-1], lengths) + np.arange(len(both))]

    is_target = joined(run_target.repeat(run_tokens), (piece > last).repeat(tokens.lengths))
    offsets = offsets_of(length)
    is_target[offsets[:-1]] = False  # nothing stands before the first token
    index = {
        "offset": offsets[:-1],
        "length": length,
        "num_events": history.lengths,
        "target_start": np.ones(num_trees, dtype=np.int64),
    }
    until = joined(trunk_until, branch_until).astype(np.int32)
    return Shards(joined(trunk.values, tokens.values), pa.table(index), {}, Branches(until, is_target))
