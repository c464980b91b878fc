"""Whether a model is one that CPRec reads rightly, found by running it on a few tokens: the scale of its logits, its
attention, and that packed documents do not see each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from cprec.errors import ConfigError
from cprec.models import SUPPORTED, attending_by, context_of, inner_model, packed_hidden, trunk_and_head


def output_scale(model: Any) -> float:
    """The constant that the output layer's result is multiplied by to give logits: 1 for most models, another number
    for some (Cohere, Granite). It is found by running the model once, and remembered with it.

    Raises ConfigError, with the name of the architecture, if logits are anything else than such a multiple.
    """
    inner = inner_model(model)
    if not hasattr(inner, "_output_scale"):
        inner._output_scale = _measured_scale(inner)
    return float(inner._output_scale)


@torch.no_grad()
def _measured_scale(inner: Any) -> float:
    name = type(inner).__name__
    trunk, head = trunk_and_head(inner)
    ids, positions = _few_tokens(inner)
    with _exactly(inner):
        try:
            logits = inner(input_ids=ids, position_ids=positions, use_cache=False).logits.double()
            ours = head(trunk(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state).double()
        except _UNFIT as unfit:
            raise ConfigError(f"{name} does not read tokens and their positions alone ({unfit}){SUPPORTED}") from unfit
    scale, error = 1.0, torch.inf
    if logits.shape == ours.shape:
        # The least-squares solution of logits = scale * ours, and how far from it the worst logit is.
        measured = float((logits * ours).sum() / ours.square().sum())
        scale = _number_of_config(inner.config, measured) if math.isfinite(measured) else 1.0
        error = float((logits - scale * ours).abs().max() / logits.abs().max())
    if error > _tolerance(inner):  # logits that are not finite are found where scores are made
        raise ConfigError(
            f"{name} does more between its last layer and its logits than to multiply by a constant (relative "
            f"difference {error:.2g}), so its loss and its scores would be those of another model{SUPPORTED}"
        )
    return scale


_UNFIT = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""Errors of models that cannot be called as we call them."""


def _number_of_config(config: Any, measured: float) -> float:
    """The number in a model's configuration (or its inverse) that a measured number stands for; 1 comes first."""
    numbers = [1.0]
    for value in config.get_text_config().to_dict().values():
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) < float("inf"):
            numbers += [float(value), 1 / value]
    nearest = min(numbers, key=lambda number: abs(number - measured))
    return nearest if abs(nearest - measured) <= 1e-4 * abs(measured) else measured


def _tolerance(model: Any) -> float:
    """The largest relative difference that rounding explains."""
    return 1e-5 if next(model.parameters()).dtype == torch.float32 else 2e-2


@contextmanager
def _exactly(inner: Any) -> Iterator[None]:
    """For the block, the model runs without dropout, in its own precision, with attention that takes any input."""
    was_training = inner.training
    inner.eval()
    own = str(getattr(inner.config, "_attn_implementation", ""))
    takes_any = not own.startswith(("flash", "flex"))
    try:
        with (
            nullcontext() if takes_any else attending_by(inner, "sdpa"),
            torch.autocast(next(inner.parameters()).device.type, enabled=False),
        ):
            yield
    finally:
        inner.train(was_training)


