"""Rankings from scores: a batch is scored once, however often it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.scoring import ScoringRecommender

IDS = np.array(["a", "b", "c"], dtype=object)


class Counted(ScoringRecommender):
    """Scores by how often an item is in the history, and counts how many queries it scored."""

    name = "counted"

    def __init__(self) -> None:
        text = np.array([""] * 3, dtype=object)
        self.catalogue, self.num_scored = Catalogue(("d",), np.zeros(3, dtype=np.int16), IDS, IDS, text, text), 0

    def scores(self, domain: str, queries: Sequence[RankingQuery]) -> np.ndarray:
        self.num_scored += len(queries)
        return np.array([[sum(item.item_id == each for item in query.history) for each in IDS] for query in queries])


def test_other_protocols_ask_for_the_same_scores_again() -> None:
    recommender = Counted()
    queries = [RankingQuery(str(n), "d", tuple(Item("d", each) for each in "abb"[n:])) for n in range(3)]
    first = recommender.rank(queries, 1)
    assert [ranking.item_ids for ranking in first] == [("b",), ("b",), ("b",)] and recommender.num_scored == 3
    recommender.rank([replace(query, candidates=("a", "c")) for query in queries], 1)
    some = recommender.rank([replace(queries[0], exclude=frozenset("b"))], 1)
    assert some[0].item_ids == ("a",) and recommender.num_scored == 3
    for changed in ({"history": ()}, {"user": "p/u"}, {"query_id": "other"}, {"text": "red"}):
        before = recommender.num_scored
        recommender.rank([replace(queries[0], **changed)], 1)
        assert recommender.num_scored == before + 1
