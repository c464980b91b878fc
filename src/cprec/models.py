"""Load and save Hugging Face decoders: any causal language model, LoRA, and `tiny`, a small one made from nothing."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cprec.errors import ConfigError
from cprec.gguf import model_source
from cprec.progress import hide_progress_bars

TINY = "tiny"
DOCUMENTS = "documents"
"""The name under which transformers knows `train.attention`."""
_OF_LAYERS = ("layer_types", "no_rope_layers")
"""Lists in configurations that have an entry for each layer."""


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


def number_of_blocks(blocks: float, total: int) -> int:
    """How many blocks a setting means: a fraction of all if below 1, else a number.

    >>> number_of_blocks(0.4, 30), number_of_blocks(1, 30), number_of_blocks(12, 30)
    (12, 1, 12)
    """
    return round(blocks * total) if blocks < 1 else round(blocks)


def freeze_lowest(model: Any, layers: float) -> None:
    """Keep the weights of the embeddings and of the lowest layers: a fraction of all if below 1, else a number. An
    output layer that shares the embeddings' weights keeps them, too.

    Raises ConfigError where no layer would be left to train, or the model has no list of layers.
    """
    blocks = blocks_of(model)
    number = number_of_blocks(layers, len(blocks))
    if number >= len(blocks):
        raise ConfigError(
            f"frozen_layers={layers:g} leaves no layer of {type(inner_model(model)).__name__} to train: it has "
            f"{len(blocks)}, so give {len(blocks) - 1} at most, or a smaller fraction"
        )
    for module in (*embeddings_of(model), *blocks[:number]):
        module.requires_grad_(False)


def trunk_and_head(model: Any) -> tuple[Any, Any]:
    """The decoder without its output layer, and the output layer, so that logits are made only where they are needed.

    Logits are the output of that layer times `inspection.output_scale(model)`. Raises ConfigError for a model whose
    output layer does more than a product with its weights.
    """
    inner = inner_model(model)
    head, trunk = inner.get_output_embeddings(), inner.get_decoder()
    if getattr(head, "bias", None) is not None or getattr(inner.config, "final_logit_softcapping", None):
        raise ConfigError(
            f"{type(inner).__name__}: output layers with a bias or soft-capped logits (Gemma 2, Phi 1) are not "
            f"supported{SUPPORTED}"
        )
    if trunk is inner or not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise ConfigError(f"{type(inner).__name__} has no decoder apart from its output layer{SUPPORTED}")
    return trunk, head


SUPPORTED = "; docs/models.md lists the architectures that are (Llama, Qwen, Mistral, SmolLM, Gemma 3 and others)"
"""Ends the messages about those that are not."""


def inner_model(model: Any) -> Any:
    """The transformers model itself, also where it is wrapped in adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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


def drop_layers(model: Any, removed: Sequence[int]) -> None:
    """Take layers out of a model; the others follow one another."""
    trunk, blocks = trunk_and_head(model)[0], blocks_of(model)
    kept = [layer for layer in range(len(blocks)) if layer not in removed]
    name = next(name for name, module in trunk.named_children() if module is blocks)
    setattr(trunk, name, nn.ModuleList(blocks[layer] for layer in kept))
    for place, layer in enumerate(kept):
        for module in blocks[layer].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    config = model.config.get_text_config()
    config.num_hidden_layers = len(kept)
    for name in _OF_LAYERS:
        if getattr(config, name, None) is not None:
            setattr(config, name, [getattr(config, name)[layer] for layer in kept])


def last_norm(model: Any) -> nn.Module:
    """What the last layer's states go through before the output layer. Raises ConfigError where it is not found."""
    trunk, _ = trunk_and_head(model)
    norms = [module for module in trunk.children() if getattr(getattr(module, "weight", None), "ndim", 0) == 1]
    if len(norms) != 1:
        raise ConfigError(
            f"{type(trunk).__name__} has {len(norms)} norms beside its layers, so it is not clear which the output "
            "layer reads: states in the middle cannot predict"
        )
    return norms[0]


@contextmanager
def recorded_states(model: Any, layers: Sequence[int]) -> Iterator[list[torch.Tensor]]:
    """For the block, each forward pass adds to the list what some layers write, in ascending order, 1 being the first:
    [R, T, D] each. That of the last layer is taken behind the norm, as the output layer reads it."""
    trunk, blocks, states = trunk_and_head(model)[0], blocks_of(model), list[torch.Tensor]()

    def add(_: Any, __: Any, out: Any) -> None:
        states.append(out if isinstance(out, torch.Tensor) else out[0])

    with ExitStack() as hooks:
        for layer in layers:
            module = trunk if layer == len(blocks) else blocks[layer - 1]
            hooks.callback(module.register_forward_hook(add).remove)
        yield states


def packed_hidden(
    model: Any, input_ids_RT: torch.Tensor, position_ids_RT: torch.Tensor, until_RT: torch.Tensor | None = None
) -> torch.Tensor:
    """Last hidden states [R, T, D] of rows in which position ids restart at each document.

    Where documents may be trees, `until` is the place in the row before which the tokens that read each token end; then
    a mask says what sees what, except to an attention of our own, which gets `until` itself.

    Otherwise no cache and no mask: with either, transformers lets documents see each other. Flash attention tells
    documents apart in a batch of one row only, so there all rows are laid end to end.
    """
    trunk, _ = trunk_and_head(model)
    shape, attention = input_ids_RT.shape, str(getattr(model.config, "_attn_implementation", ""))
    more: dict[str, Any] = {}
    if until_RT is not None:
        own = attention == DOCUMENTS
        more = {"until": until_RT} if own else {"attention_mask": _tree_mask(model, until_RT, attention)}
    elif "flash" in attention:
        input_ids_RT, position_ids_RT = input_ids_RT.reshape(1, -1), position_ids_RT.reshape(1, -1)
    hidden = trunk(input_ids=input_ids_RT, position_ids=position_ids_RT, use_cache=False, **more).last_hidden_state
    return hidden.reshape(*shape, -1)


def require_trees(model: Any, num_tokens: int) -> None:
    """Raise ConfigError where the model, as it attends, cannot read trees in rows of so many tokens."""
    attention = str(getattr(model.config, "_attn_implementation", ""))
    window = getattr(model.config.get_text_config(), "sliding_window", None) or num_tokens
    if attention == DOCUMENTS or (attention in ("sdpa", "eager") and window >= num_tokens):
        return
    name = type(inner_model(model)).__name__
    if attention in ("sdpa", "eager"):
        raise ConfigError(
            f"documents=trees: {name} sees {window} tokens back, and rows have {num_tokens}: lower max_length to that"
        )
    raise ConfigError(f"documents=trees cannot be read by {name} with {attention}: set attn_implementation=sdpa")


def _tree_mask(model: Any, until_RT: torch.Tensor, attention: str) -> torch.Tensor:
    """What sees what, [R, 1, T, T]: what stands before it in the row, and is read up to there or further."""
    require_trees(model, until_RT.shape[1])
    place = torch.arange(until_RT.shape[1], device=until_RT.device)
    seen_RTT = (place[None, :] <= place[:, None]) & (place[:, None] < until_RT[:, None, :])
    if attention == "sdpa":
        return seen_RTT[:, None]
    hidden = torch.finfo(torch.float32).min
    return torch.zeros(seen_RTT.shape, device=until_RT.device).masked_fill_(~seen_RTT, hidden)[:, None]


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
