"""A walk on the graph of item transitions: no training, no text, and hard to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from cprec.baselines.ranking import ScoringRecommender
from cprec.data.splits import Split
from cprec.recommender import RankingQuery


class TransitionGraphRecommender(ScoringRecommender):
    """Scores an item by its links to the last events of the history.

        score(j) = sum over the last 20 events i of 0.7 ** age(i) * w(i, j) / sqrt(pop(i) * pop(j))

    age is 0 for the last event. w(i, j) adds 1 / distance for each time that j follows i within 5 events of a user in
    one domain in the training part, and half of it for each time that j precedes i; pop counts an item's training
    events. Constants were set once and not tuned. Only items with a link are returned from the full catalogue; among
    candidates the others tie at 0.
    """

    name = "transition graph"
    floor = 0.0
    window, decay, last_events, backward = 5, 0.7, 20, 0.5

    def __init__(self, split: Split) -> None:
        self.catalogue = split.catalogue
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

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        """See `ScoringRecommender.scores`."""
        history = self.histories(domain, queries)
        ages = np.repeat(history.offsets[1:], history.lengths) - 1 - np.arange(len(history.values))
        recent = ages < self.last_events
        mine = self.catalogue.rows_of(domain)
        walk = sparse.csr_array(
            (self.decay ** ages[recent], (history.row_of[recent], mine[0] + history.values[recent])),
            (len(queries), len(self.catalogue)),
        )
        scores: np.ndarray = sparse.csr_array(walk @ self._graph).toarray()[:, mine]
        return scores
