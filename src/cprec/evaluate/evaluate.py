"""Stage: queries -> saved rankings -> metrics of every query -> means with intervals."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cprec.errors import ConfigError, CPRecError, DataError, LeakageError
from cprec.provenance import file_sha256
from cprec.recommender import Ranking, RankingQuery, Recommender
from cprec.schema import Item

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from cprec.data.splits import Split

FULL, SAMPLED, GENERATED = "full", "candidates", "generate"
SAMPLE = 100
"""Queries whose exact lists a beam's are compared with."""
BATCH = 256
"""Queries handed to a recommender at once."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of evaluation."""

    data: str
    """Data folder that `cprec prepare` wrote."""
    output_dir: str
    """Where rankings, metrics and the report go."""
    models: dict[str, str] = field(default_factory=dict)
    """Model folders to rank with, by the name they have in tables. A folder fine-tuned on a domain ranks that domain
    only; a pre-trained one ranks all."""
    domains: tuple[str, ...] = ()
    """Domains to rank; none named means every one that has queries."""
    part: Literal["test", "validation"] = "test"
    """Held-out events that are asked for."""
    k: int = 10
    """Length of the rankings of the full catalogue; metrics are cut at 5 and at this."""
    exclude_seen: bool = True
    """Leave out the items of the query's history."""
    max_queries: int = 0
    """Rank a seeded sample of at most this many queries a domain; 0 ranks all."""
    num_candidates: int = 20
    """Size of the frozen candidate sets: the target and uniform others."""
    mode: Literal["auto", "exact", "beam"] = "auto"
    """How models rank the full catalogue: `exact` proves that no better item is left; `auto` too, but for queries that
    have read `max_nodes` prefixes; `beam` keeps `beam_width` prefixes at each depth. Tables say what was proven, and
    of a beam what share of the exact lists it found."""
    beam_width: int = 20
    """Prefixes that a beam keeps at each depth."""
    max_nodes: int = 2000
    """Prefixes that `auto` reads for a query at most."""
    score: Literal["sum", "mean", "corrected"] = "sum"
    """Log-probability of a title: summed over its tokens, their mean, or the sum less what it is under an empty history
    (`corrected` for popularity; over the full catalogue that puts what a beam found into another order)."""
    generate: bool = False
    """Also let models write the next title freely and look for it among the candidates."""
    uncertified: bool = False
    """Rank although a leakage certificate is missing or does not cover a model; every table then says so."""
    seed: int = 0
    """Decides candidates, the sample of queries, the random baseline and bootstrap samples."""

    def __post_init__(self) -> None:
        if self.k < 5:
            raise ConfigError(f"k={self.k} must be at least 5")
        if self.num_candidates < 2:
            raise ConfigError(f"num_candidates={self.num_candidates} must be at least 2")
        if self.max_queries < 0 or self.beam_width < 1:
            raise ConfigError(
                f"max_queries={self.max_queries} and beam_width={self.beam_width} must not be below 0 and 1"
            )
        if self.max_nodes < 1:
            raise ConfigError(f"max_nodes={self.max_nodes} must be at least 1")
        if self.score == "corrected" and self.mode == "exact":
            raise ConfigError(
                "score=corrected with mode=exact: a corrected score may rise along a title, so nothing can be proven; "
                "choose mode=auto or mode=beam"
            )


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A recommender in a table."""

    name: str
    recommender: Recommender
    kind: Literal["baseline", "model", "bound"]
    trained_on: tuple[str, ...] = ()
    """Hashes of the token shards its model was trained on, one at least; a baseline learns from the split itself."""
    identity: str = ""
    """Changes when the recommender does, so that saved rankings are reused only where they are its own."""
    modes: Mapping[str, Recommender] = field(default_factory=dict)
    """The same model as it ranks in other modes: `exact`, `generate`."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The queries of a domain with their answers, in one order."""

    domain: str
    queries: list[RankingQuery]
    sampled: list[RankingQuery]
    """The same queries with their candidates, which nothing is left out of."""
    target: list[str]
    user: list[str]
    sha256: str
    """Of the files of queries and candidates."""


