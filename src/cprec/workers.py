"""Runs a function on every part of a folder, in several processes.

A worker is this module started afresh (`python -m cprec.workers`), not a copy of the caller: it holds none of the
caller's memory, and a script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cprec import errors
from cprec.errors import CPRecError
from cprec.machine import num_cores
from cprec.progress import track


def num_workers(wanted: int | None) -> int:
    """The number of processes asked for, or else of the cores that this process may use."""
    return wanted or num_cores()


def run_parts(
    function: str,
    folder: Path,
    parts: Sequence[int],
    workers: int,
    description: str,
    *,
    unit: str = "parts",
    sizes: Mapping[int, int] | None = None,
) -> list[Any]:
    """Call `function` ("module:name") with the folder and each part; returns its results in the order of the parts.

    Results must be plain JSON. With one worker, or one part, it runs in this process. Of several, each has one thread,
    and its number as LOCAL_RANK, by which it finds its GPU. An error in a part (those of `cprec.errors` keep their
    type) stops all others; so does an interruption. Progress is shown in `unit`, of which each part has `sizes[part]`.
    """
    sizes = sizes or dict.fromkeys(parts, 1)
    with track(sum(sizes[part] for part in parts), description, unit) as progress:
        if min(workers, len(parts)) <= 1:
            results = []
            for part in parts:
                results.append(function_of(function)(folder, part))
                progress.advance(sizes[part])
            return results
        messages: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        shares = [list(parts[start::workers]) for start in range(min(workers, len(parts)))]
        processes = [_start(function, folder, share, number, messages) for number, share in enumerate(shares)]
        found: dict[int, Any] = {}
        try:
            running = len(processes)
            while running:
                number, message = messages.get()
                if message is None:
                    running -= 1
                    if code := processes[number].wait():
                        raise CPRecError(_ended(code, description))
                elif "error" in message:
                    kind = getattr(errors, message["kind"], CPRecError)
                    raise kind(message["error"])
                else:
                    found[message["part"]] = message["result"]
                    progress.advance(sizes[message["part"]])
        finally:
            for process in processes:
                process.kill()
                process.wait()
                assert process.stdin is not None
                process.stdin.close()
        return [found[part] for part in parts]


def _ended(code: int, description: str) -> str:
    told = f"a worker process ended with exit code {code} while {description}"
    if code == -signal.SIGKILL:
        told += " (it was killed; for want of memory, perhaps, of which fewer processes take less)"
    return f"{told}: the same command goes on from what is written"


def _start(
    function: str, folder: Path, parts: Sequence[int], number: int, messages: queue.Queue[Any]
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", __name__, function, str(folder), ",".join(map(str, parts))]
    # One thread each, because the parts run side by side.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CPREC_PROGRESS": "off", "LOCAL_RANK": str(number)}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment
    )
    threading.Thread(target=_listen, args=(process.stdout, number, messages), daemon=True).start()
    return process


def _listen(lines: IO[str], number: int, messages: queue.Queue[Any]) -> None:
    with lines, contextlib.suppress(json.JSONDecodeError):  # a line cut short: its process died, as its exit code says
        for line in lines:
            messages.put((number, json.loads(line)))
    messages.put((number, None))


def function_of(name: str) -> Any:
    """The function of "module:name"."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _end_with_parent() -> None:
    """Exit when the parent ends, however it ends: nothing is sent through the pipe, which then closes."""
    os.read(0, 1)
    os._exit(1)


def main() -> int:
    """Work on the parts that the command line names, and print one JSON object for each."""
    name, folder, parts = sys.argv[1:]
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # so that nothing that libraries print, those in C too, mixes with the messages
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        function = function_of(name)
        for part in map(int, parts.split(",")):
            print(json.dumps({"part": part, "result": function(Path(folder), part)}), file=output, flush=True)
    except CPRecError as error:
        print(json.dumps({"kind": type(error).__name__, "error": str(error)}), file=output, flush=True)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
