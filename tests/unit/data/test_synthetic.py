from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cprec.data.cleaning import clean_title
from cprec.data.config import SyntheticConfig
from cprec.data.sources.synthetic import (
    BRANDS_OF_DOMAIN,
    FIRST_SECOND,
    KINDS_OF_DOMAIN,
    PLATFORMS,
    QUALITIES,
    SHARED_BRANDS,
    YEAR,
    OracleRecommender,
    SyntheticWorld,
)
from cprec.errors import ConfigError, DataError, UnknownItemError
from cprec.recommender import RankingQuery, Recommender
from cprec.schema import Item

SMALL = SyntheticConfig(num_market_users=120, num_library_users=40, items_per_domain=60)
FLAT = replace(SMALL, popularity_strength=0.0, taste_strength=0.0, habit_strength=0.0, cross_domain_strength=0.0)
"""Every item that the user has not had is equally likely."""

GAINS = 1 / np.log2(np.arange(10) + 2)


@pytest.fixture(scope="module")
def world() -> SyntheticWorld:
    return SyntheticWorld(SMALL)


@pytest.fixture(scope="module")
def events_of_users(world: SyntheticWorld) -> dict[str, tuple[Item, ...]]:
    """All events of each user of market."""
    return {user: world.events(user, "toys") for user in world.user_ids("market")}


def titles(world: SyntheticWorld, domain: str) -> dict[str, list[str]]:
    """Item id -> brand, two qualities, kind."""
    items = world.tables()[domain][0]
    return {row["item_id"]: row["title"].split(" ") for row in items.to_pylist()}


def users_of(interactions: pa.Table) -> set[str]:
    return set(interactions["user_id"].to_pylist())


# ---- what is generated -----------------------------------------------------------------------------------------------


def test_a_seed_makes_one_world(world: SyntheticWorld) -> None:
    again, other = SyntheticWorld(SMALL).tables(), SyntheticWorld(replace(SMALL, seed=1)).tables()
    for domain, (items, interactions) in world.tables().items():
        assert items.equals(again[domain][0]) and interactions.equals(again[domain][1])
        assert not items.equals(other[domain][0]) and not interactions.equals(other[domain][1])


def test_worlds_of_other_strengths_have_the_same_catalogues_and_times(world: SyntheticWorld) -> None:
    without = SyntheticWorld(replace(SMALL, cross_domain_strength=0.0)).tables()
    for domain, (items, interactions) in world.tables().items():
        assert items.equals(without[domain][0])
        assert interactions.select(["user_id", "timestamp"]).equals(without[domain][1].select(["user_id", "timestamp"]))
        assert not interactions["item_id"].equals(without[domain][1]["item_id"])


def test_tables_have_what_memory_sources_read(world: SyntheticWorld) -> None:
    assert list(world.tables()) == list(world.domains) == list(itertools.chain(*PLATFORMS.values()))
    for domain, (items, interactions) in world.tables().items():
        assert items.column_names == ["item_id", "title", "brand", "categories"]
        assert interactions.column_names == ["user_id", "item_id", "timestamp"]
        assert interactions.schema.field("timestamp").type == pa.int64()
        assert tuple(items["item_id"].to_pylist()) == world.item_ids(domain) == tuple(sorted(world.item_ids(domain)))
        info = world.domains[domain]
        assert info.name == domain and domain in PLATFORMS[info.platform] and info.has_times


def test_titles_are_distinct_and_plain(world: SyntheticWorld) -> None:
    for domain, (items, _) in world.tables().items():
        rows = items.to_pylist()
        assert len({row["title"] for row in rows}) == len(rows) == SMALL.items_per_domain
        for row in rows:
            brand, first, second, kind = row["title"].split(" ")
            assert clean_title(row["title"]) == row["title"] and row["title"].replace(" ", "").isalpha()
            assert (brand, kind) == (row["brand"], row["categories"])
            assert brand in SHARED_BRANDS + BRANDS_OF_DOMAIN[domain] and kind in KINDS_OF_DOMAIN[domain]
            assert {first, second} <= set(QUALITIES) and first != second


