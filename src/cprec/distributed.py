"""Devices and number formats: the only file that knows what machine a model runs on."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from cprec.errors import ConfigError

Precision = Literal["auto", "true", "false"]

BF16_GAIN = 2.0
"""On CPU, bf16 pays when its matrix products are at least this many times faster than fp32's: the casts cost time."""


def single_process() -> None:
    """Raises ConfigError under a multi-process launcher: training in several processes is not part of this version."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("WORLD_SIZE > 1: this version trains in one process; start it without torchrun")


def pick_device() -> torch.device:
    """The first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    """One line for people: the device and how much of it is used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def use_bf16(setting: Precision, device: torch.device) -> bool:
    """Whether to compute in bf16: as told, or where the machine is good at it.

    On CUDA that is the device's own word; on CPU it is measured (some 20 ms), for many CPUs accept bf16 and are slow.
    """
    if setting != "auto":
        return setting == "true"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _matmul_seconds(torch.float32) > BF16_GAIN * _matmul_seconds(torch.bfloat16)


def _matmul_seconds(dtype: torch.dtype, size: int = 512, repeats: int = 5) -> float:
    """The best of `repeats` square matrix products."""
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return best


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Compute in bf16 with fp32 weights, or in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)
