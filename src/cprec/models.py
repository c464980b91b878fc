"""Load and save Hugging Face decoders: any causal language model, LoRA, and `tiny`, a small one made from nothing."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cprec.errors import ConfigError
from cprec.gguf import model_source
from cprec.progress import hide_progress_bars

TINY = "tiny"


def tiny_model(
    vocabulary_size: int,
    *,
    hidden_size: int = 128,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    max_position_embeddings: int = 1024,
    pad_token_id: int = 0,
    eos_token_id: int = 1,
    seed: int = 0,
    attn_implementation: str | None = None,
) -> nn.Module:
    """A small Qwen3-style decoder with random weights and tied embeddings; the same weights for the same seed."""
    hide_progress_bars()
    config = Qwen3Config(
        vocab_size=vocabulary_size,
        hidden_size=hidden_size,
        intermediate_size=-(-8 * hidden_size // 3 // 64) * 64,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        head_dim=hidden_size // num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        bos_token_id=None,
        attn_implementation=attn_implementation,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def load_model(
    name_or_path: str | Path, *, device: torch.device | None = None, attn_implementation: str | None = None
) -> Any:
    """A causal language model in fp32, by Hugging Face name, folder or GGUF file; an adapter folder loads its base and
    the adapter. `attn_implementation` is what transformers calls so (eager, sdpa, flex_attention, flash_attention_2);
    by default the model's own choice.

    Raises ConfigError where nothing can be loaded.
    """
    hide_progress_bars()
    source = model_source(name_or_path)
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        if Path(source, "adapter_config.json").is_file():
            with _peft() as peft:
                model = peft.AutoPeftModelForCausalLM.from_pretrained(
                    source, dtype=torch.float32, is_trainable=True, **attention
                )
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **attention)
    except (OSError, ValueError, ImportError) as error:
        raise _no_model(name_or_path, error) from error
    return model.to(device) if device is not None else model


def unloaded_model(name_or_path: str | Path) -> Any:
    """A model with the shapes of a Hugging Face model, model folder or GGUF file, adapters included, in fp32; its
    weights are not read. Made under `torch.device("meta")` it takes no memory.

    Raises ConfigError where there is no such model.
    """
    source = model_source(name_or_path)
    try:
        if Path(source, "adapter_config.json").is_file():
            with _peft() as peft:
                adapter = peft.PeftConfig.from_pretrained(source)
                adapter.inference_mode = False
                return peft.get_peft_model(unloaded_model(adapter.base_model_name_or_path), adapter)
        config = AutoConfig.from_pretrained(source)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise _no_model(name_or_path, error) from error


def _no_model(name_or_path: str | Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"model_name_or_path={str(name_or_path)!r} is neither '{TINY}', a model folder, a GGUF file nor a model that "
        f"Hugging Face transformers can load: {error}"
    )


@contextmanager
def _peft() -> Iterator[Any]:
    """The library of adapters, without a warning that users can do nothing about: it reads a property that transformers
    is going to rename."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield peft


def add_lora(model: Any, *, rank: int, alpha: int, seed: int = 0) -> Any:
    """The model with LoRA adapters (Hu et al. 2021) on all linear layers but the head; only they are trained.

    A model that has adapters already keeps them, to be trained further. Raises ConfigError if those have another rank,
    and for a model that was never saved: adapters are saved without their base, and need one to be loaded.
    """
    if hasattr(model, "peft_config"):
        ranks = sorted({adapter.r for adapter in model.peft_config.values()})
        if ranks != [rank]:
            raise ConfigError(f"lora_rank={rank}, but the model already has adapters of rank {ranks}: use that")
        return model
    if not model.name_or_path:
        raise ConfigError(
            f"lora_rank={rank} needs a saved base model, which adapters are added to when they are loaded: give "
            f"model_name_or_path a Hugging Face name or a model folder, or train all of '{TINY}' with lora_rank=0"
        )
    with torch.random.fork_rng(devices=[]), _peft() as peft:
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)


def embeddings_of(model: Any) -> list[nn.Module]:
    """What turns tokens, and positions where these are learnt, into vectors."""
    trunk, _ = trunk_and_head(model)
    return [module for module in trunk.modules() if isinstance(module, nn.Embedding)]


def freeze_lowest(model: Any, layers: float) -> None:
    """Keep the weights of the embeddings and of the lowest layers: a fraction of all if below 1, else a number. An
    output layer that shares the embeddings' weights keeps them, too.

    Raises ConfigError where no layer would be left to train, or the model has no list of layers.
    """
    blocks = blocks_of(model)
    number = round(layers * len(blocks)) if layers < 1 else round(layers)
    if number >= len(blocks):
        raise ConfigError(
            f"frozen_layers={layers:g} leaves no layer of {type(inner_model(model)).__name__} to train: it has "
            f"{len(blocks)}, so give {len(blocks) - 1} at most, or a smaller fraction"
        )
    for module in (*embeddings_of(model), *blocks[:number]):
        module.requires_grad_(False)


def trunk_and_head(model: Any) -> tuple[Any, Any]:
    """The decoder without its output layer, and the output layer, so that logits are made only where they are needed.

    Logits are the output of that layer times `output_scale(model)`. Raises ConfigError for a model whose output layer
    does more than a product with its weights.
    """
    inner = inner_model(model)
    head, trunk = inner.get_output_embeddings(), inner.get_decoder()
    if getattr(head, "bias", None) is not None or getattr(inner.config, "final_logit_softcapping", None):
        raise ConfigError(
            f"{type(inner).__name__}: output layers with a bias or soft-capped logits (Gemma 2, Phi 1) are not "
            f"supported{_SUPPORTED}"
        )
    if trunk is inner or not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise ConfigError(f"{type(inner).__name__} has no decoder apart from its output layer{_SUPPORTED}")
    return trunk, head


_SUPPORTED = "; docs/models.md lists the architectures that are (Llama, Qwen, Mistral, SmolLM, Gemma 3 and others)"


def inner_model(model: Any) -> Any:
    """The transformers model itself, also where it is wrapped in adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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
            raise ConfigError(f"{name} does not read tokens and their positions alone ({unfit}){_SUPPORTED}") from unfit
    scale, error = 1.0, torch.inf
    if logits.shape == ours.shape:
        # The least-squares solution of logits = scale * ours, and how far from it the worst logit is.
        measured = float((logits * ours).sum() / ours.square().sum())
        scale = _number_of_config(inner.config, measured) if math.isfinite(measured) else 1.0
        error = float((logits - scale * ours).abs().max() / logits.abs().max())
    if error > _tolerance(inner):  # logits that are not finite are found where scores are made
        raise ConfigError(
            f"{name} does more between its last layer and its logits than to multiply by a constant (relative "
            f"difference {error:.2g}), so its loss and its scores would be those of another model{_SUPPORTED}"
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
    """A row of tokens and their positions: [1, T] each."""
    device = next(model.parameters()).device
    ids = torch.arange(3, 15, device=device) % model.get_input_embeddings().weight.shape[0]
    return ids[None], torch.arange(len(ids), device=device)[None]


def blocks_of(model: Any) -> Any:
    """The decoder's layers, in order. They are compiled and sharded one by one."""
    trunk, _ = trunk_and_head(model)
    lists = (
        [each for each in trunk.children() if isinstance(each, nn.ModuleList)] if isinstance(trunk, nn.Module) else []
    )
    blocks = getattr(trunk, "layers", lists[0] if len(lists) == 1 else None)  # GPT-2 calls them `h`
    if not isinstance(blocks, nn.ModuleList):
        raise ConfigError(
            f"{type(trunk).__name__} has no list of blocks called `layers`, as Llama, Qwen, Mistral, SmolLM and Gemma "
            "have: train it with fsdp=false and torch_compile=false"
        )
    return blocks


def packed_hidden(model: Any, input_ids_RT: torch.Tensor, position_ids_RT: torch.Tensor) -> torch.Tensor:
    """Last hidden states [R, T, D] of rows in which position ids restart at each document.

    No cache and no mask: with either, transformers lets documents see each other. Flash attention tells documents apart
    in a batch of one row only, so there all rows are laid end to end.
    """
    trunk, _ = trunk_and_head(model)
    shape = input_ids_RT.shape
    if "flash" in str(getattr(model.config, "_attn_implementation", "")):
        input_ids_RT, position_ids_RT = input_ids_RT.reshape(1, -1), position_ids_RT.reshape(1, -1)
    hidden = trunk(input_ids=input_ids_RT, position_ids=position_ids_RT, use_cache=False).last_hidden_state
    return hidden.reshape(*shape, -1)


ONE_FORWARD = threading.RLock()
"""Held during a forward pass for which a model is changed, by its attention or by hooks: a service adds items while it
ranks."""


@contextmanager
def attending_by(trunk: Any, name: str) -> Iterator[None]:
    """For the block, the model uses the attention that is registered with transformers under this name."""
    with ONE_FORWARD:
        config = trunk.config
        before = config._attn_implementation
        config._attn_implementation = name
        try:
            yield
        finally:
            config._attn_implementation = before


def has_learned_positions(model: Any) -> bool:
    """Whether positions are rows of a table, so that the model has none beyond its context."""
    inner = inner_model(model)
    context = context_of(inner)
    tables = [m for m in inner.modules() if isinstance(m, nn.Embedding) and m is not inner.get_input_embeddings()]
    return context is not None and any(0 <= table.num_embeddings - context <= 2 for table in tables)


def context_of(model: Any) -> int | None:
    """The most tokens that a model was made to read; None if its configuration does not say.

    With `longrope` positions (Phi-3 with 128,000 tokens) only the original context counts: beyond it all positions of a
    batch change with its longest text, so that a score would depend on the other texts in the batch.
    """
    config = model.config.get_text_config()
    context: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = getattr(config, "original_max_position_embeddings", None)
        context = rope.get("original_max_position_embeddings", original) or context
    return context


def num_parameters(model: nn.Module) -> int:
    """The number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


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
            f"{type(inner).__name__} attends in a way that cannot be read as a tree of titles ({why}){_SUPPORTED}"
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
