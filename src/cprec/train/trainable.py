"""What the training loop takes: something with losses, and a stream of batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from cprec.batch import Batch


class Trainable(Protocol):
    """A module with its losses. The module's trainable parameters are what the loop optimises, clips and saves."""

    @property
    def module(self) -> nn.Module:
        """All weights. The loop moves it between `train()` and `eval()`, and checkpoints hold its state dict."""
        ...

    def losses(self, rows: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Each loss term by name: summed over the rows of a micro-batch (a batch's arrays, as tensors on the module's
        device), times its weight, without dimensions.

        The loop divides each term by the batch's count of the same name, adds them up and backpropagates. Rows without
        anything to learn (`Batch.blank`) must give 0.
        """
        ...

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Parameter groups for AdamW that hold each trainable parameter of the module once; see `decay_matrices`. One
        with `rate_share` has that share of the learning rate."""
        ...

    def save(self, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
        """Write whole tensors (the module's state dict on the CPU) into a folder, as *.safetensors and what else opens
        them."""
        ...


class Stream(Protocol):
    """What is trained on: batches in a fixed order, each a pure function of its step.

    Batches are made in a background thread, one ahead of the step under way.
    """

    @property
    def num_steps(self) -> int: ...

    @property
    def num_tokens(self) -> int:
        """Of all steps."""
        ...

    def batch(self, step: int) -> Batch:
        """The rows of a step; it needs no earlier step."""
        ...


def decay_matrices(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay, norms and biases do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(trainable: Trainable, *, weight_decay: float, beta2: float = 0.95) -> torch.optim.AdamW:
    """AdamW (0.9, `beta2`) over all trainable parameters. The learning rate is set at each step.

    Raises ValueError if the groups leave out or add parameters: what is optimised is what is clipped and saved.
    """
    groups = trainable.parameter_groups(weight_decay)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = {
        id(parameter): name for name, parameter in trainable.module.named_parameters() if parameter.requires_grad
    }
    if sorted(grouped) != sorted(trained):
        left_out = [name for key, name in trained.items() if key not in grouped]
        raise ValueError(
            f"parameter_groups of {type(trainable).__name__} must hold each trainable parameter of its module once: "
            f"left out {left_out or 'none'}, {len(grouped)} given, {len(trained)} there"
        )
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta2), fused=True)
