"""A generated world whose law is known: users, titles and events by a seed, and the true chance of every next item.

Two platforms. `market` has five domains that share their users, `library` two; no user belongs to both. Titles read
"Brand Quality Quality Kind". Quality words are the same in all domains of both platforms, half of a domain's brands are
its own and half belong to all domains, kinds belong to one domain alone.

The chance that user u's next event in domain d is item i, which u has not had yet, is proportional to

    rank(i) ** -popularity_strength
    * exp(taste_strength * (qualities of i that u loves + 1 if u loves the brand of i))
    * exp(habit_strength * [the kind of i often follows the kind of u's latest item in d])
    * exp(cross_domain_strength * (qualities of i shared with u's latest item in the domain that triggers d))

Tastes are the user's own and hold in every domain. Given the taste, events of other domains matter only through the
last line, the planted signal; a recommender, which has to guess the taste, may also learn it from those events. When
events happen and in which domain is drawn apart from the items, so the same law holds for held-out events.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cprec.data.config import SyntheticConfig
from cprec.data.ragged import offsets_of
from cprec.errors import DataError, UnknownItemError
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import BRAND, CATEGORIES, ITEM_ID, TEST, TIMESTAMP, TITLE, USER_ID, VALIDATION, DomainInfo, Item


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLATFORMS = {"market": ("beauty", "garden", "kitchen", "sports", "toys"), "library": ("books", "films")}
"""Platform -> its domains. Each domain is triggered by the one before it; the first by the last."""

QUALITIES = _words(
    "Bold Bright Classic Coastal Cosy Daring Dreamy Elegant Gentle Golden Grand Merry Modern Noble Playful Quiet Royal "
    "Rustic Secret Simple Tiny Urban Vintage Wild"
)

KINDS_OF_DOMAIN = {
    domain: _words(words)
    for domain, words in {
        "beauty": "Balm Brush Comb Cream Lipstick Lotion Mirror Perfume Powder Serum Shampoo Soap",
        "garden": "Bench Birdhouse Gloves Hose Lantern Planter Rake Shears Spade Trellis Trowel Wheelbarrow",
        "kitchen": "Apron Bowl Grater Kettle Knife Ladle Mug Pan Teapot Toaster Tray Whisk",
        "sports": "Ball Bat Dumbbell Goggles Helmet Jersey Paddle Racket Rope Skates Snorkel Whistle",
        "toys": "Blocks Castle Doll Drum Kite Marbles Puzzle Robot Rocket Scooter Teddy Train",
        "books": "Almanac Anthology Atlas Biography Cookbook Diary Fable Memoir Mystery Novel Saga Thriller",
        "films": "Adventure Cartoon Comedy Documentary Drama Epic Musical Noir Romance Satire Western Whodunit",
    }.items()
}

SHARED_BRANDS = _words("Ashford Barlow Calder Denby Elwood Fenwick Granger Hollis Ingram Jessop")

BRANDS_OF_DOMAIN = {
    domain: _words(words)
    for domain, words in {
        "beauty": "Amberley Bellamy Carlyle Delacroix Evesham Florian Gillian Harcourt Isolde Juniper",
        "garden": "Appleby Bramley Cotswold Dunmore Everett Foxley Greenway Hawthorn Ivyside Kentmere",
        "kitchen": "Alderton Brookes Crofton Dawlish Egerton Farrow Garland Hartley Kingsley Langdon",
        "sports": "Argyle Braddock Chester Drake Falcon Gladstone Halliday Kestrel Lomax Meridian",
        "toys": "Ambrose Bumble Copper Dimble Figgins Giggle Hobson Kipper Lollard Muddle",
        "books": "Aldine Beaumont Clarendon Dryden Eliot Faversham Gresham Hathaway Lindisfarne Marlowe",
        "films": "Albion Broadway Carlton Dorian Empire Fairbanks Gaumont Hammer Lumiere Monarch",
    }.items()
}

LOVED_QUALITIES = 3
"""Quality words that each user loves."""
LOVED_BRANDS = 0.15
"""Share of all brands that each user loves."""
NEXT_KINDS = 3
"""Kinds that often follow each kind."""
FIRST_SECOND = 1_640_995_200
"""2022-01-01 UTC. Each user is active for a year that begins within a year of this."""
YEAR = 365 * 24 * 3600


class SyntheticWorld:
    """A world made from a configuration: its tables, and its law. The same configuration makes the same world."""

    def __init__(self, config: SyntheticConfig) -> None:
        """Draw catalogues, users and events; a few seconds for the default configuration."""
        self.config = config
        self.domains = {
            name: DomainInfo(name, platform, True) for platform, names in PLATFORMS.items() for name in names
        }
        """Every domain by name; all have real times."""
        self._shelves = {name: _stock(config, number, name) for number, name in enumerate(self.domains)}
        sizes = (config.num_market_users, config.num_library_users)
        self._crowds = {
            platform: _live(config, number, platform, size, [self._shelves[name] for name in PLATFORMS[platform]])
            for number, (platform, size) in enumerate(zip(PLATFORMS, sizes, strict=True))
        }

    def tables(self) -> dict[str, tuple[pa.Table, pa.Table]]:
        """Domain -> (items, interactions), as `MemorySource` takes them.

        Items have item_id, title, brand and categories (the kind). Interactions have user_id, item_id and timestamp
        (seconds UTC), by user and time; a user's times strictly increase over all domains.
        """
        out = {}
        for name, info in self.domains.items():
            shelf, crowd = self._shelves[name], self._crowds[info.platform]
            items = {
                ITEM_ID: shelf.item_ids,
                TITLE: shelf.titles,
                BRAND: [_brand_names()[brand] for brand in shelf.brand],
                CATEGORIES: [KINDS_OF_DOMAIN[name][kind] for kind in shelf.kind],
            }
            mine = crowd.domain == PLATFORMS[info.platform].index(name)
            interactions = {
                USER_ID: [crowd.user_ids[user] for user in crowd.user[mine]],
                ITEM_ID: [shelf.item_ids[item] for item in crowd.item[mine]],
                TIMESTAMP: pa.array(crowd.timestamp[mine], pa.int64()),
            }
            out[name] = (pa.table(items), pa.table(interactions))
        return out

    def item_ids(self, domain: str) -> tuple[str, ...]:
        """The items of a domain, sorted."""
        return self._shelf(domain).item_ids

    def user_ids(self, platform: str) -> tuple[str, ...]:
        """The users of a platform, sorted."""
        return self._crowds[platform].user_ids

    def events(self, user_id: str, domain: str) -> tuple[Item, ...]:
        """All events of a user on the platform of a domain, oldest first."""
        platform = self.domains[self._shelf(domain).name].platform
        crowd, names = self._crowds[platform], PLATFORMS[platform]
        user = self._user(user_id, domain)
        mine = slice(crowd.offsets[user], crowd.offsets[user + 1])
        return tuple(
            Item(names[d], self._shelves[names[d]].item_ids[i])
            for d, i in zip(crowd.domain[mine].tolist(), crowd.item[mine].tolist(), strict=True)
        )

    def next_item_probabilities(self, user_id: str, domain: str, history: Sequence[Item]) -> np.ndarray:
        """The true chance of each item of `item_ids(domain)` to be the user's next one there: float64[num_items].

        `history` is everything the user did before, in all domains of the platform, oldest first. The law also knows
        the user's taste, which no recommender is told, so no ranking can be better on average than by these chances.

        Raises DataError for a user or a domain that is not of this world, UnknownItemError for such an item.
        """
        shelf = self._shelf(domain)
        crowd = self._crowds[self.domains[domain].platform]
        user = self._user(user_id, domain)
        had = np.zeros((1, len(shelf.item_ids)), dtype=bool)
        latest, trigger = -1, -1
        for event in history:
            if event.domain == domain:
                latest = self._item(event)
                had[0, latest] = True
            elif event.domain == shelf.trigger:
                trigger = self._item(event)
        tastes = crowd.loved_qualities[[user]], crowd.loved_brands[[user]]
        hints = self._shelves[shelf.trigger].has_quality[[trigger]]
        return shelf.probabilities(self.config, *tastes, np.array([latest]), hints, had)[0]

    def _shelf(self, domain: str) -> _Shelf:
        if domain not in self._shelves:
            raise DataError(f"domain {domain!r} is not of the synthetic world, which has {', '.join(self.domains)}")
        return self._shelves[domain]

    def _user(self, user_id: str, domain: str) -> int:
        platform = self.domains[domain].platform
        user = self._crowds[platform].row_of_user.get(user_id)
        if user is None:
            ids = self._crowds[platform].user_ids
            raise DataError(f"user {user_id!r} is not one of the platform {platform!r}: they are {ids[0]} to {ids[-1]}")
        return user

    def _item(self, item: Item) -> int:
        shelf = self._shelf(item.domain)
        if item.item_id not in shelf.row_of_item:
            raise UnknownItemError(
                f"item {item.item_id!r} is not in domain {item.domain!r} of the synthetic world: its items are "
                f"{shelf.item_ids[0]} to {shelf.item_ids[-1]}"
            )
        return shelf.row_of_item[item.item_id]


class OracleRecommender:
    """Ranks by the true chances of the next item: a bound that no recommender can know or beat.

    A query says by its `query_id` (domain/platform/user_id/part, as splits write it) whom it asks about. The oracle
    reads the user's whole history in the world, all domains, up to the event asked for: the one that follows the last
    event of the domain in the query's history, or, where the history has none, the user's last event in the domain
    (test) or the one before it (validation). It knows the log as it was generated, whatever a data folder left out.
    Items that the user had already have no chance: they are not recommended, and come last among candidates.
    """

    name = "oracle"

    def __init__(self, world: SyntheticWorld) -> None:
        self._world = world

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        """See `Recommender.rank`; scores are chances.

        Raises DataError for queries about users, and UnknownItemError for items, that are not of the world.
        """
        return [self._rank(query, k) for query in queries]

    def _rank(self, query: RankingQuery, k: int) -> Ranking:
        user_id, history = self._history(query)
        chance = self._world.next_item_probabilities(user_id, query.domain, history)
        ids = np.array(self._world.item_ids(query.domain), dtype=object)
        if query.candidates is not None:
            rows = np.array([self._world._item(Item(query.domain, item)) for item in query.candidates], dtype=np.int64)
        else:
            rows = np.flatnonzero(chance)
        allow = query.allow
        rows = rows[[ids[row] not in query.exclude and (allow is None or ids[row] in allow) for row in rows]]
        rows = rows[np.lexsort((rows, -chance[rows]))]  # greatest chance first, then by row
        counted = rows[[ids[row] not in query.uncounted for row in rows]] if query.uncounted else rows
        if query.candidates is None and len(counted) > k:
            rows = rows[chance[rows] >= chance[counted[k - 1]]]
        return Ranking(query.query_id, tuple(ids[rows]), tuple(chance[rows].tolist()))

    def _history(self, query: RankingQuery) -> tuple[str, tuple[Item, ...]]:
        """The user that a query asks about, and all that happened to them before the event it asks for."""
        parts = query.query_id.split("/")
        if len(parts) < 4 or parts[0] != query.domain:
            raise DataError(
                f"query_id={query.query_id!r}: the oracle needs domain/platform/user_id/part, to know whom it is about"
            )
        user_id, part = parts[2], parts[3]
        events = self._world.events(user_id, query.domain)
        places = [place for place, event in enumerate(events) if event.domain == query.domain]
        known = next((event for event in reversed(query.history) if event.domain == query.domain), None)
        if known is not None:
            if known not in events:
                raise DataError(f"query_id={query.query_id!r}: user {user_id!r} never had {known.item_id!r}")
            index = places.index(events.index(known)) + 1
        else:
            index = len(places) - {TEST: 1, VALIDATION: 2}.get(part, 0)
        return user_id, events[: places[index]] if 0 <= index < len(places) else events


@dataclass(frozen=True)
class _Shelf:
    """The items of a domain and how they follow each other; rows are items, sorted by id."""

    name: str
    trigger: str
    """The domain whose latest item raises items here."""
    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    row_of_item: dict[str, int]
    quality: np.ndarray
    """int64[num_items, 2]: indices into QUALITIES, different ones."""
    has_quality: np.ndarray
    """int8[num_items + 1, num_qualities]: 1 where the item has the word; the last row, all 0, stands for no item."""
    brand: np.ndarray
    """int64[num_items]: indices into the names of all brands."""
    kind: np.ndarray
    """int64[num_items]: indices into the kinds of the domain."""
    log_popularity: np.ndarray
    """float64[num_items]: minus the logarithm of the rank."""
    follows: np.ndarray
    """int8[num_items + 1, num_items]: 1 where the column's kind often follows the row's; the last row is all 0."""

    def probabilities(
        self,
        config: SyntheticConfig,
        loved_qualities: np.ndarray,
        loved_brands: np.ndarray,
        latest: np.ndarray,
        hints: np.ndarray,
        had: np.ndarray,
    ) -> np.ndarray:
        """The law of the module's docstring for N users: float64[N, num_items].

        loved_qualities: int8[N, num_qualities]. loved_brands: int8[N, num_brands]. latest: int64[N], each user's latest
        item here, -1 for none. hints: int8[N, num_qualities], words of the latest item in the trigger domain. had:
        bool[N, num_items], items that the user cannot get again.
        """
        # Of an item's two quality words and its brand, how many the user loves; of the words, how many the hints have.
        first, second = self.quality.T
        taste = loved_qualities[:, first] + loved_qualities[:, second] + loved_brands[:, self.brand]
        signal = hints[:, first] + hints[:, second]
        log_odds = config.popularity_strength * self.log_popularity + config.taste_strength * taste
        log_odds += config.habit_strength * self.follows[latest] + config.cross_domain_strength * signal
        log_odds[had] = -np.inf
        # Softmax over the items, with the greatest log-odds taken out first so that nothing overflows.
        odds = np.exp(log_odds - log_odds.max(axis=1, keepdims=True))
        chances: np.ndarray = odds / odds.sum(axis=1, keepdims=True)
        return chances


@dataclass(frozen=True)
class _Crowd:
    """The users of a platform, and their events, sorted by user and time."""

    user_ids: tuple[str, ...]
    row_of_user: dict[str, int]
    loved_qualities: np.ndarray
    """int8[num_users, num_qualities]."""
    loved_brands: np.ndarray
    """int8[num_users, num_brands]."""
    offsets: np.ndarray
    """int64[num_users + 1]: where each user's events begin."""
    user: np.ndarray
    """int64[num_events]."""
    domain: np.ndarray
    """int64[num_events]: indices into the platform's domains."""
    item: np.ndarray
    """int64[num_events]: rows of the domain's shelf."""
    timestamp: np.ndarray
    """int64[num_events]: seconds UTC."""


