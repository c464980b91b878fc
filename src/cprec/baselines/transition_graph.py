"""A walk on the graph of item transitions: no training, no text, and hard to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from cprec.baselines.ranking import rankings_of_scores
from cprec.data.splits import Split
from cprec.recommender import Ranking, RankingQuery


class TransitionGraphRecommender:
    """Scores an item by its links to the last events of the history.

        score(j) = sum over the last 20 events i of 0.7 ** age(i) * w(i, j) / sqrt(pop(i) * pop(j))

    age is 0 for the last event. w(i, j) adds 1 / distance for each time that j follows i within 5 events of a user in
    one domain in the training part, and half of it for each time that j precedes i; pop counts an item's training
    events. Constants were set once and not tuned. Only items with a link are returned from the full catalogue; among
    candidates the others tie at 0.
    """

    name = "transition graph"
    window, decay, last_events, backward = 5, 0.7, 20, 0.5

    def __init__(self, split: Split) -> None:
        self._catalogue = split.catalogue
        log = split.train
        num_items = len(split.catalogue)
        domain = split.catalogue.domain[log.item]
        order = np.lexsort((np.arange(len(log.item)), domain, log.user))  # each user's domains apart, in time order
        user, item, domain = log.user[order], log.item[order], domain[order]
        graph = sparse.csr_array((num_items, num_items))
        for distance in range(1, self.window + 1):
            before, after = slice(None, -distance), slice(distance, None)
            linked = (user[before] == user[after]) & (domain[before] == domain[after])
            start, end = item[before][linked], item[after][linked]
            weight = np.full(len(start), 1 / distance)
            graph += sparse.csr_array((weight, (start, end)), (num_items, num_items))
            graph += sparse.csr_array((self.backward * weight, (end, start)), (num_items, num_items))
        scale = sparse.diags_array(1 / np.sqrt(np.maximum(np.bincount(log.item, minlength=num_items), 1)))
        self._graph = sparse.csr_array(scale @ graph @ scale)

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`."""
        rows, columns, values = [], [], []
        for number, query in enumerate(queries):
            recent = [item for item in query.history if item.domain == query.domain][: -self.last_events - 1 : -1]
            rows += [number] * len(recent)
            columns += self._catalogue.find(query.domain, [item.item_id for item in recent]).tolist()
            values += [self.decay**age for age in range(len(recent))]
        history = sparse.csr_array((values, (rows, columns)), (len(queries), len(self._catalogue)))
        scores = sparse.csr_array(history @ self._graph)
        dense = []
        for number, query in enumerate(queries):
            mine = scores[[number]].toarray()[0][self._catalogue.rows_of(query.domain)]
            dense.append(mine if query.candidates is not None else np.where(mine > 0, mine, -np.inf))
        return rankings_of_scores(self._catalogue, queries, dense, k)
