"""Processes, devices and number formats: the only file that knows what machines a model runs on.

Usually there is one process, and then everything here does nothing. `torchrun` starts several: each trains on its
share of the rows of every step, and holds the whole model or, with `shard`, a part of it (FSDP2).
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from cprec import machine
from cprec.errors import CPRecError, TrainingError

Precision = Literal["auto", "true", "false"]
Result = TypeVar("Result")

BUCKET = 2**24
"""Gradient elements that are summed over processes in one exchange."""


# ---- processes -------------------------------------------------------------------------------------------------------


def join_processes(timeout_seconds: float = 1800) -> None:
    """Join the processes that torchrun started, if it did and this one has not joined yet; it leaves them at exit.

    An exchange that takes longer than `timeout_seconds` fails: another process hangs or is lost. Raises TrainingError
    if the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with naming_lost_processes():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    atexit.register(_leave_processes)


def _leave_processes() -> None:
    gc.collect()  # sharded models still refer to the group and must not outlive it
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_ranks() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and prints messages."""
    return rank() == 0


def by_first(function: Callable[[], Result]) -> Result:
    """The result of `function`, run by the first process alone; the others wait for it.

    Its errors are raised in all of them; those that are not CPRecErrors become a TrainingError in the others.
    """
    if num_ranks() == 1:
        return function()
    answer: list[Any] = [None, None]
    original: BaseException | None = None
    if is_first():
        try:
            answer[0] = function()
        except Exception as error:
            original = error
            answer[1] = (
                error if isinstance(error, CPRecError) else TrainingError(f"the first process failed: {error!r}")
            )
    dist.broadcast_object_list(answer, src=0)
    if original is not None:
        raise original
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def all_equal(value: str) -> bool:
    """Whether every process gives the same value."""
    values: list[Any] = [value] * num_ranks()
    if num_ranks() > 1:
        dist.all_gather_object(values, value)
    return len(set(values)) == 1


def any_rank(value: bool) -> bool:
    """Whether the value is true in any process. They agree on their CPUs, and wait for no other device."""
    if num_ranks() == 1:
        return value
    votes = torch.tensor(int(value))
    dist.all_reduce(votes)
    return bool(votes)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, replaced in place by its sum over processes."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their sums over processes, of a model that each process holds whole."""
    if num_ranks() == 1:
        return
    bucket: list[torch.Tensor] = []
    for gradient in [parameter.grad for parameter in parameters if parameter.grad is not None]:
        if bucket and (gradient.dtype != bucket[0].dtype or sum(g.numel() for g in bucket) > BUCKET):
            _sum_bucket(bucket)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(gradients: list[torch.Tensor]) -> None:
    # One exchange of one flat tensor is much faster than one for each gradient.
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn a failed exchange between processes into a TrainingError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not _is_exchange_failure(error):
            raise
        raise TrainingError(
            f"process {os.environ.get('RANK', rank())} of {os.environ.get('WORLD_SIZE', num_ranks())} lost touch with "
            f"the others ({str(error).splitlines()[0]}). One of them failed, was killed, ran out of memory or hung; "
            "its own message, if there is one, has its number. The last checkpoint is intact: start the same command "
            "again to resume, with the same number of processes or another"
        ) from error


def _is_exchange_failure(error: RuntimeError) -> bool:
    """Whether gloo, NCCL or the store behind them failed; gloo raises a plain RuntimeError."""
    if isinstance(error, dist.DistError):
        return True
    return any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset"))


# ---- sharding --------------------------------------------------------------------------------------------------------


def shard(module: nn.Module, blocks: Iterable[nn.Module], *, bf16: bool) -> None:
    """Spread weights, gradients and optimizer states over the processes (FSDP2), block by block, then the rest.

    A forward and backward pass gathers one block at a time. Master weights stay fp32; with `bf16` they are gathered in
    bf16, and gradients are summed in fp32. `module` must be the one that is called. Does nothing in one process.
    """
    if num_ranks() == 1:
        return
    mesh = init_device_mesh(pick_device().type, (num_ranks(),))
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has spread this module, or one that contains it: each process holds a part of its weights."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that may be spread over processes; all of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- devices and number formats --------------------------------------------------------------------------------------


def pick_device() -> torch.device:
    """This process's CUDA device where there is one, else the CPU. Processes beyond the devices begin again at the
    first."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def num_places() -> int:
    """How many processes of one thread find a place of their own here: the CUDA devices, or else the cores."""
    return torch.cuda.device_count() or machine.num_cores()


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays as tensors on a device; the copy to a GPU waits for nothing."""
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if device.type == "cuda":
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives a function that returns the most bytes that were in use at once since the block began, beyond those in use
    before.

    On a CPU these are pages of the process. Without glibc, memory that it had freed and kept is not counted when it is
    used again.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
    else:
        before = machine.reset_peak_memory()
        yield lambda: machine.peak_memory() - before


def describe(device: torch.device) -> str:
    """One line for people: the device, the number of processes, and the threads on a CPU."""
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    one = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return one if num_ranks() == 1 else f"{num_ranks()} processes, each on {one}"


def use_bf16(setting: Precision, device: torch.device) -> bool:
    """Whether to compute in bf16: as the setting says, or with `auto` where the machine is fast at it.

    Many CPUs accept bf16 and are slow at it; those with bf16 instructions (AVX-512 BF16, AMX) are several times faster
    than in fp32. Looking for the instructions, in place of timing, gives a busy machine the same answer as an idle one.
    """
    if setting != "auto":
        return setting == "true"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Compute in bf16 with fp32 weights, or in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