def _brand_names() -> tuple[str, ...]:
    return (*SHARED_BRANDS, *itertools.chain(*BRANDS_OF_DOMAIN.values()))


def _stock(config: SyntheticConfig, number: int, name: str) -> _Shelf:
    """Draw the items of a domain: different titles, popularity without regard to them, and what follows what."""
    generator = np.random.default_rng([config.seed, 0, number])
    size, kinds = config.items_per_domain, KINDS_OF_DOMAIN[name]
    brands = (*SHARED_BRANDS, *BRANDS_OF_DOMAIN[name])
    # Each item is a number drawn without repetition that stands for a brand, a pair of quality words and a kind.
    pairs = np.array(list(itertools.combinations(range(len(QUALITIES)), 2)))
    drawn = generator.choice(len(brands) * len(pairs) * len(kinds), size, replace=False)
    own_brand, pair, kind = np.unravel_index(drawn, (len(brands), len(pairs), len(kinds)))
    quality = generator.permuted(pairs[pair], axis=1)
    has_quality = np.zeros((size + 1, len(QUALITIES)), dtype=np.int8)
    np.put_along_axis(has_quality[:-1], quality, 1, axis=1)
    # The kinds that often follow each kind, and from them the items that often follow each item.
    next_kinds = np.zeros((len(kinds), len(kinds)), dtype=np.int8)
    likely = generator.permuted(np.tile(np.arange(len(kinds)), (len(kinds), 1)), axis=1)[:, :NEXT_KINDS]
    np.put_along_axis(next_kinds, likely, 1, axis=1)
    follows = np.vstack([next_kinds[kind][:, kind], np.zeros((1, size), dtype=np.int8)])
    names = PLATFORMS[next(platform for platform, names in PLATFORMS.items() if name in names)]
    item_ids = tuple(f"{name}-{item:0{len(str(size))}d}" for item in range(1, size + 1))
    return _Shelf(
        name=name,
        trigger=names[names.index(name) - 1],
        item_ids=item_ids,
        titles=tuple(
            f"{brands[b]} {QUALITIES[first]} {QUALITIES[second]} {kinds[k]}"
            for b, (first, second), k in zip(own_brand, quality, kind, strict=True)
        ),
        row_of_item={item: row for row, item in enumerate(item_ids)},
        quality=quality,
        has_quality=has_quality,
        brand=np.array([_brand_names().index(brand) for brand in brands])[own_brand],
        kind=kind,
        log_popularity=-np.log(generator.permutation(size) + 1.0),
        follows=follows,
    )