def evaluate(config: EvaluateConfig, split: Split, domain: str, entrants: Sequence[Entrant]) -> dict[str, Any]:
    """Rank the queries of a domain with every entrant; returns the domain's part of the report.

    Rankings go to `DOMAIN/ARM.PROTOCOL.parquet` and metrics of each query to `DOMAIN/metrics.parquet`; every mean is
    made from these. An arm whose saved rankings answer the same questions is not run again.

    Raises LeakageError if the certificate is missing, not clean, or does not cover an entrant's shards or the queries.
    """
    import pyarrow as pa

    certified = check_certificate(config, domain, entrants)
    questions = read_questions(config, split, domain)
    folder = Path(config.output_dir) / domain
    folder.mkdir(parents=True, exist_ok=True)
    arms: dict[str, Any] = {}
    tables: list[Any] = []
    per_query: dict[str, np.ndarray] = {}
    for entrant in entrants:
        arm: dict[str, Any] = {"kind": entrant.kind, "num_queries": len(questions.queries)}
        generates = (GENERATED,) if config.generate and GENERATED in entrant.modes else ()
        for protocol in (FULL, SAMPLED, *generates):
            rankings, seconds = _rankings(config, entrant, questions, protocol)
            columns = metrics_of(rankings, questions, config.k)
            names = {"query_id": [query.query_id for query in questions.queries], "user_id": questions.user}
            constants = {"domain": domain, "arm": entrant.name, "protocol": protocol}
            repeated = {name: [value] * len(questions.queries) for name, value in constants.items()}
            tables.append(pa.table({**names, **repeated, **columns}))
            means = {
                name: _interval(values, config.seed) for name, values in columns.items() if "@" in name or name == "mrr"
            }
            if protocol == FULL:
                arm |= {**means, "seconds": seconds, **proven(rankings, len(questions.queries))}
                found_of_exact = (rankings.schema.metadata or {}).get(b"found_of_exact")
                if found_of_exact:
                    arm["found_of_exact"] = json.loads(found_of_exact)
                per_query[entrant.name] = columns[f"ndcg@{config.k}"]
            elif protocol == GENERATED:
                valid = columns["num_valid"] > 0
                arm[GENERATED] = {
                    "valid_ratio": float(valid.mean()),
                    "hr@1-all": means["recall@1"]["mean"],
                    "hr@1-valid": float(columns["recall@1"][valid].mean()) if valid.any() else 0.0,
                    "seconds": seconds,
                }
            else:
                arm[f"candidates{config.num_candidates}"] = {**means, "seconds": seconds}
        arms[entrant.name] = arm
    _replace_table(pa.concat_tables(tables), folder / "metrics.parquet")
    models = [entrant.name for entrant in entrants if entrant.kind == "model"]
    rivals = [entrant.name for entrant in entrants if entrant.kind != "bound" and entrant.name != "random"]
    pairs = [
        (a, b)
        for a in reversed(models)
        for b in rivals
        if a != b and (b not in models or models.index(b) < models.index(a))
    ]
    return {
        "num_items": len(split.catalogue.rows_of(domain)),
        "num_queries": len(questions.queries),
        "certified": certified,
        "arms": arms,
        "differences": [
            {
                "a": a,
                "b": b,
                "metric": f"ndcg@{config.k}",
                **_interval(per_query[a] - per_query[b], config.seed),
                "num_queries": len(questions.queries),
            }
            for a, b in pairs
        ],
    }


def protocol_of(config: EvaluateConfig, split: Split, dataset: dict[str, Any]) -> dict[str, str]:
    """What every number depends on, for people."""
    spec = ", ".join(f"{name} {value}" for name, value in asdict(split.spec).items() if value is not None)
    return {
        "split": f"{spec}; {config.part} events are asked for",
        "ties in time": str(dataset.get("rules", {}).get("tie_order", "source")),
        "candidates": f"the domain's full catalogue; beside it {config.num_candidates} (target and uniform others)",
        "seen items": "left out of the full ranking" if config.exclude_seen else "may be recommended again",
        "language models": f"{_MODES[config.mode].format(config=config)}; candidates by exact log-likelihood"
        + {"sum": "", "mean": "; scores are means over tokens", "corrected": "; scores corrected for popularity"}[
            config.score
        ],
        "ties in score": "expected value over all orders",
        "statistics": "95 % bootstrap intervals over queries; differences are paired",
        "queries": f"at most {config.max_queries:,} a domain, sampled" if config.max_queries else "all",
    }


