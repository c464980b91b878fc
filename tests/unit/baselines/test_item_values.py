"""One number of each item: places by hand, and freshness from training events alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cprec.baselines.item_values import Freshness, ItemValuesRecommender, places
from cprec.data.catalogue import Catalogue
from cprec.data.config import SplitSpec
from cprec.data.interactions import Interactions
from cprec.data.splits import Split
from cprec.errors import DataError, Unsuitable
from cprec.recommender import RankingQuery
from cprec.schema import DomainInfo

CATALOGUE = Catalogue.from_tables({"a": pa.table({"item_id": list("vwxyz"), "title": list("vwxyz")})})


def split_of(events: Sequence[tuple[str, int, int]], *, has_times: bool = True) -> Split:
    """One user's events: item, time, part (0 trains, 2 tests)."""
    item, time, part = zip(*events, strict=True)
    log = Interactions(
        platforms=("p",),
        user_platform=np.zeros(1, dtype=np.int16),
        user_id=np.array(["u"], dtype=object),
        user=np.zeros(len(events), dtype=np.int64),
        item=CATALOGUE.find("a", item),
        time=np.array(time),
        rating=np.full(len(events), np.nan),
    )
    return Split(CATALOGUE, log, np.array(part, dtype=np.int8), SplitSpec(), {"a": DomainInfo("a", "p", has_times)})


def scores(made: ItemValuesRecommender) -> list[float]:
    return made.scores("a", [RankingQuery("q", "a", ())])[0].tolist()


def test_the_first_training_event_says_how_new_an_item_is() -> None:
    """Later events of v and the test events of y and z change nothing; y and z were not there in training."""
    events = [("v", 10, 0), ("w", 20, 0), ("v", 30, 0), ("x", 90, 0), ("y", 95, 2), ("z", 5, 2)]
    assert scores(Freshness().make(split_of(events), "a")) == [0, 0.5, 1, 0, 0]
    assert scores(Freshness().make(split_of(events[:4]), "a")) == [0, 0.5, 1, 0, 0]


def test_an_item_that_came_after_is_as_new_as_the_newest() -> None:
    more = Catalogue.from_tables({"a": pa.table({"item_id": list("tvwxyz"), "title": list("tvwxyz")})})
    made = Freshness().make(split_of([("v", 10, 0), ("w", 20, 0), ("x", 90, 0)]), "a")
    assert scores(made.with_catalogue(more)) == [1, 0, 0.5, 1, 0, 0]
    assert scores(made) == [0, 0.5, 1, 0, 0]


def test_items_need_times_and_different_ones() -> None:
    with pytest.raises(Unsuitable, match="freshness: the times of domain 'a' only order the events of one user"):
        Freshness().make(split_of([("v", 1, 0), ("w", 2, 0)], has_times=False), "a")
    for events in ([("v", 1, 0), ("w", 1, 0)], [("v", 1, 2), ("w", 2, 2)]):
        with pytest.raises(Unsuitable, match="no item of domain 'a' is newer"):
            Freshness().make(split_of(events), "a")


@given(st.lists(st.integers(-9, 9), min_size=1), st.floats(1e-3, 1e3))
def test_places_depend_on_the_order_alone(values: list[int], scale: float) -> None:
    """They are the share of pairs that an item wins, ties by half, stretched from 0 to 1."""
    value_N = np.array(values, dtype=float)
    place_N = places(value_N)
    np.testing.assert_array_equal(place_N, places(scale * value_N**3 - 5))
    wins_N = np.sign(value_N[:, None] - value_N).sum(axis=1)
    spread = max(wins_N.max() - wins_N.min(), 1)
    np.testing.assert_allclose(place_N, (wins_N - wins_N.min()) / spread)


def test_a_column_is_ranked_by_its_order(write: Callable[[str, str], str]) -> None:
    path = write("m.csv", "item_id,margin\nv,1000\nw,2\nx,3\ny,0\nz,1\n")
    made = ItemValuesRecommender.read("margin", path, CATALOGUE, "a")
    assert made.rank([RankingQuery("q", "a", ())], 5)[0].item_ids == ("v", "x", "w", "z", "y")
    again = ItemValuesRecommender.from_arrays(made.arrays(), CATALOGUE)
    assert (again.name, scores(again)) == ("margin", [1, 0.5, 0.75, 0, 0.25])
    same = write("same.csv", "item_id,margin\nv,2\nw,2\nx,2\ny,2\nz,2\n")
    with pytest.raises(DataError, match="all items of domain 'a' have the same margin"):
        ItemValuesRecommender.read("margin", same, CATALOGUE, "a")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    def write_text(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_text
