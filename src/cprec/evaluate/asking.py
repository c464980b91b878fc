"""Entrants, and how they are asked: batch by batch, and what saved rankings already answer is not asked again.

One that is slow to rank is asked in parts, by this process or by several. A part is a batch of its own, and the batches
are the same whoever asks them, so that the rankings do not depend on how many processes there are. Its answers are a
file that appears whole, and the folder is removed when all are there:

    DOMAIN/ARM.parts/job.pickle     how to open the recommender, and the batches; written anew by every command
    DOMAIN/ARM.parts/full-0003.json answers to a batch, and what decides whether they are used again
"""

from __future__ import annotations

import functools
import json
import math
import pickle
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cprec.data.queries import sampled_rows
from cprec.errors import CPRecError, DataError
from cprec.evaluate.questions import Protocol
from cprec.evaluate.rankings import SavedRankings, rankings_path, read_rankings, slug, table_of, write_rankings
from cprec.evaluate.results import FULL, FoundOfExact, Kind
from cprec.files import write_whole
from cprec.progress import say, track
from cprec.recommender import Proof, Ranking, RankingQuery, Recommender
from cprec.workers import run_parts

SAMPLE = 100
"""Queries whose exact lists a beam's are compared with."""
BATCH = 256
"""Queries handed to a recommender at once."""
EXACT = "exact"
"""The mode of a recommender, and what the sample is called among the protocols."""
JOB = "job.pickle"

Rank = Callable[[Sequence[RankingQuery], int], list[Ranking]]
"""See `Recommender.rank`."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A recommender that is ready to rank."""

    recommender: Recommender
    modes: Mapping[str, Rank] = field(default_factory=dict)
    """The same model in other modes, by protocol: `generate` writes freely; `exact` is what a beam is compared with."""
    cost: Mapping[str, Any] = field(default_factory=dict)
    """num_parameters and train_seconds, where there are any."""
    scores_once: bool = False
    """Whether a batch asked under another protocol, right after the first, costs no second scoring."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A recommender in a table."""

    name: str
    kind: Kind
    open: Callable[[], Opened]
    """Reads a model or trains a baseline, before ranking is timed. It is called only where saved rankings are missing,
    and what it returns is let go once they are made. Raises Unsuitable where nothing can be made of the data."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Changes when its rankings may: saved ones are used again only where it is the same. As JSON can hold it."""
    stochastic: bool = False
    """Its training draws, so that another seed would give it other numbers."""
    trained_on: tuple[str, ...] = ()
    """Hashes of the token shards that a model was trained on; a baseline learns from the split itself."""
    beam: bool = False
    """Its lists of the full catalogue come from a beam: a sample is compared with those of its mode `exact`."""
    writes: bool = False
    """It has a mode `generate`, which writes freely, as all models have."""
    num_places: Callable[[], int] | None = None
    """For one that takes much longer to rank than to open: how many processes this machine has room for. Its queries
    are then asked in parts, and `open` must be fit for pickle. None: this process alone asks it."""


@dataclass(frozen=True)
class Batch:
    """Queries that are handed to a recommender at once."""

    protocol: str
    number: int
    """Among those of its protocol."""
    queries: Sequence[RankingQuery]


@dataclass(frozen=True)
class Answered:
    """What a recommender answered to a batch."""

    rankings: Sequence[Ranking]
    seconds: float
    cost: Mapping[str, Any]
    """See `Opened`."""


