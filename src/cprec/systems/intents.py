"""Intents of a history, which a frozen encoder distils, and reasoning that is anchored in them (Shao and Zhou 2025).

Suffixes: R rows, T positions, D width, P prefix tokens, M intents, H heads.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn
from torch.nn import functional as F

from cprec.systems.dropout import Dropout
from cprec.systems.encoders import SelfAttention, placed


class Distiller(nn.Module):
    """Reads prefix tokens, a history and a slot for each intent with a frozen encoder; the states of the slots, through
    a small network, are the intents. The tokens and the network are trained."""

    def __init__(self, encoder: SelfAttention, size: int, *, num_prefix: int, num_intents: int) -> None:
        """The encoder is copied as it is now; `adopt` copies it again."""
        super().__init__()
        self.encoder = deepcopy(encoder).requires_grad_(False)
        self.prefix_PD, self.slot_MD = (nn.Parameter(torch.randn(count, size)) for count in (num_prefix, num_intents))
        self.project = nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.Linear(size, size))

    def adopt(self, encoder: SelfAttention) -> None:
        """Take over an encoder's weights."""
        self.encoder.load_state_dict(encoder.state_dict())

    def forward(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """The intents: RMD. Item vectors get no gradient, and nothing is dropped out."""
        self.encoder.eval()
        start_R = len(self.prefix_PD) + lengths_R.clamp(min=1)
        read_RTD = self.encoder.embed(inputs_RTD, lengths_R)
        read_RTD = torch.cat([self.prefix_PD.expand(len(read_RTD), -1, -1), read_RTD], 1)
        read_RTD = placed(read_RTD, start_R, self.slot_MD.expand(len(read_RTD), -1, -1))
        place_RM = start_R[:, None] + torch.arange(len(self.slot_MD), device=start_R.device)
        hidden_RTD = self.encoder.read(read_RTD, start_R + len(self.slot_MD))
        intents_RMD: torch.Tensor = self.project(torch.take_along_dim(hidden_RTD, place_RM[..., None], 1))
        return intents_RMD


class Reading(nn.Module):
    """What one state reads from others by attention: RD; zeros before training."""

    def __init__(self, size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.norm, self.dropout = num_heads, nn.LayerNorm(size), Dropout(dropout)
        self.query, self.key_value = nn.Linear(size, size), nn.Linear(size, 2 * size)
        self.output = at_zero(nn.Linear(size, size))

    def forward(
        self, state_RD: torch.Tensor, others_RMD: torch.Tensor, is_there_RM: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows, count, size = others_RMD.shape
        query_RH1D = self.query(self.norm(state_RD)).view(rows, self.num_heads, 1, -1)
        key_RHMD, value_RHMD = (
            self.key_value(others_RMD).view(rows, count, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        )
        mask_R11M = None if is_there_RM is None else is_there_RM[:, None, None]
        read_RH1D = F.scaled_dot_product_attention(query_RH1D, key_RHMD, value_RHMD, attn_mask=mask_R11M)
        read: torch.Tensor = self.dropout(self.output(read_RH1D.reshape(rows, size)))
        return read


class IntentSteps(nn.Module):
    """The last state of an encoder, after K steps in each of which it reads the intents, then the history, then goes
    through a small network; all steps share these, and each has a vector of its own.

    Every part of a step is added to the state and is zero before training, so that training begins at the encoder.
    """

    def __init__(
        self,
        encoder: SelfAttention,
        distiller: Distiller,
        size: int,
        *,
        num_steps: int,
        num_heads: int,
        dropout: float,
        mask_share: float,
    ) -> None:
        """In training there are two copies of each history in which `mask_share` of the items are masked; 0: none."""
        super().__init__()
        self.encoder, self.distiller, self.mask_share = encoder, distiller, mask_share
        self.step = nn.Embedding(num_steps, size)
        self.from_intents, self.from_history = (Reading(size, num_heads, dropout) for _ in range(2))
        self.norm, self.first, self.second = nn.LayerNorm(size), nn.Linear(size, size), at_zero(nn.Linear(size, size))
        self.dropout, self.mask_D = Dropout(dropout), nn.Parameter(torch.zeros(size))

    def last(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """The state after all steps: [R, 1, D]. In training the intents of both copies follow: [R, 1 + 2 M, D]."""
        hidden_RTD = self.encoder(inputs_RTD, lengths_R)
        items_RTD, num_rows = inputs_RTD.detach(), len(lengths_R)
        if self.training and self.mask_share:
            masked_2RT1 = torch.rand(2, *items_RTD.shape[:2], 1, device=items_RTD.device) < self.mask_share
            items_RTD = torch.cat([items_RTD, *self.mask_D.where(masked_2RT1, items_RTD)])
        all_intents = self.distiller(items_RTD, lengths_R.repeat(len(items_RTD) // num_rows))
        intents_RMD, *copies = all_intents.unflatten(0, (-1, num_rows))
        place_T = torch.arange(hidden_RTD.shape[1], device=lengths_R.device)
        is_there_RT = place_T < lengths_R.clamp(min=1)[:, None]
        state_RD = hidden_RTD[torch.arange(num_rows, device=lengths_R.device), (lengths_R - 1).clamp(min=0)]
        for step_D in self.step.weight:
            state_RD = state_RD + self.from_intents(state_RD + step_D, intents_RMD)
            state_RD = state_RD + self.from_history(state_RD + step_D, hidden_RTD, is_there_RT)
            state_RD = state_RD + self.dropout(self.second(F.gelu(self.first(self.norm(state_RD)))))
        return torch.cat([state_RD[:, None], *copies], 1)


def at_zero(linear: nn.Linear) -> nn.Linear:
    """A layer that gives zeros before training."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear
