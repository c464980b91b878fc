"""Attention inside documents only, for packed rows on a CPU: nothing is computed between documents and thrown away.

Attention over whole rows with a mask costs row length squared, and most of that lies between documents. Here documents
of about the same length are taken out of their rows and attended to together, short ones by plain products of matrices,
which on a CPU beat the fused kernel (docs/experiments.md has the figures).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from cprec.models import DOCUMENTS

SHORT = 512
"""Longest documents whose attention weights are written out."""
ROUND = 32
"""Documents whose lengths, rounded up to a multiple of this, are equal are attended to together."""


def use_document_attention(model: Any, *, compiled: bool = False) -> None:
    """Let a model attend by `document_attention`. Rows must then be packed and read without a cache.

    With `compiled` blocks, this function itself is not compiled: its shapes change with every batch. Blocks that
    are also recomputed in the backward pass must be compiled whole, so they cannot use it.
    """
    AttentionInterface.register(
        DOCUMENTS, torch.compiler.disable(document_attention) if compiled else document_attention
    )
    AttentionMaskInterface.register(DOCUMENTS, lambda *_, **__: None)
    model.set_attn_implementation(DOCUMENTS)


def document_attention(
    module: Any,
    query_RHTD: torch.Tensor,
    key_RGTD: torch.Tensor,
    value_RGTD: torch.Tensor,
    attention_mask: None,
    *,
    position_ids: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    until: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within the documents of packed rows, where `position_ids` [R or 1, T] restart at 0.

    The signature is that of transformers: heads H in G groups of keys and values; returns [R, T, H, D] and no weights.
    A `sliding_window` limits how far back a position sees. `until` [R, T], where documents may be trees, is the place
    in the row before which the tokens that read each token end.
    """
    rows, heads, tokens, width = query_RHTD.shape
    device = query_RHTD.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else query_RHTD.dtype
    scale = width**-0.5 if scaling is None else scaling
    # All tokens of all rows one after the other, so that documents can be picked by the places of their tokens.
    flat = [
        states.transpose(1, 2).reshape(rows * tokens, -1).to(dtype) for states in (query_RHTD, key_RGTD, value_RGTD)
    ]
    buckets, standing = _buckets(position_ids, until, rows)
    out = []
    # Documents of about one length at a time, as a batch without gaps: N documents of L tokens.
    for place_NL, seen in buckets:
        num, longest = place_NL.shape
        query, key, value = (
            states.index_select(0, place_NL.flatten()).view(num, longest, -1, width).transpose(1, 2) for states in flat
        )
        groups = heads // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        if sliding_window is not None:
            position_NL = position_ids.expand(rows, -1).flatten()[place_NL]
            seen = seen & (position_NL[:, None, :, None] - position_NL[:, None, None, :] < sliding_window)
        if longest <= SHORT and not dropout:
            found = _PlainAttention.apply(query, key, value, ~seen, scale)
        else:
            found = scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropout, scale=scale)
        out.append(found.transpose(1, 2).reshape(num * longest, heads * width))
    # Put each token's result back where the token stands in the rows.
    return torch.cat(out).index_select(0, standing).view(rows, tokens, heads, width), None


class _PlainAttention(torch.autograd.Function):
    """softmax(q k' scale) v with the weights written out: fewer passes over them than autograd would make."""

    @staticmethod
    def forward(
        ctx: Any,
        query_NHLD: torch.Tensor,
        key_NHLD: torch.Tensor,
        value_NHLD: torch.Tensor,
        hidden_LL: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        scores_NHLL = torch.matmul(query_NHLD * scale, key_NHLD.transpose(-1, -2)).float()
        scores_NHLL.masked_fill_(hidden_LL, -torch.inf)
        weights_NHLL = torch.softmax(scores_NHLL, -1).to(query_NHLD.dtype)
        out_NHLD = torch.matmul(weights_NHLL, value_NHLD)
        ctx.save_for_backward(query_NHLD, key_NHLD, value_NHLD, weights_NHLL, out_NHLD)
        ctx.scale = scale
        return out_NHLD

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, weights, out = ctx.saved_tensors
        # For p = softmax(s): ds = p * (dp - sum(p * dp)), and sum(p * dp) over keys is the sum of out * dout.
        grad = grads[0].to(out.dtype)
        of_value = torch.matmul(weights.transpose(-1, -2), grad)
        of_scores = torch.matmul(grad, value.transpose(-1, -2))
        of_scores.sub_((grad * out).sum(-1, keepdim=True)).mul_(weights).mul_(ctx.scale)
        return torch.matmul(of_scores, key), torch.matmul(of_scores.transpose(-1, -2), query), of_value, None, None


Buckets = list[tuple[torch.Tensor, torch.Tensor]]


def _buckets(position_ids: torch.Tensor, until: torch.Tensor | None, rows: int) -> tuple[Buckets, torch.Tensor]:
    """Places of the documents' tokens, [documents, length], by bucket of length, each with what sees what; and for each
    token of the rows, its place in the buckets one after the other.

    The former is bool [length, length], of trees [documents, 1, length, length]: whether the first sees the second.

    Computed once for all layers of a step, and kept on the position ids. A shorter document is filled up with its last
    token, which no earlier token sees.
    """
    known: tuple[Buckets, torch.Tensor] | None = getattr(position_ids, "_buckets", None)
    if known is not None:
        return known
    # A document begins wherever a position is 0, and ends where the next one begins.
    positions = position_ids.expand(rows, -1).flatten()
    starts = (positions == 0).nonzero().squeeze(1)
    lengths = torch.diff(pad(starts, (0, 1), value=len(positions)))
    rounded = (lengths + ROUND - 1) // ROUND * ROUND
    buckets, standing, first = [], torch.empty_like(positions), 0
    for size in rounded.unique().tolist():
        mine = rounded == size
        longest = int(lengths[mine].max())
        within = torch.arange(longest, device=positions.device)
        place = starts[mine, None] + torch.minimum(within, lengths[mine, None] - 1)
        real = within < lengths[mine, None]
        standing[place[real]] = first + real.flatten().nonzero().squeeze(1)
        seen = torch.ones(longest, longest, dtype=torch.bool, device=positions.device).tril()
        if until is not None:
            # From the row's start to the document's. What fills a document up sees itself, lest it see nothing.
            ends = until.flatten()[place] - (starts[mine, None] % position_ids.shape[-1])
            seen = seen & (within[:, None] < ends[:, None, None, :]) | torch.eye(longest, dtype=torch.bool).to(seen)
        buckets.append((place, seen))
        first += place.numel()
    position_ids._buckets = buckets, standing  # type: ignore[attr-defined]
    return buckets, standing