def test_every_word_has_one_role() -> None:
    words = [*QUALITIES, *SHARED_BRANDS, *itertools.chain(*BRANDS_OF_DOMAIN.values(), *KINDS_OF_DOMAIN.values())]
    assert len(set(words)) == len(words)
    assert {len(kinds) for kinds in KINDS_OF_DOMAIN.values()} == {12}
    assert {len(brands) for brands in BRANDS_OF_DOMAIN.values()} == {10}


def test_domains_of_a_platform_share_users_and_platforms_do_not(world: SyntheticWorld) -> None:
    users = {domain: users_of(interactions) for domain, (_, interactions) in world.tables().items()}
    for platform, domains in PLATFORMS.items():
        assert set().union(*(users[domain] for domain in domains)) == set(world.user_ids(platform))
        for a, b in itertools.combinations(domains, 2):
            assert len(users[a] & users[b]) > 0.5 * len(users[a])
    assert not users["books"] & set(world.user_ids("market"))


def test_no_item_comes_twice_and_times_increase(world: SyntheticWorld) -> None:
    for domains in PLATFORMS.values():
        rows = [
            (row["user_id"], row["timestamp"], domain, row["item_id"])
            for domain in domains
            for row in world.tables()[domain][1].to_pylist()
        ]
        assert len({(user, time) for user, time, *_ in rows}) == len(rows), "no two events of a user at one time"
        assert len({(user, domain, item) for user, _, domain, item in rows}) == len(rows)
        assert min(time for _, time, *_ in rows) >= FIRST_SECOND
        assert max(time for _, time, *_ in rows) < FIRST_SECOND + 2 * YEAR + 100
        by_user = {user: [Item(*row[2:]) for row in group] for user, group in itertools.groupby(sorted(rows), _first)}
        for user, events in by_user.items():
            assert world.events(user, domains[0]) == tuple(events)


def _first(row: tuple[Any, ...]) -> Any:
    return row[0]


def test_users_are_active_as_often_as_configured(events_of_users: dict[str, tuple[Item, ...]]) -> None:
    active = 0
    for events in events_of_users.values():
        counts = {domain: sum(event.domain == domain for event in events) for domain in PLATFORMS["market"]}
        assert all(count == 0 or SMALL.min_events <= count <= SMALL.max_events for count in counts.values())
        active += sum(count > 0 for count in counts.values())
    assert active / len(events_of_users) / 5 == pytest.approx(SMALL.domain_share, abs=0.05)


def test_popularity_is_long_tailed(world: SyntheticWorld) -> None:
    for domain in PLATFORMS["market"]:
        interactions = world.tables()[domain][1]
        counts = np.sort(np.unique(interactions["item_id"].to_numpy(), return_counts=True)[1])[::-1]
        assert counts[:6].sum() > 0.2 * counts.sum(), "a tenth of the items has more than twice its share"
        assert np.median(counts) < counts.mean()


# ---- the law ---------------------------------------------------------------------------------------------------------


def test_chances_sum_to_one_and_exclude_what_the_user_had(
    world: SyntheticWorld, events_of_users: dict[str, tuple[Item, ...]]
) -> None:
    for user, events in itertools.islice(events_of_users.items(), 20):
        for place in range(len(events)):
            for domain in ("toys", "garden"):
                chances = world.next_item_probabilities(user, domain, events[:place])
                had = np.isin(world.item_ids(domain), [e.item_id for e in events[:place] if e.domain == domain])
                assert chances.sum() == pytest.approx(1) and (chances >= 0).all()
                assert (chances[had] == 0).all() and (chances[~had] > 0).all()


