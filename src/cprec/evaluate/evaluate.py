"""Stage: queries -> saved rankings -> metrics of every query -> means with intervals."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cprec.errors import ConfigError, CPRecError, DataError, LeakageError
from cprec.evaluate.config import EvaluateConfig
from cprec.provenance import file_sha256
from cprec.recommender import Ranking, Recommender

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from cprec.data.splits import Split
    from cprec.evaluate.questions import Questions

SAMPLE = 100
"""Queries whose exact lists a beam's are compared with."""
BATCH = 256
"""Queries handed to a recommender at once."""
FLATTERED = "validation events chose the weights of trained baselines, and tuned settings, and so flatter them"


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A recommender in a table."""

    name: str
    recommender: Recommender
    kind: Literal["baseline", "model", "bound"]
    stochastic: bool = False
    """Its training draws, so that another seed would give it other numbers."""
    trained_on: tuple[str, ...] = ()
    """Hashes of the token shards its model was trained on, one at least; a baseline learns from the split itself."""
    identity: str | None = ""
    """Changes when the recommender does, so that saved rankings are reused only where they are its own; None where
    the recommender is gone, and the saved rankings are all that is left of it."""
    scores: str = ""
    """The rule by which a model scores items. Rankings saved under another rule are made again, or refused where the
    model is gone."""
    modes: Mapping[str, Recommender] = field(default_factory=dict)
    """The same model as it ranks in other modes: `exact`, `generate`."""
    open: Callable[[], object] = dict
    """Makes it ready, before ranking is timed: reads a model, trains a baseline."""
    cost: Callable[[], Mapping[str, float]] = dict
    """What it took, once it has ranked: num_parameters and train_seconds, where there are any."""
    close: Callable[[], object] = dict
    """Lets go of what `open` made, once all queries are ranked."""


def evaluate(config: EvaluateConfig, split: Split, domain: str, entrants: Sequence[Entrant]) -> dict[str, Any]:
    """Rank the queries of a domain with every entrant; returns the domain's part of the report.

    Rankings go to `DOMAIN/ARM.PROTOCOL.parquet`, queries with their slices to `DOMAIN/queries.parquet`, metrics of each
    query to `DOMAIN/metrics.parquet`, and what they depend on to `DOMAIN/protocol.json`; every mean is made from these.
    An arm whose saved rankings answer the same questions is not run again.

    Raises LeakageError if the certificate is missing, not clean, or does not cover an entrant's shards or the queries,
    and ConfigError where no entrant can rank.
    """
    import pyarrow as pa

    from cprec.data.titles import title_vectors
    from cprec.evaluate.metrics import valid_ratio
    from cprec.evaluate.questions import FULL, FULL_WITH_SEEN, GENERATED, NEW_ITEMS, SAMPLED, read_questions
    from cprec.evaluate.saved import write_saved
    from cprec.evaluate.tables import Lists, means_of, metrics_of, paired, sliced
    from cprec.progress import say

    certified = check_certificate(config, domain, entrants)
    questions = read_questions(config, split, domain)
    for note in questions.notes:
        say(f"note: {domain}: {note}")
    folder = Path(config.output_dir) / domain
    folder.mkdir(parents=True, exist_ok=True)
    main, other = (FULL, FULL_WITH_SEEN) if config.exclude_seen else (FULL_WITH_SEEN, FULL)
    mine = split.catalogue.rows_of(domain)
    lists = Lists.of(split, domain, title_vectors([str(title) for title in split.catalogue.title[mine]]))
    num_queries = len(questions.queries)
    arms: dict[str, Any] = {}
    tables: list[Any] = []
    per_query: dict[str, np.ndarray] = {}

    def judged(entrant: Entrant, protocol: str, rankings: pa.Table) -> dict[str, np.ndarray]:
        columns = metrics_of(rankings, questions, config.k, protocol)
        asked = questions.of(protocol)
        users = dict(zip((query.query_id for query in questions.queries), questions.user, strict=True))
        constants: dict[str, Any] = {"domain": domain, "arm": entrant.name, "kind": entrant.kind, "protocol": protocol}
        constants["stochastic"] = entrant.stochastic
        names = {
            "query_id": [query.query_id for query in asked],
            "user_id": [users[query.query_id] for query in asked],
            **{name: [value] * len(asked) for name, value in constants.items()},
        }
        tables.append(pa.table({**names, **columns}))
        return columns

    _check_names(entrants)
    for entrant in entrants:
        try:
            rankings, seconds = _rankings(config, entrant, questions, FULL)
        except ConfigError as error:
            if entrant.kind != "baseline":
                raise
            say(f"{domain}: {entrant.name} is left out: {error}")
            entrant.close()
            continue
        columns = judged(entrant, main, rankings)
        per_query[entrant.name] = columns[f"ndcg@{config.k}"]
        arm = {
            "kind": entrant.kind,
            "num_queries": num_queries,
            **means_of(columns, questions.user, config.seed),
            "seconds": seconds,
            "cost": {**_cost(rankings), "milliseconds_per_query": 1000 * seconds / max(1, num_queries)},
            **proven(rankings, num_queries),
            "seen_kept" if config.exclude_seen else "seen_left_out": means_of(
                judged(entrant, other, rankings), questions.user, config.seed
            ),
            "lists": lists.measures(rankings, config.k, exclude_seen=config.exclude_seen),
            "slices": sliced(columns, questions, config.k, config.seed),
        }
        found_of_exact = (rankings.schema.metadata or {}).get(b"found_of_exact")
        if found_of_exact:
            arm["found_of_exact"] = json.loads(found_of_exact)
        for how, protocol in SAMPLED.items():
            if how not in questions.candidates:
                continue
            rankings, seconds = _rankings(config, entrant, questions, protocol)
            means = means_of(judged(entrant, protocol, rankings), questions.user, config.seed)
            suffix = "" if protocol == SAMPLED["uniform"] else f"_{how}"
            arm[f"candidates{config.num_candidates}{suffix}"] = {**means, "seconds": seconds}
        if asked := questions.of(NEW_ITEMS):
            rankings, seconds = _rankings(config, entrant, questions, NEW_ITEMS)
            columns = judged(entrant, NEW_ITEMS, rankings)
            users = dict(zip((query.query_id for query in questions.queries), questions.user, strict=True))
            means = means_of(columns, [users[query.query_id] for query in asked], config.seed)
            arm[NEW_ITEMS] = {**means, "num_queries": len(asked), "num_items": len(questions.new_items)}
        if config.generate and GENERATED in entrant.modes:
            rankings, seconds = _rankings(config, entrant, questions, GENERATED)
            columns = judged(entrant, GENERATED, rankings)
            valid = columns["num_valid"] > 0
            arm[GENERATED] = {
                "valid_ratio": valid_ratio(columns["num_valid"]),
                "hr@1-all": float(columns["recall@1"].mean()),
                "hr@1-valid": float(columns["recall@1"][valid].mean()) if valid.any() else 0.0,
                "seconds": seconds,
            }
        arms[entrant.name] = arm
        entrant.close()
    if not arms:
        raise ConfigError(f"{domain}: nothing is left to rank with: name a baseline that suits the data, or a model")
    settings = folder / "protocol.json"
    settings.unlink(missing_ok=True)  # written last, it never stands beside metrics of other questions
    write_saved(questions.table(), folder / "queries.parquet")
    write_saved(pa.concat_tables(tables), folder / "metrics.parquet")
    _write_protocol(config, split, questions, certified, settings)
    return {
        "num_items": len(mine),
        "num_queries": num_queries,
        "certified": certified,
        **({"notes": list(questions.notes)} if questions.notes else {}),
        "arms": arms,
        "differences": paired(
            [e for e in entrants if e.name in arms], per_query, questions.user, f"ndcg@{config.k}", config.seed
        ),
    }


def _check_names(entrants: Sequence[Entrant]) -> None:
    """Raises ConfigError where two arms have one name, or names that are alike in files."""
    slugs: dict[str, str] = {}
    for entrant in entrants:
        other = slugs.setdefault(_slug(entrant.name), entrant.name)
        if other is not entrant.name:
            raise ConfigError(f"two arms are called {other!r} and {entrant.name!r}: give the model another name")


def _write_protocol(config: EvaluateConfig, split: Split, questions: Questions, certified: bool, path: Path) -> None:
    """What the numbers of a domain depend on, for programs: `cprec compare` refuses what differs in any of it."""
    import hashlib

    dataset = json.loads((Path(config.data) / "dataset.json").read_text())
    items = "\n".join(map(str, split.catalogue.item_id[split.catalogue.rows_of(questions.domain)]))
    protocol = {
        "domain": questions.domain,
        "split": ", ".join(f"{name} {value}" for name, value in asdict(split.spec).items() if value),
        "tie_order": dataset.get("rules", {}).get("tie_order", "source"),
        "part": config.part,
        "num_queries": len(questions.queries),
        **{f"{name}_sha256": value for name, value in questions.sha256.items()},
        "num_candidates": config.num_candidates,
        "seen": "left out" if config.exclude_seen else "may be recommended",
        "catalogue_sha256": hashlib.sha256(items.encode()).hexdigest(),
        "num_items": len(split.catalogue.rows_of(questions.domain)),
        "k": config.k,
        "certificate": "clean" if certified else "uncertified",
    }
    temporary = path.with_name(path.name + ".incomplete")
    temporary.write_text(json.dumps(protocol, indent=1) + "\n")
    temporary.replace(path)


def protocol_of(config: EvaluateConfig, split: Split, dataset: dict[str, Any]) -> dict[str, str]:
    """What every number depends on, for people."""
    sha256 = file_sha256(Path(config.data) / "dataset.json")
    spec = ", ".join(f"{name} {value}" for name, value in asdict(split.spec).items() if value)
    return {
        "data": f"{config.data} (dataset.json of SHA-256 {sha256[:12]})",
        "split": f"{spec}; {config.part} events are asked for",
        "ties in time": str(dataset.get("rules", {}).get("tie_order", "source")),
        "candidates": f"the domain's full catalogue; beside it {config.num_candidates}, the target and others, drawn "
        "uniformly or by popularity and frozen",
        "seen items": ("left out" if config.exclude_seen else "may be recommended again")
        + " in the main table; the other way, from the same scores, beside it",
        "language models": f"{_MODES[config.mode].format(config=config)}; candidates by exact log-likelihood; items "
        "of one title share its probability"
        + {"sum": "", "mean": "; scores are means over tokens", "corrected": "; scores corrected for popularity"}[
            config.score
        ],
        "ties in score": "expected value over all orders",
        "statistics": "95 % bootstrap intervals over users; differences are paired, with sign-flip permutation tests, "
        "corrected by Holm within a domain; no claim under 1,000 queries",
        "queries": f"at most {config.max_queries:,} a domain, sampled" if config.max_queries else "all",
        **({"warning": FLATTERED} if config.part == "validation" else {}),
        **({"baselines": f"settings found by tuning ({config.tuned}) where it has some"} if config.tuned else {}),
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
    """The share of the exact top K, seen items aside, that an arm's lists hold, on a sample of queries."""
    import numpy as np

    from cprec.progress import say

    size = min(SAMPLE, len(questions.queries))
    chosen = np.sort(np.random.default_rng(config.seed).permutation(len(questions.queries))[:size])
    say(f"{questions.domain}: {entrant.name}, exact lists of {size} queries to compare with")
    exact = entrant.modes["exact"].rank([questions.queries[number] for number in chosen], config.k)
    lists: dict[str, set[str]] = {}
    for query, item in zip(rankings["query_id"].to_pylist(), rankings["item_id"].to_pylist(), strict=True):
        lists.setdefault(query, set()).add(item)
    best = [set(r.item_ids) - questions.queries[number].uncounted for number, r in zip(chosen, exact, strict=True)]
    shares = [len(lists.get(r.query_id, set()) & mine) / len(mine) for r, mine in zip(exact, best, strict=True) if mine]
    return {"share": float(np.mean(shares)) if shares else 1.0, "num_queries": size}


