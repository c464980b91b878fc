"""Load and save Hugging Face decoders: any causal language model, LoRA, and `tiny`, a small one made from nothing."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cprec.errors import ConfigError

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
    from transformers import Qwen3Config, Qwen3ForCausalLM

    _hide_progress_bars()
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
    """A causal language model in fp32, by Hugging Face name or folder; an adapter folder loads its base and the
    adapter. `attn_implementation` is what transformers calls so (eager, sdpa, flex_attention, flash_attention_2); by
    default the model's own choice.

    Raises ConfigError where nothing can be loaded.
    """
    from transformers import AutoModelForCausalLM

    _hide_progress_bars()
    path = Path(name_or_path)
    attention = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        if (path / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            with _peft_warnings_off():
                model = AutoPeftModelForCausalLM.from_pretrained(
                    str(path), dtype=torch.float32, is_trainable=True, **attention
                )
        else:
            model = AutoModelForCausalLM.from_pretrained(str(name_or_path), dtype=torch.float32, **attention)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"model_name_or_path={str(name_or_path)!r} is neither '{TINY}', a model folder nor a model that Hugging "
            f"Face transformers can load: {error}"
        ) from error
    return model.to(device) if device is not None else model


def _hide_progress_bars() -> None:
    """Transformers shows a bar for each file that it reads or writes, across ours; the bars of downloads stay."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    shown = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    if shown:
        enable_progress_bars()


@contextmanager
def _peft_warnings_off() -> Iterator[None]:
    """peft reads a property that transformers is about to rename, and users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def add_lora(model: Any, *, rank: int, alpha: int, seed: int = 0) -> Any:
    """The model with LoRA adapters (Hu et al. 2021) on all linear layers but the head; only they are trained.

    A model that has adapters keeps them, to be trained further. Raises ConfigError if those are of another rank, and
    for a model that stands in no folder: adapters are saved without their base.
    """
    from peft import LoraConfig, get_peft_model

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
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]), _peft_warnings_off():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def trunk_and_head(model: Any) -> tuple[Any, Any]:
    """The decoder without its output layer, and the output layer, so that logits are made only where needed."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = inner.get_output_embeddings()
    if getattr(head, "bias", None) is not None or getattr(inner.config, "final_logit_softcapping", None):
        raise ConfigError(
            f"{type(inner).__name__}: output layers with a bias or soft-capped logits (Gemma 2, Phi 1) are not "
            "supported; Llama, Qwen, Mistral, SmolLM and Gemma 3 models are"
        )
    return inner.get_decoder(), head


def blocks_of(model: Any) -> Any:
    """The decoder's layers, in order: what is compiled and sharded one by one."""
    trunk, _ = trunk_and_head(model)
    blocks = getattr(trunk, "layers", None)
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


def merge_adapters(model: Any) -> Any:
    """The base model with its LoRA adapters added into the weights: a plain transformers model."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def num_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def check_isolation(model: Any, documents: Sequence[Sequence[int]] = ((5, 6, 7, 8), (9, 10, 11))) -> None:
    """Asserts that packed documents do not see each other on this very model, evaluating and training alike.

    With restarting `position_ids` alone, transformers isolates documents only under certain settings, and silently does
    not under others. Several rows are tried, since some attention isolates in a single row only. Raises ConfigError if
    the hidden states of a row's second document depend on its first.
    """
    device = next(model.parameters()).device
    first, second = (list(document) for document in documents)
    other = [token + 1 for token in first]
    positions = [*range(len(first)), *range(len(second))]

    def states(*rows: list[int]) -> torch.Tensor:
        """Hidden states of the last document of each row."""
        ids = torch.tensor(rows, device=device)
        where = torch.tensor([positions[-len(row) :] for row in rows], device=device)
        return packed_hidden(model, ids, where)[:, -len(second) :].float()

    was_training = model.training
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            alone = states(second)
            moved = [states(first + second, other + second) - alone]
            model.train()  # dropout may differ from row to row, but not between the two runs
            packed = []
            for rows in ((first, other), (other, first)):
                torch.manual_seed(0)
                packed.append(states(*(row + second for row in rows)))
            moved.append(packed[0] - packed[1])
        finally:
            model.train(was_training)
    if not bool(torch.isfinite(alone).all()):
        name = getattr(model, "name_or_path", "") or type(model).__name__
        raise ConfigError(
            f"model_name_or_path={name!r}: what the model makes of a few tokens is not finite: its weights are "
            "damaged. Bring them back from a good copy, or train it again"
        )
    error = torch.cat(moved).abs().max().item() / max(alone.abs().max().item(), 1e-12)
    if not error < 1e-3:
        attention = getattr(model.config, "_attn_implementation", "unknown")
        raise ConfigError(
            f"packed documents see each other in this model (relative difference {error:.2g}, attention "
            f"{attention!r}): load it with attn_implementation='sdpa', or use a transformers version whose masks "
            "follow position_ids"
        )
