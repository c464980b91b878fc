from __future__ import annotations

import numpy as np

from cprec.baselines.random import RandomRecommender
from cprec.data.catalogue import Catalogue
from cprec.recommender import RankingQuery

IDS = np.array([f"i{number}" for number in range(10)], dtype=object)
BLANK = np.array([""] * 10, dtype=object)
CATALOGUE = Catalogue(("a",), np.zeros(10, dtype=np.int16), IDS, IDS, BLANK, BLANK)


def first_items(seed: int, number: int) -> list[str]:
    queries = [RankingQuery(f"q{name}", "a", ()) for name in range(number)]
    return [ranking.item_ids[0] for ranking in RandomRecommender(CATALOGUE, seed).rank(queries, 1)]


def test_every_item_is_first_equally_often() -> None:
    _, counts = np.unique(first_items(0, 3000), return_counts=True)
    assert len(counts) == 10 and (np.abs(counts - 300) < 5 * np.sqrt(300)).all()


def test_seeds_and_queries_differ() -> None:
    assert first_items(0, 50) == first_items(0, 50) != first_items(1, 50)
