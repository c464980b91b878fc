"""What waiting threads cost on a busy machine: steps a second of a small network, by how its threads wait.

    python benchmarks/contention.py [--seconds 4] [--width 192]

Each row is a process of its own, since OpenMP reads the environment when it is loaded: one thread; all threads as
PyTorch comes, and as `cprec` starts them on a busy machine (OMP_WAIT_POLICY=PASSIVE). They run by themselves, beside
one program that never waits, and beside four for each core. The machine must be idle otherwise.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cprec.machine import num_cores

POLICY = "OMP_WAIT_POLICY"
TRAIN = """
import sys, time
import torch
from torch import nn
threads, seconds, width = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
layers = [nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.LayerNorm(width)]
model, rows = nn.Sequential(*layers), torch.randn(512, width)
optimizer = torch.optim.AdamW(model.parameters())
def step():
    optimizer.zero_grad()
    model(rows).square().mean().backward()
    optimizer.step()
for _ in range(5):
    step()
number, start = 0, time.perf_counter()
while time.perf_counter() - start < seconds:
    step()
    number += 1
print(number / (time.perf_counter() - start))
"""


def steps_per_second(threads: int, asked: argparse.Namespace, environment: dict[str, str]) -> float:
    clean = {
        name: value for name, value in os.environ.items() if name not in (POLICY, "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    }
    command = [sys.executable, "-c", TRAIN, str(threads), str(asked.seconds), str(asked.width)]
    done = subprocess.run(command, env=clean | environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


@contextmanager
def busy_programs(number: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--width", type=int, default=192)
    asked = parser.parse_args()
    cores = num_cores()
    rows: dict[str, tuple[int, dict[str, str]]] = {
        "1 thread": (1, {}),
        f"{cores} threads": (cores, {}),
        f"{cores} threads, {POLICY}=PASSIVE": (cores, {POLICY: "PASSIVE"}),
    }
    rates: dict[int, dict[str, float]] = {}
    for others in (0, 1, 4 * cores):
        with busy_programs(others):
            rates[others] = {name: steps_per_second(threads, asked, more) for name, (threads, more) in rows.items()}
    best = max(rates[0].values())
    print(f"{'steps a second beside other programs:':<40}" + "".join(f"{others:>16}" for others in rates))
    for name in rows:
        print(f"{name:<40}" + "".join(f"{of[name]:>9.1f} ({of[name] / best:>4.0%})" for of in rates.values()))


if __name__ == "__main__":
    main()
