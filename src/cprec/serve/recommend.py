"""Stage: histories in (command line or file), titles with scores out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow.compute as pc
from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from cprec.errors import ConfigError, DataError
from cprec.partition import share_of
from cprec.progress import say
from cprec.serve.config import RecommendConfig
from cprec.serve.engine import Recommends
from cprec.serve.histories import USER
from cprec.serve.lists import MODEL, POPULARITY, UserCount, list_writer, rejected_writer
from cprec.serve.parts import (
    Job,
    begin,
    finish,
    read_job,
    read_parts,
    require_unchanged,
    unwritten_parts,
)

MakeParts = Callable[[Path, Job, Sequence[int]], None]
"""Writes parts of a job in a folder, by `parts.write_part`: in this process or in others, here or elsewhere."""


def recommend_one(config: RecommendConfig, recommender: Recommends) -> None:
    """Print recommendations for one history, for a query, or for both: then the words that matched as well."""
    try:
        found = recommender.recommend(
            config.history, config.k, domain=config.domain, exclude_seen=config.exclude_seen, query=config.query
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    table = Table(box=None)
    for name, justify in (("rank", "right"), ("title", "left"), ("item", "left"), ("score", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    if config.query is not None:
        table.add_column("words of the query")
    for rank, item in enumerate(found, 1):
        words = [] if config.query is None else [", ".join(item.words)]
        table.add_row(str(rank), item.title, item.item_id, f"{item.score:.2f}", *words)
    Console().print(table)


def recommend_file(config: RecommendConfig, make_parts: MakeParts) -> None:
    """Write recommendations for a file of histories: in parts, of which those that are there are not made again.

    With `partition` only a share of the parts is made; the last to finish puts all of them together.
    """
    assert config.input and config.output
    output = Path(config.output)
    folder = _beside(output, ".lists")
    if folder.is_file():
        raise DataError(f"{folder} is of an earlier version, and is not read: remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    if config.partition is None:
        with _locked(output, wait=False):
            job = begin(config, folder)
            make_parts(folder, job, _missing(folder, job, range(job.num_parts)))
            _put_together(config, job, folder)
        return
    number, count = share_of(config.partition)
    with _locked(output):
        job = begin(config, folder)
    # Neighbours, so that each job of a scheduler reads one stretch of a large file.
    share = range(number * job.num_parts // count, (number + 1) * job.num_parts // count)
    make_parts(folder, job, _missing(folder, job, share))
    with _locked(output):
        now = read_job(folder)
        if now is None or (now.finished and now.sha256 == job.sha256):
            return  # another process put the parts together
        if now.sha256 != job.sha256:
            raise DataError(f"{folder} was begun anew by another command; run this one again if its output is wanted")
        if missing := unwritten_parts(folder, job):
            say(f"partition {config.partition} is written; {len(missing):,} parts are left to the others")
            return
        _put_together(config, job, folder)


@contextmanager
def _locked(output: Path, *, wait: bool = True) -> Iterator[None]:
    """Let no other command write the same output. Where one does, wait, or raise DataError."""
    path = output.with_name(f".{output.name}.lock")
    try:
        with FileLock(path, timeout=-1 if wait else 0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout:
        raise DataError(f"{output}: another command writes it; wait until it has ended") from None


def _missing(folder: Path, job: Job, share: Sequence[int]) -> list[int]:
    missing = unwritten_parts(folder, job, share)
    if len(missing) < len(share):
        say(f"{folder}: {len(share) - len(missing):,} of {len(share):,} parts are there already")
    return missing


def _put_together(config: RecommendConfig, job: Job, folder: Path) -> None:
    """Write the output from all parts, in the order of the input, and what was left out beside it."""
    require_unchanged(job, config, folder)
    output, source = Path(config.output or ""), config.input
    counts, reasons, users = Counter[str](), Counter[str](), UserCount()
    first_unknown = ""
    path = _beside(output, ".rejected.csv")
    with list_writer(output) as write, rejected_writer(path) as reject:
        for answered, table in read_parts(folder, job):
            write(table)
            reject([[source, *row] for row in answered.rejected])
            reasons.update(reason for *_, reason in answered.rejected)
            counts += answered.counts
            counts["repeats"] += users.count_repeats(table.filter(pc.equal(table["rank"], 1))["user_id"].to_pylist())
            first_unknown = first_unknown or answered.first_unknown
        if counts["unknown"] and not counts["known"]:
            finish(folder, job, keep=False)
            raise DataError(
                f"{source}: none of its {counts['unknown']:,} events is an item of this model's catalogue, as "
                f"{first_unknown}. Is it the right file, and do its histories hold ids or titles of that catalogue?"
            )
    finish(folder, job, keep=bool(reasons))
    say(f"{output}: {_summary(counts, config.k)}")
    if reasons:
        what = "; ".join(f"{reason}: {count:,}" for reason, count in sorted(reasons.items()))
        say(f"{path} lists what was left out ({what})")
        say(f"{folder} keeps the lists: once {source} is mended, only changed users are ranked. Or remove it")


def _summary(counts: Counter[str], k: int) -> str:
    told = f"up to {k} recommendations for each of {counts[MODEL] + counts[POPULARITY]:,} users"
    if counts[POPULARITY]:
        told += f", {counts[POPULARITY]:,} of them popular items, for want of a history"
    if counts["shorter"]:
        told += f"; shorter lists, since fewer items are left: {counts['shorter']:,}"
    if counts["repeats"]:
        told += f"; rows with the {USER} of a row before, and a list of their own: {counts['repeats']:,}"
    return told


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(output.name + ending)
