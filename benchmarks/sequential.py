"""SASRec beside RecTools and RecBole: training in targets, full-ranking evaluation in users, a CPU second each.

    python benchmarks/sequential.py [--data FOLDER] [--rounds 3] [--seconds 8] [--only ml1m:50,games:50]
                                    [--quality 60] [--peers .cache/benchmark-peers] [--without rectools,recbole]

All programs have the same dimensions (64 wide, two blocks, two heads, dropout 0.2), batches of 256, Adam at 1e-3 and a
softmax over all items; they read the same files in turn, each as a process of its own with one thread, in an
environment with what `pip install` gives (RecBole needs four pins, see PEERS; made at the first run). A target is a
predicted position that is not padding. One step is, for ours, 256 windows of at most L targets, for RecTools the latest
L items of 256 users, for RecBole 256 prefixes of histories with one target each. Ours is measured from outside the
training loop of the library, between two batches that it asks for; ranking as validation does it, by
`DotProductRecommender.target_ranks`, which counts scores above the target; and beside it what `cprec evaluate` does,
which keeps the ten best items, with those of the history and without, and takes the metrics of both from the kept
table. Medians of rounds; a ratio is the median of each round's.

`ml1m` has the shape of MovieLens-1M and is generated; `games` is the folder amazon18_games of --data, else generated
too. With --quality, NDCG@10 after as many CPU seconds of training: leave-one-out, full catalogue, with items of the
history and without; also on movielens_100k of --data. The learning rate of ours falls to zero as the budget ends, as in
its recipes; a peer's is constant, as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

PEERS = {
    "rectools": ["torch==2.13.0", "rectools[torch]==0.19.0"],
    # 1.2.1 starts with no newer setuptools, numpy or pandas; torch.load is wrapped in peers/sasrec_recbole.py
    "recbole": ["torch==2.13.0", "recbole==1.2.1", "setuptools<81", "numpy<2", "pandas<3"],
}
DIMENSIONS = {
    **{"width": 64, "num_blocks": 2, "num_heads": 2, "dropout": 0.2, "batch_size": 256},
    **{"learning_rate": 1e-3, "seed": 0, "num_warm": 1},
}
SPEED = ("ml1m:50", "ml1m:200", "games:50")
FOLDERS = {"games": "amazon18_games", "ml100k": "movielens_100k"}
OURS = {"ours, fp32": False, "ours, bf16": True}
HERE = Path(__file__).parent


# ---- data ------------------------------------------------------------------------------------------------------------


def generated(lengths: np.ndarray, num_items: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Users' rows, in order: half of the items follow from the one before, the others are drawn by popularity."""
    random = np.random.default_rng(seed)
    popularity = (np.arange(num_items) + 20.0) ** -0.9
    total = int(lengths.sum())
    item = random.choice(num_items, total, p=popularity / popularity.sum())
    item[:num_items] = random.permutation(num_items)
    follows, step, after = random.random(total) < 0.5, random.integers(0, 4, total), random.permutation(num_items)
    start = np.cumsum(lengths) - lengths
    for place in range(1, int(lengths.max())):
        rows = start[lengths > place] + place
        rows = rows[follows[rows]]
        item[rows] = after[(item[rows - 1] + step[rows]) % num_items]
    return np.repeat(np.arange(len(lengths)), lengths), item


def interactions(name: str, data: Path | None) -> tuple[np.ndarray, np.ndarray, str]:
    """User and item of every row, by user and in order, and what they are."""
    if data is not None and name in FOLDERS:
        import pyarrow.parquet as pq

        table = pq.read_table(data / FOLDERS[name] / "interactions.parquet").sort_by("user_id")
        user, item, place = (table[column].to_numpy() for column in ("user_id", "item_id", "position"))
        user = np.unique(user, return_inverse=True)[1]
        order = np.lexsort((place, user))
        return user[order], np.unique(item, return_inverse=True)[1][order], FOLDERS[name]
    random = np.random.default_rng(0)
    if name == "ml1m":
        lengths = random.lognormal(4.55, 1.0, 6040).clip(20, 2314)
        lengths = np.maximum(20, lengths * (1_000_000 / lengths.sum())).astype(np.int64)
        return *generated(lengths, 3416), "generated, the shape of MovieLens-1M"
    if name == "ml100k":
        lengths = (20 + random.lognormal(3.9, 1.0, 943)).clip(20, 737).astype(np.int64)
        return *generated(lengths, 1682), "generated, the shape of MovieLens-100K"
    lengths = (5 + random.lognormal(0.69, 1.1, 50_546)).clip(5, 771).astype(np.int64)
    return *generated(lengths, 16_859), "generated, the shape of Amazon games"


