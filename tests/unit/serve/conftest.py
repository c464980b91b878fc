"""A small catalogue, an engine whose answers are known, and a service on a loopback port."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import pyarrow as pa
import pytest
import uvicorn

from cprec.data.catalogue import Catalogue
from cprec.data.word_index import QUERY
from cprec.rank.recommending import Recommending
from cprec.recommender import Proof, Ranking, RankingQuery
from cprec.schema import Item
from cprec.serve.app import make_app
from cprec.serve.engine import CacheCounts
from cprec.serve.service import Service

BOOKS = ("Dune", "Dune Messiah", "Emma", "War & Peace", "Ulysses", "1984", "b1")
GAMES = ("Go", "Chess", "Go deluxe", "Ludo")


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    def table(prefix: str, titles: tuple[str, ...]) -> pa.Table:
        return pa.table({"item_id": [f"{prefix}{row}" for row in range(len(titles))], "title": titles})

    return Catalogue.from_tables({"books": table("b", BOOKS), "games": table("g", GAMES)})


class FakeEngine:
    """Scores an item by its place in the catalogue, less a tenth of each event before: the first items are best. What
    the words of a text say counts three times, as much as its two parts together."""

    def __init__(self, catalogue: Catalogue, name: str = "fake", domain: str | None = "books") -> None:
        self.name, self.domain, self.catalogue = name, domain, catalogue
        self.withdrawn: Mapping[str, frozenset[str]] = {}
        self.max_history = 3
        self.way: str | None = None
        self.weights: Mapping[str, float] = {"model": 1.0, "graph": 2.0}
        self.item_fields: tuple[str, ...] = ("title",)
        self.cache: CacheCounts | None = None
        self.proven = True
        self.calls: list[list[RankingQuery]] = []
        """The queries of each batch, of all engines made from this one."""
        self.before: list[Callable[[Sequence[RankingQuery], Callable[[], bool] | None], None]] = []
        """What happens when the engine is called: it may wait, or raise."""

    def rank(
        self, queries: Sequence[RankingQuery], k: int, mode: Any = None, stop: Callable[[], bool] | None = None
    ) -> list[Ranking]:
        self.calls.append(list(queries))
        for act in self.before:
            act(queries, stop)
        out = []
        for query in queries:
            ids = [str(self.catalogue.item_id[row]) for row in self.catalogue.rows_of(query.domain)]
            gone = query.exclude | self.withdrawn.get(query.domain, frozenset())
            chosen = [
                name
                for name in (ids if query.candidates is None else query.candidates)
                if query.candidates is not None or (name not in gone and (query.allow is None or name in query.allow))
            ]
            words = 3 * self.catalogue.words_of(query.domain).effects(query.text)[1].sum(axis=0)
            score = {
                name: words[ids.index(name)] - float(ids.index(name)) - sum(self.weight(item) for item in query.history)
                for name in chosen
            }
            chosen.sort(key=lambda name: -score[name])
            chosen = chosen if query.candidates is not None else chosen[:k]
            proof = Proof(gap=0 if self.proven else 1, expanded=len(ids))
            out.append(Ranking("", tuple(chosen), tuple(score[name] for name in chosen), proof))
        return out

    def weight(self, item: Item) -> float:
        return 0.1 * (1 + int(item.item_id[1:])) if item.item_id[1:].isdigit() else 0.0

    @property
    def domains(self) -> tuple[str, ...]:
        return self.catalogue.domains

    def shown(self, query: RankingQuery) -> tuple[Item, ...]:
        return query.history[-self.max_history :]

    asked_in_words = Recommending.asked_in_words

    def effects(self, queries: Sequence[RankingQuery], rankings: Sequence[Ranking]) -> list[dict[str, float]]:
        """An average item has a score of -10. Half of the rest is the model's, and half a graph's; with a text, a third
        is that of each part."""
        names = [[*self.weights, *[QUERY] * bool(query.text)] for query in queries]
        return [
            {name: (ranking.scores[0] + 10) / len(mine) for name in mine}
            for mine, ranking in zip(names, rankings, strict=True)
        ]

    def with_items(self, catalogue: Catalogue, withdrawn: Mapping[str, frozenset[str]]) -> FakeEngine:
        out = copy.copy(self)
        out.catalogue, out.withdrawn = catalogue, withdrawn
        return out


class LastFirst:
    """A baseline: the last item of the domain is the best."""

    def __init__(self, catalogue: Catalogue, name: str = "last first", most: int = 100) -> None:
        self.name, self.catalogue, self.most = name, catalogue, most

    def rank(self, queries: Sequence[RankingQuery], k: int) -> list[Ranking]:
        out = []
        for query in queries:
            self.catalogue.find(query.domain, [i.item_id for i in query.history if i.domain == query.domain])
            self.catalogue.find(query.domain, query.exclude)
            ids = [str(self.catalogue.item_id[row]) for row in reversed(self.catalogue.rows_of(query.domain))]
            kept = [i for i in ids if i not in query.exclude and (query.allow is None or i in query.allow)]
            kept = kept[: min(k, self.most)]
            out.append(Ranking("", tuple(kept), tuple(-float(place) for place in range(len(kept)))))
        return out


@pytest.fixture
def engine(catalogue: Catalogue) -> FakeEngine:
    return FakeEngine(catalogue)


@contextmanager
def running(service: Service, **options: Any) -> Iterator[httpx.Client]:
    """A client of the service, which listens on a free loopback port meanwhile."""
    config = uvicorn.Config(make_app(service, **options), port=0, log_config=None, lifespan="on")
    server = uvicorn.Server(config)
    socket = config.bind_socket()
    socket.listen()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=60, trust_env=False, verify=False) as client:
        try:
            yield client
        finally:  # the client goes last: what it has asked is answered
            server.should_exit = True
            thread.join()
            socket.close()


class Held:
    """Makes an engine busy until it is released."""

    def __init__(self, engine: FakeEngine) -> None:
        self.entered, self.released = threading.Semaphore(0), threading.Semaphore(0)
        engine.before.append(self)

    def __call__(self, *_: Any) -> None:
        self.entered.release()
        assert self.released.acquire(timeout=60)

    def wait(self) -> None:
        """Until the engine is called."""
        assert self.entered.acquire(timeout=60)


@pytest.fixture
def hold() -> type[Held]:
    return Held


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[httpx.Client]:
    with running(Service([engine], [LastFirst(engine.catalogue)], deadline_ms=60_000)) as client:
        yield client


@pytest.fixture
def served() -> Callable[..., Any]:
    """`with served(service, **options) as client`: the service on a loopback port."""
    return running


@pytest.fixture
def last_first(catalogue: Catalogue) -> LastFirst:
    return LastFirst(catalogue)


@pytest.fixture(scope="session")
def shared(catalogue: Catalogue) -> Iterator[httpx.Client]:
    """A service for requests that leave nothing behind."""
    with running(Service([FakeEngine(catalogue)], [LastFirst(catalogue)], deadline_ms=60_000)) as client:
        yield client


@pytest.fixture(scope="session")
def session_service(catalogue: Catalogue) -> Callable[..., Any]:
    """`with session_service(store) as client`: for tests that share one."""
    return lambda store: running(Service([FakeEngine(catalogue)], [LastFirst(catalogue)], store, deadline_ms=60_000))
