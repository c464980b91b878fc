"""The service behind the HTTP interface: histories to queries, queries to engines, and what stands in for these."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from cprec import __version__
from cprec.data.catalogue import Catalogue, TextKind
from cprec.data.cleaning import clean_title, has_word, spelling
from cprec.errors import CPRecError, ModelError, UnknownItemError
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item
from cprec.serve import messages as m
from cprec.serve.batching import Answer, Ask, Batcher, Job, Overloaded, is_whole
from cprec.serve.engine import Baseline, Engine, reads_nothing
from cprec.serve.items import ItemStore, StoredItem, with_items, withdrawn_of
from cprec.serve.metrics import Metrics

T = TypeVar("T")

log = logging.getLogger("cprec.serve")

POPULARITY = "popularity"
"""The baseline that answers for histories that say nothing."""
UNHEALTHY = 3
"""Calls of an engine that fail one after the other until the service calls itself ill."""
PATIENCE_MS = 30_000.0
"""What scores and explanations may take where the request does not say: nothing stands in for them."""
NAMED = 100
"""Unknown ids that a refusal names."""
HUNG_UP = 499
"""The status of a request whose client is gone; nobody sees it but the metrics."""
LONG_HISTORY = 1_000
"""Events from which on a history is looked up beside the event loop, which goes on meanwhile."""


class Refused(Exception):
    """A request that is not answered as asked; the message is for whoever asked."""

    def __init__(self, status: int, message: str, unknown: Sequence[str] = (), retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.unknown, self.retry_after = status, list(unknown), retry_after


async def never() -> None:
    """What stands for a client that does not hang up."""
    await asyncio.Event().wait()


@dataclass(frozen=True)
class _Question:
    """A request for a list, looked up in the catalogue of one engine."""

    engine: Engine
    query: RankingQuery
    k: int
    mode: str
    deadline_ms: float
    began: float

    def job(self) -> Job:
        ask = Ask(self.engine, self.query.domain, self.k, self.mode, self.deadline_ms)
        return Job(ask, [self.query], self.began + self.deadline_ms / 1000)


class Service:
    """Answers requests with the engines, within deadlines; changes the items of all engines together.

    Its methods are called from one event loop.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        baselines: Sequence[Baseline] = (),
        store: ItemStore | None = None,
        *,
        deadline_ms: float = 1000.0,
        max_batch: int = 32,
        metrics: Metrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The engines have names and the same catalogue; `baselines` stand in for them in this order.

        Raises DataError where what the store has cannot be put into the catalogue.
        """
        self.metrics = metrics or Metrics()
        self._engines = {engine.name: engine for engine in engines}
        assert len(self._engines) == len(engines) > 0, "engines need names of their own"
        self._default = engines[0].name
        self._baselines = tuple(baselines)
        self._popularity = next((each for each in baselines if each.name == POPULARITY), None)
        self._store = store or ItemStore(None)
        self._deadline_ms = deadline_ms
        self._clock = clock
        self._one_change = asyncio.Lock()
        self._titles = _Titles(engines[0].catalogue)
        if self._store.items:
            self._engines = self._changed(tuple(self._store.items.values()))
            self._titles = _Titles(self.engine().catalogue)
        for engine in self._engines.values():  # builds what is built once, before anybody waits for it
            engine.catalogue.index(engine.item_fields)
            for domain in engine.catalogue.domains:
                engine.rank([RankingQuery(query_id="", domain=domain, history=())], 1, "beam")
        self._batcher = Batcher(
            max_batch=max_batch, max_seconds=deadline_ms / 2000, clock=clock, observe=self.metrics.batch
        )
        self.metrics.gauge("cprec_queue_queries", "Queries that wait for an engine", lambda: self._batcher.waiting)
        self.metrics.gauge(
            "cprec_batch_limit", "Queries that a batch, and the queue, may have now", lambda: self._batcher.limit
        )
        caches = [engine.cache for engine in engines if engine.cache is not None]
        for name, about, field in (
            ("cprec_cache_bytes", "Memory of kept prompts", "num_bytes"),
            ("cprec_cache_max_bytes", "Memory that kept prompts may take", "max_bytes"),
            ("cprec_cache_hit_tokens", "Tokens of prompts that were kept and not read again", "hits"),
        ):
            self.metrics.gauge(name, about, lambda field=field: sum(getattr(cache, field) for cache in caches))  # type: ignore[misc]
        self.closing = False
        """It takes no more requests."""
        self._is_broken = False

    def close(self) -> None:
        """Answer what waits, then stop; changes of items are on disk already."""
        self.closing = True
        self._batcher.close()
        self._store.close()

    @property
    def is_healthy(self) -> bool:
        """False once an engine fails every time, or a model has said what is no number; a restart may help."""
        return not self._is_broken and self._batcher.failures < UNHEALTHY

    def engine(self, name: str | None = None) -> Engine:
        """An engine as it is now, with all items that were put. Raises Refused for a name that is none."""
        try:
            return self._engines[name or self._default]
        except KeyError:
            raise Refused(422, f"model={name!r}: the models here are {', '.join(self._engines)}") from None

    # ---- lists -------------------------------------------------------------------------------------------------------

    async def recommend(
        self, requests: Sequence[m.RecommendRequest], hung_up: Callable[[], Awaitable[None]] = never
    ) -> list[m.RecommendResponse]:
        """A list for each request, by its deadline; what waits is dropped when `hung_up` returns.

        Raises Refused: 422 where a request names what is not there, 503 under overload or where there is neither time
        nor a baseline.
        """
        began = self._clock()
        questions = [await self._question(request, began) for request in requests]
        jobs = [None if self._may_be_popular(question) else question.job() for question in questions]
        self._submit([job for job in jobs if job is not None])
        lists = (self._list(*each) for each in zip(questions, jobs, strict=True))
        return await self._unless(hung_up, asyncio.gather(*lists))

    async def _question(self, request: m.RecommendRequest, began: float) -> _Question:
        engine = self.engine(request.model)
        domain = self._domain(engine, request.domain)
        history = await self._history(engine, domain, request.history)
        allow, deny = request.allow, request.deny
        self._check_ids(engine, domain, [*(allow or ()), *deny])
        seen = [item.item_id for item in history if item.domain == domain and request.exclude_seen]
        query = RankingQuery(
            query_id="",
            domain=domain,
            history=history,
            exclude=engine.catalogue.of_equal_text(domain, seen, engine.item_fields) | frozenset(deny),
            allow=None if allow is None else frozenset(allow),
        )
        return _Question(engine, query, request.k, request.mode, request.deadline_ms or self._deadline_ms, began)

    def _may_be_popular(self, question: _Question) -> bool:
        """Whether the model reads no event of the history, and popular items are known."""
        return self._popularity is not None and reads_nothing(question.engine, question.query)

    async def _popular(self, question: _Question) -> Ranking | None:
        """The popular items, where as many are popular as may be had."""
        assert self._popularity is not None
        engine, query = question.engine, question.query
        found = await asyncio.to_thread(_baseline_ranking, self._popularity, question)
        gone = query.exclude | engine.withdrawn.get(query.domain, frozenset())
        num_left = len(query.allow - gone if query.allow is not None else engine.catalogue.rows_of(query.domain))
        num_left -= len(gone) if query.allow is None else 0
        return found if len(found.item_ids) >= min(question.k, num_left) else None

    async def _list(self, question: _Question, job: Job | None) -> m.RecommendResponse:
        """The engine's list or, where that is late, short or fails, a baseline's.

        Without a job it is the popular items or, where these are too few, what it is with one.
        """
        if job is None:
            popular = await self._popular(question)
            if popular is not None:
                return self._response(question, popular, POPULARITY, degraded=False, proven=False)
            job = question.job()
            self._submit([job])
        k, late, ranking = question.k, False, None
        broken: ModelError | None = None
        try:
            answer = await self._answer(job)
        except TimeoutError:
            late = True
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._failed(error)
            broken = error if isinstance(error, ModelError) else None
        else:
            ranking, late = answer.rankings[0], answer.stopped
        if ranking is not None:
            proven = ranking.proof is not None and ranking.proof.exact
            if proven or is_whole(ranking, k) or (ranking.item_ids and not self._baselines):
                found, mode, degraded = ranking, "exact" if proven else "beam", late and not proven
                if question.mode == "beam":
                    mode, degraded = "beam", not is_whole(ranking, k)
                return self._response(question, found, mode, degraded, proven)
        if not self._baselines and broken is not None:
            raise Refused(500, str(broken))
        if not self._baselines:
            raise self._shed(1, "the model could not answer in time" if late else "the model failed")
        name, found = await asyncio.to_thread(self._stand_in, question)
        return self._response(question, found, name, degraded=True, proven=False)

    def _response(
        self, question: _Question, ranking: Ranking, mode: str, degraded: bool, proven: bool
    ) -> m.RecommendResponse:
        self.metrics.answered(mode, degraded)
        domain, engine = question.query.domain, question.engine
        return m.RecommendResponse(
            items=_scored(engine.catalogue, domain, ranking.item_ids[: question.k], ranking.scores),
            mode=mode,
            degraded=degraded,
            proven=proven,
            milliseconds=self._milliseconds(question.began),
            domain=domain,
            model=engine.name,
        )

    def _stand_in(self, question: _Question) -> tuple[str, Ranking]:
        """The first baseline's list that is whole, or the longest."""
        best: tuple[str, Ranking] | None = None
        for baseline in self._baselines:
            found = _baseline_ranking(baseline, question)
            if best is None or len(found.item_ids) > len(best[1].item_ids):
                best = baseline.name, found
            if len(found.item_ids) >= question.k:
                break
        assert best is not None
        return best

    async def baselines(self, request: m.RecommendRequest) -> m.BaselinesResponse:
        """The list of each baseline."""
        question = await self._question(request, self._clock())

        def lists() -> list[m.BaselineList]:
            out = []
            for baseline in self._baselines:
                found = _baseline_ranking(baseline, question)
                ids = found.item_ids[: question.k]
                items = _scored(question.engine.catalogue, question.query.domain, ids, found.scores)
                out.append(m.BaselineList(name=baseline.name, items=items))
            return out

        return m.BaselinesResponse(lists=await asyncio.to_thread(lists))

    # ---- scores ------------------------------------------------------------------------------------------------------

    async def score(self, request: m.ScoreRequest, hung_up: Callable[[], Awaitable[None]] = never) -> m.ScoreResponse:
        """The score of each candidate. Raises Refused as `recommend` does."""
        began = self._clock()
        engine = self.engine(request.model)
        domain = self._domain(engine, request.domain)
        history = await self._history(engine, domain, request.history)
        self._check_ids(engine, domain, request.candidates)
        query = RankingQuery(
            query_id="", domain=domain, history=history, candidates=tuple(dict.fromkeys(request.candidates))
        )
        (ranking,) = await self._scores(engine, [query], began, request.deadline_ms, hung_up)
        scores = dict(zip(ranking.item_ids, ranking.scores, strict=True))
        return m.ScoreResponse(
            items=_scored(engine.catalogue, domain, request.candidates, [scores[item] for item in request.candidates]),
            milliseconds=self._milliseconds(began),
            domain=domain,
            model=engine.name,
        )

    async def explain(
        self, request: m.ExplainRequest, hung_up: Callable[[], Awaitable[None]] = never
    ) -> m.ExplainResponse:
        """What each event, and each domain's events, add to the score of an item: exact, by leaving them out."""
        began = self._clock()
        engine = self.engine(request.model)
        domain = self._domain(engine, request.domain)
        history = await self._history(engine, domain, request.history)
        self._check_ids(engine, domain, [request.item_id])
        whole = RankingQuery(query_id="", domain=domain, history=history, candidates=(request.item_id,))
        whole = replace(whole, history=engine.shown(whole))
        events = whole.history
        domains = sorted({event.domain for event in events})
        shorter = [events[:place] + events[place + 1 :] for place in range(len(events))]
        shorter += [tuple(event for event in events if event.domain != name) for name in domains]
        queries = [whole, *(replace(whole, history=history) for history in shorter)]
        rankings = await self._scores(engine, queries, began, request.deadline_ms, hung_up)
        score, *without = (ranking.scores[0] for ranking in rankings)
        effects = [score - other for other in without]
        (item,) = _scored(engine.catalogue, domain, [request.item_id], [score])
        return m.ExplainResponse(
            item_id=item.item_id,
            title=item.title,
            score=item.score,
            events=[
                m.EventEffect(
                    item_id=event.item_id,
                    title=_title(engine.catalogue, event.domain, event.item_id),
                    domain=event.domain,
                    effect=effect,
                )
                for event, effect in zip(events, effects, strict=False)
            ],
            domains=[
                m.DomainEffect(domain=name, effect=effect)
                for name, effect in zip(domains, effects[len(events) :], strict=True)
            ],
            num_events_read=len(events),
            milliseconds=self._milliseconds(began),
            domain=domain,
            model=engine.name,
        )

    async def _scores(
        self,
        engine: Engine,
        queries: Sequence[RankingQuery],
        began: float,
        deadline_ms: float | None,
        hung_up: Callable[[], Awaitable[None]],
    ) -> list[Ranking]:
        """Rankings of candidates, of all queries together."""
        patience = deadline_ms or PATIENCE_MS
        job = Job(Ask(engine, queries[0].domain, 1, None, patience), queries, began + patience / 1000)
        self._submit([job])
        try:
            return (await self._unless(hung_up, self._answer(job))).rankings
        except TimeoutError:
            raise self._shed(1, f"the scores were not there within {patience:g} ms") from None
        except Refused:
            raise
        except Exception as error:
            self._failed(error)
            why = str(error) if isinstance(error, ModelError) else "the model failed; the log of the service says why"
            raise Refused(500, why) from error

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def _submit(self, jobs: Sequence[Job]) -> None:
        try:
            self._batcher.submit(jobs)
        except Overloaded as overloaded:
            raise self._shed(overloaded.retry_after, str(overloaded)) from None

    async def _answer(self, job: Job) -> Answer:
        """What the engine says. Raises TimeoutError at the deadline."""
        return await asyncio.wait_for(asyncio.wrap_future(job.future), max(0.0, job.deadline - self._clock()))

    async def _unless(self, hung_up: Callable[[], Awaitable[None]], work: Awaitable[T]) -> T:
        """The result of work, which is dropped when the client hangs up: what waits in the queue is taken out."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Refused(HUNG_UP, "the client hung up")
            return task.result()
        finally:
            task.cancel()
            gone.cancel()

    def _shed(self, retry_after: int, message: str) -> Refused:
        self.metrics.shed()
        return Refused(503, message, retry_after=retry_after)

    def _failed(self, error: Exception) -> None:
        self.metrics.failed()
        self._is_broken = self._is_broken or isinstance(error, ModelError)
        log.error("the engine failed: %s", error, exc_info=error)

    def _milliseconds(self, began: float) -> float:
        return round(1000 * (self._clock() - began), 3)

    # ---- looking up --------------------------------------------------------------------------------------------------

    def _domain(self, engine: Engine, name: str | None) -> str:
        name = engine.domain if name is None else name
        if name is None or name not in engine.catalogue.domains:
            known = ", ".join(engine.catalogue.domains)
            raise Refused(422, f"domain={name!r}: name one of {known}")
        return name

    async def _history(self, engine: Engine, domain: str, events: Sequence[m.Event | str]) -> tuple[Item, ...]:
        if len(events) < LONG_HISTORY:
            return _look_up(engine.catalogue, domain, events)
        return await asyncio.to_thread(_look_up, engine.catalogue, domain, events)

    def _check_ids(self, engine: Engine, domain: str, ids: Sequence[str]) -> None:
        """Raise Refused for ids that the domain does not have."""
        unknown = [name for name in dict.fromkeys(ids) if engine.catalogue.row_of_id(domain, name) is None]
        if unknown:
            raise _unknown(unknown, f"of domain {domain!r}")

    # ---- items -------------------------------------------------------------------------------------------------------

    def about(self) -> m.About:
        """What is served."""
        engine = self.engine()
        return m.About(
            model=engine.name,
            models=list(self._engines),
            domains=[m.DomainSize(name=name, num_items=size) for name, size in self._in_stock().items()],
            default_domain=engine.domain,
            baselines=[baseline.name for baseline in self._baselines],
            max_history=engine.max_history,
            version=__version__,
        )

    def _in_stock(self) -> dict[str, int]:
        engine = self.engine()
        return {
            name: len(engine.catalogue.rows_of(name)) - len(engine.withdrawn.get(name, ()))
            for name in engine.catalogue.domains
        }

    async def find(self, query: str, domain: str | None, limit: int) -> m.FoundItems:
        """Items in stock whose title has all words of a query, or whose id it is; by id, then in catalogue order."""
        engine, titles = self.engine(), self._titles
        if domain is not None:
            self._domain(engine, domain)
        withdrawn = engine.withdrawn

        def found() -> list[m.FoundItem]:
            catalogue, out = titles.catalogue, []
            for row in titles.find(query, domain):
                name, item_id = catalogue.domains[catalogue.domain[row]], str(catalogue.item_id[row])
                if item_id not in withdrawn.get(name, ()):
                    out.append(m.FoundItem(item_id=item_id, domain=name, title=str(catalogue.title[row])))
                if len(out) == limit:
                    break
            return out

        return m.FoundItems(items=await asyncio.to_thread(found))

    async def put_items(self, items: Sequence[m.NewItem]) -> m.Changed:
        """Add items, or give them other text, in every engine: all or none, on disk and in effect on return."""
        stored = []
        for item in items:
            self._domain(self.engine(), item.domain)
            title = clean_title(item.title)
            if not has_word(title):
                raise Refused(
                    422, f"item {item.item_id!r}: nothing is left of the title {item.title!r}: give one with a word"
                )
            if not _is_plain(item.item_id):
                raise Refused(422, f"item_id {item.item_id!r} holds control characters: give one without")
            stored.append(
                StoredItem(
                    domain=item.domain,
                    item_id=item.item_id,
                    title=title,
                    brand=clean_title(item.brand),
                    categories=clean_title(item.categories),
                )
            )
        return await self._change(lambda: stored)

    async def withdraw_items(self, domain: str | None, item_ids: Sequence[str]) -> m.Changed:
        """Recommend items no more, until they are put again: all or none. Histories may go on naming them."""
        domain = self._domain(self.engine(), domain)

        def changes() -> list[StoredItem]:
            catalogue = self.engine().catalogue
            self._check_ids(self.engine(), domain, item_ids)
            out = []
            for item_id in dict.fromkeys(item_ids):
                row = catalogue.row_of_id(domain, item_id)
                text = {name: str(getattr(catalogue, name)[row]) for name in ("title", "brand", "categories")}
                out.append(StoredItem(domain=domain, item_id=item_id, withdrawn=True, **text))
            return out

        return await self._change(changes)

    async def _change(self, changes: Callable[[], Sequence[StoredItem]]) -> m.Changed:
        if not self._store.is_open:
            raise Refused(409, "items cannot be changed here: start the service with state=FOLDER, where changes last")
        async with self._one_change:
            items = changes()
            try:
                engines, titles = await asyncio.to_thread(self._store_and_build, items)
            except CPRecError as error:
                raise Refused(422, str(error)) from None
            except OSError as error:
                log.error("changes of items cannot be stored: %s", error)
                raise Refused(507, f"the change cannot be stored, and was not made: {error.strerror}") from None
            self._engines, self._titles = engines, titles
        in_stock = self._in_stock()
        domains = sorted({item.domain for item in items})
        return m.Changed(changed=len(items), in_stock={name: in_stock[name] for name in domains})

    def _store_and_build(self, items: Sequence[StoredItem]) -> tuple[dict[str, Engine], _Titles]:
        """The engines with changed items; what they cannot take is not stored."""
        engines = self._changed(items)
        for engine in engines.values():
            engine.catalogue.index(engine.item_fields)
        titles = _Titles(next(iter(engines.values())).catalogue)
        self._store.append(items)
        return engines, titles

    def _changed(self, items: Sequence[StoredItem]) -> dict[str, Engine]:
        catalogue = with_items(self.engine().catalogue, items)
        withdrawn = withdrawn_of((self._store.items | {(i.domain, i.item_id): i for i in items}).values())
        return {name: engine.with_items(catalogue, withdrawn) for name, engine in self._engines.items()}


class _Titles:
    """The titles of a catalogue for searching."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._spelt = pa.array(catalogue.spellings, pa.string())

    def find(self, query: str, domain: str | None) -> Sequence[int]:
        """Rows whose id is the query, then those whose title has all its words, or parts of words."""
        catalogue = self.catalogue
        domains = catalogue.domains if domain is None else (domain,)
        exact = [row for name in domains if (row := catalogue.row_of_id(name, query)) is not None]
        words = spelling(query).split()
        if not words and query.strip():
            return exact
        first, last = (catalogue.rows_of(name)[[0, -1]] for name in (domains[0], domains[-1]))
        start, titles = int(first[0]), self._spelt.slice(int(first[0]), int(last[1]) - int(first[0]) + 1)
        kept = pa.array([True]).take(pa.array([0] * len(titles), pa.int8()))
        for word in words:
            kept = pc.and_(kept, pc.match_substring(titles, word))
        rows = (pc.indices_nonzero(kept).to_numpy() + start).tolist()
        return [*exact, *(row for row in rows if row not in exact)]


