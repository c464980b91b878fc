"""Documents as trees: a user's events once, and after each of them what may come next, as a prompt asks for it.

An example for each event repeats the whole history before it. In a tree the history is read once: from it, behind each
event, hang branches with the end of the prompt and a title. What a branch reads is the example, token by token.

A tree's tokens stand in preorder, the history first, then the branches of the last event, of the one before, and so on:

    Domain: books History: - Dune - Emma [Next: Ubik] [Next: Emma] [Next: Hyperion]
                                          after Emma   after Dune   after Dune

Suffixes: T trees, E events of all trees, B branches of all events.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from cprec.data.ragged import Ragged, offsets_of, places
from cprec.schema import MIXED
from cprec.text.encoding import PromptEncoder
from cprec.text.shards import Branches, Choices, Shards


@dataclass(frozen=True)
class Drawn:
    """What next items were drawn from. Q draws, each from M items."""

    row: np.ndarray
    """Of each next item the row of its draw, -1 where it was not drawn: int64."""
    among: np.ndarray
    """The items that might have been drawn, itself among them: catalogue rows, int64[Q, M]."""
    chance: np.ndarray
    """float32[Q, M]"""


def grow(
    encoder: PromptEncoder,
    kind: str,
    domain: int,
    history: Ragged,
    next_items: Ragged,
    most_tokens: int,
    most_events: int,
    drawn: Drawn | None = None,
    *,
    learns_history: bool = True,
) -> Shards:
    """The trees of users' events, in memory; a tree has at most `most_events` events, as prompts do, and at most
    `most_tokens` tokens, or a single event with branches.

    `history` has each user's events, catalogue rows, oldest first; `next_items` what may follow each of these events,
    one row for each value of `history`, empty for none. Where a user's events are too many they are divided, and all
    trees but the first begin with events of the one before, up to half of `most_events`.

    The loss covers the titles of the branches and, if it `learns_history`, the history without what is repeated. Of a
    title that was drawn it asks each token with the chance that it goes on from those before it: the chance of all
    items that might have been drawn and go on so, among all whose titles begin as this one.
    """
    title_tokens = encoder.titles(next_items.values, end=True).lengths
    ending = _ending(encoder, kind, domain)
    # A branch is the last token of the ending and a title; what stands before it in the ending is shared.
    of_branches = np.add.reduceat(np.r_[title_tokens + 1, 0], next_items.offsets[:-1]) * (next_items.lengths > 0)
    branch_tokens_E = of_branches + (len(ending) - 1) * (next_items.lengths > 0)
    line_tokens_E = encoder.event_tokens(kind, history.values)
    head_tokens = int(encoder.frame_tokens(kind, np.array([domain]))[0]) - len(ending)
    start_T, first_T, stop_T = _cut(history, line_tokens_E, branch_tokens_E, most_tokens - head_tokens, most_events)
    event = places(start_T, stop_T - start_T)
    of_trees = Ragged(history.values[event], offsets_of(stop_T - start_T))
    repeated_E = event < np.repeat(first_T, of_trees.lengths)
    number = Ragged(np.arange(len(next_items.values)), next_items.offsets).take(event)
    number = number.kept(~np.repeat(repeated_E, number.lengths))
    branches = Ragged(next_items.values[number.values], number.offsets)
    if drawn is not None:
        drawn = replace(drawn, row=drawn.row[number.values])
    return _grown(encoder, kind, domain, of_trees, branches, repeated_E, drawn, learns_history)


def _ending(encoder: PromptEncoder, kind: str, domain: int) -> np.ndarray:
    """How a prompt for an item of the domain ends, behind the last event."""
    empty = encoder.prompts(kind, np.array([domain]), Ragged.of([[]])).values
    heads = encoder.heads().lengths  # of each domain, then of mixed documents
    return empty[heads[-1 if kind == MIXED else domain] :]


def _cut(
    history: Ragged, line_tokens_E: np.ndarray, branch_tokens_E: np.ndarray, room: int, most_events: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each tree's history starts, where its branches start, and where both stop: places in the events.

    Stretches of events are halved until their trees have room.
    """
    lines, branches = offsets_of(line_tokens_E), offsets_of(branch_tokens_E)
    first, stop = history.offsets[:-1][history.lengths > 0], history.offsets[1:][history.lengths > 0]
    begin = first
    while True:
        start = np.maximum(begin, first - most_events // 2)
        long = (lines[stop] - lines[start] + branches[stop] - branches[first] > room) | (stop - start > most_events)
        long &= stop - first > 1
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
    encoder: PromptEncoder,
    kind: str,
    domain: int,
    history: Ragged,
    next_items: Ragged,
    repeated_E: np.ndarray,
    drawn: Drawn | None,
    learns_history: bool,
) -> Shards:
    """See `grow`; `history` and `next_items` are those of each tree."""
    # The runs of each tree's history: its head, then its events.
    ending = _ending(encoder, kind, domain)
    prompts = encoder.prompts(kind, np.full(len(history), domain), history)
    trunk = prompts.kept(prompts.place_of < np.repeat(prompts.lengths - len(ending), prompts.lengths))
    lines = encoder.event_tokens(kind, history.values)
    heads = trunk.lengths - np.add.reduceat(np.r_[lines, 0], history.offsets[:-1])
    runs = Ragged(trunk.values, offsets_of(np.insert(lines, history.offsets[:-1], heads)))

    # Behind them the pieces of each event, last event first: what its branches share, and for each branch the last
    # token of the ending and a title.
    backwards = np.repeat(history.offsets[:-1] + history.offsets[1:] - 1, history.lengths)
    backwards -= np.arange(len(backwards))
    number = Ragged(np.arange(len(next_items.values)), next_items.offsets).take(backwards)
    titles = encoder.titles(next_items.values[number.values], end=True)
    has_any = number.lengths > 0
    first_piece = offsets_of(np.where(has_any, 1 + 2 * number.lengths, 0))  # of each event
    last_token = np.repeat(first_piece[:-1], number.lengths) + 1 + 2 * number.place_of  # of each branch
    title = last_token + 1
    which = np.zeros(first_piece[-1], dtype=np.int64)
    which[last_token], which[title] = 1, 2 + np.arange(len(titles))
    pieces = Ragged.concatenate([Ragged.of([ending[:-1], ending[-1:]]), titles]).take(which)

    # Where the readers of each end, counted over the tokens of all pieces: of what is shared with its event, of a
    # branch with itself, of an event of the history with its own branches, since those of earlier ones stand behind.
    event_end, tree_start = pieces.offsets[first_piece[1:]], pieces.offsets[first_piece[history.offsets]]
    end = np.empty(len(pieces), dtype=np.int64)
    end[first_piece[:-1][has_any]] = event_end[has_any]
    end[last_token] = end[title] = pieces.offsets[title + 1]
    end_of_run = np.insert(event_end[backwards], history.offsets[:-1], tree_start[1:])

    # Tree by tree, its runs and then its pieces, which are numbered behind all runs.
    num_runs, num_pieces = 1 + history.lengths, np.diff(first_piece[history.offsets])
    starts = np.stack([offsets_of(num_runs)[:-1], len(runs) + first_piece[history.offsets[:-1]]], 1).ravel()
    order = places(starts, np.stack([num_runs, num_pieces], 1).ravel())
    parts = Ragged.concatenate([runs, pieces]).take(order)
    offsets = parts.offsets[offsets_of(num_runs + num_pieces)]
    # From the tokens of all pieces to those of a tree, which has its history before them.
    until = np.concatenate([end_of_run, end])[order] + np.repeat(trunk.lengths - tree_start[:-1], num_runs + num_pieces)
    of_runs = np.insert(~repeated_E, history.offsets[:-1], True) & learns_history
    learnt = np.concatenate([of_runs, which > 1])[order]
    is_target = learnt.repeat(parts.lengths)
    is_target[offsets[:-1]] = False  # nothing stands before the first token
    choices = None
    if drawn is not None:
        place_of_part = np.empty(len(order), dtype=np.int64)
        place_of_part[order] = parts.offsets[:-1]
        begin = place_of_part[len(runs) + title]
        choices = _choices(encoder, next_items.values[number.values], begin, drawn.row[number.values], drawn)
    index = {
        "offset": offsets[:-1],
        "length": np.diff(offsets),
        "num_events": history.lengths,
        "target_start": np.ones(len(history), dtype=np.int64),
    }
    branches = Branches(until.astype(np.int32).repeat(parts.lengths), is_target, choices)
    return Shards(parts.values, pa.table(index), {}, branches)


