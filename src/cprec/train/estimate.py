"""What a run will take, before it starts: floating-point operations, memory, disk, time."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cprec import distributed
from cprec.machine import free_memory
from cprec.models import embeddings_of, inner_model, trunk_and_head
from cprec.progress import format_seconds
from cprec.text.stream import NEXT_TOKEN, TokenStream
from cprec.train.loss import CHUNK, PackedLoss

Clock = Callable[[], float]

FP32, BF16 = 4, 2
"""Bytes of a number."""
ASSUMED_MFU = 0.4
"""Share of the device's matmul peak that training is taken to reach where it was not timed."""
ADVICE = {
    "memory": "lower micro_batch_size (it changes nothing else), set gradient_checkpointing=true, or train adapters "
    "alone (lora_rank)",
    "disk": "lower save_total_limit or choose another output_dir",
}
MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices that the peak is measured with."""


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
    and 4 where it is frozen, but 2 in layers below all that is trained; so does the output layer, for the
    `target_share` of tokens that are targets. Embeddings are looked up and do not count. Attention adds 12 * heads *
    head width * `context` in each layer, a third of it in those lowest, `context` being the tokens that one attends to
    (see `mean_context`; at most the window where a layer has one). Recomputation by
    gradient checkpointing, masked attention, norms and the optimizer are left out: the measure is what the model
    needs, whatever the machine does.

    Source: Chowdhery et al. (2022), PaLM, appendix B, with the causal context of packed documents for the row's length.
    """
    _, head = trunk_and_head(model)
    lowest = layers_below_training(model)
    only_read = {id(weight) for layer in lowest for weight in layer.parameters()}
    flops = sum(
        (6.0 if weight.requires_grad else 2.0 if id(weight) in only_read else 4.0) * weight.numel()
        for weight in multiplying_weights(model)
    )
    flops += (6.0 if head.weight.requires_grad else 4.0) * head.weight.numel() * target_share
    config = inner_model(model).config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or math.inf
    seen = [min(context, window if kind == "sliding_attention" else math.inf) for kind in kinds]
    passes = 3 * sum(seen) - 2 * sum(seen[: len(lowest)])
    return flops + 4 * attention_width(config) * passes


def layers_below_training(model: Any) -> list[nn.Module]:
    """The lowest layers that no gradient goes through: neither they nor what is below them is trained."""
    trunk, _ = trunk_and_head(model)
    layers = next((each for each in trunk.children() if isinstance(each, nn.ModuleList)), ())
    below: list[nn.Module] = []
    for module in (*embeddings_of(model), *layers):
        if any(weight.requires_grad for weight in module.parameters()):
            break
        below.append(module)
    return [module for module in below if not isinstance(module, nn.Embedding)]


def multiplying_weights(model: Any) -> list[nn.Parameter]:
    """Weights that each token is multiplied by, the output layer left out."""
    _, head = trunk_and_head(model)
    left_out = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(head.weight)}
    return [weight for weight in model.parameters() if weight.ndim == 2 and id(weight) not in left_out]


def attention_width(config: Any) -> int:
    """The width of all heads of a layer together."""
    head_width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head_width * int(config.num_attention_heads)


def micro_batch_bytes(model: Any, tokens: int, *, bf16: bool, gradient_checkpointing: bool = False) -> float:
    """About the memory that a forward and backward pass over `tokens` tokens takes beside weights and optimizer.

    Gradients, bf16 copies of the weights, a chunk of logits, and what layers keep for their backward pass: of width h,
    with attention of width a and a gated feed-forward of width f, 7 h numbers in fp32 around the norms, and 4 a and 4 f
    in the number format of the products.
    """
    config, (_, head) = inner_model(model).config.get_text_config(), trunk_and_head(model)
    compute, hidden, num_layers = BF16 if bf16 else FP32, config.hidden_size, config.num_hidden_layers
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = tokens * (7 * hidden * FP32 + 4 * (attention_width(config) + feed_forward) * compute)
    kept = layer + num_layers * tokens * hidden * FP32 if gradient_checkpointing else num_layers * layer
    copies = BF16 * _numbers(model) if bf16 else 0
    logits = min(CHUNK, tokens) * len(head.weight) * (FP32 + compute)
    return FP32 * (_numbers(model, trained=True) + head.weight.numel()) + copies + kept + logits