def test_events_follow_the_law(world: SyntheticWorld, events_of_users: dict[str, tuple[Item, ...]]) -> None:
    """Mean surprise equals mean entropy, and items of each rank of chance come as often as they should."""
    excess, variance, num_events = 0.0, 0.0, 0
    expected, observed = np.zeros(SMALL.items_per_domain), np.zeros(SMALL.items_per_domain)
    for user, events in events_of_users.items():
        for place, event in enumerate(events):
            chances = world.next_item_probabilities(user, event.domain, events[:place])
            surprise = -np.log(np.where(chances > 0, chances, 1))
            entropy = (chances * surprise).sum()
            row = world.item_ids(event.domain).index(event.item_id)
            excess += surprise[row] - entropy
            variance += (chances * surprise**2).sum() - entropy**2
            order = np.argsort(-chances)
            expected += chances[order]
            observed[np.flatnonzero(order == row)] += 1
            num_events += 1
    assert num_events > 3000
    assert abs(excess) < 4 * np.sqrt(variance)
    assert 0.15 < expected[0] / num_events < 0.5, "the best guess is neither certain nor hopeless"
    for first, last in ((0, 1), (1, 5), (5, 20), (20, 60)):
        share = expected[first:last].sum() / num_events
        assert abs(observed[first:last].sum() / num_events - share) < 4 * np.sqrt(share * (1 - share) / num_events)


def test_without_strengths_all_items_are_equally_likely() -> None:
    world = SyntheticWorld(FLAT)
    had = Item("toys", world.item_ids("toys")[7])
    chances = world.next_item_probabilities("market-001", "toys", [had])
    assert chances == pytest.approx(np.where(np.arange(60) == 7, 0, 1 / 59))


def test_popularity_alone_is_zipf() -> None:
    world = SyntheticWorld(replace(FLAT, popularity_strength=1.0))
    chances = np.sort(world.next_item_probabilities("market-001", "toys", []))[::-1]
    assert chances == pytest.approx(1 / np.arange(1, 61) / (1 / np.arange(1, 61)).sum())


def test_habit_alone_lifts_three_kinds_by_the_latest_one() -> None:
    world = SyntheticWorld(replace(FLAT, habit_strength=1.5, items_per_domain=200))
    ids, words = world.item_ids("toys"), titles(world, "toys")
    for row, item in enumerate(ids[:10]):
        chances = world.next_item_probabilities("market-001", "toys", [Item("toys", ids[-1]), Item("toys", item)])
        high = {
            words[name][3] for name, chance in zip(ids, chances, strict=True) if chance > chances[chances > 0].min()
        }
        assert len(high) == 3
        for name, chance in zip(ids, chances / chances[chances > 0].min(), strict=True):
            lift = 0 if name in (ids[row], ids[-1]) else np.exp(1.5) if words[name][3] in high else 1
            assert chance == pytest.approx(lift)


def test_taste_alone_counts_loved_words_in_every_domain() -> None:
    world = SyntheticWorld(replace(FLAT, taste_strength=1.0, items_per_domain=250))
    loved_by_domain = []
    for domain in PLATFORMS["market"]:
        ids, words = world.item_ids(domain), titles(world, domain)
        log_odds = np.log(world.next_item_probabilities("market-001", domain, []))
        log_odds -= log_odds.min()
        assert log_odds == pytest.approx(log_odds.round(), abs=1e-9), "each matching word counts one"
        design = np.array([[word in words[name] for word in (*QUALITIES, *_brands(domain))] for name in ids], float)
        weights = np.linalg.lstsq(design, log_odds, rcond=None)[0]
        assert design @ weights == pytest.approx(log_odds, abs=1e-6), "nothing but qualities and brands matters"
        loved_by_domain.append(
            {word for word, weight in zip(QUALITIES, weights, strict=False) if _is_high(weight, weights)}
        )
    assert len(loved_by_domain[0]) == 3
    assert all(loved == loved_by_domain[0] for loved in loved_by_domain)


def _brands(domain: str) -> tuple[str, ...]:
    return SHARED_BRANDS + BRANDS_OF_DOMAIN[domain]


def _is_high(weight: float, weights: np.ndarray) -> bool:
    return weight > weights[: len(QUALITIES)].min() + 0.5


