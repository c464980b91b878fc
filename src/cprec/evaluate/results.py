"""The results of an evaluation as records of plain numbers and text, and `report.json`, which keeps them.

Everything that shows results takes these records; only the functions at the end know how the file is laid out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from cprec.errors import DataError
from cprec.evaluate.statistics import Comparison
from cprec.files import write_whole

SCHEMA_VERSION = 1
"""Version of the layout of `report.json`. A file without a version has this layout, too."""

FULL, FULL_WITH_SEEN, NEW_ITEMS, GENERATED = "full", "full_with_seen", "new_items", "generate"
CANDIDATES_UNIFORM, CANDIDATES_POPULARITY = "candidates_uniform", "candidates_popularity"

Kind = Literal["baseline", "model", "bound"]
"""A bound knows what no recommender can know: it is never the best arm and is not tested."""


@dataclass(frozen=True)
class Metric:
    """What a number measures.

    >>> str(Metric("ndcg", 10, FULL)), str(Metric("mrr", None, FULL))
    ('ndcg@10', 'mrr')
    """

    name: str
    """ndcg, recall, precision, map or mrr."""
    k: int | None
    """The rank that it is cut at; None where it counts every listed item."""
    pool: str
    """The items that are ranked: `FULL`, `FULL_WITH_SEEN`, `CANDIDATES_UNIFORM`, `CANDIDATES_POPULARITY` or
    `NEW_ITEMS`."""

    def __str__(self) -> str:
        return self.name if self.k is None else f"{self.name}@{self.k}"

    @classmethod
    def of(cls, text: str, pool: str) -> Metric:
        """The metric that a column or key such as `ndcg@10` names."""
        name, _, k = text.partition("@")
        return cls(name, int(k) if k else None, pool)


@dataclass(frozen=True)
class Interval:
    """A mean over queries with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


Cells = Mapping[Metric, Interval]


@dataclass(frozen=True)
class Pool:
    """How much is asked, and among how many items."""

    num_queries: int
    num_items: int


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A group of queries."""

    num_queries: int
    metrics: Cells


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an arm cost on the machine that ran it; None where nothing was counted."""

    milliseconds_per_query: float
    num_parameters: int | None = None
    train_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Proofs:
    """What is proven of an arm's rankings of the full catalogue."""

    proven: float
    """Share of queries whose list is proven to miss no better item."""
    mean_gap: float
    """Mean over the other queries: by how much a missed item could at most beat the last listed one in score."""
    expanded: float
    """Prefixes of titles read, mean over queries."""


@dataclass(frozen=True, kw_only=True)
class FoundOfExact:
    """How much of the exact lists a beam search found."""

    share: float
    num_queries: int


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Results of a model that writes the next title freely, among uniform candidates."""

    valid_ratio: float
    """Share of queries answered with a candidate."""
    hit_rate_all: float
    hit_rate_valid: float
    """Among the queries that were answered with a candidate."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Results of one recommender on one domain."""

    name: str
    kind: Kind
    metrics: Cells
    seconds: Mapping[str, float]
    """Seconds of ranking, by pool. One ranking serves `FULL` and `FULL_WITH_SEEN`: its seconds are the main pool's."""
    cost: Cost
    lists: Mapping[str, float] = field(default_factory=dict)
    """Measures of the lists themselves, by name (`metrics.py`); a measure that no list has is left out."""
    slices: Mapping[str, Mapping[str, Slice]] = field(default_factory=dict)
    """Slice -> group -> results in it."""
    proofs: Proofs | None = None
    """None where nothing can be proven, and where all items were scored."""
    found_of_exact: FoundOfExact | None = None
    generated: Generated | None = None

    def of(self, pool: str) -> Cells:
        """The metrics over one pool, none where the arm was not asked for it."""
        return {metric: cell for metric, cell in self.metrics.items() if metric.pool == pool}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two arms on the same queries: a less b."""

    a: str
    b: str
    metric: Metric
    test: Comparison


@dataclass(frozen=True, kw_only=True)
class DomainResult:
    """Results of all arms on one domain."""

    domain: str
    num_items: int
    num_queries: int
    certified: bool
    """A clean leakage certificate covers every arm and query."""
    main: Metric
    """What arms are ordered and compared by."""
    pools: Mapping[str, Pool]
    """What was asked beside the full catalogue, by pool."""
    arms: Mapping[str, Arm]
    differences: Sequence[Difference] = ()
    notes: Sequence[str] = ()
    """What a reader of the numbers should know."""
    unseen: bool | None = None
    """Whether pre-training saw nothing of the domain; None where nothing was pre-trained."""

    def best(self) -> Arm | None:
        """The arm with the highest mean of the main metric, bounds aside; the first of equal ones."""
        rivals = [arm for arm in self.arms.values() if arm.kind != "bound"]
        return max(rivals, key=lambda arm: arm.metrics[self.main].mean) if rivals else None


@dataclass(frozen=True, kw_only=True)
class CertificateSummary:
    """What the leakage certificate of the data folder found."""

    clean: bool
    checked: int
    violations: int
    uncertified: bool
    """Something in the report is not covered by a clean certificate."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What training a model took."""

    num_parameters: int
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """An evaluation: all domains, and what their numbers depend on."""

    title: str
    protocol: Mapping[str, str]
    """What every number depends on, in words."""
    certificate: CertificateSummary
    domains: Mapping[str, DomainResult]
    models: Mapping[str, TrainedModel] = field(default_factory=dict)

    @property
    def main(self) -> Metric:
        """What arms are ordered and compared by, in every domain."""
        return next(iter(self.domains.values())).main


