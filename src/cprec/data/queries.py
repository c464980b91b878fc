"""The held-out events of a split as queries for recommenders."""

from __future__ import annotations

import numpy as np

from cprec.data.splits import Queries, Split
from cprec.recommender import RankingQuery
from cprec.schema import Item


def sampled_rows(num_rows: int, most: int, seed: int) -> np.ndarray:
    """A seeded sample of at most `most` row numbers, ascending; 0 takes all: int64[rows]."""
    return np.sort(np.random.default_rng(seed).permutation(num_rows)[: most or None])


def ranking_queries(
    split: Split, asked: Queries, rows: np.ndarray | None = None
) -> tuple[list[RankingQuery], list[str]]:
    """Queries over the full catalogue, with the items of the history in the domain excluded, and their targets: of some
    rows of `asked`, or of all."""
    catalogue, log = split.catalogue, split.interactions
    rows = np.arange(len(asked)) if rows is None else rows
    queries = []
    for row in rows.tolist():
        events = asked.history[row]
        history = tuple(
            Item(catalogue.domains[catalogue.domain[item]], str(catalogue.item_id[item])) for item in events
        )
        user = asked.user[row]
        queries.append(
            RankingQuery(
                query_id=str(asked.query_id[row]),
                domain=asked.domain,
                history=history,
                exclude=frozenset(item.item_id for item in history if item.domain == asked.domain),
                user=f"{log.platforms[log.user_platform[user]]}/{log.user_id[user]}",
            )
        )
    return queries, [str(item) for item in catalogue.item_id[asked.target[rows]]]
