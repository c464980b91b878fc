"""Encoders of histories: a mean, self-attention, a recurrent network, two encoders together, latent steps around one.

Suffixes: R rows, T positions, D width, W states of a position, H heads, K latent steps. Rows are padded on the right;
`lengths_R` says how many positions of each are filled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from cprec.systems.dropout import Dropout, dropout

ENCODE_POSITIONS = 4096
"""Positions that are read at once where only a row's last state is asked for: as many as stay in a CPU's cache."""

BlockKind = Literal["pre_norm", "query_norm"]


class Encoder(nn.Module, ABC):
    """Reads the vectors of a history and gives a state at each position, or at the last one alone."""

    @abstractmethod
    def embed(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """The first layer's input, with positions where the encoder has them: RTD."""

    @abstractmethod
    def read(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """The state at each position: RTD."""

    @abstractmethod
    def read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """The state at each row's last filled position (at the first of an empty row): RD."""

    def forward(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """The state at each position: RTD."""
        return self.read(self.embed(inputs_RTD, lengths_R), lengths_R)

    def last(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """The state at each row's last filled position: RD."""
        return self.read_last(self.embed(inputs_RTD, lengths_R), lengths_R)


def at_last(hidden_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
    """What stands at each row's last filled position (at the first of an empty row): RD."""
    every_R = torch.arange(len(lengths_R), device=lengths_R.device)
    return hidden_RTD[every_R, (lengths_R - 1).clamp(min=0)]


class Mean(Encoder):
    """The mean of the vectors up to each position. Rows without items are zeros. `dropout` is the share of entries that
    are left out in training.

    With `gaps`, the last column of the inputs, the mean begins anew at each gap above zero.
    """

    def __init__(self, dropout: float, *, gaps: bool = False) -> None:
        super().__init__()
        self.dropout, self._gaps = Dropout(dropout), gaps

    def embed(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """See `Encoder.embed`. Gaps stay as they are."""
        size = inputs_RTD.shape[2] - self._gaps
        return torch.cat([self.dropout(inputs_RTD[:, :, :size]), inputs_RTD[:, :, size:]], dim=2)

    def read(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        place_T = torch.arange(embedded_RTD.shape[1], device=lengths_R.device)
        first_RT = torch.zeros(embedded_RTD.shape[:2], dtype=torch.int64, device=lengths_R.device)
        if self._gaps:
            first_RT = torch.where(embedded_RTD[:, :, -1] > 0, place_T, 0).cummax(1).values
            embedded_RTD = embedded_RTD[:, :, :-1]
        sums_RTD = F.pad(embedded_RTD.cumsum(1), (0, 0, 1, 0))
        before_RTD = sums_RTD.gather(1, first_RT[:, :, None].expand_as(embedded_RTD))
        return (sums_RTD[:, 1:] - before_RTD) / (place_T + 1 - first_RT)[:, :, None]

    def read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return at_last(self.read(embedded_RTD, lengths_R), lengths_R) * (lengths_R > 0)[:, None]


class SelfAttention(Encoder):
    """Transformer blocks over item and position vectors.

    A causal one reads up to each position, and needs no mask, since padding comes after the items. The other reads the
    whole row without its padding. Each position asks for as many positions up to it as `span` says; see `Block`.

    With `time_angles` the last column of the inputs is how long after the position before each one was. Queries and
    keys are turned by angles in proportion to the time since the row began (`turned`), so that attention knows how much
    time lies between two positions. They still have vectors of positions.
    """

    def __init__(
        self,
        size: int,
        *,
        max_length: int,
        num_blocks: int,
        num_heads: int,
        dropout: float,
        causal: bool,
        attention_dropout: float = 0.0,
        block: BlockKind = "pre_norm",
        span: int = 1,
        time_angles: bool = False,
    ) -> None:
        super().__init__()
        self.causal, self.time_angles = causal, time_angles
        self.position = nn.Embedding(max_length + 1, size)
        drops = {"dropout": dropout, "attention_dropout": attention_dropout}
        blocks = [Block(size, num_heads, causal, block, span=span, **drops) for _ in range(num_blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(size)
        self.dropout = Dropout(dropout)

    def embed(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """See `Encoder.embed`. Positions are counted from a row's last item back, so that the latest items of long and
        short histories have the same ones. All that stand farther back than `max_length` have the last one."""
        inputs_RTD, gaps_RT1 = self._parts(inputs_RTD)
        place_T = torch.arange(inputs_RTD.shape[1], device=inputs_RTD.device)
        position_RT = (lengths_R[:, None] - 1 - place_T).clamp(0, self.position.num_embeddings - 1)
        # Kang and McAuley (2018) scale the items' vectors, so that scores begin small and inputs do not.
        scale = inputs_RTD.shape[2] ** 0.5
        embedded: torch.Tensor = self.dropout(inputs_RTD * scale + self.position(position_RT))
        return torch.cat([embedded, gaps_RT1.cumsum(1)], dim=2) if gaps_RT1 is not None else embedded

    def _parts(self, whole_RTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Vectors, and the last column where it is of times: RTD, [R, T, 1]."""
        return (whole_RTD[:, :, :-1], whole_RTD[:, :, -1:]) if self.time_angles else (whole_RTD, None)

    def read(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        (normed,) = self.read_after(embedded_RTD, lengths_R, [len(self.blocks)])
        return normed

    def read_after(
        self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor, counts: Sequence[int]
    ) -> list[torch.Tensor]:
        """The state at each position after so many blocks, for each of some counts in rising order: RTD each. After the
        last block it is what `read` gives, with the norm."""
        mask_R11T, (hidden_RTD, time_RT1) = self._mask(embedded_RTD, lengths_R), self._parts(embedded_RTD)
        found = []
        for count, block in enumerate(self.blocks, 1):
            hidden_RTD = block(hidden_RTD, mask_R11T, time_RT1)
            if count in counts:
                found.append(hidden_RTD if count < len(self.blocks) else self.norm(hidden_RTD))
        return found

    def read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """See `Encoder.read_last`: the last block works at one position only."""
        if not self.training:
            num_rows = max(1, ENCODE_POSITIONS // embedded_RTD.shape[1])
            parts = zip(embedded_RTD.split(num_rows), lengths_R.split(num_rows), strict=True)
            return torch.cat([self._read_last(*part) for part in parts])
        return self._read_last(embedded_RTD, lengths_R)

    def _read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        mask_R11T, (hidden_RTD, time_RT1) = self._mask(embedded_RTD, lengths_R), self._parts(embedded_RTD)
        *earlier, last = self.blocks
        for block in earlier:
            hidden_RTD = block(hidden_RTD, mask_R11T, time_RT1)
        place_R = (lengths_R - 1).clamp(min=0)
        if mask_R11T is None:  # the last position reads itself and those before it
            mask_R11T = (torch.arange(hidden_RTD.shape[1], device=place_R.device) <= place_R[:, None])[:, None, None]
        assert isinstance(last, Block)
        normed: torch.Tensor = self.norm(last.at(hidden_RTD, place_R, mask_R11T, time_RT1))
        return normed

    def _mask(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor | None:
        """Which positions may be read; None where the order alone decides."""
        if self.causal:
            return None
        place_T = torch.arange(embedded_RTD.shape[1], device=embedded_RTD.device)
        return (place_T < lengths_R[:, None])[:, None, None]


class Block(nn.Module):
    """Attention, then two linear layers as wide as the states; each is added to what it reads.

    - `pre_norm`: both read a norm of their input and are added to the input itself. Their outputs are dropped out, and
      a GELU is between the linear layers.
    - `query_norm`: queries alone read a norm; keys and values read the input. The linear layers read a norm of the sum
      and are added to that norm. Dropped out are the linear layers' output and that of the ReLU between them. So is the
      code of Kang and McAuley (2018), with attention weights dropped out too; there attention has no output layer, and
      is added to the norm that queries read.

    With a `span` above 1 the query of a position, and what attention is added to, is the mean of its input over so many
    positions, the last of which is its own: a long query (Zhu et al. 2024). Keys and values stay those of positions.
    """

    def __init__(
        self,
        size: int,
        num_heads: int,
        causal: bool,
        kind: BlockKind,
        *,
        dropout: float,
        attention_dropout: float,
        span: int = 1,
    ) -> None:
        """`attention_dropout` is the share of attention weights that is left out in training."""
        super().__init__()
        self.num_heads, self.causal, self.span = num_heads, causal, span
        self.attention_dropout, self.only_queries = attention_dropout, kind == "query_norm"
        self.norm_attention, self.norm_linear = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query_key_value, self.output = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)
        self.dropout = Dropout(dropout)

    def forward(
        self, hidden_RTD: torch.Tensor, mask_R11T: torch.Tensor | None, time_RT1: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The block's output at each position; with times queries and keys are `turned` by them."""
        rows, length, size = hidden_RTD.shape
        own_RTD, asking_RTD, read_RTD = self._inputs(hidden_RTD)
        if asking_RTD is read_RTD:
            projected = self.query_key_value(read_RTD)
        else:
            projected = torch.cat([self._query(asking_RTD), self._key_value(read_RTD)], dim=2)
        parts = projected.view(rows, length, 3, self.num_heads, -1)
        query_RHTD, key_RHTD, value_RHTD = parts.permute(2, 0, 3, 1, 4)
        if time_RT1 is not None:
            query_RHTD, key_RHTD = (turned(each, time_RT1[:, None]) for each in (query_RHTD, key_RHTD))
        read = self._attend(query_RHTD, key_RHTD, value_RHTD, mask_R11T)
        return self._rest(own_RTD, read.transpose(1, 2).reshape(rows, length, size))

    def _attend(
        self, query_RHTD: torch.Tensor, key_RHTD: torch.Tensor, value_RHTD: torch.Tensor, mask_R11T: torch.Tensor | None
    ) -> torch.Tensor:
        """What each position reads: RHTD."""
        share = self.attention_dropout if self.training else 0.0
        if not share or query_RHTD.device.type != "cpu":
            return F.scaled_dot_product_attention(
                query_RHTD, key_RHTD, value_RHTD, attn_mask=mask_R11T, dropout_p=share, is_causal=self.causal
            )
        # By hand, since the fused function drops out slowly on CPUs.
        score_RHTT = query_RHTD @ key_RHTD.transpose(2, 3) * query_RHTD.shape[3] ** -0.5
        if mask_R11T is None and self.causal:
            mask_R11T = torch.ones(score_RHTT.shape[2:], dtype=torch.bool).tril()
        if mask_R11T is not None:
            score_RHTT = score_RHTT.masked_fill(~mask_R11T, torch.finfo(score_RHTT.dtype).min)
        return dropout(score_RHTT.softmax(-1), share, training=True) @ value_RHTD

    def at(
        self,
        hidden_RTD: torch.Tensor,
        place_R: torch.Tensor,
        mask_R11T: torch.Tensor,
        time_RT1: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The block's output at one position of each row, which reads what the mask shows it: RD."""
        rows, length, size = hidden_RTD.shape
        own_RTD, asking_RTD, read_RTD = self._inputs(hidden_RTD)
        every_R = torch.arange(rows, device=place_R.device)
        # Keys and values are needed at all positions, the query at one.
        query_RHD = self._query(asking_RTD[every_R, place_R]).view(rows, self.num_heads, -1)
        parts = self._key_value(read_RTD).view(rows, length, 2, self.num_heads, -1)
        key_RHTD, value_RHTD = parts.permute(2, 0, 3, 1, 4)
        if time_RT1 is not None:
            query_RHD = turned(query_RHD, time_RT1[every_R, place_R][:, None])
            key_RHTD = turned(key_RHTD, time_RT1[:, None])
        query_RHD1 = query_RHD[..., None]
        # Attention by hand: for a single query it is quicker than the fused function.
        score_RH1T = (key_RHTD @ query_RHD1).transpose(2, 3) * query_RHD1.shape[2] ** -0.5
        share_RH1T = score_RH1T.masked_fill(~mask_R11T, -torch.inf).softmax(-1)
        share_RH1T = dropout(share_RH1T, self.attention_dropout, training=self.training)
        return self._rest(own_RTD[every_R, place_R], (share_RH1T @ value_RHTD).reshape(rows, size))

    def _inputs(self, hidden_RTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What attention is added to, what queries read, and what keys and values read: RTD each."""
        own_RTD = trailing_means(hidden_RTD, self.span)
        asking_RTD = self.norm_attention(own_RTD)
        if self.only_queries:
            return own_RTD, asking_RTD, hidden_RTD
        return own_RTD, asking_RTD, asking_RTD if self.span == 1 else self.norm_attention(hidden_RTD)

    def _query(self, asking: torch.Tensor) -> torch.Tensor:
        size = asking.shape[-1]
        return F.linear(asking, self.query_key_value.weight[:size], self.query_key_value.bias[:size])

    def _key_value(self, read_RTD: torch.Tensor) -> torch.Tensor:
        size = read_RTD.shape[-1]
        return F.linear(read_RTD, self.query_key_value.weight[size:], self.query_key_value.bias[size:])

    def _rest(self, hidden: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """The block after its attention, at any positions."""
        if self.only_queries:
            hidden = self.norm_linear(hidden + self.output(read))
            between = self.dropout(F.relu(self.first(hidden)))
        else:
            hidden = hidden + self.dropout(self.output(read))
            between = F.gelu(self.first(self.norm_linear(hidden)))
        out: torch.Tensor = hidden + self.dropout(self.second(between))
        return out


def turned(vectors: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """Vectors, [..., D] of an even D, turned by angles in proportion to times, [..., 1]: pair i of their numbers, those
    at i and D / 2 + i, by time * 10000 ** (-2 i / D) (Su et al. 2021, with times for positions).

    Products of two turned vectors depend on the difference of their times alone.

    >>> turned(torch.tensor([[1.0, 0.0]]), torch.tensor([[torch.pi / 2]])).round(decimals=3).abs().tolist()
    [[0.0, 1.0]]
    """
    half = vectors.shape[-1] // 2
    angle = time * 10_000 ** (-torch.arange(half, device=vectors.device) / half)
    first, second = vectors.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def trailing_means(hidden_RTD: torch.Tensor, span: int) -> torch.Tensor:
    """At each position the mean over the last `span` positions up to it, over as many as there are at the start: RTD.

    >>> trailing_means(torch.tensor([[[1.0], [3.0], [8.0]]]), 2).squeeze().tolist()
    [1.0, 2.0, 5.5]
    """
    if span == 1:
        return hidden_RTD
    length = hidden_RTD.shape[1]
    sums_RTD = torch.stack([F.pad(hidden_RTD, (0, 0, lag, 0))[:, :length] for lag in range(span)]).sum(0)
    count_T = torch.arange(1, length + 1, device=hidden_RTD.device).clamp(max=span)
    return sums_RTD / count_T[:, None]


class Layers(Encoder):
    """Self-attention that gives, at each position, its states after several counts of blocks: RTWD. For the last
    position alone, as in ranking, it gives the state after all blocks: RD."""

    def __init__(self, encoder: SelfAttention, counts: Sequence[int]) -> None:
        """`counts` rise, and the last of them is that of all blocks."""
        super().__init__()
        self.encoder, self._counts = encoder, tuple(counts)

    def embed(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return self.encoder.embed(inputs_RTD, lengths_R)

    def read(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.encoder.read_after(embedded_RTD, lengths_R, self._counts), 2)

    def read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return self.encoder.read_last(embedded_RTD, lengths_R)


class TwoEncoders(Encoder):
    """The mean of the states of two encoders that read the same input, where the first one weighs `share`; scores are
    the mean of theirs, since items have one vector. Positions are the first one's."""

    def __init__(self, first: SelfAttention, second: SelfAttention, share: float) -> None:
        super().__init__()
        self.first, self.second, self._share = first, second, share
        del second.position

    def embed(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return self.first.embed(inputs_RTD, lengths_R)

    def read(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return self._mean(self.first.read(embedded_RTD, lengths_R), self.second.read(embedded_RTD, lengths_R))

    def read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return self._mean(self.first.read_last(embedded_RTD, lengths_R), self.second.read_last(embedded_RTD, lengths_R))

    def _mean(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return self._share * first + (1 - self._share) * second


class Recurrent(Encoder):
    """GRU layers over item vectors, and a linear layer back to the space of the items."""

    def __init__(self, size: int, *, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.GRU(size, size, num_layers, batch_first=True, dropout=dropout if num_layers > 1 else 0.0)
        self.output = nn.Linear(size, size)
        self.dropout = Dropout(dropout)

    def embed(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.dropout(inputs_RTD)
        return embedded

    def read(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        read_RTD, _ = self.layers(embedded_RTD)
        hidden_RTD: torch.Tensor = self.output(self.dropout(read_RTD))
        return hidden_RTD

    def read_last(self, embedded_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        return at_last(self.read(embedded_RTD, lengths_R), lengths_R)


class LatentSteps(nn.Module):
    """Lets an encoder read its own last state again, K times, before it answers (Tang et al. 2025, equations 4 to 6).

    After each step the state, with a vector that says which step it is, stands at the end of the row as if it were one
    more item. The encoder's own weights are all that reads it. Position vectors of items do not move.
    """

    def __init__(self, encoder: Encoder, num_steps: int, size: int, *, noise: float = 0.0) -> None:
        """`noise` is the standard deviation of Gaussian noise that a second row of the same history has in what stands
        at its end, in training alone (their section 3.4)."""
        super().__init__()
        self.encoder, self.num_steps, self.noise = encoder, num_steps, noise
        self.step = nn.Embedding(num_steps, size).requires_grad_(num_steps > 0)

    def last(self, inputs_RTD: torch.Tensor, lengths_R: torch.Tensor) -> torch.Tensor:
        """The state before the first step and after each: [R, K + 1, D]. In training with noise the states of the row
        with noise after each step follow: [R, 2 K + 1, D]."""
        read_RTD = noisy_RTD = self.encoder.embed(inputs_RTD, lengths_R)
        lengths_R = lengths_R.clamp(min=1)
        states, noisy_states = [self.encoder.read_last(read_RTD, lengths_R)], []
        for number in range(self.num_steps):
            thought_RD = states[-1] + self.step.weight[number]
            read_RTD = placed(read_RTD, lengths_R, thought_RD[:, None])
            states.append(self.encoder.read_last(read_RTD, lengths_R + 1))
            if self.training and self.noise:
                thought_RD = thought_RD + self.noise * torch.randn_like(thought_RD)
                noisy_RTD = placed(noisy_RTD, lengths_R, thought_RD[:, None])
                noisy_states.append(self.encoder.read_last(noisy_RTD, lengths_R + 1))
            lengths_R = lengths_R + 1
        return torch.stack(states + noisy_states, 1)


def placed(read_RTD: torch.Tensor, start_R: torch.Tensor, added_RMD: torch.Tensor) -> torch.Tensor:
    """Rows that are M positions longer, with some vectors from a place of each row's own on: [R, T + M, D]."""
    num_added = added_RMD.shape[1]
    place_RM = start_R[:, None] + torch.arange(num_added, device=start_R.device)
    row_R1 = torch.arange(len(start_R), device=start_R.device)[:, None]
    return F.pad(read_RTD, (0, 0, 0, num_added)).index_put((row_R1, place_RM), added_RMD)
