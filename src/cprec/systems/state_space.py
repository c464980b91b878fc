"""State-space layers over histories: the block of Mamba-2 (Dao and Gu 2024) in plain PyTorch.

Each head keeps a state, a matrix that shrinks by a learnt factor at every position and takes the position's value along
a direction of its own; what stands along another direction is read (their equation 2, with one factor for each head):

    state_t = exp(log_decay_t) * state_(t-1) + value_t write_t'        out_t = state_t read_t

Suffixes: R rows, T positions, D width, H heads, P width of a head, E width of all heads, N width of a direction. Rows
are padded on the right; nothing reads what comes after it, so padding changes nothing before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from cprec.systems.dropout import Dropout
from cprec.systems.encoders import Encoder, at_last

EXPAND = 2
"""Width of all heads together, in widths of the input."""
KERNEL = 4
"""Positions that the convolution before the states reads: its own and those before it."""
STEP_SIZES = (1e-3, 1e-1)
"""Step sizes before training, between which they are drawn evenly by their logarithms."""
RATES = (1.0, 16.0)
"""How fast states decay before training, for a step of size 1."""


def scan(
    log_decay_RTH: torch.Tensor, value_RTHP: torch.Tensor, write_RTN: torch.Tensor, read_RTN: torch.Tensor
) -> torch.Tensor:
    """What the states give at each position, one after the other: RTHP. This is the definition; `quadratic` gives the
    same in less time."""
    state_RHPN = value_RTHP.new_zeros(*value_RTHP[:, 0].shape, write_RTN.shape[2])
    out = []
    for place in range(value_RTHP.shape[1]):
        added_RHPN = value_RTHP[:, place, :, :, None] * write_RTN[:, place, None, None]
        state_RHPN = log_decay_RTH[:, place, :, None, None].exp() * state_RHPN + added_RHPN
        out.append((state_RHPN @ read_RTN[:, place, None, :, None]).squeeze(3))
    return torch.stack(out, 1)


def quadratic(
    log_decay_RTH: torch.Tensor, value_RTHP: torch.Tensor, write_RTN: torch.Tensor, read_RTN: torch.Tensor
) -> torch.Tensor:
    """`scan` as a product with a matrix of all pairs of positions, as in attention (Dao and Gu 2024, section 3.2):

        out_t = sum over s <= t of exp(log_decay_(s+1) + ... + log_decay_t) (read_t . write_s) value_s

    Its cost grows with the square of the length, yet on a CPU (one thread, 4 heads of 64, 32 wide directions, with the
    backward pass) it takes a twentieth of the time of `scan` for 50 positions and a third for 1,000.
    """
    total_RHT = log_decay_RTH.transpose(1, 2).cumsum(2)
    between_RHTT = total_RHT[:, :, :, None] - total_RHT[:, :, None, :]
    is_later_TT = torch.ones(between_RHTT.shape[2:], dtype=torch.bool, device=between_RHTT.device).triu(1)
    kept_RHTT = between_RHTT.masked_fill(is_later_TT, -torch.inf).exp()
    weight_RHTT = (read_RTN @ write_RTN.mT)[:, None] * kept_RHTT
    return (weight_RHTT @ value_RTHP.transpose(1, 2)).transpose(1, 2)


class StateSpaceBlock(nn.Module):
    """Values, directions and step sizes of the input, a short convolution over them, the states, and a gate.

    The input may be two: what `source` holds is written into the states, and what the other asks for is read. With
    `gaps` a position's time since the one before moves the size of its step, by a weight of each head that starts at 0.
    """

    def __init__(self, size: int, *, num_heads: int, state_size: int, gaps: bool = False) -> None:
        super().__init__()
        inner = EXPAND * size
        self.num_heads, self.sizes_of_written = num_heads, [inner, state_size]
        self.written, self.asked = nn.Linear(size, inner + state_size), nn.Linear(size, state_size)
        self.step, self.gate = nn.Linear(size, num_heads), nn.Linear(size, inner)
        self.mix_written, self.mix_asked = _Convolution(inner + state_size), _Convolution(state_size)
        self.norm, self.output = nn.RMSNorm(inner), nn.Linear(inner, size)
        self.log_rate = nn.Parameter(torch.empty(num_heads).uniform_(*RATES).log())
        self.by_gap = nn.Parameter(torch.zeros(num_heads)) if gaps else None
        self.skip = nn.Parameter(torch.ones(num_heads))
        step_H = torch.empty(num_heads).uniform_(*map(math.log, STEP_SIZES)).exp()
        with torch.no_grad():
            self.step.bias.copy_(step_H + torch.log(-torch.expm1(-step_H)))  # what softplus makes these step sizes of

    def forward(
        self,
        hidden_RTD: torch.Tensor,
        lengths_R: torch.Tensor,
        source_RTD: torch.Tensor | None = None,
        gap_RT1: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """RTD. A position reads itself and those before it, whatever the lengths are."""
        source_RTD = hidden_RTD if source_RTD is None else source_RTD
        value_RTE, write_RTN = self.mix_written(self.written(source_RTD)).split(self.sizes_of_written, dim=2)
        read_RTN = self.mix_asked(self.asked(hidden_RTD))
        moved_RTH = self.step(source_RTD)
        if self.by_gap is not None and gap_RT1 is not None:
            moved_RTH = moved_RTH + self.by_gap * gap_RT1
        step_RTH = F.softplus(moved_RTH)
        value_RTHP = value_RTE.unflatten(2, (self.num_heads, -1))
        log_decay_RTH = -self.log_rate.exp() * step_RTH
        out_RTHP = quadratic(log_decay_RTH, value_RTHP * step_RTH[..., None], write_RTN, read_RTN)
        out_RTE = (out_RTHP + self.skip[:, None] * value_RTHP).flatten(2)
        gated: torch.Tensor = self.output(self.norm(out_RTE * F.silu(self.gate(hidden_RTD))))
        return gated


class _Convolution(nn.Module):
    """Of each channel by itself, over a position and the `KERNEL` - 1 before it, and a SiLU."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.layer = nn.Conv1d(num_channels, num_channels, KERNEL, groups=num_channels)

    def forward(self, inputs_RTD: torch.Tensor) -> torch.Tensor:
        return F.silu(self.layer(F.pad(inputs_RTD.mT, (KERNEL - 1, 0))).mT)


