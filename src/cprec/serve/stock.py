"""The items that are served: the engines as they are now, and changes that take effect in all of them together."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from cprec.data.catalogue import Catalogue
from cprec.data.cleaning import clean_title, has_word
from cprec.errors import CPRecError
from cprec.serve import messages as m
from cprec.serve.engine import Engine
from cprec.serve.items import ItemStore, StoredItem, with_items, withdrawn_of
from cprec.serve.lookup import TitleSearch, check_ids

log = logging.getLogger("cprec.serve")

Items = Mapping[tuple[str, str], StoredItem]
"""By domain and item id."""

FOLLOW_SECONDS = 0.1
"""How often the store is looked at for changes that other processes have made."""


@dataclass(frozen=True)
class _Served:
    """What is served at one moment."""

    engines: Mapping[str, Engine]
    titles: TitleSearch
    items: Items
    """What the engines have of the store."""

    def with_items(self, changes: Items) -> _Served:
        """With changes besides. Raises CPRecError for items that the engines cannot take."""
        items = {**self.items, **changes}
        catalogue = with_items(self.titles.catalogue, tuple(changes.values()))
        withdrawn = withdrawn_of(items.values())
        engines = {name: engine.with_items(catalogue, withdrawn) for name, engine in self.engines.items()}
        for engine in engines.values():
            engine.catalogue.index(engine.item_fields)
        return _Served(engines, TitleSearch(catalogue), items)


class Stock:
    """Engines of one catalogue by name, the store of changed items, and a search of titles.

    A request keeps the engine that it got: a change makes new engines. A thread takes in what other processes with the
    same store have changed. Coroutines are called from one event loop, the other methods from any thread.
    """

    def __init__(self, engines: Sequence[Engine], store: ItemStore | None = None) -> None:
        """Raises DataError if the items in the store cannot be put into the catalogue."""
        found = {engine.name: engine for engine in engines}
        assert len(found) == len(engines) > 0, "engines need names of their own"
        self._default = engines[0].name
        self._store = store or ItemStore(None)
        self._now = _Served(found, TitleSearch(engines[0].catalogue), {})
        if self._store.items:
            self._now = self._now.with_items(self._store.items)
        self._one_change = asyncio.Lock()
        self._alone = threading.Lock()
        """Is held by the thread that uses the store, or makes what is served next."""
        self.is_behind = False
        """Changes of other processes could not be taken in; the log says why."""
        self._closing = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="items", daemon=True)
        if self._store.is_open:
            self._follower.start()

    @property
    def names(self) -> list[str]:
        """The names of the engines; the first answers where a request names none."""
        return list(self._now.engines)

    def engine(self, name: str | None = None) -> Engine:
        """An engine as it is now, with all changes of items. Raises Refused for an unknown name."""
        engines = self._now.engines
        try:
            return engines[name or self._default]
        except KeyError:
            raise m.Refused(422, f"model={name!r}: the models here are {', '.join(engines)}") from None

    def domain(self, engine: Engine, name: str | None) -> str:
        """The domain of a request, by default that of the engine. Raises Refused for one that it does not have."""
        name = engine.domain if name is None else name
        if name is None or name not in engine.catalogue.domains:
            known = ", ".join(engine.catalogue.domains)
            raise m.Refused(422, f"domain={name!r}: name one of {known}")
        return name

    def sizes(self) -> dict[str, int]:
        """How many items of each domain can be recommended."""
        engine = self.engine()
        return {
            name: len(engine.catalogue.rows_of(name)) - len(engine.withdrawn.get(name, ()))
            for name in engine.catalogue.domains
        }

    def close(self) -> None:
        """Take no more changes; those made are on disk already."""
        self._closing.set()
        if self._follower.is_alive():
            self._follower.join()
        with self._alone:
            self._store.close()

    async def find(self, query: str, domain: str | None, limit: int) -> m.FoundItems:
        """Items in stock whose title has all words of a query, or whose id it is; by id, then in catalogue order."""
        now = self._now
        engine, titles = now.engines[self._default], now.titles
        catalogue = titles.catalogue
        if domain is not None:
            self.domain(engine, domain)

        def found() -> Iterator[m.FoundItem]:
            for row in titles.find(query, domain):
                name, item_id = catalogue.domains[catalogue.domain[row]], str(catalogue.item_id[row])
                if item_id not in engine.withdrawn.get(name, ()):
                    yield m.FoundItem(item_id=item_id, domain=name, title=str(catalogue.title[row]))

        return m.FoundItems(items=await asyncio.to_thread(lambda: list(islice(found(), limit))))

    async def put(self, items: Sequence[m.NewItem]) -> m.Changed:
        """Add items, or change the text of those there are, in every engine: all or none, on disk on return."""
        stored = [self._checked(item) for item in items]
        return await self._change(lambda _: stored)

    def _checked(self, item: m.NewItem) -> StoredItem:
        self.domain(self.engine(), item.domain)
        title = clean_title(item.title)
        if not has_word(title):
            raise m.Refused(
                422, f"item {item.item_id!r}: nothing is left of the title {item.title!r}: give one with a word"
            )
        if not all(character.isprintable() for character in item.item_id):
            raise m.Refused(422, f"item_id {item.item_id!r} holds control characters: give one without")
        brand, categories = clean_title(item.brand), clean_title(item.categories)
        return StoredItem(domain=item.domain, item_id=item.item_id, title=title, brand=brand, categories=categories)

    async def withdraw(self, domain: str | None, item_ids: Sequence[str]) -> m.Changed:
        """Stop recommending items until they are put again: all or none. Histories may still name them."""
        domain = self.domain(self.engine(), domain)

        def changes(catalogue: Catalogue) -> list[StoredItem]:
            check_ids(catalogue, domain, item_ids)
            out = []
            for item_id in dict.fromkeys(item_ids):
                row = catalogue.row_of_id(domain, item_id)
                text = {name: str(getattr(catalogue, name)[row]) for name in ("title", "brand", "categories")}
                out.append(StoredItem(domain=domain, item_id=item_id, withdrawn=True, **text))
            return out

        return await self._change(changes)

    async def _change(self, changes: Callable[[Catalogue], Sequence[StoredItem]]) -> m.Changed:
        """Make changes one after the other; `changes` gets the catalogue with those before, of all processes."""
        if not self._store.is_open:
            raise m.Refused(
                409, "items cannot be changed here: start the service with state=FOLDER, where changes last"
            )
        async with self._one_change:  # those that wait need no thread
            try:
                items = await asyncio.to_thread(self._make, changes)
            except TimeoutError:
                raise m.Refused(503, "another process is changing items: try again", retry_after=1) from None
            except (CPRecError, OSError) as error:
                log.error("changes of items cannot be stored: %s", error)
                why = error.strerror if isinstance(error, OSError) else error
                raise m.Refused(507, f"the change cannot be stored, and was not made: {why}") from None
        sizes = self.sizes()
        domains = sorted({item.domain for item in items})
        return m.Changed(changed=len(items), in_stock={name: sizes[name] for name in domains})

    def _make(self, changes: Callable[[Catalogue], Sequence[StoredItem]]) -> Sequence[StoredItem]:
        """Make a change behind all others, and return its items. Items that the engines cannot take are not stored."""
        with self._store.changing(), self._alone:
            self._store.read()
            before, catalogue = self._news(), self._now.titles.catalogue
            items = changes(with_items(catalogue, tuple(before.values())) if before else catalogue)
            try:
                made = self._now.with_items({**before, **{(item.domain, item.item_id): item for item in items}})
            except CPRecError as error:
                raise m.Refused(422, str(error)) from None
            self._store.append(items)
            self._now = made
        return items

    def catch_up(self) -> None:
        """Take in what other processes have changed, if anything.

        What cannot be taken in is logged once, and tried again at the next call.
        """
        with self._alone:
            try:
                if not (self.is_behind or self._store.has_news or self._store.items is not self._now.items):
                    return
                self._store.read()
                news = self._news()
                self._now = replace(self._now.with_items(news) if news else self._now, items=self._store.items)
                self.is_behind = False
            except Exception as error:  # any that ended the thread would leave old items for ever
                if not self.is_behind:
                    log.error("changes of items by other processes cannot be taken in: %s", error, exc_info=error)
                self.is_behind = True

    def _news(self) -> Items:
        """What was read from the store and is not served yet."""
        return {key: item for key, item in self._store.items.items() if self._now.items.get(key) != item}

    def _follow(self) -> None:
        while not self._closing.wait(FOLLOW_SECONDS):
            self.catch_up()
