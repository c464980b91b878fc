"""Re-rank the lists of a recommender by features of users and items, with LambdaMART of LightGBM.

    pip install lightgbm
    cprec prepare demo
    python examples/rerank_with_features.py runs/demo/data kitchen [ROW]

ROW, one of the baselines ("transition graph (titles)" if none is named), learns from training events and lists 50 items
for each validation and each test query. The ranker learns from the validation lists which item was the one, and puts
the test lists into a new order. No validation event has a part in the row, neither in its training nor in the choice of
its weights. Otherwise its scores would give away the answers in the lists to learn from, and in these alone.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import lightgbm
import numpy as np

from cprec.data.dataset import read_split
from cprec.data.queries import ranking_queries
from cprec.data.splits import Split
from cprec.evaluate.statistics import compare_pair
from cprec.lineup import settings_of
from cprec.ranks import count_rankings, ndcg
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import TEST, VALIDATION

FEATURES = ["score", "place", "popularity", "idle_days", "same_brand", "same_category", "category_follows"]
LENGTH, DAY = 50, 86_400_000_000
PARAMETERS = {"objective": "lambdarank", "learning_rate": 0.05, "num_leaves": 15, "verbosity": -1}


class Features:
    """Features of the items of a list, by the training events of a domain and the history that the query shows."""

    def __init__(self, split: Split, domain: str) -> None:
        self.catalogue, self.domain, log = split.catalogue, domain, split.train
        events = np.flatnonzero(self.catalogue.domain[log.item] == self.catalogue.domain_index(domain))
        user, item, day = log.user[events], log.item[events], log.time[events] / DAY
        self.popularity = np.bincount(item, minlength=len(self.catalogue))
        latest = np.full(len(self.catalogue), -np.inf)
        np.maximum.at(latest, item, day)
        self.idle_days = day.max() - latest
        texts = [column.astype(str) for column in (self.catalogue.brand, self.catalogue.categories)]
        self.kinds = [np.where(text == "", -1, np.unique(text, return_inverse=True)[1]) for text in texts]
        # How often an item of one category came right after one of another; -1, no category, is the last row.
        before, after = (self.kinds[1][items] for items in (item[:-1], item[1:]))
        self.follows = np.zeros((self.kinds[1].max() + 2,) * 2)
        np.add.at(self.follows, (before, after), user[:-1] == user[1:])
        self.follows /= self.follows.sum(1, keepdims=True).clip(min=1)

    def of(self, query: RankingQuery, ranking: Ranking) -> np.ndarray:
        """float64[items, features]."""
        items = self.catalogue.find(self.domain, ranking.item_ids)
        past = self.catalogue.find(self.domain, [event.item_id for event in query.history])
        same = [((kind[items][:, None] == kind[past]) & (kind[past] >= 0)).mean(1) for kind in self.kinds]
        follows = self.follows[self.kinds[1][past[-1]], self.kinds[1][items]]
        known = (np.arange(len(items)), self.popularity[items], self.idle_days[items])
        return np.column_stack([ranking.scores, *known, *same, follows]).reshape(-1, len(FEATURES))


def reranked(ranking: Ranking, scores: np.ndarray) -> Ranking:
    """The items of a list by other scores."""
    order = np.argsort(-scores, kind="stable")
    return Ranking(ranking.query_id, tuple(ranking.item_ids[place] for place in order), tuple(scores[order].tolist()))


folder, domain, row = (*sys.argv[1:], "transition graph (titles)")[:3]
split = read_split(folder)
recommender = settings_of(row).make(replace(split, validates=False), domain)
features, lists = Features(split, domain), {}
for part in (VALIDATION, TEST):
    queries, targets = ranking_queries(split, split.queries(domain, part, max_history=50))
    lists[part] = list(zip(queries, recommender.rank(queries, LENGTH), targets, strict=True))

learnt = [each for each in lists[VALIDATION] if each[2] in each[1].item_ids]  # the others say nothing
table = np.concatenate([features.of(query, ranking) for query, ranking, _ in learnt])
is_target = np.concatenate([np.array(ranking.item_ids) == target for _, ranking, target in learnt])
sizes = [len(ranking.item_ids) for _, ranking, _ in learnt]
ranker = lightgbm.train(PARAMETERS, lightgbm.Dataset(table, is_target, group=sizes, feature_name=FEATURES))

queries, before, targets = zip(*lists[TEST], strict=True)
after = [reranked(ranking, ranker.predict(features.of(query, ranking))) for query, ranking, _ in lists[TEST]]
first, second = (ndcg(*count_rankings(rankings, targets), 10) for rankings in (before, after))
gain = compare_pair(second, first, groups=[query.user for query in queries])
print(f"{row}: {len(learnt):,} lists to learn from, {len(queries):,} to judge by")
print(f"NDCG@10 {first.mean():.4f} before, {second.mean():.4f} after")
print(f"difference {gain.mean:+.4f}, 95 % interval {gain.low:+.4f} to {gain.high:+.4f}")
