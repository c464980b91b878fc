"""What reads prompts and sequences for a recommender: a model in this process, or an engine behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from cprec import distributed
from cprec.inspection import check_attention, output_scale
from cprec.models import context_of
from cprec.search.attention import PromptTree
from cprec.search.cache import PrefixCache

WIDE = 512
"""Width from which models read in bf16 on a CPU with instructions for it, in half the time (docs/ranking.md). Narrower
ones are quick enough, and keep the scores of fp32."""


class Tree(Protocol):
    """Prompts of several users and the continuations tried for each, which are its nodes.

    U users, M nodes or states, N tokens. A state stands for everything read up to a node; its content is the tree's own
    affair.
    """

    prompt_hidden_UD: torch.Tensor
    """The states of the prompts."""
    num_nodes: int

    @property
    def num_users(self) -> int: ...

    def extend(self, tokens_M: torch.Tensor, users_M: torch.Tensor, parents_M: torch.Tensor) -> torch.Tensor:
        """Add nodes, users ascending, and return their states.

        Nodes are numbered in the order in which they were added. `parents_M` is -1 right after the prompt; a parent may
        be one of the same call, before its child.
        """
        ...

    def forget(self) -> None:
        """Drop all nodes and their states; the prompts stay."""
        ...

    def log_probs(self, hidden_MD: torch.Tensor, row_N: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of tokens, each the next one after a state, whose rows ascend: float64[N].

        Raises ModelError where the model's scores are not finite; a token that it forbids has -inf.
        """
        ...

    def token_logits(self, hidden_MD: torch.Tensor, row_N: torch.Tensor, token_N: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of tokens up to a constant for each state, as `log_probs` takes them: float64[N]. Nothing
        is computed for other tokens where that can be spared."""
        ...

    def likeliest(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """The likeliest next token after each state: int64[M]. Raises ModelError as `log_probs` does."""
        ...


class Reader(Protocol):
    """Reads prompts."""

    context: int
    """Tokens that a prompt and a sequence may have together."""
    cache: PrefixCache | None
    """Prompts kept in this process; None where none are."""

    def read(self, prompts: Sequence[np.ndarray]) -> Tree:
        """The tree of prompts, of at least one token each."""
        ...


class ModelReader:
    """A causal language model of transformers in this process."""

    def __init__(self, model: Any, *, bf16: bool | None = False, pad_id: int = 0, cache_bytes: int = 0) -> None:
        """`cache_bytes` of memory keep prompts that were read. `bf16` None: where the machine is fast at it, on a CPU
        for models of `WIDE` states and more.

        Raises ConfigError for architectures whose attention a `PromptTree` cannot stand in for.
        """
        output_scale(model)
        check_attention(model)
        self.model = model.eval()
        self.context = int(context_of(model) or 1 << 30)
        self.cache = PrefixCache(cache_bytes) if cache_bytes else None
        self.bf16 = _is_fast_in_bf16(model) if bf16 is None else bf16
        self._pad_id = pad_id

    def read(self, prompts: Sequence[np.ndarray]) -> PromptTree:
        """See `Reader.read`."""
        return PromptTree(self.model, prompts, bf16=self.bf16, pad_id=self._pad_id, cache=self.cache)


def _is_fast_in_bf16(model: Any) -> bool:
    device = next(model.parameters()).device
    is_wide = getattr(model.config.get_text_config(), "hidden_size", 0) >= WIDE
    return (is_wide or device.type == "cuda") and distributed.use_bf16("auto", device)