def write(name: str, data: Path | None, folder: Path) -> str:
    """The rows as a CSV file and as RecBole's atomic file; times are row numbers, so that no two are equal."""
    user, item, about = interactions(name, data)
    item = np.unique(item, return_inverse=True)[1]
    rows = np.stack([user, item, np.arange(len(user))], 1)
    (folder / name).mkdir()
    names = {",": "user,item,time", "\t": "user_id:token\titem_id:token\ttimestamp:float"}
    for path, mark in ((folder / f"{name}.csv", ","), (folder / name / f"{name}.inter", "\t")):
        np.savetxt(path, rows, fmt="%d", delimiter=mark, header=names[mark], comments="")
    return f"{about}: {user[-1] + 1:,} users, {item.max() + 1:,} items, {len(rows):,} rows"


# ---- ours ------------------------------------------------------------------------------------------------------------


class Spent(Exception):
    """The budget is spent."""


class Clocked:
    """A stream that counts CPU seconds and targets of all steps but the first, and ends training when a budget is
    spent. A step lasts from one request for a batch to the next, so whatever the loop does is in it."""

    def __init__(self, stream: Any, budget: float, num_warm: int) -> None:
        self._stream, self._budget, self._num_warm = stream, budget, num_warm
        self.num_steps, self.num_tokens = stream.num_steps, stream.num_tokens
        self._start, self._latest = time.process_time(), 0
        self.seconds, self.steps, self.targets = 0.0, 0, 0

    def share(self) -> float:
        """Of the budget, spent so far."""
        return min(1.0, (time.process_time() - self._start) / self._budget)

    def batch(self, step: int) -> Any:
        now = time.process_time()
        if step <= self._num_warm:
            self._start = now
        else:
            self.seconds, self.steps, self.targets = now - self._start, self.steps + 1, self.targets + self._latest
            if self.seconds >= self._budget:
                raise Spent
        batch = self._stream.batch(step)
        self._latest = sum(batch.counts.values())
        return batch


