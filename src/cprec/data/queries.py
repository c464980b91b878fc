"""The held-out events of a split as queries for recommenders."""

from __future__ import annotations

import numpy as np

from cprec.data.splits import Queries, Split
from cprec.recommender import RankingQuery
from cprec.schema import Item


def ranking_queries(
    split: Split, asked: Queries, *, most: int = 0, seed: int = 0
) -> tuple[list[RankingQuery], list[str]]:
    """Queries over the full catalogue, with the items of the history in the domain excluded, and their targets.

    With `most` above 0 they are a seeded sample of at most as many, in the order of `asked`.
    """
    catalogue, log = split.catalogue, split.interactions
    rows = np.arange(len(asked))
    if 0 < most < len(asked):
        rows = np.sort(np.random.default_rng(seed).permutation(len(asked))[:most])
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
