"""A deterministic mixture of documents as packed batches: which tokens step s trains on is a pure function of the plan.

The whole order is fixed before the first step, from (documents, phases, seed) alone. So a run resumes at any step
without other state, any number of processes divides the rows of a step, the mixture changes without tokenising again,
and two plans that begin with the same phases read the same documents in them, which lets runs fork.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cprec.batch import IGNORE, Batch
from cprec.data.ragged import Ragged, offsets_of
from cprec.data.splits import runs
from cprec.errors import ConfigError
from cprec.text.corpus import Corpus
from cprec.text.packing import pack
from cprec.text.shards import Choices

NEXT_TOKEN = "next_token"
"""The name of the loss term of every stream: the token that follows."""
NEXT_CHILD = "next_child"
"""The name of the loss term of streams with nodes: how the titles of the catalogue go on."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with one mixture."""

    name: str
    num_tokens: float
    """About how many tokens to read: documents are read whole."""
    share: np.ndarray
    """The share of these tokens that each group of the corpus has."""
    num_steps: int = 0
    """Optimizer steps to divide the rows over; 0, or fewer than the rows need: as many as they need."""


def document_order(corpus: Corpus, phases: Sequence[Phase], seed: int, max_passes: float = 0) -> list[np.ndarray]:
    """Documents of each phase in training order, each group holding its share at every moment.

    A group's documents come in one shuffled pass after the other, and a phase goes on where the one before it stopped.
    A document is read if its middle token lies within the tokens that its group should have read by the end of the
    phase. It is due when its group should have reached that token; sorting by due time interleaves the groups evenly.
    `max_passes` above 0 caps the passes over a group's documents in all phases together; the other groups make up for
    what it may not read. Returns int64 places in the corpus.
    """
    members = np.split(np.arange(len(corpus)), np.cumsum([len(group.documents) for group in corpus.groups])[:-1])
    size = np.array([group.num_tokens for group in corpus.groups], dtype=np.float64)
    cap = max_passes * size if max_passes else np.full(len(members), np.inf)
    # Of each group in all phases so far: tokens asked for, tokens read, and documents read.
    asked, read = np.zeros(len(members)), np.zeros(len(members))
    given = np.zeros(len(members), dtype=np.int64)
    orders = []
    for phase in phases:
        share = np.where(size > 0, phase.share, 0.0)
        tokens = within_caps(share, phase.num_tokens, cap - asked)
        documents, due = [np.empty(0, dtype=np.int64)], [np.empty(0)]
        for number in np.flatnonzero(tokens >= 1):
            mine = members[number]
            # The passes that the phase may touch, shuffled each by itself; 1e-9 keeps a whole number of passes whole.
            first = int(given[number]) // len(mine)
            last = int((asked + tokens)[number] / size[number] + 1 - 1e-9)
            generators = [np.random.default_rng((seed, int(number), each)) for each in range(first, last)]
            coming = np.concatenate([mine[rng.permutation(len(mine))] for rng in generators])[
                given[number] - first * len(mine) :
            ]
            lengths = corpus.lengths[coming]
            # Tokens of the group from the start of the phase to the middle of each document.
            middle = read[number] + np.cumsum(lengths) - lengths / 2 - asked[number]
            # A group that has read nothing yet reads one document at least.
            limit = tokens[number] if given[number] else max(tokens[number], middle[0])
            taken = int(np.searchsorted(middle, limit, side="right"))
            documents.append(coming[:taken])
            due.append(middle[:taken] / tokens[number])
            read[number] += lengths[:taken].sum()
            given[number] += taken
        asked += tokens
        orders.append(np.concatenate(documents)[np.argsort(np.concatenate(due), kind="stable")])
    return orders


def within_caps(share: np.ndarray, tokens: float, room: np.ndarray) -> np.ndarray:
    """Tokens of each group: its share of `tokens`, but no more than its room; the excess goes to the others.

    The others take it in proportion to their shares, as far as they have room. Where no group has any left, fewer
    tokens are read than asked for.

    >>> within_caps(np.array([0.5, 0.3, 0.2]), 100, np.array([20, 1000, 30])).tolist()
    [20.0, 50.0, 30.0]
    """
    wanted = np.zeros(len(share))
    has_room = share > 0
    while has_room.any():
        left = tokens - wanted[~has_room].sum()
        wanted[has_room] = left * share[has_room] / share[has_room].sum()
        full = has_room & (wanted > room)
        if not full.any():
            break
        wanted[full] = room[full]
        has_room &= ~full
    return wanted