def ours(folder: Path, name: str, asked: dict[str, Any]) -> dict[str, Any]:
    """Train by the library's loop until the budget is spent, then rank every user's last item."""
    import torch

    from cprec import distributed
    from cprec.data.catalogue import Catalogue
    from cprec.data.ragged import Ragged, gather, offsets_of
    from cprec.evaluate.asking import BATCH
    from cprec.evaluate.questions import Questions
    from cprec.evaluate.rankings import table_of
    from cprec.evaluate.results import FULL_WITH_SEEN
    from cprec.evaluate.tables import metrics_of
    from cprec.ranks import ndcg
    from cprec.recommender import RankingQuery
    from cprec.schema import Item
    from cprec.systems.recipes.sasrec import WIDE
    from cprec.systems.signals import TrainingSequences
    from cprec.train.loop import Cadence, Optimisation, train
    from cprec.train.schedule import WSA

    torch.set_num_threads(1)
    user, item, _ = np.loadtxt(folder / f"{name}.csv", delimiter=",", skiprows=1, dtype=np.int64).T
    rows, num_items = Ragged(item, offsets_of(np.bincount(user))), int(item.max()) + 1
    start, lengths = rows.offsets[:-1], rows.lengths
    users = tuple(map(str, range(len(rows))))
    text = np.array([""] * num_items, dtype=object)
    ids = np.array([str(number) for number in range(num_items)], dtype=object)
    catalogue = Catalogue(("items",), np.zeros(num_items, dtype=np.int16), ids, ids, text, text)
    data = TrainingSequences(catalogue, "items", gather(item, start, lengths - 2), users)
    settings = replace(
        WIDE,
        hidden_size=asked["width"],
        num_blocks=asked["num_blocks"],
        num_heads=asked["num_heads"],
        dropout=asked["dropout"],
        batch_size=asked["batch_size"],
        learning_rate=asked["learning_rate"],
        max_length=asked["max_length"],
        num_epochs=10**5,
    )
    torch.manual_seed(asked["seed"])
    distributed.use_bf16 = lambda setting, device: asked["bf16"]
    (stage,) = settings.stages(data, asked["seed"])
    stream = Clocked(stage.stream, asked["seconds"], asked["num_warm"])
    schedule = WSA(total=1000, peak=settings.learning_rate, warmup=20, anneal=300, shape="linear")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            train(
                stage.trainable,
                stream,
                lambda step: schedule.after(1 + int(999 * stream.share())),
                output_dir=Path(temporary),
                optimisation=Optimisation(weight_decay=settings.weight_decay, max_grad_norm=5.0),
                cadence=Cadence(logging_steps=20, eval_steps=10**9, save_steps=10**9, save_total_limit=1),
                validate=dict,
                description="ours",
            )
    except Spent:
        pass
    known, target = gather(item, start, lengths - 1), item[rows.offsets[1:] - 1]
    recommender = stage.recommender()

    def counted(leave_out_seen: bool) -> float:
        ranks = recommender.target_ranks(known, target, users=users, exclude_seen=leave_out_seen)
        return float(ndcg(*ranks, 10).mean())

    def kept(queries: list[RankingQuery]) -> float:
        """As `cprec evaluate`: lists, their table, and metrics under both rules for seen items."""
        rankings = [
            each
            for first in range(0, len(queries), BATCH)
            for each in recommender.rank(queries[first : first + BATCH], 10)
        ]
        number = [int(query.query_id) for query in queries]
        names = [query.query_id for query in queries]
        questions = Questions(domain="items", queries=queries, target=ids[target[number]].tolist(), user=names)
        protocol = questions.protocols()[0]
        columns = metrics_of(table_of(rankings, protocol, "items"), protocol, 10, FULL_WITH_SEEN)
        return float(columns["ndcg@10"].mean())

    begin = time.process_time()
    quality = counted(False)
    spent = time.process_time() - begin
    queries = [
        RankingQuery(
            query_id=user,
            domain="items",
            history=tuple(Item("items", each) for each in ids[known[row]]),
            user=user,
            uncounted=frozenset(ids[known[row]]),
        )
        for row, user in enumerate(users)
    ]
    kept(queries[:BATCH])  # reads its modules
    begin = time.process_time()
    same = kept(queries)
    spent_keeping = time.process_time() - begin
    if abs(same - quality) > 1e-6:
        raise RuntimeError(f"NDCG@10 is {quality} by counting and {same} from kept lists")
    return {
        "seconds": stream.seconds,
        "steps": stream.steps,
        "targets": stream.targets,
        "evaluation_seconds": spent,
        "keeping_seconds": spent_keeping,
        "users": len(rows),
        "ndcg": quality,
        "ndcg_unseen": counted(True) if asked["unseen"] else None,
    }


# ---- running ---------------------------------------------------------------------------------------------------------


def interpreter(peer: str, folder: Path) -> Path:
    """The Python of a peer's environment, made if it is not there."""
    python = folder / peer / "bin" / "python"
    if not python.exists():
        print(f"making {peer}'s environment", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder / peer], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--quiet", *PEERS[peer]], check=True)
    return python


