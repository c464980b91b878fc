"""CPU seconds (user + system) of what a person waits for before a stage runs: help, version, a setting that is wrong.

    python benchmarks/startup.py [repetitions]

Prints the median and the range, after one run that is not counted, with an empty Python process as the floor.
"""

from __future__ import annotations

import platform
import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import cprec": ["-c", "import cprec"],
    "cprec --version": ["-m", "cprec", "--version"],
    "cprec --help": ["-m", "cprec", "--help"],
    "cprec prepare --help": ["-m", "cprec", "prepare", "--help"],
    "cprec run no_such_recipe": ["-m", "cprec", "run", "no_such_recipe"],
    "cprec demo prepare.no_such_field=1": ["-m", "cprec", "demo", "prepare.no_such_field=1"],
}


def cpu_seconds(command: list[str]) -> float:
    """CPU seconds of one process, start to end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    print(f"Python {platform.python_version()}, {platform.machine()}, {repetitions} repetitions")
    for name, arguments in COMMANDS.items():
        seconds = [cpu_seconds([sys.executable, *arguments]) for _ in range(repetitions + 1)][1:]
        print(f"{name:<36} {statistics.median(seconds):.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    main()
