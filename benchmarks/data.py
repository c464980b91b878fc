"""Preparing data, beside pandas: CPU seconds, peak memory, and whether the time goes up with the rows alone.

    python benchmarks/data.py compare [rows]   raw files and tables to sequences, ours and a pandas script's (1 M rows)
    python benchmarks/data.py tokens [rows]    documents from once-tokenised titles, and tokenizers.encode_batch
    python benchmarks/data.py scale [rows]     the whole of `cprec prepare` on 8 domains under 8 GiB, step by step
    python benchmarks/data.py                  compare and tokens

Every contestant is a process of its own; CPU seconds are user + system, memory is the peak of what is resident. The
logs are generated: users with about ten events a domain, items of falling popularity, times to the second.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GIB = 1 << 30
LIMIT = 8 * GIB
MIN_EVENTS, MAX_EVENTS, K_CORE = 5, 20, 5


# ---- generated logs --------------------------------------------------------------------------------------------------


def write_log(folder: Path, num_rows: int, num_domains: int, kind: str) -> list[str]:
    """`num_rows` events over some domains, as DOMAIN.KIND and DOMAIN_items.KIND (csv, parquet); returns the domains."""
    import duckdb

    folder.mkdir(parents=True, exist_ok=True)
    connection = duckdb.connect()
    connection.execute("SET preserve_insertion_order = false")
    rows = num_rows // num_domains
    users, items = max(10, rows // 8), max(10, rows // 100)
    written = "FORMAT csv, HEADER" if kind == "csv" else "FORMAT parquet, COMPRESSION zstd"
    domains = [f"domain{number}" for number in range(num_domains)]
    for number, domain in enumerate(domains):
        connection.execute(
            f"""COPY (SELECT 'U' || lpad((hash(i, {number}, 1) % {users})::VARCHAR, 8, '0') AS user_id,
                'B' || lpad(floor({items} * pow((hash(i, {number}, 2) % 1000003) / 1000003.0, 2.5))::BIGINT::VARCHAR,
                8, '0') AS item_id, 1300000000 + (hash(i, {number}, 3) % 150000000)::BIGINT AS timestamp,
                1 + (hash(i, {number}, 4) % 5)::INT AS rating FROM range({rows}) r(i))
                TO '{folder / f"{domain}.{kind}"}' ({written})"""
        )
        words = ", ".join(
            f"substr(md5((i * 7 + {place})::VARCHAR || '{domain}'), 1, {4 + place})" for place in range(6)
        )
        connection.execute(
            f"""COPY (SELECT 'B' || lpad(i::VARCHAR, 8, '0') AS item_id, concat_ws(' ', {words}) AS title
                FROM range({items}) r(i)) TO '{folder / f"{domain}_items.{kind}"}' ({written})"""
        )
    return domains


# ---- the contestants: raw files, or canonical tables, to sequences ---------------------------------------------------


def ours_from_files(folder: Path, domains: list[str]) -> dict[str, int]:
    """Raw CSV files to canonical tables on disk, a split, and sequences on disk."""
    from cprec.data.build import build_tables
    from cprec.data.config import Rules, TableSource
    from cprec.data.dataset import read_manifest

    sources = [
        TableSource(
            domain=domain,
            interactions=str(folder / f"{domain}.csv"),
            items=str(folder / f"{domain}_items.csv"),
            timestamps="seconds",
        )
        for domain in domains
    ]
    target = folder / "ours"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    build_tables(sources, target, Rules(k_core=K_CORE))
    return _sequences_of_parts(target, range(read_manifest(target)["num_parts"]), finish=True)


def ours_from_tables(folder: Path, domains: list[str]) -> dict[str, int]:
    """Canonical tables, not in order yet, to a split and sequences in memory."""
    from cprec.data.dataset import read_manifest

    return _sequences_of_parts(folder / "tables", range(read_manifest(folder / "tables")["num_parts"]), finish=False)


def _sequences_of_parts(folder: Path, parts: Any, *, finish: bool) -> dict[str, int]:
    import numpy as np

    from cprec.data.config import SplitSpec
    from cprec.data.dataset import finish_part, read_catalogue, read_domains, read_part
    from cprec.data.sequences import build_sequences
    from cprec.data.splits import make_split

    catalogue, domains = read_catalogue(folder), read_domains(folder)
    total = {"events": 0, "train": 0, "sequences": 0}
    for part in parts:
        if finish:
            split = finish_part(folder, part, lambda *log: make_split(*log, SplitSpec()), catalogue)
            assert split is not None
        else:
            split = make_split(catalogue, read_part(folder, part, catalogue), domains, SplitSpec())
        found = build_sequences(
            split, catalogue.domains, min_events=MIN_EVENTS, max_events=MAX_EVENTS, kinds=["specific"]
        )
        items = split.interactions.item[found.event]
        if finish:
            np.savez(folder / f"sequences-{part}.npz", items=items, offsets=found.offsets)
        total["events"] += len(split.interactions)
        total["train"] += int((split.part == 0).sum())
        total["sequences"] += len(found)
    return total


def pandas_from_files(folder: Path, domains: list[str]) -> dict[str, int]:
    """What `ours_from_files` does, in pandas."""
    import pandas as pd

    target = folder / "pandas"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    total = {"events": 0, "train": 0, "sequences": 0}
    for domain in domains:
        items = pd.read_csv(folder / f"{domain}_items.csv", dtype=str)
        items["title"] = items["title"].str.replace(r"\s+", " ", regex=True).str.strip()
        items = items[items["title"].str.len() > 0].drop_duplicates("item_id")
        log = pd.read_csv(folder / f"{domain}.csv", dtype={"user_id": str, "item_id": str})
        log = log[log["user_id"].notna() & log["item_id"].notna() & log["timestamp"].notna()]
        log = log[log["item_id"].isin(items["item_id"])]
        log = log.drop_duplicates(["user_id", "item_id", "timestamp"])
        log = log.sort_values(["user_id", "timestamp"], kind="stable")
        while True:
            size = len(log)
            repeated = (log["user_id"] == log["user_id"].shift()) & (log["item_id"] == log["item_id"].shift())
            log = log[~repeated]
            log = log[log["user_id"].map(log["user_id"].value_counts()) >= K_CORE]
            log = log[log["item_id"].map(log["item_id"].value_counts()) >= K_CORE]
            if len(log) == size:
                break
        items = items[items["item_id"].isin(log["item_id"])].sort_values("item_id").reset_index(drop=True)
        log["item"] = log["item_id"].map(pd.Series(items.index, index=items["item_id"]))
        log, sequences = _pandas_sequences(log)
        items.to_parquet(target / f"{domain}_items.parquet", compression="zstd")
        log.drop(columns="item").to_parquet(target / f"{domain}.parquet", compression="zstd")
        sequences.to_frame().to_parquet(target / f"{domain}_sequences.parquet", compression="zstd")
        total["events"] += len(log)
        total["train"] += int((log["split"] == "train").sum())
        total["sequences"] += len(sequences)
    return total


def pandas_from_tables(folder: Path, domains: list[str]) -> dict[str, int]:
    """What `ours_from_tables` does, in pandas."""
    import pandas as pd

    total = {"events": 0, "train": 0, "sequences": 0}
    for domain in domains:
        items = pd.read_parquet(folder / "tables" / "items" / f"domain={domain}", columns=["item_id"])
        log = pd.read_parquet(folder / "tables" / "interactions" / f"domain={domain}")
        log["item"] = log["item_id"].map(pd.Series(items.index, index=items["item_id"]))
        log = log.sort_values(["user_id", "timestamp"], kind="stable")
        log, sequences = _pandas_sequences(log)
        total["events"] += len(log)
        total["train"] += int((log["split"] == "train").sum())
        total["sequences"] += len(sequences)
    return total


def _pandas_sequences(log: Any) -> tuple[Any, Any]:
    """Leave-one-out, and the training events of each user in chunks of nearly equal size; `log` is sorted."""
    import numpy as np

    log = log.copy()
    users = log.groupby("user_id", sort=False)
    from_end = users.cumcount(ascending=False)
    size = users["user_id"].transform("size")
    log["split"] = np.select(
        [(from_end == 0) & (size > 2), (from_end == 1) & (size > 2)], ["test", "validation"], "train"
    )
    train = log[log["split"] == "train"]
    users = train.groupby("user_id", sort=False)
    place, size = users.cumcount(), users["user_id"].transform("size")
    train, place, size = train[size >= MIN_EVENTS], place[size >= MIN_EVENTS], size[size >= MIN_EVENTS]
    chunks = -(-size // MAX_EVENTS)
    longer = size % chunks
    length = size // chunks
    chunk = np.where(
        place < longer * (length + 1), place // (length + 1), longer + (place - longer * (length + 1)) // length
    )
    return log, train.assign(chunk=chunk).groupby(["user_id", "chunk"], sort=False)["item"].agg(list)


CONTESTS = {
    "raw files -> tables, split, sequences on disk": (ours_from_files, pandas_from_files),
    "tables -> split, sequences": (ours_from_tables, pandas_from_tables),
}


# ---- measuring -------------------------------------------------------------------------------------------------------


def measured(name: str, folder: Path, domains: list[str]) -> dict[str, Any]:
    """Run a contestant in a process of its own: its result, CPU and wall seconds and peak resident bytes."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, __file__, "--contestant", name, str(folder), *domains]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.perf_counter() - start, "cpu": cpu, **json.loads(done.stdout)}


