"""From scores over a domain to rankings, for baselines that score every item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.recommender import Ranking, RankingQuery


def rankings_of_scores(
    catalogue: Catalogue, queries: Sequence[RankingQuery], scores: Sequence[np.ndarray], k: int
) -> list[Ranking]:
    """One ranking per query from its scores over the items of its domain, in catalogue order.

    Items scored minus infinity are not returned. Ties with the K-th item are kept; equal scores stand by item id.
    """
    out = []
    for query, row in zip(queries, scores, strict=True):
        rows = catalogue.rows_of(query.domain)
        first = int(rows[0])
        row = row.astype(float, copy=True)
        if query.exclude:
            row[catalogue.find(query.domain, sorted(query.exclude)) - first] = -np.inf
        if query.allow is not None:
            allowed = np.zeros(len(row), dtype=bool)
            allowed[catalogue.find(query.domain, sorted(query.allow)) - first] = True
            row[~allowed] = -np.inf
        if query.candidates is not None:
            chosen = catalogue.find(query.domain, query.candidates) - first
            order = chosen[np.lexsort((chosen, -row[chosen]))]
            order = order[row[order] > -np.inf]
        else:
            size = min(k, len(row))
            bound = np.partition(row, len(row) - size)[len(row) - size]
            kept = np.flatnonzero((row >= bound) & (row > -np.inf))
            order = kept[np.lexsort((kept, -row[kept]))]
        ids = catalogue.item_id[first + order]
        out.append(Ranking(query.query_id, tuple(map(str, ids)), tuple(row[order].tolist())))
    return out