def saved_rankings(
    entrant: Entrant,
    protocols: Sequence[Protocol],
    asked: Mapping[str, Any],
    output_dir: str,
    domain: str,
    num_processes: int | Literal["auto"] = 1,
) -> dict[str, SavedRankings]:
    """The rankings of an entrant by protocol: saved ones that answer the same questions, others made and saved now.

    Raises CPRecError for a score that is not finite, and where a process that ranks has ended.
    """
    answers = json.loads(json.dumps({**asked, "identity": dict(entrant.identity)}))
    found = {}
    for protocol in protocols:
        path = rankings_path(output_dir, domain, entrant.name, protocol.name)
        saved = read_rankings(path)
        if saved is not None and saved.answers == answers:
            say(f"{path}: answers the same questions, reused")
            found[protocol.name] = saved
    missing = [protocol for protocol in protocols if protocol.name not in found]
    if not missing:
        return found

    def save(group: Sequence[Protocol], answered: Mapping[str, Sequence[Answered]]) -> None:
        for protocol in group:
            made = _joined(entrant, protocol, answered, answers, domain)
            write_rankings(rankings_path(output_dir, domain, entrant.name, protocol.name), made)
            found[protocol.name] = made

    if entrant.num_places is not None:
        workers = entrant.num_places() if num_processes == "auto" else num_processes
        folder = Path(output_dir, domain, f"{slug(entrant.name)}.parts")
        save(missing, _ask_in_parts(entrant, missing, answers, folder, workers, domain))
        shutil.rmtree(folder)
        return found
    opened = entrant.open()
    # Who scores a batch once for all protocols is asked for them together. One that reads prompts anew for each takes
    # long: what it has finished stays after an interruption.
    for _, members in groupby(
        missing, lambda protocol: "" if opened.scores_once and not protocol.written else protocol.name
    ):
        group = list(members)
        save(group, _ask(entrant, opened, group, answers, domain))
    return found


def _joined(
    entrant: Entrant,
    protocol: Protocol,
    answered: Mapping[str, Sequence[Answered]],
    answers: Mapping[str, Any],
    domain: str,
) -> SavedRankings:
    """The rankings of all batches of a protocol."""
    batches = answered.get(protocol.name, ())
    rankings = [ranking for batch in batches for ranking in batch.rankings]
    assert [ranking.query_id for ranking in rankings] == [query.query_id for query in protocol.queries]
    table = table_of(rankings, protocol, domain)
    exact = [ranking for batch in answered.get(EXACT, ()) for ranking in batch.rankings]
    return SavedRankings(
        table=table,
        answers=answers,
        seconds=round(sum(batch.seconds for batch in batches), 3),
        cost=batches[0].cost if batches else {},
        trained_on=entrant.trained_on,
        found_of_exact=_found_of_exact(protocol, exact, table) if exact and protocol.name == FULL else None,
    )


def _found_of_exact(protocol: Protocol, exact: Sequence[Ranking], rankings: pa.Table) -> FoundOfExact:
    """The share of the exact top K, seen items aside, that an arm's lists hold, on a sample of queries."""
    uncounted = {query.query_id: query.uncounted for query in protocol.queries}
    listed = set(zip(rankings["query_id"].to_pylist(), rankings["item_id"].to_pylist(), strict=True))
    best = [{(r.query_id, item) for item in r.item_ids if item not in uncounted[r.query_id]} for r in exact]
    shares = [len(listed & mine) / len(mine) for mine in best if mine]
    return FoundOfExact(share=float(np.mean(shares)) if shares else 1.0, num_queries=len(exact))


# ---- asking ----------------------------------------------------------------------------------------------------------