_MODES = {
    "exact": "exact search of the catalogue's titles, each list proven",
    "auto": "exact search of the catalogue's titles; after {config.max_nodes:,} prefixes the best found",
    "beam": "beam search of width {config.beam_width} over the catalogue's titles, not exact",
}


def check_certificate(config: EvaluateConfig, domain: str, entrants: Sequence[Entrant]) -> bool:
    """Whether the data folder's certificate is clean and covers the entrants' shards and the domain's queries.

    Raises LeakageError where it does not, unless `uncertified` is set, and DataError where the file is no certificate.
    """
    data = Path(config.data)
    path = data / "certificate.json"
    problem = None
    if not path.is_file():
        problem = f"{path} is missing: make it with `cprec audit {data}`"
    else:
        try:
            certificate = json.loads(path.read_text())
            known = set(certificate["artifacts"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path} is no certificate: make it anew with `cprec audit {data}`") from None
        unknown = [entrant.name for entrant in entrants if entrant.kind == "model" and not entrant.trained_on]
        strangers = [entrant.name for entrant in entrants if not set(entrant.trained_on) <= known]
        queries = data / "queries" / domain / f"{config.part}.parquet"
        if not certificate["clean"]:
            wrong = [p["name"] for p in certificate["properties"] if p["violations"]]
            problem = f"{path} found leaks: {'; '.join(wrong)}"
        elif unknown:
            problem = f"{', '.join(unknown)} does not say what data it was trained on, so {path} cannot cover it"
        elif strangers:
            problem = (
                f"{path} does not cover the data that {', '.join(strangers)} was trained on: train it on {data}, or "
                "give the data folder that it was trained on"
            )
        elif certificate["queries"].get(f"{domain}/{config.part}") != file_sha256(queries):
            problem = (
                f"{queries} is not the file that {path} covers: run `cprec audit {data}` and look at what it finds"
            )
    if problem and not config.uncertified:
        raise LeakageError(f"{problem} (uncertified=true ranks all the same, and says so in every table)")
    return problem is None


def read_questions(config: EvaluateConfig, split: Split, domain: str) -> Questions:
    """The queries of a domain and their candidate sets, which are drawn and frozen on first use."""
    import hashlib

    import numpy as np
    import pyarrow.parquet as pq

    from cprec.evaluate.candidates import draw_candidates, read_candidates, write_candidates
    from cprec.progress import track

    folder = Path(config.data) / "queries" / domain
    path = folder / f"{config.part}.parquet"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: name {domain!r} in target_domains of `cprec prepare`")
    frozen = folder / f"candidates{config.num_candidates}_{config.part}_seed{config.seed}.parquet"
    rows = pq.read_table(path).to_pylist()
    if not frozen.is_file():
        mine = split.catalogue.rows_of(domain)
        titles = [str(title) for title in split.catalogue.title[mine]]
        log = split.interactions
        of_domain = split.catalogue.domain[log.item] == split.catalogue.domain_index(domain)
        had: dict[tuple[str, str], list[int]] = {}
        for user, item in zip(log.user[of_domain], log.item[of_domain] - mine[0], strict=True):
            key = (str(log.platforms[log.user_platform[user]]), str(log.user_id[user]))
            had.setdefault(key, []).append(int(item))
        target = split.catalogue.find(domain, [row["target"] for row in rows]) - mine[0]
        sets = []
        with track(len(rows), f"{domain}: candidate sets", unit="queries") as progress:
            for row, position in zip(rows, target, strict=True):
                taken = np.array(had[row["platform"], row["user_id"]])
                drawn = draw_candidates(
                    row["query_id"], int(position), taken, titles, config.num_candidates, config.seed
                )
                sets.append([str(item) for item in split.catalogue.item_id[mine[0] + drawn]])
                progress.advance()
        write_candidates(frozen, [row["query_id"] for row in rows], sets)
    candidates = read_candidates(frozen)
    if candidates.keys() != {row["query_id"] for row in rows}:
        raise DataError(f"{frozen} holds candidates of other queries than {path}: delete it, and it is drawn anew")
    if config.max_queries and config.max_queries < len(rows):
        chosen = np.sort(np.random.default_rng(config.seed).permutation(len(rows))[: config.max_queries])
        rows = [rows[number] for number in chosen]
    queries, sampled = [], []
    for row in rows:
        history = tuple(Item(d, i) for d, i in zip(row["history_domain"], row["history_item"], strict=True))
        seen = frozenset(item.item_id for item in history if item.domain == domain)
        exclude = seen if config.exclude_seen else frozenset()
        queries.append(RankingQuery(query_id=row["query_id"], domain=domain, history=history, exclude=exclude))
        sampled.append(
            RankingQuery(
                query_id=row["query_id"], domain=domain, history=history, candidates=candidates[row["query_id"]]
            )
        )
    return Questions(
        domain=domain,
        queries=queries,
        sampled=sampled,
        target=[row["target"] for row in rows],
        user=[row["user_id"] for row in rows],
        sha256=hashlib.sha256((file_sha256(path) + file_sha256(frozen)).encode()).hexdigest(),
    )


def metrics_of(rankings: pa.Table, questions: Questions, k: int) -> dict[str, np.ndarray]:
    """Metrics of each query from saved rankings: neither the model nor torch is needed."""
    import numpy as np

    from cprec.evaluate.metrics import ndcg, recall, reciprocal_rank

    row_of = {query.query_id: row for row, query in enumerate(questions.queries)}
    query = np.array([row_of[name] for name in rankings["query_id"].to_pylist()], dtype=np.int64)
    score = rankings["score"].to_numpy()
    targets = np.array(questions.target, dtype=object)
    hit = rankings["item_id"].to_numpy() == targets[query]
    of_target = np.full(len(questions.queries), np.nan)
    of_target[query[hit]] = score[hit]
    found = ~np.isnan(of_target)
    better = np.bincount(query[score > of_target[query]], minlength=len(found))
    tied = np.where(found, np.bincount(query[score == of_target[query]], minlength=len(found)), 0)
    columns: dict[str, np.ndarray] = {"num_better": better, "num_tied": tied}
    columns["num_valid"] = np.bincount(query, minlength=len(found))
    for cut in (1, 5, k):
        columns[f"recall@{cut}"] = recall(better, tied, cut)
    for cut in (5, k):
        columns[f"ndcg@{cut}"] = ndcg(better, tied, cut)
    return columns | {"mrr": reciprocal_rank(better, tied)}


def proven(rankings: pa.Table, num_queries: int) -> dict[str, Any]:
    """What the certificates of an arm's rankings say, nothing where there are none: the share of queries whose list is
    proven, the mean gap of the others, and prefixes read a query. A query without any item is not."""
    import numpy as np

    if "gap" not in rankings.column_names:
        return {}
    first = rankings.filter(np.asarray(rankings["rank"]) == 1)
    gap = first["gap"].to_numpy()
    wide = gap[(gap > 0) & np.isfinite(gap)]
    return {
        "proven": float((gap == 0).sum()) / num_queries,
        "mean_gap": float(wide.mean()) if len(wide) else 0.0,
        "expanded": float(first["expanded"].to_numpy().sum()) / num_queries,
    }


def _found_of_exact(
    config: EvaluateConfig, entrant: Entrant, questions: Questions, rankings: pa.Table
) -> dict[str, Any]:
    """The share of the exact top K that an arm's lists hold, on a sample of queries."""
    import numpy as np

    from cprec.progress import say

    size = min(SAMPLE, len(questions.queries))
    chosen = np.sort(np.random.default_rng(config.seed).permutation(len(questions.queries))[:size])
    say(f"{questions.domain}: {entrant.name}, exact lists of {size} queries to compare with")
    exact = entrant.modes["exact"].rank([questions.queries[number] for number in chosen], config.k)
    lists: dict[str, set[str]] = {}
    for query, item in zip(rankings["query_id"].to_pylist(), rankings["item_id"].to_pylist(), strict=True):
        lists.setdefault(query, set()).add(item)
    shares = [len(lists.get(r.query_id, set()) & set(r.item_ids)) / len(r.item_ids) for r in exact if r.item_ids]
    return {"share": float(np.mean(shares)) if shares else 1.0, "num_queries": size}


def rankings_path(config: EvaluateConfig, domain: str, arm: str, protocol: str) -> Path:
    """Where an arm's rankings of a domain are saved."""
    name = re.sub("[^a-z0-9]+", "-", arm.lower()).strip("-")
    return Path(config.output_dir) / domain / f"{name}.{protocol}.parquet"


def _rankings(config: EvaluateConfig, entrant: Entrant, questions: Questions, protocol: str) -> tuple[Any, float]:
    """The rankings of an arm, saved or made now, and the seconds that they took to make."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cprec.progress import say, track

    queries = questions.queries if protocol == FULL else questions.sampled
    recommender = entrant.modes[GENERATED] if protocol == GENERATED else entrant.recommender
    names = ("k", "exclude_seen", "max_queries", "seed", "num_candidates", "mode", "beam_width", "max_nodes", "score")
    asked: dict[str, Any] = {name: getattr(config, name) for name in names}
    asked |= {"questions": questions.sha256, "identity": entrant.identity}
    asked["data"] = file_sha256(Path(config.data) / "dataset.json")  # what baselines learn from
    key = json.dumps(asked, sort_keys=True)
    path = rankings_path(config, questions.domain, entrant.name, protocol)
    if path.is_file():
        known = pq.read_schema(path).metadata or {}
        if known.get(b"answers", b"").decode() == key:
            say(f"{path}: answers the same questions, reused")
            return pq.read_table(path), float(known[b"seconds"])
    start = time.perf_counter()
    rankings: list[Ranking] = []
    with track(len(queries), f"{questions.domain}: {entrant.name}, {protocol}", unit="queries") as progress:
        for first in range(0, len(queries), BATCH):
            batch = queries[first : first + BATCH]
            rankings += recommender.rank(batch, config.k)
            progress.advance(len(batch))
    seconds = round(time.perf_counter() - start, 3)
    assert [ranking.query_id for ranking in rankings] == [query.query_id for query in queries]
    broken = next((r.query_id for r in rankings if not all(map(math.isfinite, r.scores))), None)
    if broken is not None:
        raise CPRecError(f"{entrant.name} gave query {broken!r} a score that is not finite: its model is broken")
    lengths = [len(ranking.item_ids) for ranking in rankings]
    pairs = list(zip(rankings, questions.user, lengths, strict=True))
    table = pa.table(
        {
            "query_id": pa.array([r.query_id for r, _, n in pairs for _ in range(n)], pa.string()),
            "user_id": pa.array([user for _, user, n in pairs for _ in range(n)], pa.string()),
            "domain": pa.array([questions.domain] * sum(lengths), pa.string()),
            "rank": pa.array([rank for n in lengths for rank in range(1, n + 1)], pa.int32()),
            "item_id": pa.array([item for r in rankings for item in r.item_ids], pa.string()),
            "score": pa.array([score for r in rankings for score in r.scores], pa.float64()),
        }
    )
    if any(ranking.certificate is not None for ranking in rankings):
        proofs = [r.certificate for r in rankings for _ in r.item_ids]
        table = table.append_column("gap", pa.array([p.gap if p else None for p in proofs], pa.float64()))
        table = table.append_column("expanded", pa.array([p.expanded if p else None for p in proofs], pa.int32()))
    about = {"answers": key, "seconds": repr(seconds)}
    if protocol == FULL and config.mode == "beam" and "exact" in entrant.modes:
        about["found_of_exact"] = json.dumps(_found_of_exact(config, entrant, questions, table))
    table = table.replace_schema_metadata(about)
    _replace_table(table, path)
    return table, seconds


def _replace_table(table: Any, path: Path) -> None:
    import pyarrow.parquet as pq

    temporary = path.with_name(path.name + ".incomplete")
    pq.write_table(table, temporary, compression="zstd")
    temporary.replace(path)


def _interval(values: np.ndarray, seed: int) -> dict[str, float]:
    from cprec.evaluate.statistics import bootstrap_interval

    mean, low, high = bootstrap_interval(values, seed=seed)
    return {"mean": mean, "low": low, "high": high}
