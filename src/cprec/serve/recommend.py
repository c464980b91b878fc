"""Stage: histories in (command line or file), titles with scores out."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cprec.errors import ConfigError

if TYPE_CHECKING:
    from cprec.serve.engine import Baseline
    from cprec.serve.lists import Recommends

SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class RecommendConfig:
    """Settings of recommendation."""

    model: str
    """Model folder that `cprec pretrain` or `cprec finetune` wrote."""
    history: tuple[str, ...] = ()
    """One history, oldest event first: item ids or titles."""
    domain: str | None = None
    """Domain to recommend from; by default the one the model was fine-tuned for."""
    k: int = 10
    """Items to recommend."""
    input: str | None = None
    """File of histories: CSV (columns user_id and history, events separated by |), JSONL or Parquet (a list). Of a
    user with fewer items left than `k` the list is shorter; one whose history says nothing gets the popular items."""
    output: str | None = None
    """File to write for `input`, CSV, JSONL or Parquet by its name: user_id, rank, item_id, title, score, and source,
    which is model or popularity."""
    exclude_seen: bool = True
    """Leave out the items of the history."""
    strict: bool = False
    """Stop at the first row or event that cannot be used. By default these are left out, counted, and listed in
    OUTPUT.rejected.csv."""

    def __post_init__(self) -> None:
        if bool(self.history) == bool(self.input):
            raise ConfigError("give either --history with ids or titles, oldest first, or --input FILE with many")
        if self.input and not self.output:
            raise ConfigError("--input needs --output FILE (.csv, .jsonl or .parquet)")
        if self.k < 1:
            raise ConfigError(f"k={self.k} must be at least 1")
        for name in ("input", "output"):
            path = getattr(self, name)
            if path and Path(path).suffix not in SUFFIXES:
                raise ConfigError(f"{name}={path!r}: only .csv, .jsonl and .parquet files are known")


def recommend(config: RecommendConfig, recommender: Recommends, popular: Baseline | None = None) -> None:
    """Print recommendations for one history, or write those for a file of histories.

    `popular` answers for histories of which the model reads no event.
    """
    if config.history:
        _show(config, recommender, sys.stdout)
        return
    from cprec.serve.lists import answer_file

    answer_file(config, recommender, popular)


def _show(config: RecommendConfig, recommender: Recommends, out: TextIO) -> None:
    from rich.console import Console
    from rich.table import Table

    try:
        found = recommender.recommend(config.history, config.k, domain=config.domain, exclude_seen=config.exclude_seen)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    table = Table(box=None)
    for name, justify in (("rank", "right"), ("title", "left"), ("item", "left"), ("log-probability", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for rank, item in enumerate(found, 1):
        table.add_row(str(rank), item.title, item.item_id, f"{item.score:.2f}")
    Console(file=out).print(table)
