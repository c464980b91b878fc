"""A decoder that reads each prompt once and then any tree of continuations, by an attention mask over one cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cprec.distributed import autocast
from cprec.models import trunk_and_head


class PromptTree:
    """Prompts of several users and the continuations tried for each, in one growing cache.

    A continuation token attends to its user's prompt, its ancestors and itself. So a prompt's keys and values are
    computed once and never copied for beams, and beams need no reordering of the cache.
    Suffixes: U users, T prompt positions, N new nodes a user, S all nodes a user so far (new ones included), D width.
    """

    def __init__(self, model: Any, prompts: Sequence[np.ndarray], *, bf16: bool = False, pad_id: int = 0) -> None:
        from transformers import DynamicCache

        self._trunk, self._head = trunk_and_head(model)
        self._device = next(model.parameters()).device
        self._bf16 = bf16
        self._cache = DynamicCache()
        lengths = np.array([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids_UT = np.full((len(prompts), width), pad_id, dtype=np.int64)  # padded on the left
        for row, prompt in enumerate(prompts):
            ids_UT[row, width - len(prompt) :] = prompt
        self._length_U = torch.from_numpy(lengths).to(self._device)
        at = torch.arange(width, device=self._device)
        start_U = width - self._length_U
        self._real_UT = at[None] >= start_U[:, None]
        causal_TT = at[:, None] >= at[None]
        itself_TT = at[:, None] == at[None]  # keeps the softmax of padding defined
        visible = causal_TT & self._real_UT[:, None] | itself_TT
        positions_UT = (at[None] - start_U[:, None]).clamp(min=0)
        hidden = self._forward(torch.from_numpy(ids_UT).to(self._device), positions_UT, visible)
        self.prompt_hidden_UD = hidden[:, -1]

    def extend(self, tokens_UN: torch.Tensor, depth_UN: torch.Tensor, ancestors_UNS: torch.Tensor) -> torch.Tensor:
        """Add nodes and return their hidden states [U, N, D].

        `depth_UN` is 0 for a token right after the prompt; `ancestors_UNS` says which nodes each new one sees, itself
        included, in the order in which nodes were added.
        """
        prompt = self._real_UT[:, None].expand(-1, tokens_UN.shape[1], -1)
        visible = torch.cat([prompt, ancestors_UNS], dim=2)
        return self._forward(tokens_UN, self._length_U[:, None] + depth_UN, visible)

    @property
    def vocabulary_size(self) -> int:
        return int(self._head.weight.shape[0])

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the next token: float32[..., V]."""
        with autocast(self._device, self._bf16):
            logits = self._head(hidden)
        return logits.float().log_softmax(-1)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if self._bf16 else torch.float32
        mask = torch.zeros(visible.shape, dtype=dtype, device=self._device)
        mask.masked_fill_(~visible, torch.finfo(dtype).min)
        with autocast(self._device, self._bf16):
            return self._trunk(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask[:, None],
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
