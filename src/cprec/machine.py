"""The cores and the memory that a process may use: those of the machine, or of the control group that it runs in."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LEAST_MEMORY = 1 << 28
"""Bytes that count as free in any case."""


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy_cores() -> float:
    """How many cores programs kept busy in the last minute, this one included; 0 where the system does not say."""
    with suppress(OSError, AttributeError):  # no such number, or another system
        return os.getloadavg()[0]
    return 0.0


def is_busy() -> bool:
    """Whether other programs need so many cores that threads of this one would wait for theirs. Asked when a program
    starts, before it is busy itself."""
    return busy_cores() > num_cores() / 4


def free_memory() -> int:
    """Bytes that this process may still take; memory that the system would give back (file cache) counts as free."""
    # The smallest of: all memory of the machine, what the system calls available, what limits of groups leave.
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return max(LEAST_MEMORY, min([*free, *_free_in_groups()]))


def reset_peak_memory() -> int:
    """Let `peak_memory` start from here; returns the bytes that this process takes now.

    Memory that the process has freed and kept is given back first, where glibc can do so: using it again would not
    count.
    """
    with suppress(OSError, AttributeError, TypeError):  # another C library, or none that can be opened so
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets the peak and nothing else
    return _of_this_process("VmRSS") or peak_memory()


def peak_memory() -> int:
    """The most bytes that this process took at once since the reset; where the system knows no reset, ever."""
    in_kilobytes = sys.platform != "darwin"
    ever = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if in_kilobytes else 1)
    return _of_this_process("VmHWM") or ever


def _of_this_process(key: str) -> int:
    """A number of bytes that Linux tells of this process; 0 elsewhere."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
    return 0


def _free_in_groups() -> Iterator[int]:
    """Bytes left under the limits of control groups: version 2 (memory.max), then version 1 (memory.limit_in_bytes)."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers == "":
            yield from _free_in_group(Path("/sys/fs/cgroup"), path, "memory.max", "anon")
        elif "memory" in controllers.split(","):
            yield from _free_in_group(Path("/sys/fs/cgroup/memory"), path, "memory.limit_in_bytes", "total_rss")


def _free_in_group(root: Path, path: str, limit_file: str, used_key: str) -> Iterator[int]:
    for group in (root / path.lstrip("/"), root):  # in a container the root may be the group itself
        try:
            limit = int((group / limit_file).read_text())
            used = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield limit - int(used[used_key])
        except (OSError, ValueError, KeyError):  # no limit ("max"), or no such file
            continue