def _batches(entrant: Entrant, protocols: Sequence[Protocol], seed: int) -> list[Batch]:
    """The queries of some protocols in batches; those of one batch under every protocol come one after the other.

    Where the entrant searches by a beam, the sample of the full catalogue comes last.
    """
    most = max((protocol.queries for protocol in protocols), key=len)
    place = {query.query_id: number for number, query in enumerate(most)}
    found = [
        Batch(protocol.name, number, list(queries))
        for protocol in protocols
        for number, queries in groupby(protocol.queries, lambda query: place[query.query_id] // BATCH)
    ]
    found.sort(key=lambda batch: batch.number)
    for protocol in protocols:
        if entrant.beam and protocol.name == FULL:
            sample = [protocol.queries[row] for row in sampled_rows(len(protocol.queries), SAMPLE, seed)]
            found.append(Batch(EXACT, 0, sample))
    return found


def _ask(
    entrant: Entrant, opened: Opened, protocols: Sequence[Protocol], answers: Mapping[str, Any], domain: str
) -> dict[str, list[Answered]]:
    """What the entrant answers under some protocols, by protocol and batch."""
    batches = _batches(entrant, protocols, answers["seed"])
    answered: dict[str, list[Answered]] = {}
    title = f"{domain}: {entrant.name}" + (f", {protocols[0].name}" if len(protocols) == 1 else "")
    with track(sum(len(batch.queries) for batch in batches), title, unit="queries") as progress:
        for batch in batches:
            answered.setdefault(batch.protocol, []).append(_answer(opened, batch, answers["k"]))
            progress.advance(len(batch.queries))
    return answered


def _answer(opened: Opened, batch: Batch, k: int) -> Answered:
    """What a recommender answers to a batch. Raises CPRecError for a score that is not finite."""
    start = time.perf_counter()
    rankings = opened.modes.get(batch.protocol, opened.recommender.rank)(batch.queries, k)
    seconds, name = time.perf_counter() - start, opened.recommender.name
    if broken := [ranking.query_id for ranking in rankings if not all(map(math.isfinite, ranking.scores))]:
        raise CPRecError(f"{name} gave query {broken[0]!r} a score that is not finite: its model is broken")
    return Answered(rankings, seconds, opened.cost)


# ---- asking in parts -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What the processes need that ask an entrant in parts."""

    open: Callable[[], Opened]
    batches: Sequence[Batch]
    answers: Mapping[str, Any]
    """See `SavedRankings`."""


def _ask_in_parts(
    entrant: Entrant,
    protocols: Sequence[Protocol],
    answers: Mapping[str, Any],
    folder: Path,
    workers: int,
    domain: str,
) -> dict[str, list[Answered]]:
    """What `_ask` gives, each protocol asked by itself, by processes that leave their answers in a folder.

    Answers that are there already, of an earlier command that was stopped, are not made again.
    """
    batches = [batch for protocol in protocols for batch in _batches(entrant, [protocol], answers["seed"])]
    parts = [part for part, batch in enumerate(batches) if _read(folder, batch, answers) is None]
    if there := len(batches) - len(parts):
        say(f"{folder}: {there:,} of {len(batches):,} parts are there already")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / JOB, pickle.dumps(Job(entrant.open, batches, answers)))
    sizes = {part: len(batches[part].queries) for part in parts}
    try:
        run_parts(
            RANK_PART, folder, parts, workers, f"ranking {domain} with {entrant.name}", unit="queries", sizes=sizes
        )
    finally:
        _opened.cache_clear()  # this process may have been the only one
    answered: dict[str, list[Answered]] = {}
    for batch in batches:
        found = _read(folder, batch, answers)
        if found is None:
            raise DataError(
                f"{folder}: another command writes it, too; wait until it has ended, and run this one again"
            )
        answered.setdefault(batch.protocol, []).append(found)
    return answered


RANK_PART = "cprec.evaluate.asking:rank_part"


def rank_part(folder: Path, part: int) -> None:
    """Answer a batch and write the answers: the work of one process of `cprec evaluate`."""
    job, opened = _opened(folder)
    batch = job.batches[part]
    answered = _answer(opened, batch, job.answers["k"])
    write_whole(_path(folder, batch), json.dumps({"answers": job.answers, **asdict(answered)}))


@functools.lru_cache(maxsize=1)
def _opened(folder: Path) -> tuple[Job, Opened]:
    """The job of a folder, and its recommender, which is opened for the first part of a process and stays."""
    job: Job = pickle.loads((folder / JOB).read_bytes())
    return job, job.open()


def _read(folder: Path, batch: Batch, answers: Mapping[str, Any]) -> Answered | None:
    """The answers to a batch; None where there are none, or where they are of something else."""
    path = _path(folder, batch)
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        say(f"{path} cannot be read ({error}): its queries are ranked again")
        return None
    rows = found["rankings"]
    asked = [query.query_id for query in batch.queries]
    if found["answers"] != answers or [row["query_id"] for row in rows] != asked:
        return None
    rankings = [
        Ranking(row["query_id"], tuple(row["item_ids"]), tuple(row["scores"]), row["proof"] and Proof(**row["proof"]))
        for row in rows
    ]
    return Answered(rankings, found["seconds"], found["cost"])


def _path(folder: Path, batch: Batch) -> Path:
    return folder / f"{batch.protocol}-{batch.number:04}.json"