AT_ONCE = 1 << 12
"""Branches whose choices are found at once."""


def _choices(
    encoder: PromptEncoder, items_B: np.ndarray, begin_B: np.ndarray, row_B: np.ndarray, drawn: Drawn
) -> Choices:
    """What might stand in the place of the tokens of titles that were drawn; `begin` is where these titles begin, `row`
    the row of their draws.

    L tokens of the longest title, M items that might have been drawn.
    """
    found = [Choices(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32), np.empty(0, dtype=np.float32))]
    of_catalogue = encoder.titles(np.arange(len(encoder.catalogue)), end=True)
    table_IL = np.full((len(of_catalogue), of_catalogue.lengths.max(initial=1)), -1, dtype=np.int32)
    table_IL[of_catalogue.row_of, of_catalogue.place_of] = of_catalogue.values
    branches = np.flatnonzero(row_B >= 0)
    for start in range(0, len(branches), AT_ONCE):
        some = branches[start : start + AT_ONCE]
        among_BM, chance_BM = drawn.among[row_B[some]], drawn.chance[row_B[some]]
        same_BML = table_IL[among_BM] == table_IL[items_B[some], None]
        # Whether an item's title begins with the tokens before each of the branch's.
        begins_BLM = np.ones((len(some), table_IL.shape[1], among_BM.shape[1]), dtype=bool)
        begins_BLM[:, 1:] = np.logical_and.accumulate(same_BML, 2).transpose(0, 2, 1)[:, :-1]
        # Where all of them go on alike there is no choice; behind a title's end there is nothing.
        varied_BL = (begins_BLM & ~same_BML.transpose(0, 2, 1)).any(2) & (table_IL[items_B[some]] >= 0)
        branch, place, item = (begins_BLM & varied_BL[:, :, None]).nonzero()
        total_BL = (begins_BLM * chance_BM[:, None]).sum(2)
        of, token = begin_B[some][branch] + place, table_IL[among_BM[branch, item], place].astype(np.int64)
        # Items that go on with the same token count together.
        both, which = np.unique(of * encoder.vocabulary_size + token, return_inverse=True)
        chance = np.bincount(which, chance_BM[branch, item] / total_BL[branch, place], len(both))
        of, token = np.divmod(both, encoder.vocabulary_size)
        found.append(Choices(of, token.astype(np.int32), chance.astype(np.float32)))
    order = np.argsort(np.concatenate([each.of for each in found]), kind="stable")
    joined = (np.concatenate([getattr(each, name) for each in found])[order] for name in ("of", "token", "chance"))
    return Choices(*joined)
