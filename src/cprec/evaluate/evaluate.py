"""Stage: queries -> saved rankings -> metrics of every query -> means with intervals."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cprec.data.dataset import read_manifest
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.evaluate.asking import Entrant, saved_rankings
from cprec.evaluate.config import EvaluateConfig
from cprec.evaluate.coverage import check_certificate
from cprec.evaluate.questions import Questions, read_questions
from cprec.evaluate.rankings import slug
from cprec.evaluate.results import FULL, FULL_WITH_SEEN, GENERATED, DomainResult, Metric, Pool
from cprec.evaluate.saved import write_saved
from cprec.evaluate.tables import Judge, Judged, Lists, paired
from cprec.files import write_whole
from cprec.progress import say
from cprec.provenance import FileHashes, file_sha256

REFIT = (
    "validation events too, by baselines, item heads and parts of blends, after everything was chosen without them; "
    "language models have not read them"
)
"""What is learnt with the setting `refit`."""

# ---- stage -----------------------------------------------------------------------------------------------------------


def evaluate(config: EvaluateConfig, split: Split, domain: str, entrants: Sequence[Entrant]) -> DomainResult:
    """Rank the queries of a domain with every entrant; returns the domain's part of the report.

    Rankings go to `DOMAIN/ARM.PROTOCOL.parquet`, queries with their slices to `DOMAIN/queries.parquet`, metrics of each
    query to `DOMAIN/metrics.parquet`, and what they depend on to `DOMAIN/protocol.json`; every mean is made from these.
    An arm whose saved rankings answer the same questions is not run again.

    Raises LeakageError if the certificate is missing, not clean, or does not cover the events, the queries or an
    entrant's shards, and ConfigError where no entrant can rank.
    """
    _check_names(entrants)
    hashes = FileHashes(config.output_dir)
    models = {entrant.name: entrant.trained_on for entrant in entrants if entrant.kind == "model"}
    certified = check_certificate(config.data, domain, config.part, models, hashes, uncertified=config.uncertified)
    Path(config.output_dir, domain).mkdir(parents=True, exist_ok=True)
    hashes.save()
    sampling = {name: getattr(config, name) for name in ("max_queries", "num_candidates", "seed")}
    questions = read_questions(config.data, split, domain, config.part, **sampling)
    for note in questions.notes:
        say(f"note: {domain}: {note}")
    judge = Judge(
        questions=questions,
        protocols=questions.protocols(generate=config.generate),
        main=Metric("ndcg", config.k, FULL if config.exclude_seen else FULL_WITH_SEEN),
        lists=Lists.of(split, domain),
        seed=config.seed,
    )
    judged = _judge_all(config, judge, entrants)
    _publish(config, split, judge, judged, certified)
    return DomainResult(
        domain=domain,
        num_items=questions.num_items,
        num_queries=len(questions.queries),
        certified=certified,
        main=judge.main,
        pools={
            protocol.name: Pool(len(protocol.queries), protocol.num_items)
            for protocol in judge.protocols
            if protocol.name not in (FULL, GENERATED)
        },
        arms={one.arm.name: one.arm for one in judged},
        differences=paired(judged, questions.user, judge.main, judge.seed),
        notes=questions.notes,
    )


def _check_names(entrants: Sequence[Entrant]) -> None:
    """Raises ConfigError where two arms have one name, or names that are alike in files."""
    taken: dict[str, str] = {}
    for entrant in entrants:
        if (file := slug(entrant.name)) in taken:
            raise ConfigError(f"two arms are called {taken[file]!r} and {entrant.name!r}: give the model another name")
        taken[file] = entrant.name


def _judge_all(config: EvaluateConfig, judge: Judge, entrants: Sequence[Entrant]) -> list[Judged]:
    """The results of every entrant that suits the data."""
    domain = judge.questions.domain
    asked = {name: getattr(config, name) for name in ("k", "max_queries", "seed", "num_candidates")} | {
        "questions": dict(judge.questions.sha256),
        "data": file_sha256(Path(config.data) / "dataset.json"),  # what baselines learn from
    }
    judged = []
    for entrant in entrants:
        writes = entrant.kind == "model" or entrant.writes
        protocols = [protocol for protocol in judge.protocols if writes or not protocol.written]
        try:
            rankings = saved_rankings(entrant, protocols, asked, config.output_dir, domain, config.num_processes)
        except Unsuitable as error:
            say(f"{domain}: {entrant.name} is left out: {error}")
            continue
        judged.append(judge.results_of(entrant.name, entrant.kind, rankings, stochastic=entrant.stochastic))
    if not judged:
        raise ConfigError(f"{domain}: nothing is left to rank with: name a baseline that suits the data, or a model")
    return judged


def _publish(config: EvaluateConfig, split: Split, judge: Judge, judged: Sequence[Judged], certified: bool) -> None:
    """Write the queries, the metrics of each, and what they depend on."""
    folder = Path(config.output_dir) / judge.questions.domain
    protocol = folder / "protocol.json"
    protocol.unlink(missing_ok=True)  # written last, it never stands beside metrics of other questions
    write_saved(judge.questions.table(), folder / "queries.parquet")
    write_saved(judge.table(judged), folder / "metrics.parquet")
    write_whole(protocol, json.dumps(_settings(config, split, judge.questions, certified), indent=1) + "\n")


# ---- what numbers depend on ------------------------------------------------------------------------------------------


def _settings(config: EvaluateConfig, split: Split, questions: Questions, certified: bool) -> dict[str, Any]:
    """What the numbers of a domain depend on, for programs: `cprec compare` refuses what differs in any of it."""
    items = "\n".join(map(str, split.catalogue.item_id[split.catalogue.rows_of(questions.domain)]))
    return {
        "domain": questions.domain,
        "split": _split_in_words(split),
        "tie_order": _tie_order(config.data),
        "part": config.part,
        "num_queries": len(questions.queries),
        **{f"{name}_sha256": value for name, value in questions.sha256.items()},
        "num_candidates": config.num_candidates,
        "seen": "left out" if config.exclude_seen else "may be recommended",
        "catalogue_sha256": hashlib.sha256(items.encode()).hexdigest(),
        "num_items": questions.num_items,
        "k": config.k,
        "certificate": "clean" if certified else "uncertified",
        **({"learnt": REFIT} if config.refit else {}),
    }


def protocol_of(config: EvaluateConfig, split: Split, language_models: str) -> dict[str, str]:
    """What every number depends on, for people; `language_models` says how these rank."""
    sha256 = file_sha256(Path(config.data) / "dataset.json")
    lines = {
        "data": f"{config.data} (dataset.json of SHA-256 {sha256[:12]})",
        "split": f"{_split_in_words(split)}; {config.part} events are asked for",
        "ties in time": _tie_order(config.data),
        "candidates": f"the domain's full catalogue; beside it {config.num_candidates}, the target and others, drawn "
        "uniformly or by popularity and frozen",
        "seen items": ("left out" if config.exclude_seen else "may be recommended again")
        + " in the main table; the other way, from the same scores, beside it",
        "language models": language_models,
        "ties in score": "expected value over all orders",
        "statistics": "95 % bootstrap intervals over users; differences are paired, with sign-flip permutation tests, "
        "corrected by Holm within a domain; no claim under 1,000 queries; all hold for these trained models on other "
        "users, and the luck of training is not in them",
        "queries": f"at most {config.max_queries:,} a domain, sampled" if config.max_queries else "all",
    }
    if config.part == "validation":
        lines["warning"] = (
            "validation events chose the weights of trained baselines, and tuned settings, and so flatter them"
        )
    if config.refit:
        lines["learnt"] = REFIT
    found = [f"settings found by tuning ({config.tuned}) where it has some"] if config.tuned else []
    given = [
        f"{name} with {', '.join(f'{setting}={value}' for setting, value in settings.items())}"
        for name, settings in config.settings.items()
    ]
    if found or given:
        lines["baselines"] = "; ".join([*found, *given])
    return lines


def _split_in_words(split: Split) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(split.spec).items() if value)


def _tie_order(data: str) -> str:
    return str(read_manifest(data).get("rules", {}).get("tie_order", "source"))
