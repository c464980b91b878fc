"""The walk against a slow reference, and its published figures on real logs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cprec.baselines.popularity import PopularityRecommender
from cprec.baselines.text import TitleSimilarity
from cprec.baselines.transition_graph import TransitionGraph, TransitionGraphRecommender
from cprec.data.catalogue import Catalogue
from cprec.data.config import Rules, SplitSpec
from cprec.data.interactions import Interactions
from cprec.data.splits import Split
from cprec.errors import ConfigError
from cprec.ranks import ndcg, recall
from cprec.recommender import RankingQuery, Recommender
from cprec.schema import DomainInfo, Item


def make_split(events: list[tuple[int, int]], domain_of_item: list[int], titles: list[str] | None = None) -> Split:
    """All events train; (user, item) pairs in order."""
    names = ("a", "b")[: max(domain_of_item) + 1]
    size = len(domain_of_item)
    text = np.array([f"i{n}" for n in range(size)], dtype=object)
    blank = np.array([""] * size, dtype=object)
    title = text if titles is None else np.array(titles, dtype=object)
    catalogue = Catalogue(names, np.array(domain_of_item, dtype=np.int16), text, title, blank, blank)
    user = np.array([u for u, _ in events])
    log = Interactions(
        platforms=("p",),
        user_platform=np.zeros(user.max() + 1, dtype=np.int16),
        user_id=np.array([f"u{n}" for n in range(user.max() + 1)], dtype=object),
        user=user,
        item=np.array([i for _, i in events]),
        time=np.arange(len(events)),
        rating=np.full(len(events), np.nan),
    )
    domains = {name: DomainInfo(name, "p", True) for name in names}
    return Split(catalogue, log, np.zeros(len(events), dtype=np.int8), SplitSpec(), domains)


def slow_scores(events, domain_of_item, history, window=5):
    popularity = [sum(item == i for _, item in events) for i in range(len(domain_of_item))]
    weight = np.zeros((len(domain_of_item),) * 2)
    for user in {u for u, _ in events}:
        for domain in set(domain_of_item):
            row = [i for u, i in events if u == user and domain_of_item[i] == domain]
            for x, start in enumerate(row):
                for y in range(x + 1, min(x + window, len(row) - 1) + 1):
                    weight[start, row[y]] += 1 / (y - x)
                    weight[row[y], start] += 0.5 / (y - x)
    scores = np.zeros(len(domain_of_item))
    for age, item in enumerate(reversed(history[-20:])):
        for other in range(len(scores)):
            scale = math.sqrt(max(popularity[item], 1) * max(popularity[other], 1))
            scores[other] += 0.7**age * weight[item, other] / scale
    return scores


def test_equals_a_slow_reference_over_two_domains() -> None:
    generator = np.random.default_rng(0)
    domain_of_item = [0] * 8 + [1] * 6
    events = [(user, int(item)) for user in range(12) for item in generator.integers(0, 14, 15)]
    graph = TransitionGraphRecommender(make_split(events, domain_of_item))
    history = [1, 5, 2, 7, 5]
    query = RankingQuery("q", "a", tuple(Item("a", f"i{i}") for i in history), exclude=frozenset({"i5"}))
    (ranking,) = graph.rank([query], 8)
    expected = slow_scores(events, domain_of_item, history)[:8]
    expected[5] = 0
    got = np.zeros(8)
    got[[int(item[1:]) for item in ranking.item_ids]] = ranking.scores
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert list(ranking.scores) == sorted(ranking.scores, reverse=True)


def test_only_linked_items_are_returned_but_all_candidates_are() -> None:
    split = make_split([(0, 0), (0, 1), (1, 2), (1, 3)], [0, 0, 0, 0])
    graph = TransitionGraphRecommender(split)
    history = (Item("a", "i0"),)
    assert graph.rank([RankingQuery("q", "a", history)], 4)[0].item_ids == ("i1",)
    ranking = graph.rank([RankingQuery("q", "a", history, candidates=("i3", "i1", "i2"))], 4)[0]
    assert ranking.item_ids == ("i1", "i2", "i3") and ranking.scores[1:] == (0.0, 0.0)


def scores_of(settings: TransitionGraph | TitleSimilarity, split: Split, history: list[int]) -> np.ndarray:
    query = RankingQuery("q", "a", tuple(Item("a", f"i{item}") for item in history))
    return settings.make(split, "a").scores("a", [query])[0]


def test_two_hops_add_what_follows_from_the_first() -> None:
    """0 -> 1 -> 2 in two users' logs: g(0, 1) = 1 / sqrt(1 * 2), g(1, 2) the same, so g g (0, 2) = 1 / 2."""
    split = make_split([(0, 0), (0, 1), (1, 1), (1, 2)], [0, 0, 0])
    one = TransitionGraph(backward=0.0)
    link = 1 / math.sqrt(2)
    assert scores_of(one, split, [0]) == pytest.approx([0, link, 0])
    assert scores_of(TransitionGraph(backward=0.0, second_hop=0.4), split, [0]) == pytest.approx([0, link, 0.4 / 2])