def _live(config: SyntheticConfig, number: int, platform: str, num_users: int, shelves: list[_Shelf]) -> _Crowd:
    """Draw the users of a platform: their tastes, when and where they act, then all items, one step of all at a time.

    Tastes, plans and items have a stream of random numbers each, so that worlds that differ in their strengths alone
    have the same users, who act at the same times in the same domains.
    """
    generator = np.random.default_rng([config.seed, 1, number])
    loved_qualities = (generator.random((num_users, len(QUALITIES))).argsort(axis=1) < LOVED_QUALITIES).astype(np.int8)
    loved_brands = (generator.random((num_users, len(_brand_names()))) < LOVED_BRANDS).astype(np.int8)
    user, domain, timestamp = _plan(config, np.random.default_rng([config.seed, 2, number]), num_users, len(shelves))
    user_ids = tuple(f"{platform}-{name:0{len(str(num_users))}d}" for name in range(1, num_users + 1))
    crowd = _Crowd(
        user_ids=user_ids,
        row_of_user={name: row for row, name in enumerate(user_ids)},
        loved_qualities=loved_qualities,
        loved_brands=loved_brands,
        offsets=offsets_of(np.bincount(user, minlength=num_users)),
        user=user,
        domain=domain,
        item=np.full(len(user), -1, dtype=np.int64),
        timestamp=timestamp,
    )
    _choose_items(config, np.random.default_rng([config.seed, 3, number]), crowd, shelves)
    return crowd


