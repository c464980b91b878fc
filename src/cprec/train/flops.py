"""The floating-point operations that training a decoder needs, and the share of the machine that they keep busy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from cprec.models import inner_model, trunk_and_head


def mean_context(lengths: np.ndarray | Sequence[int]) -> float:
    """Tokens that a token attends to on average, itself included, in documents of these lengths that see no other.

    >>> mean_context([3]), mean_context([1, 1, 1]), mean_context([2, 4])
    (2.0, 1.0, 2.1666666666666665)
    """
    lengths = np.asarray(lengths, dtype=np.float64)
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


def flops_per_token(model: Any, context: float, target_share: float = 1.0) -> float:
    """Floating-point operations that training on one token needs, forward and backward.

    A weight that multiplies counts 6 where it is trained (2 forward, 2 for the gradient of its input, 2 for its own)
    and 4 where it is frozen; so does the output layer, for the `target_share` of tokens that are targets. Embeddings
    are looked up and do not count. Attention adds 12 * heads * head width * `context` in each layer, `context` being
    the tokens that one attends to (see `mean_context`; at most the window where a layer has one). Recomputation by
    gradient checkpointing, masked attention, norms and the optimizer are left out: the measure is what the model
    needs, whatever the machine does.

    Source: Chowdhery et al. (2022), PaLM, appendix B, with the causal context of packed documents for the row's length.
    """
    _, head = trunk_and_head(model)
    flops = sum((6.0 if weight.requires_grad else 4.0) * weight.numel() for weight in multiplying_weights(model))
    flops += (6.0 if head.weight.requires_grad else 4.0) * head.weight.numel() * target_share
    config = inner_model(model).config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or math.inf
    seen = sum(min(context, window if kind == "sliding_attention" else math.inf) for kind in kinds)
    return flops + 12 * attention_width(config) * seen


def multiplying_weights(model: Any) -> list[nn.Parameter]:
    """Weights that each token is multiplied by, the output layer left out."""
    _, head = trunk_and_head(model)
    left_out = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(head.weight)}
    return [weight for weight in model.parameters() if weight.ndim == 2 and id(weight) not in left_out]


def attention_width(config: Any) -> int:
    """The width of all heads of a layer together."""
    head_width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_width * int(config.num_attention_heads)


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation: what the model needs a second, as a share of what the devices reach in matrix products.

    >>> mfu(1000, 2e9, 4e12)
    0.5
    """
    return tokens_per_second * flops_per_token / peak
