"""What a run will take, before it starts: arithmetic, memory, disk, time.

Sizes come from a model without weights: its forward pass runs on tensors that have shapes and no memory, and what
autograd would keep for the backward pass is counted. So they hold for any decoder of transformers, with adapters too.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from cprec import distributed
from cprec.errors import ConfigError
from cprec.machine import free_memory as free_memory_of_machine
from cprec.models import _peft_warnings_off, blocks_of, packed_hidden, trunk_and_head
from cprec.progress import format_seconds
from cprec.text.stream import NEXT_TOKEN, TokenStream
from cprec.train.loss import CHUNK, PackedLoss

if TYPE_CHECKING:
    from cprec.train.config import TrainingConfig
    from cprec.train.plan import Plan

FP32, BF16 = 4, 2
"""Bytes of a number."""
ASSUMED_MFU = {"cuda": 0.4, "cpu": 0.4}
"""Share of the device's matmul peak that training is taken to reach where it was not timed."""
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices that the peak is measured with."""


# ---- models without weights ------------------------------------------------------------------------------------------


def without_weights(make_model: Callable[[], Any]) -> Any:
    """What `make_model` makes, of tensors that have shapes and no memory: takes no time and no room, and cannot run.

    `unloaded_model` is a `make_model` for models that would have to be loaded.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        model = make_model()
    with FakeTensorMode():  # unlike meta ones, these tensors seem to be on a device, so that autocast works on them
        made: dict[int, Any] = {}  # tied weights stay tied
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None and id(weight) not in made:
                    made[id(weight)] = nn.Parameter(_on_cpu(weight), weight.requires_grad)
                module._parameters[name] = None if weight is None else made[id(weight)]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else _on_cpu(buffer)
    return model


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def unloaded_model(name_or_path: str | Path) -> Any:
    """A model with the shapes of a Hugging Face model or model folder, adapters included, in fp32 and not its weights.

    Raises ConfigError where there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        if (Path(name_or_path) / "adapter_config.json").is_file():
            from peft import PeftConfig, get_peft_model

            adapter = PeftConfig.from_pretrained(str(name_or_path))
            adapter.inference_mode = False
            base = unloaded_model(adapter.base_model_name_or_path)
            with _peft_warnings_off():
                return get_peft_model(base, adapter)
        config = AutoConfig.from_pretrained(str(name_or_path))
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model_name_or_path={str(name_or_path)!r} is neither a model folder nor a model that Hugging Face "
            f"transformers knows: {error}"
        ) from error


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def mean_context(lengths: np.ndarray | Sequence[int]) -> float:
    """Tokens that a token attends to on average, itself included, in documents of these lengths that see no other.

    >>> mean_context([3]), mean_context([1, 1, 1]), mean_context([2, 4])
    (2.0, 1.0, 2.1666666666666665)
    """
    lengths = np.asarray(lengths, dtype=np.float64)
    return float((lengths * (lengths + 1) / 2).sum() / lengths.sum())


def flops_per_token(model: Any, context: float, target_share: float = 1.0) -> float:
    """Floating-point operations that training on one token needs, forward and backward.

    A weight that multiplies counts 6 where it is trained (2 forward, 2 for the gradient of its input, 2 for its own)
    and 4 where it is frozen; so does the output layer, for the `target_share` of tokens that are targets. Embeddings
    are looked up and do not count. Attention adds 12 * heads * head width * `context` in each layer, `context` being
    the tokens that one attends to (see `mean_context`; at most the window where a layer has one). What gradient
    checkpointing computes again, masked attention, norms and the optimizer are no part of it: the measure is what the
    model needs, whatever the machine does.

    Source: Chowdhery et al. (2022), PaLM, appendix B, with the causal context of packed documents for the row's length.
    """
    _, head = trunk_and_head(model)
    flops = sum((6.0 if weight.requires_grad else 4.0) * weight.numel() for weight in _multiplying(model))
    flops += (6.0 if head.weight.requires_grad else 4.0) * head.weight.numel() * target_share
    return flops + sum(12 * width * min(context, window) for width, window in _attention_layers(model))


def _multiplying(model: Any) -> list[nn.Parameter]:
    """Weights that each token is multiplied by, the output layer left out."""
    _, head = trunk_and_head(model)
    left_out = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(head.weight)}
    return [weight for weight in model.parameters() if weight.ndim == 2 and id(weight) not in left_out]


def _attention_layers(model: Any) -> list[tuple[int, float]]:
    """Of each layer, the width of all its heads together and the tokens it can look back on."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = inner.config.get_text_config()
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or math.inf
    width = config.num_attention_heads * head_width
    return [(width, window if kind == "sliding_attention" else math.inf) for kind in kinds]


