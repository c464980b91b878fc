"""The items that are served: the engines as they are now, and changes that take effect in all of them together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from cprec.data.cleaning import clean_title, has_word
from cprec.errors import CPRecError
from cprec.serve import messages as m
from cprec.serve.engine import Engine
from cprec.serve.items import ItemStore, StoredItem, with_items, withdrawn_of
from cprec.serve.lookup import TitleSearch, check_ids

log = logging.getLogger("cprec.serve")


class Stock:
    """Engines of one catalogue by name, the store of changed items, and a search of titles.

    Its methods are called from one event loop. A request keeps the engine that it got: a change makes new engines.
    """

    def __init__(self, engines: Sequence[Engine], store: ItemStore | None = None) -> None:
        """Raises DataError if the items in the store cannot be put into the catalogue."""
        self._engines = {engine.name: engine for engine in engines}
        assert len(self._engines) == len(engines) > 0, "engines need names of their own"
        self._default = engines[0].name
        self._store = store or ItemStore(None)
        self._one_change = asyncio.Lock()
        if self._store.items:
            self._engines = self._with(tuple(self._store.items.values()))
        self._titles = TitleSearch(self.engine().catalogue)

    @property
    def names(self) -> list[str]:
        """The names of the engines; the first answers where a request names none."""
        return list(self._engines)

    def engine(self, name: str | None = None) -> Engine:
        """An engine as it is now, with all changes of items. Raises Refused for an unknown name."""
        try:
            return self._engines[name or self._default]
        except KeyError:
            raise m.Refused(422, f"model={name!r}: the models here are {', '.join(self._engines)}") from None

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
        """Let another process have the store; changes are on disk already."""
        self._store.close()

    async def find(self, query: str, domain: str | None, limit: int) -> m.FoundItems:
        """Items in stock whose title has all words of a query, or whose id it is; by id, then in catalogue order."""
        engine, titles = self.engine(), self._titles
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
        return await self._change(lambda: stored)

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

        def changes() -> list[StoredItem]:
            catalogue = self.engine().catalogue
            check_ids(catalogue, domain, item_ids)
            out = []
            for item_id in dict.fromkeys(item_ids):
                row = catalogue.row_of_id(domain, item_id)
                text = {name: str(getattr(catalogue, name)[row]) for name in ("title", "brand", "categories")}
                out.append(StoredItem(domain=domain, item_id=item_id, withdrawn=True, **text))
            return out

        return await self._change(changes)

    async def _change(self, changes: Callable[[], Sequence[StoredItem]]) -> m.Changed:
        """Make changes one after the other; `changes` is called when those before are in effect."""
        if not self._store.is_open:
            raise m.Refused(
                409, "items cannot be changed here: start the service with state=FOLDER, where changes last"
            )
        async with self._one_change:
            items = changes()
            try:
                engines, titles = await asyncio.to_thread(self._build_and_store, items)
            except CPRecError as error:
                raise m.Refused(422, str(error)) from None
            except OSError as error:
                log.error("changes of items cannot be stored: %s", error)
                raise m.Refused(507, f"the change cannot be stored, and was not made: {error.strerror}") from None
            self._engines, self._titles = engines, titles
        sizes = self.sizes()
        domains = sorted({item.domain for item in items})
        return m.Changed(changed=len(items), in_stock={name: sizes[name] for name in domains})

    def _build_and_store(self, items: Sequence[StoredItem]) -> tuple[dict[str, Engine], TitleSearch]:
        """The engines with changed items. Items that the engines cannot take are not stored."""
        engines = self._with(items)
        for engine in engines.values():
            engine.catalogue.index(engine.item_fields)
        titles = TitleSearch(next(iter(engines.values())).catalogue)
        self._store.append(items)
        return engines, titles

    def _with(self, items: Sequence[StoredItem]) -> dict[str, Engine]:
        catalogue = with_items(self.engine().catalogue, items)
        changed = {(item.domain, item.item_id): item for item in items}
        withdrawn = withdrawn_of((self._store.items | changed).values())
        return {name: engine.with_items(catalogue, withdrawn) for name, engine in self._engines.items()}