def test_the_signal_alone_counts_words_shared_with_the_latest_trigger() -> None:
    world = SyntheticWorld(replace(FLAT, cross_domain_strength=1.0))
    for domain, trigger in (("garden", "beauty"), ("beauty", "toys"), ("films", "books"), ("books", "films")):
        user = world.user_ids(world.domains[domain].platform)[0]
        words, hints = titles(world, domain), titles(world, trigger)
        first, last = Item(trigger, world.item_ids(trigger)[3]), Item(trigger, world.item_ids(trigger)[5])
        chances = world.next_item_probabilities(user, domain, [first, last, Item(domain, world.item_ids(domain)[0])])
        shared = [len(set(words[i][1:3]) & set(hints[last.item_id][1:3])) for i in world.item_ids(domain)]
        lift = np.exp(np.array(shared, float))
        lift[0] = 0
        assert chances == pytest.approx(lift / lift.sum())
        assert set(shared) >= {0, 1}


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_other_domains_matter_through_the_signal_only(strength: float) -> None:
    world = SyntheticWorld(replace(SMALL, cross_domain_strength=strength))
    changes = []
    for user in world.user_ids("market")[:40]:
        events = world.events(user, "toys")
        full = world.next_item_probabilities(user, "toys", events)
        own = world.next_item_probabilities(user, "toys", [e for e in events if e.domain == "toys"])
        trigger = world.next_item_probabilities(user, "toys", [e for e in events if e.domain in ("toys", "sports")])
        assert np.array_equal(full, trigger), "only sports triggers toys"
        changes.append(np.abs(full - own).sum())
    assert max(changes) == 0 if strength == 0 else np.mean(changes) > 0.1


def test_what_is_not_of_the_world_is_refused(world: SyntheticWorld) -> None:
    with pytest.raises(DataError, match="'market-999' is not one of the platform 'market'"):
        world.next_item_probabilities("market-999", "toys", [])
    with pytest.raises(DataError, match="library-01"):
        world.next_item_probabilities("market-001", "books", [])
    with pytest.raises(DataError, match="'cars' is not of the synthetic world, which has beauty"):
        world.item_ids("cars")
    with pytest.raises(UnknownItemError, match="'toys-99' is not in domain 'toys'"):
        world.next_item_probabilities("market-001", "toys", [Item("toys", "toys-99")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_events": 0}, "min_events=0"),
        ({"min_events": 9, "max_events": 8}, "min_events=9"),
        ({"items_per_domain": 9}, "no user has an item twice"),
        ({"items_per_domain": 10**6}, "at most 66240"),
        ({"num_library_users": 0}, "num_library_users=0"),
        ({"domain_share": 0.0}, "domain_share"),
        ({"seed": -1}, "seed=-1"),
        ({"taste_strength": -1.0}, "taste_strength=-1.0"),
    ],
)
def test_impossible_worlds_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SyntheticConfig(**settings)


def test_the_smallest_world_is_one() -> None:
    config = SyntheticConfig(
        num_market_users=1, num_library_users=1, items_per_domain=2, min_events=1, max_events=1, domain_share=0.01
    )
    world = SyntheticWorld(config)
    assert len(world.events("market-1", "toys")) == 1, "everyone is active in one domain at least"


# ---- the oracle ------------------------------------------------------------------------------------------------------

Ask = Callable[..., RankingQuery]


@pytest.fixture(scope="module")
def user(events_of_users: dict[str, tuple[Item, ...]]) -> str:
    """A user active in toys and in sports, which triggers it, whose last event is another."""
    wanted = {"toys", "sports"}
    return next(u for u, es in events_of_users.items() if wanted <= {e.domain for e in es} and es[-1].domain != "toys")


@pytest.fixture(scope="module")
def ask(user: str) -> Ask:
    def make(part: str, history: tuple[Item, ...] = (), **settings: Any) -> RankingQuery:
        return RankingQuery(f"toys/market/{user}/{part}", "toys", history, **settings)

    return make


