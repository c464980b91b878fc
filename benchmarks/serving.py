"""Load on `cprec serve`, over loopback: what micro-batching is worth, and what overload does.

    python benchmarks/serving.py [--model FOLDER] [--seconds 10] [--deadline-ms 1000] [--threads 1] [--markdown FILE]

FOLDER is a fine-tuned model whose data folder is where it was; that of `cprec demo` by default. The service runs in a
process of its own and the clients in this one, on the same cores. Histories are those of the test events of the
model's domain, in a random order, and all answers are checked to be lists of K items or a refusal.

1. Throughput of exact lists, one request at a time (max_batch=1: one is answered, one waits) and in batches (32 are
   answered, 32 wait), without a deadline.
2. Closed loop: 1, 8 and 64 clients, each with its next request once it has its answer.
3. Open loop: requests at random moments (Poisson) at 50, 90 and 150 % of what 64 clients got, whatever is answered.

Times are of the client, from the first byte sent to the last received; shed requests are counted, not timed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cprec.data.dataset import read_split
from cprec.machine import num_cores
from cprec.provenance import read_resolved

K = 10


@dataclass
class Load:
    """What clients saw."""

    name: str
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    """Milliseconds of each list."""
    answers: Counter[str] = field(default_factory=Counter)
    """Lists by mode; shed; failed."""
    degraded: int = 0

    @property
    def per_second(self) -> float:
        """Lists a second."""
        return len(self.latencies) / self.seconds

    def row(self) -> str:
        """A line of the table."""
        sent = max(1, sum(self.answers.values()))
        p50, p95, p99 = np.percentile(self.latencies, [50, 95, 99]) if self.latencies else [float("nan")] * 3
        modes = ", ".join(f"{mode} {100 * n / sent:.0f} %" for mode, n in self.answers.most_common() if mode != "shed")
        shed, degraded = 100 * self.answers["shed"] / sent, 100 * self.degraded / sent
        return (
            f"| {self.name} | {self.per_second:.1f} | {p50:.0f} | {p95:.0f} | {p99:.0f} | {modes} | {degraded:.1f} % | "
            f"{shed:.1f} % |"
        )


HEAD = "| load | lists/s | p50 ms | p95 ms | p99 ms | how | degraded | shed |\n|---|---:|---:|---:|---:|---|---:|---:|"


@contextmanager
def serving(model: str, threads: int, *settings: str) -> Iterator[int]:
    """The port of a service, which is stopped in order afterwards."""
    command = [sys.executable, "-m", "cprec", "serve", model, "port=0", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CPREC_PROGRESS": "plain"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    said = ""
    try:
        while not (found := re.search(r"serving on http://127\.0\.0\.1:(\d+)", said)):
            line = process.stderr.readline()
            if not line:
                raise SystemExit(f"the service did not start:\n{said}")
            said += line
        yield int(found[1])
    finally:
        process.terminate()
        process.communicate(timeout=60)


class Client:
    """One connection, kept open."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes, load: Load) -> float:
        """Send a request and note the answer; returns how long to stay away."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = "POST /v1/recommend HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        began = time.perf_counter()
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"content-length: (\d+)", answer)
        assert length is not None, answer
        text = await reader.readexactly(int(length[1]))
        milliseconds = 1000 * (time.perf_counter() - began)
        status = int(answer.split()[1])
        if status == 503:
            load.answers["shed"] += 1
            wait = re.search(r"retry-after: (\d+)", answer)
            assert wait is not None, answer
            return float(wait[1])
        assert status == 200, text
        told = json.loads(text)
        assert len(told["items"]) == K and len({item["item_id"] for item in told["items"]}) == K
        load.latencies.append(milliseconds)
        load.answers[told["mode"]] += 1
        load.degraded += told["degraded"]
        return 0.0

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()


async def closed_loop(name: str, port: int, clients: int, seconds: float, bodies: Sequence[bytes]) -> Load:
    """Each client asks again once it has its answer, or when it is told to come back."""
    load, begin = Load(name), time.perf_counter()
    following = iter(range(1 << 60))

    async def one() -> None:
        client = Client(port)
        while time.perf_counter() - begin < seconds:
            await asyncio.sleep(await client.ask(bodies[next(following) % len(bodies)], load))
        client.close()

    await asyncio.gather(*(one() for _ in range(clients)))
    load.seconds = time.perf_counter() - begin
    return load


async def open_loop(name: str, port: int, rate: float, seconds: float, bodies: Sequence[bytes]) -> Load:
    """`rate` requests a second at random moments; connections that are free are used again."""
    load, begin = Load(name), time.perf_counter()
    random = np.random.default_rng(0)
    idle: list[Client] = []
    under_way: set[asyncio.Task[None]] = set()

    async def one(body: bytes) -> None:
        client = idle.pop() if idle else Client(port)
        await client.ask(body, load)
        idle.append(client)

    at, number = 0.0, 0
    while (at := at + random.exponential(1 / rate)) < seconds:
        await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
        task = asyncio.create_task(one(bodies[number % len(bodies)]))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        number += 1
    await asyncio.gather(*under_way)
    load.seconds = time.perf_counter() - begin
    for client in idle:
        client.close()
    return load


def bodies_of(model: str, **fields: object) -> list[bytes]:
    """A request for each user of the model's domain: the events before the last."""
    about = json.loads(Path(model, "cprec.json").read_text())
    split = read_split(read_resolved(model)["config"]["data"])
    log, catalogue = split.interactions, split.catalogue
    mine = log.select(catalogue.domain[log.item] == catalogue.domain_index(about["domain"]))
    offsets = np.searchsorted(mine.user, np.unique(mine.user), side="left").tolist() + [len(mine)]
    histories = [
        [str(item) for item in catalogue.item_id[mine.item[start : stop - 1][-about["max_history"] :]]]
        for start, stop in zip(offsets, offsets[1:], strict=False)
        if stop - start > 1
    ]
    order = np.random.default_rng(0).permutation(len(histories))
    return [json.dumps({"history": histories[place], "k": K, **fields}).encode() for place in order]


