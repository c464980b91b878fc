"""Cross-entropy of hidden states and the output layer, without ever making a tensor of all tokens by the vocabulary."""

from __future__ import annotations

from typing import Any

import torch

CHUNK = 256
"""Positions whose logits exist at once. Small chunks stay in the cache (benchmarks/loss.py: 2.5x over plain logits)."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk, the gradients already in the forward pass, where the logits are at hand.

    Suffixes: N positions, D hidden width, V vocabulary, C positions of a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            hidden_CD, target_C1 = hidden[rows], target_N[rows, None]
            logits_CV = (hidden_CD @ weight.T).float()
            correct = logits_CV.gather(1, target_C1)
            largest = logits_CV.amax(1, keepdim=True)
            share_CV = logits_CV.sub_(largest).exp_()
            total = share_CV.sum(1, keepdim=True)
            loss += (total.log() + (largest - correct)).sum()
            share_CV.div_(total).scatter_add_(1, target_C1, correct.new_full(correct.shape, -1.0))
            grad_logits = share_CV.to(dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden_CD
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grads[0]).to(ctx.dtypes[0]),
            None if grad_weight is None else (grad_weight * grads[0]).to(ctx.dtypes[1]),
            None,
            None,
        )


def linear_cross_entropy(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Summed cross-entropy of `hidden @ weight.T` against the targets, in nats; products in `dtype`, sums in fp32.

    Equals torch's cross_entropy(reduction="sum") on the full logits, values and gradients, up to rounding.
    """
    if not torch.is_grad_enabled():  # a Function is told that parameters want gradients all the same
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, target_N, dtype)
