"""Rankings of a batch from its scores are those that a plain rule gives each query alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cprec import scoring
from cprec.data.catalogue import Catalogue
from cprec.errors import CPRecError
from cprec.recommender import Ranking, RankingQuery
from cprec.scoring import rankings_of

NUM_ITEMS = 40
IDS = np.array([f"i{number:02}" for number in range(NUM_ITEMS)], dtype=object)
TEXT = np.array(["text"] * (NUM_ITEMS + 1), dtype=object)
CATALOGUE = Catalogue(
    ("b", "c"),
    np.array([0] + [1] * NUM_ITEMS, dtype=np.int16),  # the domain is not the first of the catalogue
    np.concatenate([IDS[:1], IDS]),
    *[TEXT] * 3,
)


def plainly(query: RankingQuery, score_of: dict[str, float], k: int, floor: float) -> Ranking:
    """By the words of `Recommender.rank` and `ScoringRecommender.floor`, an item at a time."""
    permitted = {
        item for item in score_of if item not in query.exclude and (query.allow is None or item in query.allow)
    }
    if query.candidates is not None:
        kept = {item: max(score_of[item], floor) for item in query.candidates if item in permitted}
    else:
        above = {item: score for item, score in score_of.items() if item in permitted and score > floor}
        counted = sorted((score for item, score in above.items() if item not in query.uncounted), reverse=True)
        kth = counted[k - 1] if len(counted) >= k else -math.inf
        kept = {item: score for item, score in above.items() if score >= kth}
    pairs = sorted((-score, item) for item, score in kept.items() if score > -math.inf)
    return Ranking(query.query_id, tuple(item for _, item in pairs), tuple(-score for score, _ in pairs))


def batch_of(random: np.random.Generator) -> tuple[list[RankingQuery], np.ndarray]:
    """Queries and their scores, which are mostly equal or mostly different; some items cannot be had."""

    def some(most: int) -> list[str]:
        chosen: list[str] = random.choice(IDS, random.integers(0, most + 1), replace=False).tolist()
        return chosen

    shared = frozenset(some(NUM_ITEMS))  # many queries allow the same
    queries = [
        RankingQuery(
            query_id=f"q{number}",
            domain="c",
            history=(),
            candidates=tuple(some(NUM_ITEMS)) if random.random() < 0.3 else None,
            exclude=frozenset(some(random.choice([0, 8]))),
            allow=[None, None, shared, frozenset(some(NUM_ITEMS))][random.integers(4)],
            uncounted=frozenset(some(random.choice([0, 8]))),
        )
        for number in range(random.integers(1, 7))
    ]
    spread = random.choice([1, 3, 1000])
    scores_QN = random.integers(-spread, spread + 1, (len(queries), NUM_ITEMS)) / 4
    scores_QN[random.random(scores_QN.shape) < random.choice([0, 0.2, 0.9])] = -np.inf
    return queries, scores_QN.astype(random.choice([np.float32, np.float64]), order=random.choice(["C", "F"]))


@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, NUM_ITEMS + 5),
    floor=st.sampled_from([-math.inf, -0.25, 0.0, 0.5]),
    cells=st.sampled_from([1, 2 * NUM_ITEMS, 10**6]),
)
def test_a_batch_ranks_as_a_plain_rule_does(seed: int, k: int, floor: float, cells: int) -> None:
    queries, scores_QN = batch_of(np.random.default_rng(seed))
    before = scores_QN.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "CELLS", cells)
        found = rankings_of(CATALOGUE, queries, scores_QN, k, floor)
    assert np.array_equal(scores_QN, before), "scores are kept for other protocols"
    for query, score_N, ranking in zip(queries, scores_QN.tolist(), found, strict=True):
        assert ranking == plainly(query, dict(zip(IDS, score_N, strict=True)), k, floor)


def test_a_score_that_is_nan_is_refused_and_told() -> None:
    scores_QN = np.zeros((2, NUM_ITEMS))
    scores_QN[1, 7] = np.nan
    queries = [RankingQuery(f"q{number}", "c", ()) for number in range(2)]
    with pytest.raises(CPRecError, match="query 'q1' got a score that is NaN"):
        rankings_of(CATALOGUE, queries, scores_QN, 3)
    without = [RankingQuery(f"q{number}", "c", (), exclude=frozenset({"i07"})) for number in range(2)]
    assert [len(ranking.item_ids) for ranking in rankings_of(CATALOGUE, without, scores_QN, 3)] == [39, 39]