def test_the_oracle_knows_all_that_came_before_and_no_more(world: SyntheticWorld, user: str, ask: Ask) -> None:
    oracle = OracleRecommender(world)
    assert isinstance(oracle, Recommender) and oracle.name == "oracle"
    events = world.events(user, "toys")
    places = [place for place, event in enumerate(events) if event.domain == "toys"]
    for part, from_end in (("test", -1), ("validation", -2)):
        before = events[: places[from_end]]
        own = tuple(event for event in before if event.domain == "toys")
        chances = world.next_item_probabilities(user, "toys", before)
        for history in ((), own, own[-1:], before):
            ranking = oracle.rank([ask(part, history)], 10)[0]
            assert ranking.scores == tuple(np.sort(chances)[::-1][:10])
            assert ranking.item_ids == tuple(np.array(world.item_ids("toys"))[np.argsort(-chances)[:10]])
    first = oracle.rank([ask("test/0", (events[places[0]],))], 5)[0]
    chances = world.next_item_probabilities(user, "toys", events[: places[1]])
    assert first.scores == tuple(np.sort(chances)[::-1][:5]), "the history says which event of several is asked for"


def test_the_oracle_honours_candidates_and_exclude(world: SyntheticWorld, user: str, ask: Ask) -> None:
    oracle, ids = OracleRecommender(world), world.item_ids("toys")
    best = oracle.rank([ask("test")], 3)[0].item_ids
    without = oracle.rank([ask("test", exclude=frozenset(best[:1]))], 2)[0]
    assert without.item_ids == best[1:]
    had = world.events(user, "toys")
    had_toy = next(event.item_id for event in had if event.domain == "toys")
    ranking = oracle.rank([ask("test", candidates=(had_toy, best[1], best[0]))], 1)[0]
    assert ranking.item_ids == (*best[:2], had_toy) and ranking.scores[2] == 0
    everything = oracle.rank([ask("test")], 10_000)[0]
    assert set(everything.item_ids) < set(ids) and had_toy not in everything.item_ids
    assert all(a >= b > 0 for a, b in itertools.pairwise(everything.scores))


def test_the_oracle_keeps_ties_with_the_last() -> None:
    oracle = OracleRecommender(SyntheticWorld(FLAT))
    user = oracle.rank([RankingQuery("toys/market/market-001/test", "toys", ())], 3)[0]
    assert len(user.item_ids) > 50 and len(set(user.scores)) == 1


def test_the_oracle_says_what_it_cannot_answer(world: SyntheticWorld, user: str, ask: Ask) -> None:
    oracle = OracleRecommender(world)
    with pytest.raises(DataError, match="the oracle needs domain/platform/user_id/part"):
        oracle.rank([RankingQuery("", "toys", ())], 3)
    never = next(i for i in world.item_ids("toys") if Item("toys", i) not in world.events(user, "toys"))
    with pytest.raises(DataError, match=f"never had '{never}'"):
        oracle.rank([ask("test", (Item("toys", never),))], 3)
    with pytest.raises(UnknownItemError, match="'no-toy'"):
        oracle.rank([ask("test", candidates=("no-toy",))], 3)


def test_no_order_beats_the_oracle(world: SyntheticWorld, events_of_users: dict[str, tuple[Item, ...]]) -> None:
    """Expected NDCG@10 of the last event of each user: the oracle's order, popularity's, and random ones."""
    counts = {
        domain: np.array([interactions["item_id"].to_pylist().count(item) for item in world.item_ids(domain)])
        for domain, (_, interactions) in world.tables().items()
    }
    generator = np.random.default_rng(0)
    oracle, popular, shuffled = [], [], []
    for user, events in events_of_users.items():
        domain = events[-1].domain
        chances = world.next_item_probabilities(user, domain, events[:-1])
        oracle.append(np.sort(chances)[::-1][:10] @ GAINS)
        popular.append(chances[np.argsort(-counts[domain])[:10]] @ GAINS)
        shuffled.append(generator.permutation(chances)[:10] @ GAINS)
        assert oracle[-1] >= max(popular[-1], shuffled[-1])
    assert np.mean(oracle) > 2 * np.mean(popular) > 2 * np.mean(shuffled)