def rankings_path(config: EvaluateConfig, domain: str, arm: str, protocol: str) -> Path:
    """Where an arm's rankings of a domain are saved."""
    return Path(config.output_dir) / domain / f"{_slug(arm)}.{protocol}.parquet"


def _slug(arm: str) -> str:
    return re.sub("[^a-z0-9]+", "-", arm.lower()).strip("-")


def _cost(rankings: pa.Table) -> dict[str, float]:
    cost: dict[str, float] = json.loads((rankings.schema.metadata or {}).get(b"cost", b"{}"))
    return cost


def _rankings(config: EvaluateConfig, entrant: Entrant, questions: Questions, protocol: str) -> tuple[Any, float]:
    """The rankings of an arm, saved or made now, and the seconds that they took to make."""
    from cprec.evaluate.questions import FULL, GENERATED
    from cprec.evaluate.saved import write_saved
    from cprec.progress import say, track

    queries = questions.of(protocol)
    recommender = entrant.modes[GENERATED] if protocol == GENERATED else entrant.recommender
    names = ("k", "max_queries", "seed", "num_candidates", "mode", "beam_width", "max_nodes", "score")
    asked: dict[str, Any] = {name: getattr(config, name) for name in names}
    asked |= {"questions": questions.sha256, "identity": entrant.identity}
    if entrant.scores:
        asked["scores"] = entrant.scores
    asked["data"] = file_sha256(Path(config.data) / "dataset.json")  # what baselines learn from
    path = rankings_path(config, questions.domain, entrant.name, protocol)
    saved = _saved(path) if path.is_file() else None
    if saved is not None:
        answered = json.loads(saved.schema.metadata[b"answers"])
        if entrant.identity is None:
            asked["identity"] = answered["identity"]
        if answered == json.loads(json.dumps(asked)):
            say(f"{path}: answers the same questions, reused")
            return saved, float(saved.schema.metadata[b"seconds"])
    entrant.open()
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
    table = as_table(rankings, questions, protocol)
    about = {
        "answers": json.dumps(asked, sort_keys=True),
        "seconds": repr(seconds),
        "cost": json.dumps(dict(entrant.cost())),
        "trained_on": " ".join(entrant.trained_on),
    }
    if protocol == FULL and config.mode == "beam" and "exact" in entrant.modes:
        about["found_of_exact"] = json.dumps(_found_of_exact(config, entrant, questions, table))
    table = table.replace_schema_metadata(about)
    write_saved(table, path)
    return table, seconds


