"""Counts by hand, of all times and of the latest."""

from __future__ import annotations

import numpy as np
import pytest

from cprec.baselines.popularity import Popularity, PopularityRecommender, RecentPopularity
from cprec.data.catalogue import Catalogue
from cprec.data.config import SplitSpec
from cprec.data.interactions import Interactions
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.recommender import RankingQuery
from cprec.schema import DomainInfo, Item


def make_split(events: list[tuple[str, int]], *, test: int = 0, has_times: bool = True) -> Split:
    """One user's (item, time) events of domain a, which also has items without an event; the last ones test."""
    ids = np.array(["i0", "i1", "i2", "i3", "i4"], dtype=object)
    blank = np.array([""] * len(ids), dtype=object)
    catalogue = Catalogue(("a", "b"), np.array([0, 0, 0, 0, 1], dtype=np.int16), ids, ids, blank, blank)
    size = len(events)
    log = Interactions(
        platforms=("p",),
        user_platform=np.zeros(1, dtype=np.int16),
        user_id=np.array(["u"], dtype=object),
        user=np.zeros(size, dtype=np.int64),
        item=np.array([int(item[1:]) for item, _ in events]),
        time=np.array([time for _, time in events]),
        rating=np.full(size, np.nan),
    )
    part = np.zeros(size, dtype=np.int8)
    part[size - test :] = 2
    return Split(catalogue, log, part, SplitSpec(), {name: DomainInfo(name, "p", has_times) for name in ("a", "b")})


LOG = [("i0", 0), ("i0", 10), ("i1", 60), ("i2", 90), ("i1", 90), ("i1", 100), ("i3", 101)]
"""Six training events from 0 to 100, and a test event after them."""


def counts(settings: Popularity | RecentPopularity, split: Split) -> list[int]:
    return settings.make(split, "a").scores("a", [RankingQuery("q", "a", ())])[0].astype(int).tolist()


def test_all_training_events_count_alike() -> None:
    assert counts(Popularity(), make_split(LOG, test=1)) == [2, 3, 1, 0]


@pytest.mark.parametrize(
    ("share", "of", "expected"),
    [
        (1.0, "span", [2, 3, 1, 0]),
        (1.0, "events", [2, 3, 1, 0]),
        (0.4, "span", [0, 3, 1, 0]),  # from 60 on
        (0.399, "span", [0, 2, 1, 0]),
        (0.17, "events", [0, 2, 1, 0]),  # two of six, and the other event of the same moment
        (1 / 6, "events", [0, 1, 0, 0]),
    ],
)
def test_only_the_latest_events_count(share: float, of: str, expected: list[int]) -> None:
    assert counts(RecentPopularity(share=share, of=of), make_split(LOG, test=1)) == expected


def test_recency_needs_real_times() -> None:
    with pytest.raises(ConfigError, match="times of domain 'a' only order the events of one user.*use popularity"):
        RecentPopularity().make(make_split(LOG, has_times=False), "a")


def test_a_domain_without_training_events_is_refused() -> None:
    with pytest.raises(ConfigError, match="domain 'b' has no training event"):
        RecentPopularity().make(make_split(LOG), "b")


@pytest.mark.parametrize(("wrong", "message"), [({"share": 0.0}, "share=0.0"), ({"of": "days"}, "of='days'")])
def test_settings_that_mean_nothing_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecentPopularity(**wrong)


def test_popularity_keeps_ties_with_the_last() -> None:
    split = make_split([("i0", 0), ("i0", 1), ("i1", 2), ("i2", 3), ("i3", 4)])
    query = RankingQuery("q", "a", (Item("a", "i0"),))
    ranking = PopularityRecommender(split).rank([query], 2)[0]
    assert ranking.item_ids == ("i0", "i1", "i2", "i3")
    assert ranking.scores == (2.0, 1.0, 1.0, 1.0)
