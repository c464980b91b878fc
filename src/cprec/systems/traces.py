"""Traces: before the codes of each item stand a few tokens that lead from the events before it to the item.

A trace is made by fitting what is left to explain (Zhang et al. 2025, "Slow Thinking for Sequential Recommendation"):

    r_1 = vector of the item - mean vector of the items before it
    o_i = the token whose vector is nearest to r_i,  r_(i + 1) = r_i - vector of o_i

Tokens are those of codes, and the vector of one is what its code stands for. Suffixes: N items, L codes, D width, C
tokens, E events, K tokens of a trace, U users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cprec.data.catalogue import Catalogue
from cprec.data.ragged import Ragged, offsets_of
from cprec.errors import ConfigError
from cprec.recommender import RankingQuery
from cprec.systems.codes import BEGIN, ItemCodes
from cprec.systems.generator import QUERY_BATCH, CodeRecommender
from cprec.systems.signals import TrainingSequences

ROWS = 2048
"""Histories whose traces are fitted at once."""


def token_vectors(token_NL: np.ndarray, vectors_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different tokens of items, level by level, and what each stands for: int64[C] and float64[C, D].

    It is the mean, over the items that have the token, of what the tokens before it leave of their vectors.

    >>> tokens, vectors = token_vectors(np.array([[3, 5], [3, 6], [4, 5]]), np.array([[0.0], [4], [9]]))
    >>> tokens.tolist(), vectors.ravel().tolist()
    ([3, 4, 5, 6], [2.0, 9.0, -1.0, 2.0])
    """
    left_ND, tokens, vectors = vectors_ND.astype(np.float64), [], []
    for token_N in token_NL.T:
        token_C, place_N, counts_C = np.unique(token_N, return_inverse=True, return_counts=True)
        sums_CD = np.zeros((len(token_C), left_ND.shape[1]))
        np.add.at(sums_CD, place_N, left_ND)
        tokens.append(token_C)
        vectors.append(sums_CD / counts_C[:, None])
        left_ND = left_ND - vectors[-1][place_N]
    return np.concatenate(tokens), np.concatenate(vectors)


@dataclass(frozen=True, kw_only=True)
class TracedCodes(ItemCodes):
    """Codes of items, with a trace before those of each event."""

    item_ND: np.ndarray
    token_C: np.ndarray
    token_CD: np.ndarray
    trace_length: int

    @classmethod
    def traced(cls, codes: ItemCodes, vectors_ND: np.ndarray, trace_length: int) -> TracedCodes:
        """From the codes of items and the vectors that these are of."""
        token_NL = codes.sequences.values[codes.sequences.offsets[:-1, None] + np.arange(codes.num_levels)]
        token_C, token_CD = token_vectors(token_NL, vectors_ND)
        return cls(**vars(codes), item_ND=vectors_ND, token_C=token_C, token_CD=token_CD, trace_length=trace_length)

    @property
    def longest(self) -> int:
        """The most tokens of an item, with its trace."""
        return super().longest + self.trace_length

    def prompts(self, histories: Ragged) -> Ragged:
        """See `ItemCodes.prompts`. Before each item's tokens stands its trace."""
        parts = [self.traces(histories.take(rows)) for rows in _in_parts(len(histories), ROWS)]
        trace_EK = np.concatenate([np.empty((0, self.trace_length), dtype=np.int64), *parts])
        num_events, num_items = len(trace_EK), len(self.sequences)
        traces = Ragged(trace_EK.ravel(), np.arange(num_events + 1) * self.trace_length)
        pieces = Ragged.concatenate([traces, self.sequences, Ragged.of([[BEGIN]])])
        chosen = np.stack([np.arange(num_events), num_events + histories.values], axis=1).ravel()
        tokens = pieces.take(np.insert(chosen, 2 * histories.offsets[:-1], num_events + num_items))
        return Ragged(tokens.values, tokens.offsets[2 * histories.offsets + np.arange(len(histories) + 1)])

    def traces(self, histories: Ragged) -> np.ndarray:
        """The trace of each event after those before it in its row: int64[E, K]. Of equally near tokens the first
        counts; before the first event stands the trace that leads to it from zero."""
        item_ED = self.item_ND[histories.values].astype(np.float64)
        before_ED = np.cumsum(item_ED, axis=0) - item_ED
        first_E = histories.offsets[:-1][histories.row_of]
        mean_ED = (before_ED - before_ED[first_E]) / np.maximum(histories.place_of, 1)[:, None]
        left_ED, tokens = item_ED - mean_ED, [np.empty((len(item_ED), 0), dtype=np.int64)]
        for _ in range(self.trace_length):
            nearest_E = (left_ED @ self.token_CD.T - (self.token_CD**2).sum(1) / 2).argmax(1)
            left_ED = left_ED - self.token_CD[nearest_E]
            tokens.append(self.token_C[nearest_E, None])
        return np.concatenate(tokens, axis=1)


class TracingRecommender(CodeRecommender):
    """Writes the likeliest trace after a history, one token after the other, and ranks items by the probability of
    their codes after it."""

    def __init__(self, name: str, data: TrainingSequences, codes: TracedCodes, model: Any, **limits: Any) -> None:
        super().__init__(name, data, codes, model, **limits)
        self._traced = codes

    def with_items(self, catalogue: Catalogue) -> CodeRecommender:
        """Raises ConfigError: new items have no vectors that a trace could lead away from."""
        raise ConfigError(f"{self.name} cannot rank items that came after training: train it again")

    @torch.inference_mode()
    def _prompts(self, queries: Sequence[RankingQuery]) -> Ragged:
        prompts = super()._prompts(queries)
        for _ in range(self._traced.trace_length):
            parts = [self._likeliest(prompts.take(rows)) for rows in _in_parts(len(prompts), QUERY_BATCH)]
            token_U = np.concatenate([np.empty(0, dtype=np.int64), *parts])
            values = np.insert(prompts.values, prompts.offsets[1:], token_U)
            prompts = Ragged(values, offsets_of(prompts.lengths + 1))
        return prompts

    def _likeliest(self, prompts: Ragged) -> np.ndarray:
        """The most probable token of a trace after each prompt, of equals the first: int64[U]."""
        tree = self._reader.read([prompts[number] for number in range(len(prompts))])
        token_C = torch.from_numpy(self._traced.token_C).to(tree.prompt_hidden_UD.device)
        row = torch.arange(len(prompts), device=token_C.device).repeat_interleave(len(token_C))
        scores_N = tree.log_probs(tree.prompt_hidden_UD, row, token_C.repeat(len(prompts)))
        likeliest: np.ndarray = token_C[scores_N.unflatten(0, (-1, len(token_C))).argmax(1)].cpu().numpy()
        return likeliest


def _in_parts(number: int, size: int) -> Sequence[np.ndarray]:
    return [np.arange(start, min(start + size, number)) for start in range(0, number, size)]