def compare(num_rows: int) -> None:
    from cprec.data.build import build_tables
    from cprec.data.config import Rules, TableSource

    rounds = 3 if num_rows <= 2_000_000 else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        domains = write_log(folder, num_rows, 4, "csv")
        (folder / "tables").mkdir()
        sources = [
            TableSource(
                domain=domain, interactions=str(folder / f"{domain}.csv"), items=str(folder / f"{domain}_items.csv")
            )
            for domain in domains
        ]
        build_tables(sources, folder / "tables", Rules(k_core=K_CORE))
        print(f"{num_rows:,} rows in 4 domains; CPU seconds, best of {rounds}; peak memory")
        for contest, (ours, pandas) in CONTESTS.items():
            found = {}
            for function in (ours, pandas):
                runs = [measured(function.__name__, folder, domains) for _ in range(rounds)]
                found[function] = min(runs, key=lambda run: run["cpu"])
            one, other = found[ours], found[pandas]
            assert one["result"] == other["result"], (one["result"], other["result"])
            print(f"{contest}: {one['result']['sequences']:,} sequences of {one['result']['events']:,} events, both")
            for label, run in (("cprec", one), ("pandas", other)):
                print(
                    f"  {label:<7} {run['cpu']:7.1f} s CPU {run['wall']:7.1f} s wall "
                    f"{num_rows / run['cpu'] / 1e6:6.2f} M rows per CPU-second {run['peak'] / GIB:6.2f} GiB"
                )
            print(
                f"  {other['cpu'] / one['cpu']:.2f}x as fast per CPU-second, "
                f"{one['peak'] / other['peak']:.2f}x the memory"
            )