def _numbers(model: Any, *, trained: bool = False) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad or not trained)


@cache
def matmul_peak(device: torch.device, bf16: bool, clock: Clock = time.perf_counter) -> float:
    """Floating-point operations a second that this process reaches in one large matrix product, the best of some."""
    size = MATMUL_SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator) for _ in range(2))
    if bf16:
        left, right = left.bfloat16(), right.bfloat16()
    return 2.0 * size**3 / _shortest(lambda: torch.mm(left, right), device, 10, clock)


def measure(planned: Estimate, loss: PackedLoss, stream: TokenStream, clock: Clock = time.perf_counter) -> Estimate:
    """The estimate with the speed and the memory of a real micro-batch, the first rows of the stream.

    Each process does as many passes, since sharded ones work in step. The optimizer and the exchange of gradients are
    not timed. Gradients are gone afterwards, weights as they were.
    """
    device = next(loss.parameters()).device
    arrays = {name: array[: planned.rows] for name, array in stream.batch(0).rows.items()}

    def work() -> None:
        first, *more = loss.losses(distributed.to_device(arrays, device)).values()
        sum(more, first).backward()

    with distributed.peak_memory(device) as taken:
        rate = stream.fill * arrays["input_ids"].size / _shortest(work, device, 2, clock)
        taken_bytes = max(taken(), FP32 * planned.num_trained)  # the gradients alone, where too little was counted
    loss.zero_grad(set_to_none=True)
    tokens_per_second = rate * planned.num_processes
    return replace(planned, tokens_per_second=tokens_per_second, micro_batch_bytes=taken_bytes, measured=True)


def _shortest(work: Callable[[], object], device: torch.device, repeats: int, clock: Clock) -> float:
    """The shortest time that `work` took, after once to warm up."""
    times = []
    for _ in range(1 + repeats):
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return min(times[1:])


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will take; `str()` says it in four lines. Rates are of all processes, memory is of one of them."""

    num_parameters: int
    num_trained: int
    num_tokens: int
    heldout_tokens: int
    """Read for held-out perplexities in the whole run, at a third of the cost."""
    context: float
    """Tokens that one attends to on average."""
    flops_per_token: float
    peak: float
    """Floating-point operations a second in matrix products."""
    tokens_per_second: float
    rows: int
    """Of a micro-batch."""
    micro_batch_bytes: float
    """Memory that a forward and backward pass takes, gradients included."""
    measured: bool = False
    """Rate and micro-batch are measured; else they are `ASSUMED_MFU` of the peak and arithmetic."""
    num_processes: int
    weight_bytes: float
    adam_bytes: float
    checkpoint_bytes: int
    num_checkpoints: int
    """On disk at most, the one being written included."""
    model_bytes: int
    free_memory: float
    """Bytes that the process may use, its weights included."""
    free_disk: float

    @property
    def memory_bytes(self) -> float:
        return self.weight_bytes + self.adam_bytes + self.micro_batch_bytes

    @property
    def disk_bytes(self) -> int:
        return self.num_checkpoints * self.checkpoint_bytes + self.model_bytes

    @property
    def seconds(self) -> float:
        return (self.num_tokens + self.heldout_tokens / 3) / self.tokens_per_second

    def mfu(self, tokens_per_second: float) -> float:
        """Model FLOPs utilisation: the share of the devices' matrix products that the model needs at this rate."""
        return tokens_per_second * self.flops_per_token / self.peak

    def __str__(self) -> str:
        each = f" in each of {self.num_processes} processes" if self.num_processes > 1 else ""
        how = "measured" if self.measured else "by arithmetic"
        timed = "timed on a micro-batch" if self.measured else "not timed: a guess"
        lines = [
            f"arithmetic: {self.num_trained / 1e6:,.2f} M of {self.num_parameters / 1e6:,.2f} M parameters are "
            f"trained; {_scaled(self.flops_per_token)}FLOP a token, attending to {self.context:,.0f} on average",
            f"memory: about {_scaled(self.memory_bytes)}B{each} (weights {_scaled(self.weight_bytes)}B, Adam "
            f"{_scaled(self.adam_bytes)}B, a micro-batch with its gradients {_scaled(self.micro_batch_bytes)}B, {how})",
            f"disk: up to {_scaled(self.disk_bytes)}B ({self.num_checkpoints} checkpoints of "
            f"{_scaled(self.checkpoint_bytes)}B, one of them being written, and the model of "
            f"{_scaled(self.model_bytes)}B)",
            f"time: about {format_seconds(self.seconds)} at {self.tokens_per_second:,.0f} tokens/s ({timed}, "
            f"{self.mfu(self.tokens_per_second):.0%} of the {_scaled(self.peak)}FLOP/s of matrix products here)",
        ]
        needs = {"memory": (self.memory_bytes, self.free_memory), "disk": (self.disk_bytes, self.free_disk)}
        for what, (needed, free) in needs.items():
            if free < needed:
                found = f"about {_scaled(needed)}B of {what} are needed and {_scaled(free)}B are free"
                lines.append(f"warning: {found}: {ADVICE[what]}")
        return "\n".join(lines)


