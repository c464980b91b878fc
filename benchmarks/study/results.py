"""From the evaluations of all jobs to the small tables that the page is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.study.arms import ALL, ARMS, ZERO
from benchmarks.study.costs import costs_of
from benchmarks.study.jobs import ANNEALING, Job, is_done, jobs_of, pretrainings, recipe_of
from benchmarks.study.questions import QUESTIONS, Claim, Question
from benchmarks.study.worlds import World
from cprec.errors import DataError
from cprec.evaluate.saved import write_saved
from cprec.evaluate.statistics import Comparison, adjusted, bootstrap_interval, compare_pair, seed_variance
from cprec.train.folder import LOG, read_log

SHOWN = {
    "full": ("ndcg@10", "recall@10"),
    "full_with_seen": ("ndcg@10", "recall@10"),
    "candidates_uniform": ("recall@1", "ndcg@10"),
}
"""Protocols and metrics that are kept."""
MAIN, CANDIDATES = ("full", "ndcg@10"), ("candidates_uniform", "recall@1")
"""What arms are compared by, and what else the page shows of all rows."""
SLICES = {"target": "full", "history": "full", "repeat": "full_with_seen"}
"""Groups of queries by which the fifth question is told, and the protocol: who leaves seen items out misses all
repeats."""
EVERY = "all queries"
MEANS, DIFFERENCES, LOSSES, PLAN = "means.parquet", "differences.parquet", "losses.parquet", "plan.parquet"


@dataclass(kw_only=True)
class Row:
    """An arm's values on a domain after a regime: a row for each seed, a column for each query in the order of ids."""

    query_id: list[str]
    user_id: list[str]
    stochastic: bool
    values: dict[int, np.ndarray] = field(default_factory=dict)
    """By seed."""

    @property
    def values_SQ(self) -> np.ndarray:
        return np.stack([self.values[seed] for seed in sorted(self.values)])


Rows = dict[tuple[str, str, str, str, str], Row]
"""By arm, regime, domain, protocol and metric. Rivals have the names of their own, and no regime."""