def test_settings_decide_the_walk() -> None:
    """A user's log 0 1 2: within one event 0 -> 1 -> 2, and half of it back."""
    split = make_split([(0, 0), (0, 1), (0, 2)], [0, 0, 0])
    near = TransitionGraph(window=1, decay=0.5)
    assert scores_of(near, split, [0]) == pytest.approx([0, 1, 0])
    assert scores_of(near, split, [0, 1]) == pytest.approx([0.5, 0.5, 1])
    assert scores_of(TransitionGraph(window=1, decay=0.5, last_events=1), split, [0, 1]) == pytest.approx([0.5, 0, 1])
    assert scores_of(TransitionGraph(window=2, decay=0.5), split, [0]) == pytest.approx([0, 1, 1 / 2])


def test_titles_reach_items_that_nobody_had() -> None:
    """'red', in two titles of four, weighs ln 2 and all else ln 4: t(0, 3) = ln2^2 / (ln2^2 + ln4^2) = 1/5."""
    titles = ["red shoe", "hat", "scarf", "Red glove"]
    split = make_split([(0, 0), (0, 1)], [0] * 4, titles)
    assert scores_of(TitleSimilarity(decay=0.5), split, [0, 1]) == pytest.approx([0.5, 1, 0, 0.5 / 5])
    assert scores_of(TransitionGraph(text_weight=0.3), split, [0]) == pytest.approx([0.3, 1, 0, 0.3 / 5])