@dataclass(frozen=True, kw_only=True)
class Example:
    """A user, and what some arms recommend; items are named by their titles."""

    domain: str
    user: str
    history: Sequence[str]
    """Oldest first."""
    target: str
    recommendations: Mapping[str, Sequence[tuple[str, float]]]
    """Arm -> titles with scores, best first."""


# ---- seeds -----------------------------------------------------------------------------------------------------------

SEED = re.compile(r"(?P<model>.+) \(seed \d+\)")
"""Names of arms that are one model trained with several seeds. In a table of differences they stand together and are
never tested against each other."""

BLENDED = " blend"
"""End of the name of a row that blends a model with other recommenders; the model is the row of the name before it."""
BY_HEAD = " item head"
"""End of the name of a row that ranks by a model's item head; the model is the row of the name before it."""


def arm_of(model: str, seed: int) -> str:
    """The name of an arm that is one of several seeds.

    >>> arm_of("SASRec", 1)
    'SASRec (seed 1)'
    """
    return f"{model} (seed {seed})"


def model_of(arm: str) -> str:
    """The name of an arm without its seed."""
    match = SEED.fullmatch(arm)
    return match["model"] if match else arm


def together(arms: Iterable[str]) -> dict[str, list[str]]:
    """Arms by the name that their model has in a table, in the order given; an arm without a seed stands alone.

    >>> together(["EASE", "SASRec (seed 0)", "SASRec (seed 1)"])
    {'EASE': ['EASE'], 'SASRec (2 seeds)': ['SASRec (seed 0)', 'SASRec (seed 1)']}
    """
    models: dict[tuple[str, bool], list[str]] = {}
    for arm in arms:
        models.setdefault((model_of(arm), SEED.fullmatch(arm) is not None), []).append(arm)
    return {f"{model} ({len(own)} seeds)" if len(own) > 1 else own[0]: own for (model, _), own in models.items()}


# ---- report.json -----------------------------------------------------------------------------------------------------

REMEDY = "run `cprec evaluate` again with the settings of its run.json; saved rankings are reused"
SHOWN = {"hit_rate_all": "hr@1-all", "hit_rate_valid": "hr@1-valid"}
"""Fields of `Generated` that have another name in the file."""


def write_report(path: str | Path, report: Report) -> None:
    """Write `report.json`; it appears complete or not at all."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "title": report.title,
        "protocol": dict(report.protocol),
        "certificate": asdict(report.certificate),
        "domains": {name: _domain_to_json(result) for name, result in report.domains.items()},
        "models": {name: asdict(model) for name, model in report.models.items()},
    }
    write_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_report(path: str | Path) -> Report:
    """The report of a file that `write_report` wrote, or that was written before files had a version.

    Raises DataError for a file that is no report, or of another version; the message says what to do.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        version = content.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise DataError(f"{path} has schema_version {version}; this CPRec reads {SCHEMA_VERSION}: {REMEDY}")
        return Report(
            title=content["title"],
            protocol=content["protocol"],
            certificate=CertificateSummary(**content["certificate"]),
            domains={name: _domain_from_json(name, result) for name, result in content["domains"].items()},
            models={name: TrainedModel(**model) for name, model in content.get("models", {}).items()},
        )
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise DataError(f"{path} is not a report of CPRec, or too old ({error!r}): {REMEDY}") from None


def _domain_to_json(result: DomainResult) -> dict[str, Any]:
    return {
        **{name: getattr(result, name) for name in ("unseen", "num_items", "num_queries", "certified")},
        **({"notes": list(result.notes)} if result.notes else {}),
        "arms": {name: _arm_to_json(arm, result) for name, arm in result.arms.items()},
        "differences": [
            {"a": line.a, "b": line.b, "metric": str(line.metric), **asdict(line.test), "claim": line.test.claim}
            for line in result.differences
        ],
    }