class PartlyBackwards(nn.Module):
    """A reading of rows whose events, but for the latest `kept`, stand in reverse order; padding stays where it is."""

    def __init__(self, reading: nn.Module, kept: int) -> None:
        super().__init__()
        self.reading, self.kept = reading, kept

    def forward(self, hidden_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        place_T = torch.arange(hidden_RTD.shape[1], device=lengths_R.device)
        last_R1 = (lengths_R - self.kept)[:, None] - 1  # of the events that are reversed
        from_RT = torch.where(place_T <= last_R1, last_R1 - place_T, place_T)
        read: torch.Tensor = self.reading(hidden_RTD.gather(1, from_RT[:, :, None].expand_as(hidden_RTD)), lengths_R)
        return read


class ConvolvedGRU(nn.Module):
    """A GRU over a convolution of each event with its two neighbours in the row."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.near, self.gru = nn.Conv1d(size, size, 3, padding=1), nn.GRU(size, size, bias=False, batch_first=True)

    def forward(self, hidden_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        is_event_RT = torch.arange(hidden_RTD.shape[1], device=lengths_R.device) < lengths_R[:, None]
        read_RTD: torch.Tensor = self.gru(self.near((hidden_RTD * is_event_RT[:, :, None]).mT).mT)[0]
        return read_RTD


class AfterMixing(nn.Module):
    """What follows a mixer of positions: a norm, then two linear layers with a GELU between them and another norm."""

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.norm_mixed, self.norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.first, self.second = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.dropout = Dropout(dropout)

    def forward(self, mixed_RTD: torch.Tensor, beside_RTD: torch.Tensor | None = None) -> torch.Tensor:
        """RTD; `beside_RTD` is added to what was mixed."""
        mixed_RTD = self.dropout(mixed_RTD)
        mixed_RTD = self.norm_mixed(mixed_RTD if beside_RTD is None else mixed_RTD + beside_RTD)
        inner_RTE = self.dropout(F.gelu(self.first(mixed_RTD)))
        out: torch.Tensor = self.norm(mixed_RTD + self.dropout(self.second(inner_RTE)))
        return out


class StateSpace(Encoder):
    """Layers that each mix positions, after a norm of the item vectors.

    A mixer is called with hidden states and the lengths of the rows. Its input is added to what it gives, except in an
    encoder of one layer (Liu et al. 2024, section 3.3).
    """

    def __init__(self, size: int, mixers: Sequence[nn.Module], dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(size), Dropout(dropout)
        self.mixers = nn.ModuleList(mixers)
        self.after = nn.ModuleList([AfterMixing(size, dropout) for _ in mixers])

    def embed(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.norm(self.dropout(inputs_RTD))
        return embedded

    def read(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        hidden_RTD = embedded_RTD
        for mixer, after in zip(self.mixers, self.after, strict=True):
            beside_RTD = hidden_RTD if len(self.mixers) > 1 else None
            hidden_RTD = after(mixer(hidden_RTD, lengths_R), beside_RTD)
        return hidden_RTD

    def read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return at_last(self.read(embedded_RTD, lengths_R), lengths_R)