def saved_model(config: EvaluateConfig, domain: str, arm: str) -> tuple[str, ...] | None:
    """The shards that a model was trained on, as its saved rankings say; None where there are none."""
    path = rankings_path(config, domain, arm, "full")
    saved = _saved(path) if path.is_file() else None
    return tuple(saved.schema.metadata.get(b"trained_on", b"").decode().split()) if saved is not None else None


def _saved(path: Path) -> pa.Table | None:
    """Saved rankings, with what they answer; None where the file is damaged or of something else."""
    from cprec.evaluate.saved import read_saved
    from cprec.progress import say

    try:
        table = read_saved(path, "its rankings are not used")
    except DataError as error:
        say(str(error))
        return None
    return table if {b"answers", b"seconds"} <= set(table.schema.metadata or {}) else None


def as_table(rankings: Sequence[Ranking], questions: Questions, protocol: str) -> pa.Table:
    """Rankings as they are saved: one row for each listed item, best first; `seen` says whether the history has it."""
    import numpy as np
    import pyarrow as pa

    from cprec.evaluate.questions import FULL

    lengths = np.array([len(ranking.item_ids) for ranking in rankings], dtype=np.int64)
    users = dict(zip((query.query_id for query in questions.queries), questions.user, strict=True))

    def repeated(values: Sequence[Any], kind: Any) -> pa.Array:
        return pa.array(values, kind).take(pa.array(np.repeat(np.arange(len(lengths)), lengths)))

    columns = {
        "query_id": repeated([ranking.query_id for ranking in rankings], pa.string()),
        "user_id": repeated([users[ranking.query_id] for ranking in rankings], pa.string()),
        "domain": repeated([questions.domain] * len(rankings), pa.string()),
        "rank": pa.array([rank for n in lengths.tolist() for rank in range(1, n + 1)], pa.int32()),
        "item_id": pa.array([item for ranking in rankings for item in ranking.item_ids], pa.string()),
        "score": pa.array([score for ranking in rankings for score in ranking.scores], pa.float64()),
    }
    if protocol == FULL:
        pairs = zip(rankings, questions.queries, strict=True)
        columns["seen"] = pa.array([i in query.uncounted for r, query in pairs for i in r.item_ids], pa.bool_())
    if any(ranking.certificate is not None for ranking in rankings):
        proofs = [ranking.certificate for ranking in rankings]
        columns["gap"] = repeated([p.gap if p else None for p in proofs], pa.float64())
        columns["expanded"] = repeated([p.expanded if p else None for p in proofs], pa.int32())
    return pa.table(columns)