def test_items_that_came_after_are_reached_by_their_titles() -> None:
    """As above, and a blue shoe came, first in the order of ids. 'shoe' weighs ln 4 and 'blue' nothing, which no title
    had, so it is as near to the red shoe as ln 4 / sqrt(ln2^2 + ln4^2) = 2 / sqrt 5. It is read in histories, too."""
    split = make_split([(0, 0), (0, 1)], [0] * 4, ["red shoe", "hat", "scarf", "Red glove"])
    rows = {
        "item_id": ["a new one", "i0", "i1", "i2", "i3"],
        "title": ["blue shoe", "red shoe", "hat", "scarf", "Red glove"],
    }
    catalogue = Catalogue.from_tables({"a": pa.table(rows)})
    near, query = 2 / math.sqrt(5), RankingQuery("q", "a", (Item("a", "i0"),))
    titles, walk = (settings.make(split, "a") for settings in (TitleSimilarity(), TransitionGraph(text_weight=0.3)))
    for before, expected in ((titles, [near, 1, 0, 0, 1 / 5]), (walk, [0.3 * near, 0.3, 1, 0, 0.3 / 5])):
        known = before.scores("a", [query])  # which it keeps for the same query, but not for another catalogue
        after = before.with_catalogue(catalogue)
        assert after is not None and after.scores_once("a", [query])[0] == pytest.approx(expected)
        again = after.with_catalogue(catalogue)
        assert again is not None and again.scores("a", [query])[0] == pytest.approx(expected)
        assert np.array_equal(before.scores("a", [query]), known)
    after, of_new = titles.with_catalogue(catalogue), RankingQuery("q", "a", (Item("a", "a new one"),))
    assert after.scores("a", [of_new])[0] == pytest.approx([1, near, 0, 0, 0])
    assert TransitionGraph().make(split, "a").with_catalogue(catalogue) is None


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (TransitionGraph(), "transition graph"),
        (TransitionGraph(last_events=1), "transition graph (last item)"),
        (TransitionGraph(second_hop=0.5, text_weight=0.1), "transition graph (two hops, titles)"),
    ],
)
def test_the_name_says_what_differs(settings: TransitionGraph, name: str) -> None:
    assert settings.make(make_split([(0, 0), (0, 1)], [0, 0]), "a").name == name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"window": 0}, "window=0"), ({"decay": 0.0}, "decay=0.0"), ({"text_weight": -1.0}, "text_weight=-1.0")],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransitionGraph(**wrong)


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "walk", "popularity"),
    [
        ("amazon14_beauty", (0.0561, 0.0419, 0.0775, 0.0488), (0.0120, 0.0056)),
        ("amazon14_sports", (0.0266, 0.0190, 0.0376, 0.0225), None),
        ("amazon14_toys", (0.0718, 0.0531, 0.0919, 0.0595), None),
    ],
)
def test_known_figures_on_real_logs(
    folder: str, walk: tuple[float, ...], popularity: tuple[float, ...] | None, real_data: Path, tmp_path: Path
) -> None:
    """Leave-one-out, full catalogue, seen items left out; the graph knows the training part only.

    The known figures are Recall@5, NDCG@5, Recall@10 and NDCG@10 (popularity: at 10), with ties counted
    in the target's favour.
    """
    from cprec.data.build import build_dataset
    from cprec.data.config import TableSource
    from cprec.data.dataset import read_dataset
    from cprec.data.splits import make_split as split_of

    table = TableSource(
        domain="d",
        interactions=str(real_data / folder / "interactions.parquet"),
        items=str(real_data / folder / "items.parquet"),
        columns={"order": "position"},
        timestamps="seconds",
    )
    build_dataset([table], tmp_path / "data", Rules(k_core=0, drop_consecutive_repeats=False))
    split = split_of(*read_dataset(tmp_path / "data"), SplitSpec())
    asked = split.queries("d", "test", max_history=len(split.interactions))
    ids = split.catalogue.item_id
    queries = []
    for number in range(len(asked)):
        history = tuple(Item("d", ids[row]) for row in asked.history[number])
        queries.append(RankingQuery(str(number), "d", history, exclude=frozenset(item.item_id for item in history)))

    def figures(recommender: Recommender) -> list[float]:
        better, found = [], []
        for start in range(0, len(queries), 512):
            rankings = recommender.rank(queries[start : start + 512], 10)
            for ranking, target in zip(rankings, asked.target[start : start + 512], strict=True):
                own = dict(zip(ranking.item_ids, ranking.scores, strict=True)).get(ids[target])
                better.append(sum(score > own for score in ranking.scores) if own is not None else 0)
                found.append(int(own is not None))  # a group of one: the target stands first among its ties
        values = [metric(np.array(better), np.array(found), cut) for cut in (5, 10) for metric in (recall, ndcg)]
        return [float(value.mean()) for value in values]

    assert figures(TransitionGraphRecommender(split)) == pytest.approx(walk, abs=2e-4)
    if popularity is not None:
        assert figures(PopularityRecommender(split))[2:] == pytest.approx(popularity, abs=2e-4)  # at 10
