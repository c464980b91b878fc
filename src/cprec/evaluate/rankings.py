"""Saved rankings: `DOMAIN/ARM.PROTOCOL.parquet`, one row for each listed item, with what they answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cprec.errors import DataError
from cprec.evaluate.questions import Protocol
from cprec.evaluate.results import FULL, FoundOfExact
from cprec.evaluate.saved import read_saved, write_saved
from cprec.progress import say
from cprec.recommender import Ranking


@dataclass(frozen=True, kw_only=True)
class SavedRankings:
    """The rankings of an arm under one protocol."""

    table: pa.Table
    """As `table_of` makes it."""
    answers: Mapping[str, Any]
    """What decides whether they are used again: the questions, and under `identity` the recommender."""
    seconds: float
    """What ranking took."""
    cost: Mapping[str, Any] = field(default_factory=dict)
    """num_parameters and train_seconds, where there are any."""
    trained_on: Sequence[str] = ()
    """Hashes of the shards that the model was trained on."""
    found_of_exact: FoundOfExact | None = None


def rankings_path(output_dir: str | Path, domain: str, arm: str, protocol: str) -> Path:
    """Where an arm's rankings of a domain are saved."""
    return Path(output_dir) / domain / f"{slug(arm)}.{protocol}.parquet"


def slug(arm: str) -> str:
    """An arm's name as files have it."""
    return re.sub("[^a-z0-9]+", "-", arm.lower()).strip("-")


def write_rankings(path: Path, rankings: SavedRankings) -> None:
    """Write rankings; the file appears complete or not at all."""
    about = {
        "answers": json.dumps(rankings.answers, sort_keys=True),
        "seconds": repr(rankings.seconds),
        "cost": json.dumps(dict(rankings.cost)),
        "trained_on": " ".join(rankings.trained_on),
    }
    if rankings.found_of_exact:
        about["found_of_exact"] = json.dumps(asdict(rankings.found_of_exact))
    write_saved(rankings.table.replace_schema_metadata(about), path)


def read_rankings(path: Path) -> SavedRankings | None:
    """Saved rankings; None where there are none, or where the file is damaged or of something else."""
    if not path.is_file():
        return None
    try:
        table = read_saved(path, "its rankings are not used")
    except DataError as error:
        say(str(error))
        return None
    about = {name.decode(): text.decode() for name, text in (table.schema.metadata or {}).items()}
    if not {"answers", "seconds"} <= about.keys():
        return None
    answers = json.loads(about["answers"])
    if "mode" in answers:  # in files of earlier versions how models rank stood among the questions
        rank = {name: answers.pop(name) for name in ("mode", "beam_width", "max_nodes", "score")}
        answers["identity"] = {"before": answers["identity"], "rank": rank, "scores": answers.pop("scores", "")}
    if isinstance(answers["identity"], dict) and "rank" in answers["identity"]:
        answers["identity"]["rank"].setdefault("normaliser", "auto")  # earlier versions had one way alone
    found = about.get("found_of_exact")
    return SavedRankings(
        table=table,
        answers=answers,
        seconds=float(about["seconds"]),
        cost=json.loads(about.get("cost", "{}")),
        trained_on=about.get("trained_on", "").split(),
        found_of_exact=FoundOfExact(**json.loads(found)) if found else None,
    )


def table_of(rankings: Sequence[Ranking], protocol: Protocol, domain: str) -> pa.Table:
    """Rankings as they are saved: one row for each listed item, best first.

    Over the full catalogue `seen` says whether the history has the item. `gap` and `expanded` are there where something
    is proven.
    """
    lengths = np.array([len(ranking.item_ids) for ranking in rankings], dtype=np.int64)

    def repeated(values: Sequence[Any], kind: Any) -> pa.Array:
        return pa.array(values, kind).take(pa.array(np.repeat(np.arange(len(lengths)), lengths)))

    columns = {
        "query_id": repeated([ranking.query_id for ranking in rankings], pa.string()),
        "user_id": repeated(protocol.user, pa.string()),
        "domain": repeated([domain] * len(rankings), pa.string()),
        "rank": pa.array(np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1, pa.int32()),
        "item_id": pa.array(list(chain.from_iterable(ranking.item_ids for ranking in rankings)), pa.string()),
        "score": pa.array(np.fromiter(chain.from_iterable(ranking.scores for ranking in rankings), float)),
    }
    if protocol.name == FULL:
        pairs = zip(rankings, protocol.queries, strict=True)
        columns["seen"] = pa.array([i in query.uncounted for r, query in pairs for i in r.item_ids], pa.bool_())
    if any(ranking.proof is not None for ranking in rankings):
        proofs = [ranking.proof for ranking in rankings]
        columns["gap"] = repeated([p.gap if p else None for p in proofs], pa.float64())
        columns["expanded"] = repeated([p.expanded if p else None for p in proofs], pa.int32())
    return pa.table(columns)