def tokens(num_rows: int) -> None:
    """Documents from once-tokenised titles, against encoding the rendered text; equal ids."""
    import numpy as np
    import pyarrow as pa

    from cprec.data.catalogue import Catalogue
    from cprec.data.ragged import Ragged
    from cprec.text.encoding import PromptEncoder
    from cprec.text.prompts import Template
    from cprec.text.tokenizer import train_on_titles

    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefghijklmnopqrstuvwxyz"), size)) for size in random.integers(3, 10, 4000)]
    titles = [" ".join(random.choice(words, 8)).title() for _ in range(20_000)]
    catalogue = Catalogue.from_tables({"shop": pa.table({"item_id": [str(n) for n in range(20_000)], "title": titles})})
    tokenizer = train_on_titles(catalogue, ["shop"], 8192)
    encoder = PromptEncoder(tokenizer, catalogue, max_title_tokens=1 << 20)
    events = Ragged(random.integers(0, 20_000, num_rows), np.arange(0, num_rows + 1, 10))
    domains = np.zeros(len(events), dtype=np.int64)
    template = Template()
    head = template.head("shop")
    written = [template.title(title) for title in catalogue.title]
    texts = [
        head + "".join(template.line + written[item] for item in row[:-1]) + template.next + written[row[-1]]
        for row in (events[number] for number in range(len(events)))
    ]

    def cpu(function: Callable[[], Any]) -> tuple[float, Any]:
        start = time.process_time()
        result = function()
        return time.process_time() - start, result

    ours, theirs = [], []
    for _ in range(3):
        seconds, (documents, _) = cpu(lambda: encoder.documents("specific", domains, events))
        ours.append(seconds)
        seconds, encoded = cpu(lambda: tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
        theirs.append(seconds)
    for number, one in enumerate(encoded):
        assert documents[number][:-1].tolist() == one.ids, texts[number]
    count = len(documents.values)
    one, other = statistics.median(ours), statistics.median(theirs)
    print(f"{len(events):,} documents of 10 titles, {count:,} tokens, equal ids; CPU seconds, median of 3")
    print(f"  cprec        {one:7.2f} s {count / one / 1e6:8.1f} M tokens per CPU-second")
    print(f"  encode_batch {other:7.2f} s {count / other / 1e6:8.1f} M tokens per CPU-second")
    print(f"  {other / one:.0f}x as fast")


# ---- scale -----------------------------------------------------------------------------------------------------------


def scale(num_rows: int) -> None:
    """`cprec prepare` on generated Parquet logs, in a control group of 8 GiB where this process may make one."""
    root, group = Path(tempfile.mkdtemp(prefix="cprec-scale-")), _control_group()
    try:
        domains = write_log(root, num_rows, 8, "parquet")
        tables = [
            {
                "domain": domain,
                "interactions": str(root / f"{domain}.parquet"),
                "items": str(root / f"{domain}_items.parquet"),
                "timestamps": "seconds",
            }
            for domain in domains
        ]
        config = {"output_dir": str(root / "data"), "tables": tables, "target_domains": domains[:1]}
        (root / "shop.yaml").write_text(json.dumps({"prepare": config}))
        size = sum(path.stat().st_size for path in root.glob("*.parquet"))
        limit = "a control group of 8 GiB" if group else "no control group could be made: measured only"
        print(f"{num_rows:,} rows in 8 domains, {size / GIB:.2f} GiB of Parquet; {limit}")
        _follow([sys.executable, "-m", "cprec", "prepare", str(root / "shop.yaml")], group)
        written = sum(path.stat().st_size for path in (root / "data").rglob("*") if path.is_file())
        about = json.loads((root / "data" / "certificate.json").read_text())
        checks = sum(entry["checked"] for entry in about["properties"])
        wrong = sum(entry["violations"] for entry in about["properties"])
        print(f"written: {written / GIB:.2f} GiB; certificate: {checks:,} checks, {wrong:,} violations")
    finally:
        shutil.rmtree(root, ignore_errors=True)
        if group is not None:
            group.rmdir()


def _control_group() -> Path | None:
    """A new control group with 8 GiB and no swap, or None where it cannot be made."""
    for root, limits in (
        (Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")),  # version 1
        (Path("/sys/fs/cgroup"), ("memory.max", "memory.swap.max")),  # version 2
    ):
        group = root / f"cprec-{os.getpid()}"
        try:
            if not (root / "cgroup.procs").exists():
                continue
            group.mkdir()
            (group / limits[0]).write_text(str(LIMIT))
            if (group / limits[1]).exists():
                (group / limits[1]).write_text(str(LIMIT if "memsw" in limits[1] else 0))
            return group
        except OSError:
            if group.exists():
                group.rmdir()
    return None


def _follow(command: list[str], group: Path | None) -> None:
    """Run a command; print each line that it says with the seconds since the line before and the peak memory."""

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    environment = os.environ | {"CPREC_PROGRESS": "plain"}
    peak = [0]
    done = threading.Event()
    start = last = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=enter, env=environment) as process:

        def watch() -> None:
            while not done.wait(0.2):
                peak[0] = max(peak[0], _resident(process.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        highest = 0
        assert process.stderr is not None
        for line in process.stderr:
            now = time.perf_counter()
            print(f"{now - last:8.1f} s {peak[0] / GIB:6.2f} GiB  {line.rstrip()}", flush=True)
            highest, peak[0], last = max(highest, peak[0]), 0, now
        done.set()
    if process.returncode:
        raise SystemExit(f"it failed with exit code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"in all {time.perf_counter() - start:.0f} s, {cpu:.0f} s CPU, peak {highest / GIB:.2f} GiB resident")


def _resident(pid: int) -> int:
    """Resident bytes of a process and all its children that are its own (memory-mapped files are the system's)."""
    total = 0
    try:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        total += int(fields["RssAnon"].split()[0]) * 1024
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += _resident(int(child))
    except (OSError, KeyError):
        pass
    return total


def main() -> None:
    if sys.argv[1:2] == ["--contestant"]:
        name, folder, *domains = sys.argv[2:]
        result = globals()[name](Path(folder), domains)
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024
        print(json.dumps({"result": result, "peak": peak}))
        return
    verbs = {"compare": (compare, 1_000_000), "tokens": (tokens, 500_000), "scale": (scale, 100_000_000)}
    chosen = sys.argv[1:2] or ["compare", "tokens"]
    for verb in chosen:
        function, rows = verbs[verb]
        function(int(float(sys.argv[2])) if len(sys.argv) > 2 else rows)


if __name__ == "__main__":
    main()
