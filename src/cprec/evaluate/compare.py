"""Stage: evaluation folders -> one table and one plot, if their runs were asked the same.

A run is a folder that `cprec evaluate` wrote. For each domain `protocol.json` holds what its numbers depend on and
`metrics.parquet` the metrics of every query; every mean, interval and test here is made from these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cprec.errors import ConfigError, DataError
from cprec.evaluate.comparison import (
    ComparedArm,
    ComparisonTable,
    Estimate,
    comparison_page,
    in_words,
    key_in_words,
    latex_table,
    markdown_table,
    print_tables,
)
from cprec.evaluate.results import FULL, FULL_WITH_SEEN, model_of, together
from cprec.evaluate.saved import read_saved
from cprec.evaluate.statistics import bootstrap_interval, compare_pairs, seed_variance
from cprec.files import write_whole
from cprec.progress import say

METRICS = "metrics.parquet"

# ---- stage -----------------------------------------------------------------------------------------------------------


def compare(
    folders: Sequence[str | Path],
    *,
    domains: Sequence[str] = (),
    metric: str | None = None,
    protocol: str | None = None,
    force: bool = False,
    output: str | Path = "compare.html",
    file: TextIO | None = None,
) -> list[ComparisonTable]:
    """Compare the arms of evaluation folders: print one table for each domain, and write them to `output`.

    The file has the tables and a plot; where its name ends in .md or .tex, only the tables.

    `domains` are those that every folder has if none is named. `metric` is NDCG at the K of the runs if None, and
    `protocol` (a key of `PROTOCOLS`) the one of their main table. Arms are tested in pairs on the same queries, queries
    of one user together, with Holm's correction over all pairs of a table. The table is printed to `file`, standard
    output if None.

    Raises ConfigError if a folder, domain, metric or protocol is not there, and, listing every difference, if the runs
    were not asked the same; with `force` runs that were asked differently stand in separate tables. Raises DataError
    for files that are no evaluation, and for arms that answered other queries than their protocol says.
    """
    runs = named_runs(folders)
    tables = [
        _table(domain, {name: runs[name] / domain for name in names}, settings, metric, protocol)
        for domain, settings, names in _groups(runs, domains, force)
    ]
    print_tables(tables, file)
    table_of = {".md": markdown_table, ".tex": latex_table}.get(Path(output).suffix)
    write_whole(output, "\n".join(map(table_of, tables)) if table_of else comparison_page(tables))
    say(f"wrote {output}")
    return tables


def _groups(
    runs: Mapping[str, Path], domains: Sequence[str], force: bool
) -> list[tuple[str, Mapping[str, Any], list[str]]]:
    """The tables to make: a domain, what was asked, and the runs that were asked it.

    Raises ConfigError where runs were not asked the same, unless `force` is set.
    """
    groups: list[tuple[str, Mapping[str, Any], list[str]]] = []
    differences: list[str] = []
    for domain in shared_domains(runs, domains):
        settings = {name: read_settings(path / domain) for name, path in runs.items()}
        differences += [f"{domain}: {line}" for line in protocol_differences(settings)]
        alike: dict[str, list[str]] = {}
        for name, values in settings.items():
            alike.setdefault(_canonical(values), []).append(name)
        groups += [(domain, settings[names[0]], names) for names in alike.values()]
    if differences and not force:
        raise ConfigError(
            "these runs were not asked the same, so their numbers cannot stand in one table:\n  "
            + "\n  ".join(differences)
            + "\nEvaluate them alike, or add --force to see them in separate tables."
        )
    return groups


def protocol_differences(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each setting that is not the same in all runs, with the value of each.

    >>> protocol_differences({"old": {"k": 10, "part": "test"}, "new": {"k": 20, "part": "test"}})
    ['K is 10 in old, 20 in new']
    """
    lines = []
    for key in dict.fromkeys(key for values in settings.values() for key in values):
        holders: dict[str, list[str]] = {}
        for name, values in settings.items():
            holders.setdefault(_canonical(values.get(key)), []).append(name)
        told = [f"{in_words(key, settings[names[0]].get(key))} in {' and '.join(names)}" for names in holders.values()]
        if len(told) > 1:
            lines.append(f"{key_in_words(key)} is {', '.join(told)}")
    return lines


def _canonical(value: Any) -> str:
    """A setting as text, equal where the setting is."""
    return json.dumps(value, sort_keys=True)


