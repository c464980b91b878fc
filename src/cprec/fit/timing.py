"""How long ranking takes here with the model that is there: timed, since a search depends on what the model knows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cprec.data.dataset import read_split
from cprec.evaluate.config import EvaluateConfig
from cprec.rank.blend_file import BLEND
from cprec.rank.config import BlendConfig
from cprec.rank.llm import LLMRecommender
from cprec.recommender import RankingQuery
from cprec.tune import validation_queries

TIMED = 64
"""Queries at most that are ranked to time it."""
SHARE = 0.1
"""Of the time for the work, what may go into timing it."""

Clock = Callable[[], float]


def seconds_each(
    work: Callable[[Sequence[RankingQuery]], object],
    queries: Sequence[RankingQuery],
    seconds: float,
    clock: Clock = time.perf_counter,
) -> float:
    """Seconds that `work` takes for a query, of more and more of them until four times as many would take too long.

    Few together take longer each than many, so the guess errs on the side of the clock.
    """
    count, start = 1, clock()
    while True:
        before = clock()
        work(queries[:count])
        now = clock()
        if count >= len(queries) or now - start + 4 * (now - before) > SHARE * seconds:
            return (now - before) / min(count, len(queries))
        count *= 4


def seconds_to_blend(config: BlendConfig, data: str, domain: str, seconds: float) -> float:
    """Seconds that `cprec blend` takes for a query: what competes for its list, scored, and then two lists."""
    model = LLMRecommender.from_pretrained(config.model, blend=False, max_nodes=config.max_nodes)
    queries, items = _asked(model, data, domain, config.seed)
    competing = items[: (1 + len(config.parts)) * config.pool]

    def work(queries: Sequence[RankingQuery]) -> None:
        model.rank(queries, config.pool)
        model.rank([replace(query, candidates=competing) for query in queries], 10)
        model.rank([query for query in queries for _ in ("the blend", "the model alone")], 10)

    return seconds_each(work, queries, seconds)


def seconds_to_try(config: EvaluateConfig, folder: str, domain: str, seconds: float) -> float:
    """Seconds that `cprec evaluate` takes for a query with the model of a folder and, where there is one, its blend."""
    ways = {False, Path(folder, BLEND).is_file()}
    models = [
        LLMRecommender.from_pretrained(folder, blend=blend, max_nodes=config.rank.max_nodes) for blend in sorted(ways)
    ]
    queries, items = _asked(models[0], config.data, domain, config.seed)

    def work(queries: Sequence[RankingQuery]) -> None:
        for model in models:
            model.rank(queries, config.k)
            for _ in ("drawn uniformly", "by popularity"):
                model.rank([replace(query, candidates=items[: config.num_candidates]) for query in queries], config.k)

    return seconds_each(work, queries, seconds)


def _asked(model: LLMRecommender, data: str, domain: str, seed: int) -> tuple[Sequence[RankingQuery], tuple[str, ...]]:
    """Validation queries, and the domain's items in a random order. The titles are read before anything is timed."""
    model.trie(domain)
    queries, _ = validation_queries(read_split(data), domain, TIMED, seed)
    items = np.random.default_rng(seed).permutation(model.catalogue.item_id[model.catalogue.rows_of(domain)])
    return queries, tuple(map(str, items))
