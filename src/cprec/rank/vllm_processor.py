"""A logits processor of vLLM that gives log-probabilities to the children of a trie node, and to no other token.

vLLM imports this module in the process of its engine and in the one that asks. Apart from vLLM only the reader imports
it, and only where vLLM is installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

CHILDREN = "cprec_children"
"""The extra argument of a request with the tokens that may come next."""


class ChildrenOnly(LogitsProcessor, LogitsProcessorV2):
    """Replaces the logits of a request's children by log-probabilities over the whole vocabulary, and all others by
    -inf. Requests that name no children are left alone. Where the logits are not finite, children get NaN, which the
    reader refuses.

    vLLM has two model runners. One tells processors of requests by rows that move (`update_state`), the other by slots
    that stay (`add_request`). This processor serves both.
    """

    def __init__(self, vllm_config: Any, *state: Any) -> None:
        self._children: dict[int, np.ndarray] = {}
        """By row, or by slot."""

    @classmethod
    def validate_params(cls, params: Any) -> None:
        """Raises ValueError for children that are no list of tokens."""
        children = (params.extra_args or {}).get(CHILDREN)
        if children is not None and not (
            isinstance(children, list) and children and all(isinstance(token, int) and token >= 0 for token in children)
        ):
            raise ValueError(f"{CHILDREN}: expected a list of one or more tokens")

    def is_argmax_invariant(self) -> bool:
        """No: the likeliest token need not be one of the children."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow rows that are added, removed or moved (the first runner)."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._children.pop(row, None)
        for row, params, *_ in batch_update.added:
            self.add_request(row, params)
        for start, end, direction in batch_update.moved:
            moving, there = self._children.pop(start, None), self._children.pop(end, None)
            if moving is not None:
                self._children[end] = moving
            if there is not None and direction == MoveDirectionality.SWAP:
                self._children[start] = there

    def add_request(self, slot: int, params: Any) -> bool:
        """A request takes a slot, in place of any earlier one (the second runner). Returns whether it has children."""
        children = (params.extra_args or {}).get(CHILDREN)
        self._children.pop(slot, None)
        if children is not None:
            self._children[slot] = np.asarray(children, dtype=np.int64)
        return children is not None

    def apply(self, logits: torch.Tensor, context: Any = None) -> torch.Tensor:
        """Logits by row, in place: float32[rows, V]."""
        slots = range(len(logits)) if context is None else context.expanded_idx_mapping.tolist()
        mine = [(row, self._children[slot]) for row, slot in enumerate(slots) if slot in self._children]
        if not mine:
            return logits
        # One entry for each child: its row and its token.
        rows = torch.tensor([row for row, _ in mine], device=logits.device)
        sizes = torch.tensor([len(children) for _, children in mine], device=logits.device)
        token = torch.from_numpy(np.concatenate([children for _, children in mine])).to(logits.device)
        row = torch.repeat_interleave(rows, sizes)
        # A logit less its row's log-sum-exp is a log-probability.
        normaliser = logits[rows].logsumexp(-1)
        normaliser = torch.where(normaliser.isfinite(), normaliser, torch.nan)
        kept = logits[row, token] - torch.repeat_interleave(normaliser, sizes)
        logits[rows] = -torch.inf
        logits[row, token] = kept
        return logits