# ---- reading ---------------------------------------------------------------------------------------------------------


def named_runs(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Folders by short name: the last part of the path where that tells them apart, else the whole path."""
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ConfigError("no folder to compare: name those that `cprec evaluate` wrote")
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder: name one that `cprec evaluate` wrote")
    resolved = [path.resolve() for path in paths]
    if twice := [path for path, full in zip(paths, resolved, strict=True) if resolved.count(full) > 1]:
        raise ConfigError(f"{twice[0]} is named twice: name each folder once")
    short = [full.name for full in resolved]
    return {name if short.count(name) == 1 else str(path): path for name, path in zip(short, paths, strict=True)}


def shared_domains(runs: Mapping[str, Path], wanted: Sequence[str]) -> list[str]:
    """The domains to compare: those wanted, else those that every run has."""
    found = {
        name: sorted(file.parent.name for file in path.glob("*/protocol.json") if file.with_name(METRICS).is_file())
        for name, path in runs.items()
    }
    for name, has in found.items():
        if not has:
            raise ConfigError(f"{runs[name]} holds no evaluation: name a folder that `cprec evaluate` wrote")
        if missing := [domain for domain in wanted if domain not in has]:
            raise ConfigError(f"domain={missing[0]!r} is not in {runs[name]}, which has {', '.join(has)}")
    if wanted:
        return list(dict.fromkeys(wanted))
    shared = [domain for domain in next(iter(found.values())) if all(domain in has for has in found.values())]
    if not shared:
        listed = "; ".join(f"{name} has {', '.join(has)}" for name, has in found.items())
        raise ConfigError(f"these runs share no domain: {listed}")
    if others := sorted({domain for has in found.values() for domain in has} - set(shared)):
        say(f"not in every run, so not compared: {', '.join(others)}")
    return shared


def read_settings(folder: Path) -> dict[str, Any]:
    """What the numbers of a run's domain depend on. Raises DataError where they are not there."""
    path = folder / "protocol.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or not isinstance(settings.get("k"), int):
        raise DataError(f"{path} is not the protocol of an evaluation: run `cprec evaluate` anew")
    return settings


@dataclass(frozen=True, kw_only=True)
class SavedArm:
    """An arm's metrics: a row a seed, a column a query, in the order of query ids."""

    query_id: list[str]
    user_id: list[str]
    bound: bool
    stochastic: bool
    """Whether another seed would give other numbers."""
    values_SQ: Mapping[str, np.ndarray]

    def equals(self, other: SavedArm) -> bool:
        """Whether another arm, which answered the same queries, has the same numbers."""
        mine, theirs = self.values_SQ, other.values_SQ
        return mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)


def _read(folder: Path, protocol: str, metrics: Sequence[str]) -> dict[str, SavedArm]:
    """The arms of a run by name, each of one seed. The first metric must be there; of the others those that are."""
    path = folder / METRICS
    table = read_saved(path, "run `cprec evaluate` anew")
    names = table.column_names
    if lacking := {"query_id", "user_id", "arm", "protocol"} - set(names):
        raise DataError(f"{path} has no column {min(lacking)!r}: run `cprec evaluate` anew")
    offered = [name for name in names if "@" in name or name == "mrr"]
    if metrics[0] not in offered:
        raise ConfigError(f"metric={metrics[0]} is not in {path}, which has {', '.join(offered)}")
    kept = [name for name in dict.fromkeys(metrics) if name in offered]
    asked = table.filter(pc.equal(table["protocol"], protocol)).sort_by("query_id")
    if not asked.num_rows:
        there = ", ".join(sorted(pc.unique(table["protocol"]).to_pylist()))
        raise ConfigError(f"protocol={protocol} is not in {path}, which has {there}")
    return {
        name: _arm(path, name, asked.filter(pc.equal(asked["arm"], name)), kept)
        for name in pc.unique(asked["arm"]).to_pylist()
    }


def _arm(path: Path, name: str, rows: pa.Table, metrics: Sequence[str]) -> SavedArm:
    """An arm from its rows. Files of early versions do not say its kind and whether it is stochastic."""
    values = {metric: rows[metric].to_numpy()[None] for metric in metrics}
    if broken := [metric for metric in metrics if not np.isfinite(values[metric]).all()]:
        raise DataError(f"{path}: {broken[0]} of {name} is not a number everywhere: run `cprec evaluate` anew")
    kind = rows["kind"][0].as_py() if "kind" in rows.column_names else "model"
    return SavedArm(
        query_id=rows["query_id"].to_pylist(),
        user_id=rows["user_id"].to_pylist(),
        bound=kind == "bound",
        stochastic=rows["stochastic"][0].as_py() if "stochastic" in rows.column_names else kind != "bound",
        values_SQ=values,
    )


