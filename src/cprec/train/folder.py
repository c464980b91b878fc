"""The folder of a training run: its log, and what the finished model says about itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cprec.provenance import ITEM_HEAD, TOKENIZER, WEIGHTS, FileHashes, model_hashes

DONE, LOG, REFIT = "cprec.json", "log.jsonl", "refit.json"
METRIC = "ndcg@10"
"""The field of the log with what the ranking probe measures, by domain; see `cprec.train.probe`."""


def read_done(folder: Path | str) -> dict[str, Any] | None:
    """The content of a model folder's `cprec.json`, or None where `cprec` did not write the folder."""
    path = Path(folder) / DONE
    return json.loads(path.read_text()) if path.is_file() else None


def refitted_on(folder: Path | str) -> tuple[str, ...]:
    """The held-out parts that what stands beside a model has learnt, as `cprec refit` says; none without it."""
    path = Path(folder) / REFIT
    return tuple(json.loads(path.read_text())["held_out"]) if path.is_file() else ()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a run's log; a last line cut off by a kill is dropped."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def model_identity(folder: str | Path, hashes: FileHashes) -> str:
    """A hash that changes whenever a model folder may rank differently: weights, tokenizer, items, `cprec.json`."""
    found = model_hashes(folder, (*WEIGHTS, *TOKENIZER, *ITEM_HEAD), hashes)
    items = sorted(Path(folder, "items").rglob("*.parquet"))
    found |= {path.relative_to(folder).as_posix(): hashes.of(path) for path in items}
    about = {name: value for name, value in (read_done(folder) or {}).items() if name != "seconds"}
    return hashlib.sha256(json.dumps([found, about], sort_keys=True).encode()).hexdigest()
