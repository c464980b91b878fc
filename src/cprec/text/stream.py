"""A deterministic mixture of documents as packed batches: which tokens step s trains on is a pure function of the plan.

The whole order is fixed before the first step, from (documents, weights, seed) alone. So a run resumes at a step with
no other state, another number of processes takes other rows of the same step, and weights change without tokenising
again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError
from cprec.schema import MIXED
from cprec.text.packing import pack
from cprec.text.shards import Shards

IGNORE = -100
"""Marks a position that predicts nothing (the value that torch's cross-entropy ignores)."""


@dataclass(frozen=True)
class Batch:
    """Packed rows; suffix R = rows, T = tokens in a row."""

    input_ids_RT: np.ndarray
    position_ids_RT: np.ndarray
    """Restarts at 0 at each document, which is how attention knows where documents begin."""
    targets_RT: np.ndarray
    """The token that follows, or IGNORE: at the end of a document, in padding and where the loss is masked."""
    num_tokens: int
    """Tokens of documents, padding left out."""
    documents: np.ndarray
    """Row numbers in the shards' index of the documents in this batch, in order."""

    @property
    def num_targets(self) -> int:
        return int((self.targets_RT != IGNORE).sum())


def mixture_weights(shards: Shards, *, mixed_share: float, domain_temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Groups of documents and the share of all tokens that each is to have.

    A group is one domain's specific documents, or all mixed ones. Mixed documents get `mixed_share`; the rest is
    divided over domains in proportion to (events in the domain) ** `domain_temperature` (our reconstruction,
    docs/papers.md: 1:1, 0.7). A kind without documents leaves its share to the other. Returns the group of each
    document, int64[D], and the weights.
    """
    mixed = shards.column("kind") == MIXED
    names, group = np.unique(np.where(mixed, "", shards.column("domain")).astype(str), return_inverse=True)
    events = np.bincount(group, weights=shards.column("num_events"), minlength=len(names))
    is_mixed = np.zeros(len(names), dtype=bool)
    is_mixed[group[mixed]] = True
    share = mixed_share if mixed.any() and not mixed.all() else float(mixed.any())
    weight = np.where(is_mixed, 0.0, events**domain_temperature)
    if weight.sum() > 0:
        weight *= (1 - share) / weight.sum()
    weight[is_mixed] = share
    return group, weight


def document_order(
    lengths: np.ndarray, group: np.ndarray, weight: np.ndarray, num_tokens: int, seed: int
) -> np.ndarray:
    """Documents in training order, about `num_tokens` tokens in all, each group holding its share at every moment.

    A group's documents come in one shuffled pass after the other. Each is due when its group should have reached its
    middle token; sorting by due time interleaves the groups evenly. Returns int64 positions in `lengths`.
    """
    order, due = [], []
    for number in range(len(weight)):
        members = np.flatnonzero(group == number)
        wanted = weight[number] * num_tokens
        if not len(members) or wanted < 1:
            continue
        size = int(lengths[members].sum())
        passes = [
            members[np.random.default_rng([seed, number, epoch]).permutation(len(members))]
            for epoch in range(int(np.ceil(wanted / size - 1e-9)))
        ]
        documents = np.concatenate(passes)
        middle = np.cumsum(lengths[documents]) - lengths[documents] / 2
        keep = middle <= max(wanted, middle[0])  # one document at least
        order.append(documents[keep])
        due.append(middle[keep] / wanted)
    if not order:
        return np.empty(0, dtype=np.int64)
    return np.concatenate(order)[np.argsort(np.concatenate(due), kind="stable")]


class TokenStream:
    """Batches of packed rows in a fixed order: `stream.batch(step)` needs no earlier step.

    Raises ConfigError if a document does not fit a row or nothing is to be trained on.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        rows_per_step: int,
        row_tokens: int,
        num_tokens: int,
        seed: int,
        group: np.ndarray | None = None,
        weight: np.ndarray | None = None,
        targets_only: bool = False,
        pad_id: int = 0,
    ) -> None:
        lengths = shards.column("length")
        if group is None or weight is None:
            group, weight = np.zeros(len(lengths), dtype=np.int64), np.ones(1)
        order = document_order(lengths, group, weight, num_tokens, seed)
        if not len(order):
            raise ConfigError(f"no documents to train on: {len(lengths)} in the shards, num_tokens={num_tokens}")
        rows = pack(lengths[order], row_tokens, seed)
        self._rows = Ragged(order[rows.values], rows.offsets)
        self._tokens = shards.rows
        self._first_target = shards.column("target_start") if targets_only else np.ones(len(lengths), dtype=np.int64)
        self.rows_per_step, self.row_tokens, self.pad_id = rows_per_step, row_tokens, pad_id
        self.num_tokens = int(lengths[order].sum())
        self.group_tokens = np.bincount(group[order], weights=lengths[order], minlength=len(weight)).astype(np.int64)

    @property
    def num_steps(self) -> int:
        return -(-len(self._rows) // self.rows_per_step)

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold tokens of documents."""
        return self.num_tokens / (len(self._rows) * self.row_tokens)

    def batch(self, step: int) -> Batch:
        """The rows of a step; the last step may have fewer."""
        rows = np.arange(step * self.rows_per_step, min((step + 1) * self.rows_per_step, len(self._rows)))
        taken = self._rows.take(rows)
        documents, rows_of = taken.values, np.repeat(np.arange(len(rows)), taken.lengths)
        tokens = self._tokens.take(documents)
        lengths = tokens.lengths
        start = offsets_of(lengths)[:-1]
        row_start = start[taken.offsets[:-1]]  # tokens before each row's first document
        place = rows_of * self.row_tokens + start - row_start[rows_of]
        position = np.arange(len(tokens.values)) - np.repeat(start, lengths)
        flat = np.repeat(place, lengths) + position

        size = len(rows) * self.row_tokens
        input_ids = np.full(size, self.pad_id, dtype=np.int64)
        input_ids[flat] = tokens.values
        positions = np.zeros(size, dtype=np.int64)
        positions[flat] = position
        self._number_padding(positions, rows_of, lengths, len(rows))
        targets = np.full(size, IGNORE, dtype=np.int64)
        predicted = position >= np.maximum(1, np.repeat(self._first_target[documents], lengths))
        targets[flat[predicted] - 1] = tokens.values[predicted]
        shape = (len(rows), self.row_tokens)
        return Batch(
            input_ids.reshape(shape), positions.reshape(shape), targets.reshape(shape), len(tokens.values), documents
        )

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(step) for step in range(self.num_steps))

    def _number_padding(self, positions: np.ndarray, rows_of: np.ndarray, lengths: np.ndarray, num_rows: int) -> None:
        """Padding is a document of its own, numbered from 0, so that it attends to nothing else."""
        used = np.bincount(rows_of, weights=lengths, minlength=num_rows).astype(np.int64)
        column = np.arange(len(positions)) % self.row_tokens
        row = np.arange(len(positions)) // self.row_tokens
        padding = column >= used[row]
        positions[padding] = (column - used[row])[padding]
