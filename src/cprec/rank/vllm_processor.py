"""The trie as a logits processor of vLLM: of a prefix, only its children in the trie have a log-probability.

vLLM imports this module in the process of its engine and in the one that asks; nothing else does but the reader, once
vLLM is there.
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
    """Puts log-probabilities, over the whole vocabulary, in the place of the logits of a request's children, and -inf
    everywhere else. Requests that name no children are left alone. Where the logits are no distribution, children get
    NaN, which the one that asks refuses.

    vLLM has two model runners, whose processors differ in how they learn of requests: by rows that move
    (`update_state`) or by slots that stay (`add_request`). This one serves both.
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
        """No: what is likeliest may be none of the children."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Rows that are new, gone or elsewhere (the first runner)."""
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
        """A request that takes a slot, whoever had it before (the second runner). Says whether it has children."""
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
        rows = torch.tensor([row for row, _ in mine], device=logits.device)
        sizes = torch.tensor([len(children) for _, children in mine], device=logits.device)
        token = torch.from_numpy(np.concatenate([children for _, children in mine])).to(logits.device)
        row = torch.repeat_interleave(rows, sizes)
        normaliser = logits[rows].logsumexp(-1)
        normaliser = torch.where(normaliser.isfinite(), normaliser, torch.nan)
        kept = logits[row, token] - torch.repeat_interleave(normaliser, sizes)
        logits[rows] = -torch.inf
        logits[row, token] = kept
        return logits