def matmul_peak(
    device: torch.device, bf16: bool, *, seconds: float = 0.3, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Floating-point operations a second that this process reaches in one large matrix product, the best of some."""
    size = MATMUL_SIZE.get(device.type, MATMUL_SIZE["cpu"])
    generator = torch.Generator(device).manual_seed(0)  # what training draws must not depend on this
    left, right = (torch.randn(size, size, device=device, generator=generator) for _ in range(2))
    if bf16:
        left, right = left.bfloat16(), right.bfloat16()
    times = _times(lambda: torch.mm(left, right), device, clock, seconds=seconds)
    return 2.0 * size**3 / min(times)


@cache
def peak_here(device: torch.device, bf16: bool) -> float:
    """`matmul_peak`, measured once in a process."""
    return matmul_peak(device, bf16)


def timed_rate(
    loss: PackedLoss,
    stream: TokenStream,
    device: torch.device,
    *,
    rows: int,
    num_processes: int = 1,
    repeats: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Tokens a second of `num_processes` that each train on micro-batches of `rows` rows, the best of some.

    A forward and backward pass of the first rows is done once to warm up and then `repeats` times: equally often in
    each process, since sharded ones work in step. What the optimizer and the exchange of gradients take is left out.
    Gradients are gone afterwards, weights as they were.
    """
    first = stream.batch(0)
    micro_batch = {name: array[:rows] for name, array in first.rows.items()}
    num_tokens = round(stream.fill * micro_batch["input_ids"].size)

    def work() -> None:
        for term in loss.losses(distributed.to_device(micro_batch, device)).values():
            term.backward()

    seconds = min(_times(work, device, clock, repeats=repeats))
    loss.zero_grad(set_to_none=True)
    return num_processes * num_tokens / seconds


def _times(
    work: Callable[[], object],
    device: torch.device,
    clock: Callable[[], float],
    *,
    repeats: int = 1,
    seconds: float = 0.0,
) -> list[float]:
    """How long `work` took each time, `repeats` times or more until `seconds` are over, after one to warm up."""

    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    work()
    times: list[float] = []
    before = start = finished()
    while len(times) < repeats or before - start < seconds:
        work()
        after = finished()
        times.append(after - before)
        before = after
    return times


# ---- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the device of one process. What kernels and the allocator need comes on top, some 10 %."""

    weights: int
    """fp32, frozen ones too."""
    gradients: int
    optimizer: int
    """Adam's two means of each trained weight."""
    activations: int
    """What a micro-batch keeps for its backward pass, with the bf16 copies of the weights."""
    loss: int
    """Logits of a chunk, hidden states at the targets and their gradients, the gradient of the output layer."""
    gathered: int
    """With fsdp: the block at work and the next, embeddings and output layer, all whole."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss + self.gathered


def memory_of(
    model: Any,
    *,
    rows: int,
    row_tokens: int,
    bf16: bool,
    gradient_checkpointing: bool = False,
    fsdp_processes: int = 1,
) -> Memory:
    """What training `model`, one without weights, takes with micro-batches of `rows` rows of `row_tokens` tokens."""
    compute = BF16 if bf16 else FP32
    _, head = trunk_and_head(model)
    parameters = list(model.parameters())
    all_of, trained = (
        sum(p.numel() for p in some) for some in (parameters, [p for p in parameters if p.requires_grad])
    )
    copies = BF16 * sum(weight.numel() for weight in _multiplying(model)) if bf16 else 0
    kept = _kept_for_backward(model, rows, row_tokens, bf16)
    activations, gathered = kept.total, 0
    if gradient_checkpointing:
        activations = kept.outside + sum(kept.inputs) + max(*kept.blocks, copies)
    if fsdp_processes > 1:
        activations = max(0, activations - copies)  # gathered in bf16, they need no copy
        blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
        gathered = compute * (2 * max(blocks) + all_of - sum(blocks))
    tokens, (vocabulary, width) = rows * row_tokens, head.weight.shape
    of_head = vocabulary * width
    loss = (
        tokens * width * (FP32 + 2 * compute)
        + min(CHUNK, tokens) * vocabulary * (FP32 + compute)
        + (of_head * BF16 if bf16 else 0)
        + (of_head * FP32 if head.weight.requires_grad else 0)
    )
    return Memory(
        weights=-(-FP32 * all_of // fsdp_processes),
        gradients=-(-FP32 * trained // fsdp_processes),
        optimizer=-(-2 * FP32 * trained // fsdp_processes),
        activations=activations,
        loss=loss,
        gathered=gathered,
    )


@dataclass
class _Kept:
    """Bytes that autograd keeps, of the blocks one by one and of the rest, and those of the blocks' inputs."""

    blocks: list[int]
    inputs: list[int]
    outside: int = 0

    @property
    def total(self) -> int:
        return self.outside + sum(self.blocks)


def _kept_for_backward(model: Any, rows: int, row_tokens: int, bf16: bool) -> _Kept:
    from torch._subclasses.fake_tensor import FakeTensor

    first = next(model.parameters())
    if not isinstance(first, FakeTensor):
        raise TypeError("memory is told from a model that without_weights() made")
    kept, place = _Kept([], []), [-1]
    seen = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    alive: list[Any] = []  # a storage that is gone could lend its address to another

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(storage)
            if place[0] < 0:
                kept.outside += storage.nbytes()
            else:
                kept.blocks[place[0]] += storage.nbytes()
        return tensor

    def enter(block: nn.Module, arguments: tuple[Any, ...]) -> None:
        place[0] = len(kept.blocks)
        kept.blocks.append(0)
        kept.inputs.append(arguments[0].numel() * arguments[0].element_size() if arguments else 0)

    def leave(block: nn.Module, arguments: Any, output: Any) -> None:
        place[0] = -1

    hooks = [
        hook for b in blocks_of(model) for hook in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))
    ]
    was_training = model.training
    model.train()
    try:
        with (
            first.fake_mode,
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            distributed.autocast(first.device, bf16),
        ):
            ids = torch.zeros(rows, row_tokens, dtype=torch.int64)
            packed_hidden(model, ids, ids)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return kept