def _look_up(catalogue: Catalogue, domain: str, events: Sequence[m.Event | str]) -> tuple[Item, ...]:
    """The items of a history: by id or by title, in the domain named, or else in the target's and then the others.

    Raises Refused naming those that are nowhere.
    """
    known: dict[tuple[str, str | None, str], Item | None] = {}
    out, unknown = [], []
    kind: TextKind
    for event in events:
        if isinstance(event, str):
            kind, text, where = "any", event, None
        elif event.item_id is not None:
            kind, text, where = "item_id", event.item_id, event.domain
        else:
            kind, text, where = "title", event.title or "", event.domain
        key = (text, where, kind)
        if key not in known:
            known[key] = _find(catalogue, kind, text, where, domain)
        item = known[key]
        if item is None:
            unknown.append(text)
        else:
            out.append(item)
    if unknown:
        raise _unknown(list(dict.fromkeys(unknown)), "of the history")
    return tuple(out)


def _find(catalogue: Catalogue, kind: TextKind, text: str, where: str | None, target: str) -> Item | None:
    if where is not None and where not in catalogue.domains:
        raise Refused(422, f"domain={where!r} in the history: name one of {', '.join(catalogue.domains)}")
    try:
        row = catalogue.look_up(text, where or target, kind, elsewhere=where is None)
    except UnknownItemError as error:
        raise Refused(422, str(error), [text]) from None
    return None if row is None else Item(catalogue.domains[catalogue.domain[row]], str(catalogue.item_id[row]))