def measured(program: str, python: dict[str, Path], folder: Path, name: str, settings: dict[str, Any]) -> Any:
    """What a program measured of itself."""
    if program in OURS:
        command = [sys.executable, __file__, "--ours"]
        settings = {**settings, "bf16": OURS[program]}
    else:
        command = [str(python[program]), str(HERE / "peers" / f"sasrec_{program}.py")]
    command += ["--folder", str(folder), "--data", name, "--settings", json.dumps(settings)]
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **one_thread, "PYTHONWARNINGS": "ignore"},
    )
    if done.returncode:
        raise RuntimeError(f"{program} on {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def rates(run: dict[str, Any]) -> tuple[float, float, float]:
    """A CPU second: targets; users; users whose lists are kept too, as a peer does anyway."""
    evaluation = run["evaluation_seconds"]
    keeping = run.get("keeping_seconds", evaluation)
    return run["targets"] / run["seconds"], run["users"] / evaluation, run["users"] / keeping


def ratio(ours: list[dict[str, Any]], other: list[dict[str, Any]], which: int) -> float:
    return statistics.median(rates(a)[which] / rates(b)[which] for a, b in zip(ours, other, strict=True))


def show_speed(title: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """One data set's table: rates, and how many times as fast ours is."""
    peers = [program for program in runs if program not in OURS]
    print(f"\n{title}")
    heads = "".join(f"{'x ' + peer:>12}" for peer in peers)
    print(f"  {'':<12}{'ms/step':>9}{'targets/s':>12}{heads}{'users/s':>12}{heads}")
    for program, mine in runs.items():
        targets, users = (statistics.median(rates(run)[which] for run in mine) for which in (0, 1))
        step = statistics.median(1e3 * run["seconds"] / run["steps"] for run in mine)
        beside = peers if program in OURS else []
        cells = ["".join(f"{ratio(mine, runs[peer], which):>11.1f}x" for peer in beside) for which in (0, 1)]
        cells[0] = cells[0].ljust(12 * len(peers))
        print(f"  {program:<12}{step:>9,.0f}{targets:>12,.0f}{cells[0]}{users:>12,.0f}{cells[1]}", flush=True)
    for program in (program for program in runs if program in OURS):
        users = statistics.median(rates(run)[2] for run in runs[program])
        beside = ", ".join(f"{ratio(runs[program], runs[peer], 2):.1f}x {peer}" for peer in peers)
        print(f"  {program}, as `cprec evaluate` with lists kept: {users:,.0f} users/s, {beside}", flush=True)


def show_quality(program: str, run: dict[str, Any]) -> None:
    """A line of the table, as soon as it is known."""
    unseen = "" if run["ndcg_unseen"] is None else f"{run['ndcg_unseen']:.4f}"
    print(f"  {program:<12}{run['ndcg']:>9.4f}{unseen:>10}{run['targets']:>13,}{run['seconds']:>8.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with amazon18_games and movielens_100k")
    parser.add_argument("--rounds", type=int, default=3, help="0: only what --quality asks for")
    parser.add_argument("--seconds", type=float, default=8, help="CPU seconds of training that are timed in each run")
    parser.add_argument("--only", default=",".join(SPEED), help="data set and length, each")
    parser.add_argument("--without", default="", help="peers to leave out")
    parser.add_argument(
        "--quality", type=float, default=0, help="CPU seconds of training before NDCG@10; 0: no such run"
    )
    parser.add_argument("--peers", type=Path, default=HERE.parent / ".cache" / "benchmark-peers")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(ours(args.folder, str(args.data), args.settings)))
        return
    peers = [peer for peer in PEERS if peer not in args.without.split(",")]
    python = {peer: interpreter(peer, args.peers.absolute()) for peer in peers}
    programs = [*OURS, *peers]
    for peer in peers:
        print(f"{peer}: {', '.join(PEERS[peer])}")
    print("ours computes the products of training in fp32 or bf16, as named; ranking is in fp32", flush=True)
    wanted = [each.split(":") for each in args.only.split(",") if each]
    if args.quality:
        wanted += [["ml100k", "50"]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        about = {name: write(name, args.data, folder) for name in dict.fromkeys(name for name, _ in wanted)}
        for name, length in wanted:
            settings = {**DIMENSIONS, "max_length": int(length), "seconds": args.seconds, "unseen": False}
            if args.rounds and name != "ml100k":
                runs: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
                for _ in range(args.rounds):
                    for program in programs:
                        runs[program].append(measured(program, python, folder, name, settings))
                show_speed(f"{about[name]}; L={length}, {args.rounds} rounds", runs)
            if args.quality and name in FOLDERS:
                settings |= {"seconds": args.quality, "num_warm": 0, "unseen": True}
                print(f"\n{about[name]}; after {args.quality:.0f} CPU s of training, L={length}")
                print(f"  {'':<12}{'NDCG@10':>9}{'seen out':>10}{'targets':>13}{'CPU s':>8}")
                for program in programs:
                    show_quality(program, measured(program, python, folder, name, settings))


if __name__ == "__main__":
    main()
