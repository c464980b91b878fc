"""What the trained baselines minimise: losses over (representation of a history, item that came next).

Suffixes: N targets, D width, V items, M shared negatives. `hidden_ND @ weight_VD.T` are the scores of all items. Losses
are summed over the targets, float32, without dimensions.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch.nn import functional as F

from cprec.errors import ConfigError
from cprec.train.loss import linear_cross_entropy

CHUNK = 256
"""Targets whose scores of negatives exist at once."""

Objective = Literal["softmax", "sampled_softmax", "bce", "bpr", "bpr_max"]


class _SampledSoftmax(torch.autograd.Function):
    """Loss and gradients of a few targets at a time, which stay in the cache; the gradients already in the forward
    pass, where the scores are at hand. Suffix C: targets of a chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        positive_ND: torch.Tensor,
        negative_MD: torch.Tensor,
        target_N: torch.Tensor,
        drawn_M: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        low_MD = negative_MD.to(dtype)
        grads = [torch.empty_like(hidden_ND), torch.empty_like(positive_ND), torch.zeros_like(negative_MD)]
        loss = hidden_ND.new_zeros(())
        for start in range(0, len(hidden_ND), CHUNK):
            rows = slice(start, start + CHUNK)
            hidden_CD, positive_CD = hidden_ND[rows], positive_ND[rows]
            scores_CM = (hidden_CD.to(dtype) @ low_MD.T).to(hidden_ND.dtype)
            scores_CM.masked_fill_(drawn_M == target_N[rows, None], -torch.inf)
            positive_C1 = (hidden_CD * positive_CD).sum(1, keepdim=True)
            total_C1 = torch.logaddexp(positive_C1, scores_CM.logsumexp(1, keepdim=True))
            loss += (total_C1 - positive_C1).sum()
            share_CM = scores_CM.sub_(total_C1).exp_().to(dtype)
            rest_C1 = (positive_C1 - total_C1).expm1()  # minus the share that the target lacks
            grads[0][rows] = rest_C1 * positive_CD + share_CM @ low_MD
            grads[1][rows] = rest_C1 * hidden_CD
            grads[2] += share_CM.T @ hidden_CD.to(dtype)
        ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(each * grads[0] for each in ctx.saved_tensors), None, None, None


def check_objective(objective: str, num_negatives: int) -> None:
    """Raises ConfigError for an objective that is none, and for negatives that it does not use or lacks."""
    if objective not in get_args(Objective):
        raise ConfigError(f"objective={objective!r}: expected {', '.join(get_args(Objective))}")
    if (objective == "softmax") != (num_negatives == 0):
        hint = "softmax ranks all items and draws none" if objective == "softmax" else "give 1 or more"
        raise ConfigError(f"num_negatives={num_negatives} with objective={objective}: {hint}")


def objective_loss(
    objective: Objective,
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    *,
    num_negatives: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The summed loss of targets under an objective; negatives are uniform over the items, drawn with torch's seed.

    - `softmax`: cross-entropy over all items, never held for all targets at once; products in `dtype`.
    - `sampled_softmax`: cross-entropy over the target and M negatives that all targets of the step share; a negative
      that is the target does not count (Jean et al. 2015, with a uniform proposal, whose correction cancels); products
      with negatives in `dtype`.
    - `bce`: log-sigmoid of the target against M negatives of each target's own (Kang and McAuley 2018 have M = 1).
    - `bpr`: log-sigmoid of the difference to each of M own negatives, their mean (Rendle et al. 2009).
    - `bpr_max`: minus the log of the differences' sigmoids, weighted by a softmax over M shared negatives, plus 0.5
      times their weighted squares (Hidasi and Karatzoglou 2018, equation 10).
    """
    if objective == "softmax":
        return linear_cross_entropy(hidden_ND, weight_VD, target_N, dtype)
    num_items = len(weight_VD)
    if objective == "sampled_softmax":
        drawn_M = torch.randint(num_items, (num_negatives,), device=hidden_ND.device)
        return _SampledSoftmax.apply(hidden_ND, weight_VD[target_N], weight_VD[drawn_M], target_N, drawn_M, dtype)
    positive_N = (hidden_ND * weight_VD[target_N]).sum(1)
    if objective in ("bce", "bpr"):
        drawn_NM = torch.randint(num_items, (len(target_N), num_negatives), device=hidden_ND.device)
        negative_NM = torch.einsum("nd,nmd->nm", hidden_ND, weight_VD[drawn_NM])
        if objective == "bce":
            return -(F.logsigmoid(positive_N).sum() + F.logsigmoid(-negative_NM).sum())
        return -F.logsigmoid(positive_N[:, None] - negative_NM).mean(1).sum()
    drawn_M = torch.randint(num_items, (num_negatives,), device=hidden_ND.device)
    negative_NM = hidden_ND @ weight_VD[drawn_M].T
    negative_NM = negative_NM.masked_fill(drawn_M == target_N[:, None], -1e9)
    share_NM = negative_NM.softmax(1)
    apart_N = (share_NM * torch.sigmoid(positive_N[:, None] - negative_NM)).sum(1)
    size_N = (share_NM * negative_NM.clamp(min=-1e4).square()).sum(1)
    return (0.5 * size_N - torch.log(apart_N + 1e-24)).sum()