class TokenStream:
    """Batches of packed rows in a fixed order: `stream.batch(step)` needs no earlier step.

    Each phase is packed on its own, and its rows are divided evenly over its steps, `rows_per_step` at most.
    `is_target(documents, tokens)` says for each token whether the loss covers it, where the corpus allows that.
    `nodes_of(tokens, first_target)` says which node of a trie each token of some documents leads to, or IGNORE; then
    batches have these. `more_terms` names loss terms that are means over the targets, as the usual one is.

    Raises ConfigError if a document does not fit a row or nothing is to be trained on.
    """

    def __init__(
        self,
        corpus: Corpus,
        phases: Sequence[Phase],
        *,
        rows_per_step: int,
        row_tokens: int,
        seed: int,
        max_passes: float = 0,
        is_target: Callable[[np.ndarray, Ragged], np.ndarray] | None = None,
        nodes_of: Callable[[Ragged, np.ndarray], np.ndarray] | None = None,
        more_terms: Sequence[str] = (),
        pad_id: int = 0,
    ) -> None:
        orders = document_order(corpus, phases, seed, max_passes)
        if not sum(map(len, orders)):
            wanted = sum(phase.num_tokens for phase in phases)
            raise ConfigError(f"no documents to train on: {len(corpus)} in the shards, {wanted:,.0f} tokens asked for")
        rows, sizes = [], []
        for number, (phase, order) in enumerate(zip(phases, orders, strict=True)):
            packed = pack(corpus.lengths[order], row_tokens, seed + number)
            rows.append(Ragged(order[packed.values], packed.offsets))
            # Rows are divided over the steps so that two steps differ by one row at most.
            num_steps = max(phase.num_steps, -(-len(packed) // rows_per_step)) if len(packed) else 0
            num_steps = min(num_steps, len(packed))
            sizes.append(np.diff(np.arange(num_steps + 1) * len(packed) // max(1, num_steps)))
        self.corpus, self.phases = corpus, tuple(phases)
        self.row_tokens, self.pad_id, self._is_target = row_tokens, pad_id, is_target
        self._nodes_of, self._terms = nodes_of, (NEXT_TOKEN, *more_terms)
        self.tokens_per_step = rows_per_step * row_tokens
        """Positions of a step at most."""
        self._rows = Ragged.concatenate(rows)
        self._first_row = offsets_of(np.concatenate(sizes))
        self.phase_steps = [len(of_phase) for of_phase in sizes]
        """Optimizer steps of each phase."""
        self.group_tokens = np.diff(self._tokens_until[np.cumsum([0, *self.phase_steps])], axis=0)
        """Tokens that each phase reads of each group: int64[phases, groups]."""
        self.num_tokens = int(self.group_tokens.sum())

    @property
    def num_steps(self) -> int:
        return len(self._first_row) - 1

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold tokens of documents."""
        return self.num_tokens / (len(self._rows) * self.row_tokens)

    def tokens_after(self) -> np.ndarray:
        """Tokens read by the end of each step: int64[num_steps]."""
        return offsets_of(self.corpus.lengths[self._rows.values])[self._rows.offsets[self._first_row[1:]]]

    @cached_property
    def _tokens_until(self) -> np.ndarray:
        """Tokens of each group in the steps before each step: int64[num_steps + 1, groups]."""
        documents, num_groups = self._rows.values, len(self.corpus.groups)
        documents_until = self._rows.offsets[self._first_row]
        step = np.repeat(np.arange(self.num_steps), np.diff(documents_until))
        # One count for each pair of a step and a group, then summed over the steps so far.
        tokens = np.bincount(
            step * num_groups + self.corpus.group[documents],
            weights=self.corpus.lengths[documents],
            minlength=self.num_steps * num_groups,
        )
        of_step = tokens.astype(np.int64).reshape(self.num_steps, num_groups)
        return np.concatenate([np.zeros((1, num_groups), dtype=np.int64), of_step.cumsum(0)])

    def mixture_until(self, step: int) -> dict[str, float]:
        """The share of each group in the tokens of the steps before `step`, by name."""
        return self._shares(self._tokens_until[step])

    def mixture_asked(self) -> dict[str, float]:
        """The share of each group that the phases ask for in all, by name; caps on passes may leave less."""
        return self._shares(np.sum([phase.num_tokens * phase.share for phase in self.phases], axis=0))

    def _shares(self, tokens: np.ndarray) -> dict[str, float]:
        return dict(zip(self.corpus.names, (tokens / max(1, tokens.sum())).round(5).tolist(), strict=True))

    def documents(self, step: int) -> np.ndarray:
        """Places in the corpus of a step's documents, in order."""
        return self._rows.take(np.arange(self._first_row[step], self._first_row[step + 1])).values

    def batch(self, step: int) -> Batch:
        """The rows of a step: `input_ids`, `position_ids` and `targets`, int64[R, T] each.

        Position ids restart at 0 at each document, which is how attention knows where documents begin. A target is the
        token that follows, or IGNORE: at the end of a document, in padding and where the loss is masked. With nodes
        also `nodes`: the node to which the token that follows leads, or IGNORE. Where documents may be trees also
        `until`: the place in the row before which the tokens that read a token end. Where they have choices, a position
        has K targets, [R, T, K], the last of them IGNORE where it has fewer, and `weights`, float32, that sum to one.
        """
        rows = np.arange(self._first_row[step], self._first_row[step + 1])
        taken = self._rows.take(rows)
        documents, rows_of = taken.values, np.repeat(np.arange(len(rows)), taken.lengths)
        read = self.corpus.take(documents)
        tokens = read.tokens
        lengths = tokens.lengths
        start = tokens.offsets[:-1]
        row_start = start[taken.offsets[:-1]]  # tokens before each row's first document
        place = rows_of * self.row_tokens + start - row_start[rows_of]
        position = np.arange(len(tokens.values)) - np.repeat(start, lengths)
        flat = np.repeat(place, lengths) + position

        size = len(rows) * self.row_tokens
        input_ids = np.full(size, self.pad_id, dtype=np.int64)
        input_ids[flat] = tokens.values
        positions = np.zeros(size, dtype=np.int64)
        positions[flat] = read.depth
        self._number_padding(positions, rows_of, lengths, len(rows))
        targets = np.full(size, IGNORE, dtype=np.int64)
        predicted = read.is_target & (position > 0)
        if self._is_target is not None:
            predicted &= self._is_target(documents, tokens)
        targets[flat[predicted] - 1] = tokens.values[predicted]
        arrays = {"input_ids": input_ids, "position_ids": positions, "targets": targets}
        if read.until is not None:
            # From the document's start to the row's.
            column = np.repeat(start - row_start[rows_of], lengths)
            arrays["until"] = np.full(size, self.row_tokens, dtype=np.int64)
            arrays["until"][flat] = column + read.until
        if read.choices is not None:
            arrays |= self._with_choices(targets, read.choices, flat)
        counts = dict.fromkeys(self._terms, int(predicted.sum()))
        if self._nodes_of is not None:
            node = self._nodes_of(tokens, read.first_target)
            arrays["nodes"] = np.full(size, IGNORE, dtype=np.int64)
            arrays["nodes"][flat[node != IGNORE] - 1] = node[node != IGNORE]
            # As many as tokens, since where titles go on in one way only the loss is 0.
            counts[NEXT_CHILD] = counts[NEXT_TOKEN]
        return Batch(
            rows={name: array.reshape(len(rows), self.row_tokens, *array.shape[1:]) for name, array in arrays.items()},
            counts=counts,
            num_tokens=len(tokens.values),
            examples=documents,
            blank={name: IGNORE for name in ("targets", "nodes") if name in arrays},
        )

    def _with_choices(self, targets: np.ndarray, choices: Choices, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Targets and their weights where some positions have K: int64 and float32, [positions, K]."""
        place, of_one, _ = runs(choices.of)
        width = int(of_one.max(initial=1))
        several, weights = np.full((len(targets), width), IGNORE), np.zeros((len(targets), width), dtype=np.float32)
        several[:, 0], weights[:, 0] = targets, targets != IGNORE
        at = flat[choices.of] - 1
        several[at, place], weights[at, place] = choices.token, choices.chance
        return {"targets": several, "weights": weights}

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(step) for step in range(self.num_steps))

    def _number_padding(self, positions: np.ndarray, rows_of: np.ndarray, lengths: np.ndarray, num_rows: int) -> None:
        """Padding is a document of its own, numbered from 0, so that it attends to nothing else."""
        used = np.bincount(rows_of, weights=lengths, minlength=num_rows).astype(np.int64)
        column = np.arange(len(positions)) % self.row_tokens
        row = np.arange(len(positions)) // self.row_tokens
        padding = column >= used[row]
        positions[padding] = (column - used[row])[padding]


def one_phase(num_tokens: float, share: Sequence[float] = (1.0,)) -> list[Phase]:
    """A plan of one phase; of a corpus of one group, all of it by default."""
    return [Phase(name="", num_tokens=num_tokens, share=np.asarray(share, dtype=np.float64))]
