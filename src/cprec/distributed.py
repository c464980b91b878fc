"""Devices and number formats: the only file that knows what machine a model runs on."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

from cprec.errors import ConfigError

Precision = Literal["auto", "true", "false"]


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

    Many CPUs accept bf16 and are slow at it; those with bf16 instructions (AVX-512 BF16, AMX) are several times faster
    than in fp32. The instructions are asked for, not timed: a busy machine gives the same answer as an idle one.
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
