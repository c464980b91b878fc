"""Stage: histories in (command line or file), titles with scores out."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from cprec.errors import ConfigError
from cprec.serve.config import RecommendConfig

if TYPE_CHECKING:
    from cprec.serve.engine import Baseline
    from cprec.serve.lists import Recommends


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
