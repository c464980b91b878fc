"""Seconds of the output layer with its loss, forward and backward: chunk by chunk against plain full logits.

    python benchmarks/loss.py [positions width vocabulary]

Both run in turn in one process; the ratio is what counts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from cprec.distributed import pick_device, use_bf16
from cprec.train.loss import linear_cross_entropy

ROUNDS = 7


def main() -> None:
    positions, width, vocabulary = (int(word) for word in sys.argv[1:4]) if len(sys.argv) > 3 else (4096, 192, 8192)
    device = pick_device()
    dtype = torch.bfloat16 if use_bf16("auto", device) else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(positions, width, device=device, requires_grad=True)
    weight = torch.randn(vocabulary, width, device=device, requires_grad=True)
    target = torch.randint(0, vocabulary, (positions,), device=device)

    def plain() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = torch.nn.functional.linear(hidden, weight)
        return torch.nn.functional.cross_entropy(logits.float(), target, reduction="sum")

    def chunked() -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, target, dtype)

    def seconds(loss: Callable[[], torch.Tensor]) -> float:
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        loss().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(plain), seconds(chunked)
    pairs = [(seconds(plain), seconds(chunked)) for _ in range(ROUNDS)]
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{positions:,} positions, width {width}, vocabulary {vocabulary:,}, {dtype}, {device.type}")
    print(f"plain {first:.3f} s, chunked {second:.3f} s: {ratio:.2f}x as fast (median of {ROUNDS} pairs)")


if __name__ == "__main__":
    main()