def _unknown(unknown: Sequence[str], whose: str) -> Refused:
    few = ", ".join(repr(text[:80]) for text in unknown[:3]) + (f" and {len(unknown) - 3} more" * (len(unknown) > 3))
    return Refused(422, f"not in the catalogue: {few}, {whose}; GET /v1/items finds ids", unknown[:NAMED])


def _baseline_ranking(baseline: Baseline, question: _Question) -> Ranking:
    """What a baseline says, as far as it knows the items: new ones it does not, and withdrawn ones stay away."""
    query, catalogue = question.query, baseline.catalogue
    domain = query.domain
    if domain not in catalogue.domains:
        return Ranking("", (), ())

    def known(ids: frozenset[str]) -> frozenset[str]:
        return frozenset(name for name in ids if catalogue.row_of_id(domain, name) is not None)

    history = tuple(
        item
        for item in query.history
        if item.domain in catalogue.domains and catalogue.row_of_id(item.domain, item.item_id) is not None
    )
    gone = question.engine.withdrawn.get(domain, frozenset())
    asked = replace(
        query,
        history=history,
        exclude=known(query.exclude | gone),
        allow=None if query.allow is None else known(query.allow),
    )
    return baseline.rank([asked], question.k)[0]


def _scored(catalogue: Catalogue, domain: str, item_ids: Sequence[str], scores: Sequence[float]) -> list[m.ScoredItem]:
    return [
        m.ScoredItem(item_id=item_id, title=_title(catalogue, domain, item_id), score=score)
        for item_id, score in zip(item_ids, scores, strict=False)
    ]


def _title(catalogue: Catalogue, domain: str, item_id: str) -> str:
    row = catalogue.row_of_id(domain, item_id)
    assert row is not None
    return str(catalogue.title[row])


def _is_plain(text: str) -> bool:
    return all(character.isprintable() for character in text)