def estimate(
    model: Any,
    stream: TokenStream,
    *,
    device: torch.device,
    bf16: bool,
    rows: int,
    output_dir: Path,
    num_checkpoints: int,
    heldout_tokens: int = 0,
    gradient_checkpointing: bool = False,
    fsdp: bool = False,
    teacher: Any | None = None,
) -> Estimate:
    """What training `model`, which may be on the meta device, on a stream takes on this machine, by arithmetic. A
    frozen `teacher` reads the same tokens, and weighs beside it.
    """
    num_processes, first = distributed.num_ranks(), stream.batch(0)
    context = mean_context(stream.corpus.lengths)
    flops = flops_per_token(model, context, first.counts[NEXT_TOKEN] / first.num_tokens)
    taught = 0
    if teacher is not None:
        # Its output layer has no gradient to hand on, which is half of what a frozen one takes.
        flops += flops_per_token(teacher, context, first.counts[NEXT_TOKEN] / first.num_tokens / 2)
        taught = _numbers(teacher)
    again = 2.0 * gradient_checkpointing * sum(weight.numel() for weight in multiplying_weights(model))
    tokens = rows * stream.row_tokens
    of_batch = micro_batch_bytes(model, tokens, bf16=bf16, gradient_checkpointing=gradient_checkpointing)
    peak = matmul_peak(device, bf16) * num_processes
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory() / num_processes
    num_parameters, num_trained = _numbers(model), _numbers(model, trained=True)
    num_saved = num_trained if hasattr(model, "peft_config") else num_parameters
    num_shares = num_processes if fsdp else 1
    is_loaded = not next(model.parameters()).is_meta
    existing = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
    return Estimate(
        num_parameters=num_parameters,
        num_trained=num_trained,
        num_tokens=stream.num_tokens,
        heldout_tokens=heldout_tokens,
        context=context,
        flops_per_token=flops,
        peak=peak,
        tokens_per_second=ASSUMED_MFU * peak / (flops + again),
        rows=rows,
        micro_batch_bytes=of_batch,
        num_processes=num_processes,
        weight_bytes=FP32 * (num_parameters / num_shares + taught),
        adam_bytes=2 * FP32 * num_trained / num_shares,  # two means of each trained weight
        checkpoint_bytes=FP32 * (num_saved + 2 * num_trained),
        num_checkpoints=num_checkpoints,
        model_bytes=FP32 * num_saved,
        free_memory=free + (FP32 * num_parameters / num_shares if is_loaded else 0),
        free_disk=shutil.disk_usage(existing).free,
    )


def _scaled(value: float) -> str:
    """A large number in front of its unit.

    >>> _scaled(3.62e9), _scaled(791.4e12), _scaled(85_000)
    ('3.62 G', '791 T', '85 k')
    """
    for power, letter in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {letter}"
    return f"{value:.3g} "