def read_arms(runs: Mapping[str, Path], protocol: str, metrics: Sequence[str]) -> dict[str, SavedArm]:
    """The arms of all runs, each once, with the seeds of one model together.

    Where a model has other numbers in another run, the name of its run stands in front of its own.
    """
    read = {run: _read(folder, protocol, metrics) for run, folder in runs.items()}
    (known, first), *others = ((f"{run}: {name}", arm) for run, of_run in read.items() for name, arm in of_run.items())
    for name, arm in others:
        if arm.query_id != first.query_id:
            raise DataError(
                f"{known} and {name} answered different queries, though their protocols are the same: a file of "
                f"{' or '.join(map(str, runs.values()))} was changed; run `cprec evaluate` anew"
            )
    holders: dict[str, dict[str, SavedArm]] = {}
    for run, of_run in read.items():
        for name, arm in of_run.items():
            holders.setdefault(name, {})[run] = arm
    one = {name: next(iter(of_runs.values())) for name, of_runs in holders.items()}
    differing = {model_of(n) for n, of_runs in holders.items() if not all(map(one[n].equals, of_runs.values()))}
    single: dict[str, SavedArm] = {}
    for name, of_runs in holders.items():
        apart = {f"{run}: {name}": arm for run, arm in of_runs.items()}
        single |= apart if model_of(name) in differing else {name: one[name]}
    arms = {}
    for shown, members in together(single).items():
        of_seeds = [single[name].values_SQ for name in members]
        values = {metric: np.concatenate([of_seed[metric] for of_seed in of_seeds]) for metric in of_seeds[0]}
        arms[shown] = replace(single[members[0]], values_SQ=values)
    return arms


def main_protocol(settings: Mapping[str, Any]) -> str:
    """The protocol of a run's main table."""
    return FULL_WITH_SEEN if settings.get("seen") == "may be recommended" else FULL


# ---- statistics ------------------------------------------------------------------------------------------------------


def _table(
    domain: str, runs: Mapping[str, Path], settings: Mapping[str, Any], metric: str | None, protocol: str | None
) -> ComparisonTable:
    """The table of runs that were asked the same."""
    k = settings["k"]
    protocol = protocol or main_protocol(settings)
    arms = read_arms(runs, protocol, [metric or f"ndcg@{k}", f"ndcg@{k}", f"recall@{k}", "ndcg@5", "mrr"])
    first = next(iter(arms.values()))
    metrics = [name for name in first.values_SQ if all(name in arm.values_SQ for arm in arms.values())]
    users = first.user_id if len(set(first.user_id)) < len(first.user_id) else None
    values = {name: arm.values_SQ[metrics[0]] for name, arm in arms.items()}
    order = sorted(arms, key=lambda name: -float(values[name].mean()))
    rivals = [name for name in order if not arms[name].bound]
    pairs = list(combinations(rivals, 2))
    stochastic = {name: arm.stochastic for name, arm in arms.items()}
    comparisons = dict(zip(pairs, compare_pairs(values, pairs, groups=users, stochastic=stochastic), strict=True))
    against_best = {b: test.reversed() for (a, b), test in comparisons.items() if a == rivals[0]}
    compared = [
        ComparedArm(
            name=name,
            num_seeds=len(values[name]),
            bound=arms[name].bound,
            estimates={m: _estimate(arms[name].values_SQ[m], users) for m in metrics},
            against_best=against_best.get(name),
        )
        for name in order
    ]
    return ComparisonTable(
        domain=domain,
        runs=tuple(runs),
        protocol=protocol,
        settings=settings,
        num_queries=len(first.query_id),
        arms=tuple(compared),
        comparisons=comparisons,
    )


def _estimate(values_SQ: np.ndarray, users: Sequence[str] | None) -> Estimate:
    if len(values_SQ) > 1:
        return Estimate(**asdict(seed_variance(values_SQ, groups=users)))
    mean, low, high = bootstrap_interval(values_SQ[0], groups=users)
    return Estimate(mean=mean, low=low, high=high)
