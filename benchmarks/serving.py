"""Load on `cprec serve`, over loopback: what micro-batching is worth, what overload does, and two workers.

    python benchmarks/serving.py [--model FOLDER] [--seconds 10] [--deadline-ms 1000] [--threads 1] [--markdown FILE]
                                 [--only load|workers]

FOLDER is a fine-tuned model whose data folder is where it was; that of `cprec demo` by default. The service runs in a
process of its own and the clients in this one, on the same cores. Histories are those of the test events of the
model's domain, in a random order, and all answers are checked to be lists of K items or a refusal.

1. Throughput of exact lists, one request at a time (max_batch=1: one is answered, one waits) and in batches (32 are
   answered, 32 wait), without a deadline.
2. Closed loop: 1, 8 and 64 clients, each with its next request once it has its answer.
3. Open loop: requests at random moments (Poisson) at 50, 90 and 150 % of what 64 clients got, whatever is answered.

Times are of the client, from the first byte sent to the last received; shed requests are counted, not timed.

4. Workers, with a tiny model of random weights that is made here: one, then two with the same state folder, behind a
   round-robin proxy (each new connection goes to the next worker); 32 clients ask for beams, whose cost is fixed. Then,
   at half of the load that two workers took, two more clients add items, withdraw and change them, always two changes
   at once, one at each worker; an item that one worker has confirmed goes on at the other. Once a change is confirmed,
   both workers are asked until they show it, and a history that names the item must be answered. In the end every item
   is looked up at both workers and in the store: what is not as the last confirmed change left it is a lost change.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from cprec.data.catalogue import Catalogue
from cprec.data.dataset import read_split
from cprec.machine import num_cores
from cprec.models import tiny_model
from cprec.provenance import read_resolved
from cprec.serve.items import ItemStore
from cprec.text.tokenizer import train_tokenizer

K = 10
GIVE_UP_SECONDS = 20.0
"""How long a change is looked for."""


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

    async def send(self, method: str, path: str, body: bytes = b"") -> tuple[int, str, bytes]:
        """The status, the headers and the body of an answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = re.search(r"content-length: (\d+)", answer)
        assert length is not None, answer
        return int(answer.split()[1]), answer, await reader.readexactly(int(length[1]))

    async def ask(self, body: bytes, load: Load) -> float:
        """Send a request and note the answer; returns how long to stay away."""
        began = time.perf_counter()
        status, answer, text = await self.send("POST", "/v1/recommend", body)
        milliseconds = 1000 * (time.perf_counter() - began)
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
    parser.add_argument("--markdown", help="file for the tables")
    parser.add_argument("--only", choices=("load", "workers"), help="one of the two sections")
    args = parser.parse_args()
    lines: list[str] = []
    if args.only != "workers":
        lines += measure_load(args)
    if args.only != "load":
        lines += measure_workers(args)
    if args.markdown:
        Path(args.markdown).write_text("\n".join(lines) + "\n")


def measure_load(args: argparse.Namespace) -> list[str]:
    """Sections 1 to 3; returns the lines of the table."""
    if not Path(args.model, "cprec.json").is_file():
        print(f"{args.model} holds no model: run `cprec demo`, or give --model FOLDER")
        return []
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
    return lines


# ---- workers ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def round_robin(ports: Sequence[int]) -> AsyncIterator[int]:
    """The port of a TCP proxy: each new connection goes to the next of `ports`."""
    following = itertools.cycle(ports)

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_worker, to_worker = await asyncio.open_connection("127.0.0.1", next(following))
        passing.extend(asyncio.create_task(pass_on(*pair)) for pair in ((reader, to_worker), (from_worker, writer)))

    passing: list[asyncio.Task[None]] = []
    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await asyncio.gather(*passing)  # the clients have hung up


async def through_proxy(name: str, ports: Sequence[int], clients: int, seconds: float, bodies: Sequence[bytes]) -> Load:
    """A closed loop of clients of the proxy, after one of two seconds that is not counted."""
    async with round_robin(ports) as port:
        await closed_loop("", port, clients, min(2, seconds), bodies)
        return await closed_loop(name, port, clients, seconds, bodies)