def _few_tokens(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A row of tokens and their positions, twelve or as many as the model can read: [1, T] each."""
    device = next(model.parameters()).device
    num_tokens, num_rows = min(12, context_of(model) or 12), model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(3, 3 + num_tokens, device=device) % num_rows
    return ids[None], torch.arange(len(ids), device=device)[None]


@torch.no_grad()
def check_weights(model: Any) -> None:
    """Raises ConfigError, with the name of a weight, if one is not finite."""
    for name, weight in model.named_parameters():
        if weight.numel() and not torch.isfinite(torch.stack(torch.aminmax(weight))).all():
            raise ConfigError(
                f"the weights of this model are not finite: {name} has NaN or infinity in it. The file is damaged, or "
                "the training that wrote it diverged: take another model, or an earlier checkpoint"
            )


PROBE = "cprec_probe"
"""The name that `check_attention` registers its attention with transformers under."""


class _Probe:
    """Plain causal attention that records its arguments."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.windows: set[int | None] = set()
        self.masked: set[int | None] = set()
        """The windows that the model asks masks for."""
        self.unknown: set[str] = set()
        self.positions = True

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        *,
        tree: _Probe,  # required, as by what reads trees: the model must hand on what it is called with
        scaling: float | None = None,
        sliding_window: int | None = None,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        assert tree is self
        self.layers.append(module.layer_idx)
        self.windows.add(sliding_window)
        self.positions &= more.get("position_ids") is not None
        self.unknown |= {name for name in ("s_aux", "softcap") if more.get(name) is not None}
        if value.shape != key.shape:
            self.unknown.add("values of another width than keys")
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
        seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
        if sliding_window is not None:
            seen = seen.triu(1 - sliding_window)
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
        return found.transpose(1, 2), None


@torch.no_grad()
def check_attention(model: Any) -> bool:
    """Check that the attention of this model may be replaced by a function of ours, as it is to read trees of titles.

    Such a function gets the queries, keys and values of each layer, a scale and a window. Anything else that a model
    has is lost: sinks, soft caps, position biases, chunks, layers without attention, layers that run twice. Returns
    whether the function also gets the positions. Raises ConfigError, with the name of the architecture, if something
    is lost.
    """
    inner, probe = inner_model(model), _Probe()
    AttentionInterface.register(PROBE, probe.attend)
    AttentionMaskInterface.register(PROBE, lambda *_, local_size=None, **__: probe.masked.add(local_size))
    trunk, _ = trunk_and_head(inner)
    ids, positions = _few_tokens(inner)
    found, why = None, ""
    with _exactly(inner):
        expected = trunk(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.double()
        try:
            with attending_by(trunk, PROBE):
                found = trunk(input_ids=ids, position_ids=positions, use_cache=False, tree=probe).last_hidden_state
        except _UNFIT as unfit:
            why = f"{type(unfit).__name__}: {unfit}"
    if found is not None:
        error = float((found.double() - expected).abs().max() / expected.abs().max())
        why = _what_is_lost(probe, inner, error)
    if why:
        raise ConfigError(
            f"{type(inner).__name__} attends in a way that cannot be read as a tree of titles ({why}){SUPPORTED}"
        )
    return probe.positions


def _what_is_lost(probe: _Probe, inner: Any, error: float) -> str:
    """What the model's own attention has beyond the probe's, in words; empty if nothing."""
    num_layers = inner.config.get_text_config().num_hidden_layers
    if sorted(probe.layers) != list(range(num_layers)):
        return f"of {num_layers} layers {len(set(probe.layers))} are attention, run {len(probe.layers)} times"
    if probe.unknown:
        return f"it has {', '.join(sorted(probe.unknown))}"
    if not probe.masked <= probe.windows | {None}:
        return "its masks hide more than a sliding window"
    return f"relative difference {error:.2g}" if error > 10 * _tolerance(inner) else ""


@torch.no_grad()
def check_isolation(model: Any, documents: Sequence[Sequence[int]] = ((5, 6, 7, 8), (9, 10, 11))) -> None:
    """Check that packed documents do not see each other on this very model, evaluating and training alike.

    With restarting `position_ids` alone, transformers isolates documents only under certain settings, and silently does
    not under others. Several rows are tried, since some attention isolates in a single row only. Raises ConfigError if
    the hidden states of a row's second document depend on its first, and if weights or states are not finite.
    """
    check_weights(model)
    name, device, was_training = type(inner_model(model)).__name__, next(model.parameters()).device, model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            alone, moved = _states_alone_and_moves(model, *(list(document) for document in documents))
        finally:
            model.train(was_training)
    if not torch.isfinite(torch.cat([alone, moved])).all():
        raise ConfigError(
            f"{name} gives states that are not finite (NaN or infinity) for a few tokens, though its weights are "
            "finite: take another model, or an earlier checkpoint"
        )
    error = moved.abs().max().item() / max(alone.abs().max().item(), 1e-12)
    if not error < 1e-3:
        attention = getattr(model.config, "_attn_implementation", "unknown")
        raise ConfigError(
            f"{name}: packed documents see each other in this model (relative difference {error:.2g}, attention "
            f"{attention!r}): try another attn_implementation, or a transformers version whose masks follow "
            "position_ids, or another model"
        )


def _states_alone_and_moves(model: Any, first: list[int], second: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The second document's hidden states by itself, and how they change when another document stands before it."""
    device = next(model.parameters()).device
    other = [token + 1 for token in first]
    positions = [*range(len(first)), *range(len(second))]

    def states(*rows: list[int]) -> torch.Tensor:
        """Hidden states of the last document of each row."""
        ids = torch.tensor(rows, device=device)
        where = torch.tensor([positions[-len(row) :] for row in rows], device=device)
        return packed_hidden(model, ids, where)[:, -len(second) :].float()

    model.eval()
    alone = states(second)
    moved = [states(first + second, other + second) - alone]
    model.train()  # dropout may differ from row to row, but not between two runs with one seed
    packed = []
    for rows in ((first, other), (other, first)):
        torch.manual_seed(0)
        packed.append(states(*(row + second for row in rows)))
    return alone, torch.cat([*moved, packed[0] - packed[1]])