def _plan(
    config: SyntheticConfig, generator: np.random.Generator, num_users: int, num_domains: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The user, domain and time of each event, by user and time."""
    # Everyone is active in the domain with the smallest chance drawn, and in those below `domain_share`.
    chance = generator.random((num_users, num_domains))
    active = (chance < config.domain_share) | (chance == chance.min(axis=1, keepdims=True))
    counts = np.where(active, generator.integers(config.min_events, config.max_events + 1, active.shape), 0)
    per_user = counts.sum(axis=1)
    user = np.repeat(np.arange(num_users), per_user)
    domain = np.repeat(np.tile(np.arange(num_domains), num_users), counts.ravel())
    domain = domain[np.lexsort((generator.random(len(domain)), user))]  # shuffled within each user
    start = FIRST_SECOND + generator.integers(0, YEAR, num_users)
    timestamp = start[user] + generator.integers(0, YEAR, len(user))
    # Sorted within each user; the place of each event is added, so that no two times of a user are equal.
    place = np.arange(len(user)) - offsets_of(per_user)[user]
    return user, domain, timestamp[np.lexsort((timestamp, user))] + place


def _choose_items(
    config: SyntheticConfig, generator: np.random.Generator, crowd: _Crowd, shelves: list[_Shelf]
) -> None:
    """Draw the item of each event by the law, into `crowd.item`: every user's first event, then the second ones ..."""
    num_users = len(crowd.user_ids)
    uniform = generator.random(len(crowd.user))
    latest = np.full((num_users, len(shelves)), -1, dtype=np.int64)  # item of each user and domain, -1 for none
    had = np.zeros((len(shelves), num_users, config.items_per_domain), dtype=bool)
    place = np.arange(len(crowd.user)) - crowd.offsets[crowd.user]
    for step in range(int(place.max()) + 1):
        now = np.flatnonzero(place == step)
        for index, shelf in enumerate(shelves):
            event = now[crowd.domain[now] == index]
            who = crowd.user[event]
            chances = shelf.probabilities(
                config,
                crowd.loved_qualities[who],
                crowd.loved_brands[who],
                latest[who, index],
                shelves[index - 1].has_quality[latest[who, index - 1]],
                had[index, who],
            )
            # The drawn item is the first whose cumulated chance exceeds the uniform number.
            total = np.cumsum(chances, axis=1)
            drawn = (total <= uniform[event, None] * total[:, -1:]).sum(axis=1)
            crowd.item[event] = latest[who, index] = drawn
            had[index, who, drawn] = True