def tiny_folder(folder: Path) -> tuple[str, list[bytes]]:
    """A model folder of random weights over 300 items, and requests for beams."""
    random = np.random.default_rng(0)
    words = [f"{first}{second}" for first in ("bra", "ke", "lo", "mi", "su") for second in ("dan", "fel", "gor", "pin")]
    titles = [" ".join(random.choice(words, 4)).title() for _ in range(300)]
    ids = [f"item-{number:03}" for number in range(len(titles))]
    catalogue = Catalogue.from_tables({"shop": pa.table({"item_id": ids, "title": titles})})
    tokenizer = train_tokenizer([f" {title}" for title in titles], 300)
    tiny_model(len(tokenizer), hidden_size=64, num_hidden_layers=4, num_attention_heads=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    catalogue.write(folder)
    about = {"domain": "shop", "template": {}, "max_title_tokens": 32, "history": "specific", "max_history": 10}
    (folder / "cprec.json").write_text(json.dumps(about))
    (folder / "run.json").write_text(json.dumps({"config": {}}))
    histories = [random.choice(ids, random.integers(1, 10)).tolist() for _ in range(500)]
    return str(folder), [json.dumps({"history": history, "k": K, "mode": "beam"}).encode() for history in histories]


@dataclass
class Changes:
    """What came of changes at two workers."""

    titles: dict[str, str | None] = field(default_factory=dict)
    """Each item as its last confirmed change left it; None for one that was withdrawn."""
    named: Load = field(default_factory=lambda: Load("histories that name it"))
    made: list[float] = field(default_factory=list)
    """Milliseconds from sending a change until it was confirmed."""
    asked: list[float] = field(default_factory=list)
    """From then until the worker that confirmed it showed it."""
    other: list[float] = field(default_factory=list)
    """And until the other one did."""


async def title_at(worker: Client, item_id: str) -> str | None:
    """The title of an item in stock, as a worker tells it; None for one that is not."""
    status, _, text = await worker.send("GET", f"/v1/items?query={item_id}")
    assert status == 200, text
    return next((item["title"] for item in json.loads(text)["items"] if item["item_id"] == item_id), None)


async def until_shown(worker: Client, item_id: str, title: str | None) -> float:
    """Milliseconds until a worker shows an item as it was changed; after GIVE_UP_SECONDS it is lost."""
    began = time.perf_counter()
    while await title_at(worker, item_id) != title and time.perf_counter() - began < GIVE_UP_SECONDS:
        await asyncio.sleep(0.005)
    return 1000 * (time.perf_counter() - began)


async def ask_once(port: int, body: bytes, load: Load) -> None:
    """Send a request by a connection of its own, for whichever worker is next."""
    client = Client(port)
    await client.ask(body, load)
    client.close()


async def change_items(number: int, ports: Sequence[int], proxy: int, until: float, changes: Changes) -> None:
    """Change items of one's own, at the worker `number` first and then at each in turn, until the time is over."""
    workers, asks = [Client(port) for port in ports], []
    for place in itertools.count():
        if time.perf_counter() > until:
            break
        # An item is added at one worker, withdrawn at the next and put back with another title at the one after.
        item_id, step = f"new-{number}-{place // 3}", place % 3
        title = None if step == 1 else f"New Kedan {number} {place}"
        at = (number + place) % len(workers)
        began = time.perf_counter()
        if title is None:
            status, _, text = await workers[at].send("DELETE", f"/v1/items?item_id={item_id}&domain=shop")
        else:
            # In the same change an item for which both clients contend.
            new = [{"item_id": name, "domain": "shop", "title": title} for name in (item_id, "shared")]
            status, _, text = await workers[at].send("PUT", "/v1/items", json.dumps({"items": new}).encode())
        assert status == 200, text
        changes.made.append(1000 * (time.perf_counter() - began))
        changes.titles[item_id] = title
        named = json.dumps({"history": ["item-000", item_id], "k": K, "mode": "beam"}).encode()
        asks.append(asyncio.create_task(ask_once(proxy, named, changes.named)))
        asked, other = await asyncio.gather(*(until_shown(workers[which], item_id, title) for which in (at, 1 - at)))
        changes.asked.append(asked)
        changes.other.append(other)
    await asyncio.gather(*asks)
    for worker in workers:
        worker.close()


async def count_lost(ports: Sequence[int], titles: dict[str, str | None], state: str) -> int:
    """How many items a worker, or the store, has otherwise than the last confirmed change left them."""
    lost, shared = 0, set()
    for port in ports:
        worker = Client(port)
        for item_id, title in titles.items():
            lost += await title_at(worker, item_id) != title
        shared.add(await title_at(worker, "shared"))
        worker.close()
    with closing(ItemStore(state)) as store:
        stored = {item.item_id: None if item.withdrawn else item.title for item in store.items.values()}
    shared.add(stored.pop("shared"))
    lost += sum(stored.get(item_id, "") != title for item_id, title in titles.items())
    return lost + len(shared) - 1  # of the contended item, all must have the same title


def measure_workers(args: argparse.Namespace) -> list[str]:
    """Section 4; returns the lines of its table."""
    clients, changes, lines = 32, Changes(), [HEAD]
    print(f"\ntiny model, {args.threads} thread(s) for each of two engines on {num_cores()} cores\n{HEAD}")

    def note(load: Load) -> Load:
        lines.append(load.row())
        print(load.row(), flush=True)
        return load

    async def under_load(ports: Sequence[int], rate: float, bodies: Sequence[bytes]) -> Load:
        async with round_robin(ports) as port:
            until = time.perf_counter() + args.seconds
            load = open_loop(f"half of it ({rate:.0f}/s), items change", port, rate, args.seconds, bodies)
            changers = (change_items(number, ports, port, until, changes) for number in range(2))
            return (await asyncio.gather(load, *changers))[0]

    with tempfile.TemporaryDirectory() as folder, ExitStack() as workers:
        model, bodies = tiny_folder(Path(folder, "tiny"))
        state = f"{folder}/state"

        def start() -> int:
            return workers.enter_context(serving(model, args.threads, f"state={state}", "deadline_ms=60000"))

        ports = [start()]
        one = note(asyncio.run(through_proxy("one worker", ports, clients, args.seconds, bodies)))
        ports.append(start())
        two = note(asyncio.run(through_proxy("two workers", ports, clients, args.seconds, bodies)))
        during = note(asyncio.run(under_load(ports, two.per_second / 2, bodies)))
        lost = asyncio.run(count_lost(ports, changes.titles, state))

    def times(milliseconds: Sequence[float]) -> str:
        return f"median {np.median(milliseconds):.0f} ms, greatest {max(milliseconds):.0f} ms"

    meanwhile = during.answers + changes.named.answers
    said = [
        "",
        f"Two workers over one: {two.per_second / one.per_second:.2f} times the requests a second.",
        f"{len(changes.made)} changes, two at once, were confirmed after: {times(changes.made)}.",
        f"The worker that confirmed a change showed it after: {times(changes.asked)}.",
        f"The other worker showed it after: {times(changes.other)}.",
        f"Lost changes: {lost}. Of {meanwhile.total()} requests meanwhile, {meanwhile['shed']} were refused and none "
        "failed.",
    ]
    print("\n".join(said))
    if lost:
        raise SystemExit("changes were lost")
    return [*lines, *said]


if __name__ == "__main__":
    main()