# ---- all of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take; `str()` says it in four lines."""

    num_parameters: int
    num_trained: int
    num_tokens: int
    context: float
    """Tokens that one attends to on average."""
    flops_per_token: float
    memory: Memory
    """Of one process."""
    num_processes: int
    checkpoint_bytes: int
    """One checkpoint: trained weights and Adam's means."""
    num_checkpoints: int
    """Kept at most, stable ones and the one being written included."""
    model_bytes: int
    """The finished model folder."""
    tokens_per_second: float
    """Of all processes together."""
    measured: bool
    """The rate was timed; else it is `ASSUMED_MFU` of the matmul peak."""
    peak: float
    """Floating-point operations a second of one process's device in matrix products; 0 where not measured."""
    heldout_tokens: int
    """Read for held-out perplexities in the whole run, at a third of the cost."""
    free_memory: int = 0
    """Bytes; 0 where not known."""
    free_disk: int = 0

    @property
    def disk_bytes(self) -> int:
        return self.num_checkpoints * self.checkpoint_bytes + self.model_bytes

    @property
    def seconds(self) -> float:
        return (self.num_tokens + self.heldout_tokens / 3) / self.tokens_per_second

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the share of the peak that the rate means; NaN where the peak is not known."""
        return mfu(self.tokens_per_second, self.flops_per_token, self.peak * self.num_processes)

    def timed(self, tokens_per_second: float) -> Estimate:
        """The same with a rate that was timed, of all processes together; see `timed_rate`."""
        return replace(self, tokens_per_second=tokens_per_second, measured=True)

    @property
    def time_line(self) -> str:
        """The last of the four lines."""
        how = "timed on a micro-batch" if self.measured else "not timed: a guess"
        if self.peak:
            peak = _number(self.peak * self.num_processes)
            how += f", {self.mfu:.0%} of the {peak}FLOP/s of matrix products here"
        return f"time: about {format_seconds(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s ({how})"

    @property
    def warnings(self) -> list[str]:
        """What will not fit, and what would help."""
        found = []
        if 0 < self.free_memory < self.memory.total:
            found.append(
                f"warning: about {_bytes(self.memory.total)} of memory are needed and {_bytes(self.free_memory)} are "
                "free: lower per_device_train_batch_size and raise gradient_accumulation_steps as much (activations), "
                "set gradient_checkpointing=true, or train adapters alone (lora_rank)"
            )
        if 0 < self.free_disk < self.disk_bytes:
            found.append(
                f"warning: about {_bytes(self.disk_bytes)} of disk are needed and {_bytes(self.free_disk)} are free: "
                "lower save_total_limit or choose another output_dir"
            )
        return found

    def __str__(self) -> str:
        parts = {
            "weights": self.memory.weights,
            "gradients": self.memory.gradients,
            "Adam": self.memory.optimizer,
            "activations": self.memory.activations,
            "loss": self.memory.loss,
            "gathered": self.memory.gathered,
        }
        each = f" in each of {self.num_processes} processes" if self.num_processes > 1 else ""
        lines = [
            f"arithmetic: {self.num_trained / 1e6:,.2f} M of {self.num_parameters / 1e6:,.2f} M parameters are "
            f"trained; {_number(self.flops_per_token)}FLOP a token, attending to {self.context:,.0f} on average",
            f"memory: about {_bytes(self.memory.total)}{each} ("
            + ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items() if size)
            + ")",
            f"disk: up to {_bytes(self.disk_bytes)} ({self.num_checkpoints} checkpoints of "
            f"{_bytes(self.checkpoint_bytes)}, one of them being written, and the model, {_bytes(self.model_bytes)})",
            self.time_line,
        ]
        return "\n".join([*lines, *self.warnings])


def estimate(
    model: Any,
    *,
    num_tokens: int,
    lengths: np.ndarray | Sequence[int],
    rows: int,
    row_tokens: int,
    bf16: bool,
    peak: float,
    device_type: str = "cpu",
    target_share: float = 1.0,
    gradient_checkpointing: bool = False,
    fsdp: bool = False,
    num_processes: int = 1,
    save_total_limit: int = 2,
    num_stable: int = 0,
    heldout_tokens: int = 0,
    tokens_per_second: float = 0.0,
    free_memory: int = 0,
    free_disk: int = 0,
) -> Estimate:
    """What training `model`, one that `without_weights` made, on `num_tokens` tokens takes.

    `lengths` are those of the documents, in tokens; `rows` the packed rows of a forward pass of one process. `peak` is
    `matmul_peak` of the device and `tokens_per_second` the timed rate of all processes together, where it was timed;
    0 guesses it as `ASSUMED_MFU` of the peak, gradient checkpointing's second forward pass counted.

    Raises ValueError if there is neither a rate nor a peak to tell one from.
    """
    if not (tokens_per_second > 0 or peak > 0):
        raise ValueError("give tokens_per_second as timed, or peak as matmul_peak measures it, to tell the time from")
    context = mean_context(lengths)
    flops = flops_per_token(model, context, target_share)
    measured = tokens_per_second > 0
    if not measured:
        again = sum(2.0 * w.numel() for w in _multiplying(model)) if gradient_checkpointing else 0.0
        tokens_per_second = ASSUMED_MFU.get(device_type, ASSUMED_MFU["cpu"]) * peak * num_processes / (flops + again)
    memory = memory_of(
        model,
        rows=rows,
        row_tokens=row_tokens,
        bf16=bf16,
        gradient_checkpointing=gradient_checkpointing,
        fsdp_processes=num_processes if fsdp else 1,
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    written = num_trained if hasattr(model, "peft_config") else num_parameters  # of adapters, the adapters alone
    return Estimate(
        num_parameters=num_parameters,
        num_trained=num_trained,
        num_tokens=num_tokens,
        context=context,
        flops_per_token=flops,
        memory=memory,
        num_processes=num_processes,
        checkpoint_bytes=FP32 * written + 2 * FP32 * num_trained,
        num_checkpoints=save_total_limit + 1 + num_stable,
        model_bytes=FP32 * written,
        tokens_per_second=tokens_per_second,
        measured=measured,
        peak=peak,
        heldout_tokens=heldout_tokens,
        free_memory=free_memory,
        free_disk=free_disk,
    )


def estimate_plan(
    config: TrainingConfig,
    plan: Plan,
    model: Any,
    *,
    device: torch.device,
    bf16: bool,
    heldout_tokens: int = 0,
    num_stable: int = 0,
) -> Estimate:
    """What the plan takes with `model`, one that `without_weights` made, on this machine; the time is a guess.

    `heldout_tokens` are read at each measurement of held-out perplexity; `num_stable` checkpoints stay for good.
    """
    stream, num_processes = plan.stream, distributed.num_ranks()
    first = stream.batch(0)
    on_cuda = device.type == "cuda"
    return estimate(
        model,
        num_tokens=stream.num_tokens,
        lengths=stream.corpus.lengths,
        rows=min(config.per_device_train_batch_size, first.num_rows),
        row_tokens=config.max_length,
        bf16=bf16,
        peak=peak_here(device, bf16),
        device_type=device.type,
        target_share=first.counts[NEXT_TOKEN] / first.num_tokens,
        gradient_checkpointing=config.gradient_checkpointing,
        fsdp=config.fsdp,
        num_processes=num_processes,
        save_total_limit=config.save_total_limit,
        num_stable=num_stable,
        heldout_tokens=heldout_tokens * (stream.num_steps // config.eval_steps + 2),  # at the start and the end, too
        free_memory=torch.cuda.mem_get_info(device)[0] if on_cuda else free_memory_of_machine() // num_processes,
        free_disk=shutil.disk_usage(_existing(Path(config.output_dir))).free,
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def mfu(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation: what the model needs a second, as a share of what the devices reach in matrix products.

    NaN where `peak`, of all devices together, is not known.

    >>> mfu(1000, 2e9, 4e12), mfu(1000, 2e9, 0)
    (0.5, nan)
    """
    return tokens_per_second * flops_per_token / peak if peak > 0 else math.nan


def _number(value: float) -> str:
    """A large number in front of its unit.

    >>> _number(3.62e9), _number(791.4e12), _number(85_000)
    ('3.62 G', '791 T', '85 k')
    """
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g} "


def _bytes(size: float) -> str:
    """Bytes as people read them.

    >>> _bytes(1_240_000_000), _bytes(53_000_000), _bytes(900)
    ('1.2 GB', '53 MB', '1 kB')
    """
    if size >= 10**9:
        return f"{size / 1e9:,.1f} GB"
    return f"{size / 1e6:,.0f} MB" if size >= 10**6 else f"{max(1, size / 1e3):,.0f} kB"