def _domain_from_json(name: str, content: Mapping[str, Any]) -> DomainResult:
    # Every arm has the entries of the main pool; those of the other pools say which these are.
    first = next(iter(content["arms"].values()))
    k = max(int(key[5:]) for key in first if key.startswith("ndcg@"))
    main = Metric("ndcg", k, FULL_WITH_SEEN if "seen_left_out" in first else FULL)
    pools = {}
    for key in first:
        if key.startswith("candidates"):
            size, _, popularity = key.removeprefix("candidates").partition("_")
            pool = CANDIDATES_POPULARITY if popularity else CANDIDATES_UNIFORM
            pools[pool] = Pool(content["num_queries"], int(size))
    if NEW_ITEMS in first:
        pools[NEW_ITEMS] = _record(Pool, first[NEW_ITEMS])
    keys = _keys(main.pool, pools)
    return DomainResult(
        domain=name,
        **{name: content[name] for name in ("unseen", "num_items", "num_queries", "certified")},
        main=main,
        pools=pools,
        arms={arm: _arm_from_json(arm, found, main.pool, keys) for arm, found in content["arms"].items()},
        differences=[
            Difference(
                a=line["a"], b=line["b"], metric=Metric.of(line["metric"], main.pool), test=_record(Comparison, line)
            )
            for line in content["differences"]
        ],
        notes=content.get("notes", []),
    )


def _keys(main: str, pools: Mapping[str, Pool]) -> dict[str, str]:
    """The keys that an arm has the pools beside the main one under."""
    other = {FULL_WITH_SEEN: "seen_kept"} if main == FULL else {FULL: "seen_left_out"}
    suffix = {CANDIDATES_UNIFORM: "", CANDIDATES_POPULARITY: "_popularity"}
    return other | {
        pool: f"candidates{about.num_items}{suffix[pool]}" if pool in suffix else pool for pool, about in pools.items()
    }


def _arm_to_json(arm: Arm, result: DomainResult) -> dict[str, Any]:
    main = result.main.pool
    content: dict[str, Any] = {
        "kind": arm.kind,
        "num_queries": result.num_queries,
        **_cells_to_json(arm.of(main)),
        "seconds": arm.seconds[main],
        "cost": {name: value for name, value in asdict(arm.cost).items() if value is not None},
        **(asdict(arm.proofs) if arm.proofs else {}),
        "lists": dict(arm.lists),
        "slices": {
            name: {
                group: {"num_queries": found.num_queries, **_cells_to_json(found.metrics)}
                for group, found in groups.items()
            }
            for name, groups in arm.slices.items()
        },
    }
    for pool, key in _keys(main, result.pools).items():
        if cells := arm.of(pool):
            timed = {"seconds": arm.seconds[pool]} if pool in arm.seconds else {}
            sized = asdict(result.pools[pool]) if pool == NEW_ITEMS else {}
            content[key] = {**_cells_to_json(cells), **timed, **sized}
    if arm.found_of_exact:
        content["found_of_exact"] = asdict(arm.found_of_exact)
    if arm.generated:
        content[GENERATED] = {SHOWN.get(name, name): value for name, value in asdict(arm.generated).items()}
    return content


def _arm_from_json(name: str, content: Mapping[str, Any], main: str, keys: Mapping[str, str]) -> Arm:
    by_pool = {main: content} | {pool: content[key] for pool, key in keys.items() if key in content}
    free = content.get(GENERATED)
    return Arm(
        name=name,
        kind=content["kind"],
        metrics={metric: cell for pool, found in by_pool.items() for metric, cell in _cells(found, pool).items()},
        seconds={pool: found["seconds"] for pool, found in by_pool.items() if "seconds" in found},
        cost=Cost(**content["cost"]),
        lists=content["lists"],
        slices={
            slice_: {
                group: Slice(num_queries=found["num_queries"], metrics=_cells(found, main))
                for group, found in groups.items()
            }
            for slice_, groups in content["slices"].items()
        },
        proofs=_record(Proofs, content) if "proven" in content else None,
        found_of_exact=FoundOfExact(**content["found_of_exact"]) if "found_of_exact" in content else None,
        generated=_record(Generated, free | {name: free[key] for name, key in SHOWN.items()}) if free else None,
    )


def _record(record: Any, content: Mapping[str, Any]) -> Any:
    """A record from the entries of its fields, which may stand among others."""
    return record(**{one.name: content[one.name] for one in fields(record)})


def _cells_to_json(cells: Cells) -> dict[str, dict[str, float]]:
    return {str(metric): asdict(cell) for metric, cell in cells.items()}


def _cells(content: Mapping[str, Any], pool: str) -> dict[Metric, Interval]:
    """The metrics among the entries of an arm, a pool or a slice."""
    return {
        Metric.of(key, pool): Interval(**cell)
        for key, cell in content.items()
        if isinstance(cell, Mapping) and cell.keys() == {"mean", "low", "high"}
    }