def gather(world: World, folder: Path, seeds: Sequence[int]) -> None:
    """Write the tables of all jobs that are done."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(world, ARMS, seeds)
    done = [job for job in jobs if is_done(world, job)]
    rows: Rows = {}
    for job in done:
        _add(rows, world, job)
    plan = [
        {"arm": job.arm.name, "regime": job.regime, "domain": job.domain, "seed": job.seed, **asdict(cost)}
        | {"done": job in done}
        for job, cost in zip(jobs, costs_of(world, jobs, fresh=True), strict=True)
    ]
    tables = {
        MEANS: [line for key, row in rows.items() for line in _means(key, row)],
        DIFFERENCES: [line for question in QUESTIONS for line in _differences(question, rows, world, done)],
        LOSSES: list(_losses(world, done)),
        PLAN: plan,
    }
    for name, lines in tables.items():
        if lines:
            write_saved(pa.Table.from_pylist(lines), folder / name)


def _add(rows: Rows, world: World, job: Job) -> None:
    """Add the values of a job. Raises DataError where it answered other queries than other jobs of the domain."""
    path = Path(recipe_of(world, job).evaluate.output_dir, job.domain, "metrics.parquet")
    table = pq.read_table(path).sort_by("query_id")
    for name in pc.unique(table["arm"]).to_pylist():
        for protocol, metrics in SHOWN.items():
            own = table.filter(pc.and_(pc.equal(table["arm"], name), pc.equal(table["protocol"], protocol)))
            for metric in metrics:
                row = rows.setdefault(
                    (name, job.regime, job.domain, protocol, metric),
                    Row(
                        query_id=own["query_id"].to_pylist(),
                        user_id=own["user_id"].to_pylist(),
                        stochastic=own["stochastic"][0].as_py(),
                    ),
                )
                if row.query_id != own["query_id"].to_pylist():
                    raise DataError(f"{path} answers other queries than another seed: delete it, and evaluate anew")
                row.values[job.seed] = own[metric].to_numpy()


def _groups(users: Sequence[str]) -> Sequence[str] | None:
    """The users, where one of them has several queries."""
    return users if len(set(users)) < len(users) else None


def _means(key: tuple[str, str, str, str, str], row: Row) -> Iterator[dict[str, Any]]:
    """The mean of each seed, and of all together (without a seed) where there are several."""
    about = dict(zip(("arm", "regime", "domain", "protocol", "metric"), key, strict=True))
    users = _groups(row.user_id)
    about |= {"num_queries": len(row.query_id)}
    for seed, values_Q in sorted(row.values.items()):
        mean, low, high = bootstrap_interval(values_Q, groups=users)
        yield about | {"seed": seed, "num_seeds": 1, "mean": mean, "low": low, "high": high}
    if len(row.values) > 1:
        both = seed_variance(row.values_SQ, groups=users)
        found = {name: getattr(both, name) for name in ("mean", "low", "high")}
        yield about | {"seed": None, "num_seeds": len(row.values), **found}


# ---- differences -----------------------------------------------------------------------------------------------------


def _differences(question: Question, rows: Rows, world: World, done: Sequence[Job]) -> list[dict[str, Any]]:
    """Paired differences of a question's claims; p values are corrected over all of its queries' groups together."""
    lines, tests = [], []
    for claim in question.claims:
        for name, regime, domain, *how in list(rows):
            if name != claim.a or tuple(how) != MAIN or (question.sliced and regime != ALL):
                continue
            groups = _slices(world, done, domain) if question.sliced else {}
            for group, (protocol, inside) in {EVERY: (MAIN[0], None), **groups}.items():
                how = (domain, protocol, MAIN[1])
                a, b = rows[claim.a, regime, *how], rows.get((claim.b, regime, *how)) or rows.get((claim.b, "", *how))
                if b is not None:
                    tests.append(_test(a, b, inside, f"{domain}: {claim.a} and {claim.b}"))
                    lines.append(_about(question, claim, (regime, domain, group, protocol), a, b))
    found = adjusted(tests) if tests else []
    return [line | _numbers(test) for line, test in zip(lines, found, strict=True)]


def _test(a: Row, b: Row, inside: set[str] | None, told: str) -> Comparison:
    """Compare two arms on the queries that are inside, on all if that is None. Raises DataError where they differ."""
    if a.query_id != b.query_id:
        raise DataError(f"{told} answered other queries: evaluate them anew")
    chosen_Q = np.array([inside is None or query in inside for query in a.query_id])
    users = [user for user, chosen in zip(a.user_id, chosen_Q, strict=True) if chosen]
    values = (row.values_SQ[:, chosen_Q] for row in (a, b))
    return compare_pair(*values, groups=_groups(users), stochastic=(a.stochastic, b.stochastic))


def _about(question: Question, claim: Claim, where: tuple[str, str, str, str], a: Row, b: Row) -> dict[str, Any]:
    regime, domain, group, protocol = where
    about = {"question": question.number, "thing": claim.thing, "a": claim.a, "b": claim.b}
    about |= {"regime": regime, "domain": domain, "group": group, "protocol": protocol, "metric": MAIN[1]}
    return about | {"seeds_a": len(a.values), "seeds_b": len(b.values)}


def _numbers(test: Comparison) -> dict[str, Any]:
    names = ("mean", "low", "high", "p_value", "p_adjusted", "num_queries", "detectable", "claim")
    return {name: getattr(test, name) for name in names}


def _slices(world: World, done: Sequence[Job], domain: str) -> dict[str, tuple[str, set[str]]]:
    """The protocol and the ids of the queries of each group of each slice, by `slice: group`."""
    job = next(job for job in done if job.domain == domain)
    table = pq.read_table(Path(recipe_of(world, job).evaluate.output_dir, domain, "queries.parquet"))
    found: dict[str, tuple[str, set[str]]] = {}
    for name in [name for name in SLICES if name in table.column_names]:  # one with a single group is not there
        for query, group in zip(table["query_id"].to_pylist(), table[name].to_pylist(), strict=True):
            found.setdefault(f"{name}: {group}", (SLICES[name], set()))[1].add(query)
    return {name: found[name] for name in sorted(found) if len(found[name][1]) > 1}


# ---- losses ----------------------------------------------------------------------------------------------------------


def _losses(world: World, done: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """The held-out loss a token of every finished pre-training on the shared data, as often as it was measured."""
    told = set()
    for job in done:
        runs = pretrainings(world, job)
        if not runs or job.domain in world.left_out or job.regime != ZERO or runs[-1].config.output_dir in told:
            continue
        last, before = runs[-1], 0
        told.add(last.config.output_dir)
        log = [line for line in read_log(Path(last.config.output_dir) / LOG) if line.get("heldout")]
        if last.way == "longer":  # its own tokens come after those of the stable phase that it goes on from
            before = runs[0].planned - round(ANNEALING * runs[0].planned)
        for line in log:
            for group, perplexity in line["heldout"].items():
                yield {
                    "arm": job.arm.name,
                    "seed": job.seed,
                    "tokens": before + line["tokens"],
                    "group": group,
                    "loss": math.log(perplexity),
                    "annealed": line is log[-1],
                }
