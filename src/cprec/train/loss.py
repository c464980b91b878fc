"""The loss of packed rows as a module. No tensor of all tokens by the whole vocabulary is ever made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cprec import distributed
from cprec.batch import IGNORE
from cprec.errors import ConfigError
from cprec.inspection import output_scale
from cprec.models import blocks_of, packed_hidden, trunk_and_head
from cprec.text.stream import NEXT_TOKEN
from cprec.train.trainable import decay_matrices

CHUNK = 256
"""Positions whose logits exist at once. Small chunks stay in the cache (benchmarks/loss.py: 2.5x over plain logits)."""

BLOCK = 1024
"""Entries of the vocabulary in one fp32 product on a CPU, where a product with a large vocabulary at once takes up to
twice as long."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk. The gradients are made in the forward pass already, where the logits exist.

    Suffixes: N positions, D hidden width, V vocabulary, C positions of a chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        target_N: torch.Tensor,
        dtype: torch.dtype,
        bias_V: torch.Tensor | None,
        left_out_NX: torch.Tensor | None,
        chance_NK: torch.Tensor | None,
    ) -> torch.Tensor:
        target_NK = target_N if target_N.ndim == 2 else target_N[:, None]
        if chance_NK is None:
            chance_NK = torch.ones(1, 1, device=hidden_ND.device).expand(target_NK.shape)
        hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        block_size = BLOCK if hidden.device.type == "cpu" and dtype == torch.float32 else max(1, len(weight))
        blocks = [slice(start, start + block_size) for start in range(0, len(weight), block_size)]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # All chunks share the memory of the first, because new memory costs a CPU page faults.
        size = min(CHUNK, len(hidden)), len(weight)
        logits_room, share_room = hidden.new_empty(size), hidden.new_empty(size, dtype=torch.float32)
        grad_room = share_room if dtype == torch.float32 else logits_room
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            hidden_CD, target_CK, chance_CK = hidden[rows], target_NK[rows], chance_NK[rows]
            logits_CV, share_CV, grad_CV = (room[: len(hidden_CD)] for room in (logits_room, share_room, grad_room))
            for block in blocks:
                torch.matmul(hidden_CD, weight[block].T, out=logits_CV[:, block])
            if bias_V is not None:
                logits_CV += bias_V
            if left_out_NX is not None:
                of_target_CK = logits_CV.gather(1, target_CK)
                logits_CV.scatter_(1, left_out_NX[rows], -torch.inf).scatter_(1, target_CK, of_target_CK)
            # The loss of a target is log(sum(exp(logits))) minus its own logit, of several by their chances.
            correct = (logits_CV.gather(1, target_CK).float() * chance_CK).sum(1, keepdim=True)
            largest = logits_CV.amax(1, keepdim=True).float()
            torch.softmax(logits_CV, 1, dtype=torch.float32, out=share_CV)
            # The largest share is 1 / sum(exp(logits - largest)), at least 1 / V.
            loss += (largest - correct - share_CV.amax(1, keepdim=True).log()).sum()
            # The gradient of the logits is the softmax, less each target's chance at the target.
            share_CV.scatter_add_(1, target_CK, -chance_CK)
            grad_CV.copy_(share_CV)
            if grad_hidden is not None:
                torch.mm(grad_CV, weight, out=grad_hidden[rows])
            if grad_weight is not None and dtype == torch.float32:
                for block in blocks:
                    grad_weight[block].addmm_(grad_CV[:, block].T, hidden_CD)
            elif grad_weight is not None:
                grad_weight += grad_CV.T @ hidden_CD
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grads[0]).to(ctx.dtypes[0]),
            None if grad_weight is None else (grad_weight * grads[0]).to(ctx.dtypes[1]),
            *[None] * 5,
        )


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    dtype: torch.dtype,
    bias_V: torch.Tensor | None = None,
    left_out_NX: torch.Tensor | None = None,
    chance_NK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Summed cross-entropy of `hidden @ weight.T + bias` against the targets, in nats; products in `dtype`, sums in
    fp32. The bias gets no gradient. At each position the entries in `left_out`, any number of columns, have no share,
    but for the target. With chances, which sum to one at each position, it has K targets in place of one, [N, K]; equal
    targets add up. Where they sum to less, the caller takes off what the rest of the targets has.

    Equals torch's cross_entropy(reduction="sum") on the full logits, values and gradients, up to rounding.
    """
    if not torch.is_grad_enabled():  # otherwise the Function would make gradients, since parameters require them
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, target_N, dtype, bias_V, left_out_NX, chance_NK)


class _LinearDivergence(torch.autograd.Function):
    """Loss and gradients chunk by chunk, the gradients in the forward pass, as for `_LinearCrossEntropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        given_ND: torch.Tensor,
        given_VD: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        low_VD, given_low_VD = weight_VD.to(dtype), given_VD.to(dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden_ND), torch.zeros_like(weight_VD)
        loss = hidden_ND.new_zeros(())
        for start in range(0, len(hidden_ND), CHUNK):
            rows = slice(start, start + CHUNK)
            low_CD = hidden_ND[rows].to(dtype)
            log_CV = (low_CD @ low_VD.T).float().log_softmax(1)
            given_log_CV = (given_ND[rows].to(dtype) @ given_low_VD.T).float().log_softmax(1)
            chance_CV = given_log_CV.exp()
            loss += (chance_CV * given_log_CV.sub_(log_CV)).sum()
            rest_CV = log_CV.exp_().sub_(chance_CV).to(dtype)
            grad_hidden[rows] = rest_CV @ low_VD
            if ctx.needs_input_grad[1]:
                grad_weight += rest_CV.T @ low_CD
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *(each * grads[0] for each in ctx.saved_tensors), None, None, None


def linear_divergence(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    given_ND: torch.Tensor,
    given_VD: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Summed Kullback-Leibler divergence KL(p, q) of q = softmax(hidden @ weight.T) from p = softmax(given @ given
    weight.T), in nats; products in `dtype`, sums in fp32. What is given gets no gradient, and may have another width.
    """
    loss: torch.Tensor = _LinearDivergence.apply(hidden_ND, weight_VD, given_ND, given_VD, dtype)
    return loss


class PackedLoss(nn.Module):
    """A causal language model as a `Trainable` of packed rows (see `TokenStream`), whose forward pass is the loss: the
    one door for sharding, compiling and checkpointing.

    Hidden states meet the output layer only where a target is. Suffixes: R rows, T tokens in a row, N targets, D width.
    """

    def __init__(self, model: Any, *, bf16: bool = False) -> None:
        super().__init__()
        self.module = model
        self.scale = output_scale(model)  # refuses output layers that this loss would get wrong
        self.bf16 = bf16

    def forward(
        self,
        input_ids_RT: torch.Tensor,
        position_ids_RT: torch.Tensor,
        targets_RT: torch.Tensor,
        until_RT: torch.Tensor | None = None,
        weights_RTK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross-entropy summed over the targets that are not IGNORE, in nats: float32, no dimensions.

        With weights, which sum to one, a position has K targets: [R, T, K].
        """
        return self._of_tokens(self._hidden(input_ids_RT, position_ids_RT, until_RT), targets_RT, weights_RTK)

    def _hidden(
        self, input_ids_RT: torch.Tensor, position_ids_RT: torch.Tensor, until_RT: torch.Tensor | None = None
    ) -> torch.Tensor:
        with distributed.autocast(input_ids_RT.device, self.bf16):
            return packed_hidden(self.module, input_ids_RT, position_ids_RT, until_RT)

    def _of_tokens(
        self, hidden_RTD: torch.Tensor, targets_RT: torch.Tensor, weights_RTK: torch.Tensor | None = None
    ) -> torch.Tensor:
        """With weights a position has K targets."""
        _, head = trunk_and_head(self.module)
        targets_PK = (targets_RT[..., None] if weights_RTK is None else targets_RT).flatten(0, 1)
        at_N = (targets_PK[:, 0] != IGNORE).nonzero().squeeze(1)
        hidden_ND, target_NK = hidden_RTD.flatten(0, 1)[at_N], targets_PK[at_N].clamp(min=0)
        if self.scale != 1:
            hidden_ND = hidden_ND * self.scale
        # Sharding hands on what it is given in the number format of its products.
        chance_NK = None if weights_RTK is None else weights_RTK.flatten(0, 1)[at_N].float()
        return linear_cross_entropy(hidden_ND, head.weight, target_NK, self._dtype, chance_NK=chance_NK)

    @property
    def usual(self) -> PackedLoss:
        """The loss that held-out rows are measured by: this one, without what a teacher adds to it."""
        return self

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    def losses(self, rows: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Trainable.losses`."""
        more = rows.get("until"), rows.get("weights")
        return {NEXT_TOKEN: self(rows["input_ids"], rows["position_ids"], rows["targets"], *more)}

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """See `Trainable.parameter_groups`."""
        return decay_matrices(self.module, weight_decay)

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Write a Hugging Face model folder."""
        self.module.save_pretrained(folder, state_dict=dict(weights))


def prepare_loss(
    model: Any,
    *,
    bf16: bool,
    fsdp: bool = False,
    gradient_checkpointing: bool = False,
    torch_compile: bool = False,
) -> PackedLoss:
    """The model as a loss to train. As asked, its blocks are computed again in the backward pass (half the memory or
    less for a third more time), compiled, and spread over the processes.

    Raises ConfigError where the model has no list of blocks or cannot compute them again.
    """
    loss = PackedLoss(model, bf16=bf16)
    if gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", True):
            raise ConfigError(
                f"gradient_checkpointing=true, but {type(model).__name__} does not support it: leave it off"
            )
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if torch_compile:
        for block in blocks_of(model):
            block.compile()
    if fsdp:
        distributed.shard(loss, blocks_of(model), bf16=bf16)
    return loss