def main() -> None:
    """Run all loads and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/finetune/kitchen/cprec-style")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--deadline-ms", type=float, default=1000.0)
    parser.add_argument("--threads", type=int, default=1, help="of the engine; the clients and HTTP take another core")
    parser.add_argument("--markdown", help="file for the table")
    args = parser.parse_args()
    if not Path(args.model, "cprec.json").is_file():
        print(f"{args.model} holds no model: run `cprec demo`, or give --model FOLDER")
        return
    lines = [HEAD]

    def note(load: Load) -> Load:
        lines.append(load.row())
        print(load.row(), flush=True)
        return load

    print(
        f"{args.model}, {num_cores()} cores, {args.threads} thread(s) for the engine, {args.seconds:g} s each\n{HEAD}"
    )
    exact = bodies_of(args.model, mode="exact", deadline_ms=60_000)
    auto = bodies_of(args.model, deadline_ms=args.deadline_ms)
    rates = {}
    for name, max_batch, clients in (("exact, one at a time", 1, 2), ("exact, batches up to 32", 32, 64)):
        with serving(args.model, args.threads, f"max_batch={max_batch}", "deadline_ms=60000", "cache_mb=0") as port:
            asyncio.run(closed_loop("", port, clients, min(2, args.seconds), exact))  # warm
            rates[max_batch] = note(asyncio.run(closed_loop(name, port, clients, args.seconds, exact))).per_second
    with serving(args.model, args.threads, f"deadline_ms={args.deadline_ms}") as port:
        asyncio.run(closed_loop("", port, 8, min(2, args.seconds), auto))
        for clients in (1, 8, 64):
            load = note(asyncio.run(closed_loop(f"closed, {clients} clients", port, clients, args.seconds, auto)))
        for share in (50, 90, 150):
            rate = load.per_second * share / 100
            name = f"open, {share} % ({rate:.0f}/s)"
            over = note(asyncio.run(open_loop(name, port, rate, args.seconds, auto)))
    p99 = float(np.percentile(over.latencies, 99))
    lines += ["", f"Batches over one at a time: {rates[32] / rates[1]:.2f} times the lists a second."]
    lines += [f"At 150 %: p99 {p99:.0f} ms, deadline {args.deadline_ms:g} ms."]
    print("\n".join(lines[-2:]))
    if args.markdown:
        Path(args.markdown).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
