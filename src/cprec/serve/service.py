"""The service behind the HTTP interface: requests to queries, queries to engines, baselines to stand in for them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np

from cprec import __version__
from cprec.data.word_index import QUERY, check_query
from cprec.errors import ConfigError, DataError, ModelError
from cprec.recommender import Ranking, RankingQuery
from cprec.schema import Item
from cprec.serve import messages as m
from cprec.serve.batching import Answer, Ask, Batcher, Job, Overloaded, is_whole
from cprec.serve.engine import Baseline, CacheCounts, Engine, list_query, reads_nothing, score_query
from cprec.serve.items import ItemStore
from cprec.serve.lookup import check_ids, look_up_history, scored_items, title_of
from cprec.serve.monitoring import Metrics
from cprec.serve.stock import Stock

T = TypeVar("T")
HungUp = Callable[[], Awaitable[None]]
"""Returns when the client is gone."""

log = logging.getLogger("cprec.serve")

QUERY_AND_HISTORY = "query and history"
WORDS = "words"
"""Stands in for a model that has no time for a query: the items that have its words, by these alone."""
POPULARITY = "popularity"
"""The baseline that answers for histories of which the model reads no event."""
UNHEALTHY = 3
"""Failed calls of an engine in a row after which the service is not healthy."""
SCORE_DEADLINE_MS = 30_000.0
"""How long scores and explanations may take if the request does not say: nothing stands in for them."""
MOST_LEFT_OUT = 20
"""Events that an explanation leaves out one at a time, the latest; more where the model reads more."""
LONG_HISTORY = 1_000
"""Events from which on a history is looked up in another thread, so that the event loop goes on."""


async def never() -> None:
    """Wait for ever, as for a client that does not hang up."""
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

    @property
    def mode_of_text(self) -> str:
        """How a list of the engine is made where there is a text."""
        return QUERY_AND_HISTORY if self.query.history and self.engine.shown(self.query) else QUERY

    def items(self, ranking: Ranking) -> list[m.ScoredItem]:
        return scored_items(self.engine.catalogue, self.query.domain, ranking.item_ids[: self.k], ranking.scores)


class Service:
    """Answers requests within their deadlines, using the engines. Its methods are called from one event loop."""

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

        Raises DataError if the items in the store cannot be put into the catalogue.
        """
        self.metrics = metrics or Metrics()
        self.stock = Stock(engines, store)
        self._baselines = tuple(baselines)
        self._popularity = next((each for each in baselines if each.name == POPULARITY), None)
        self._deadline_ms = deadline_ms
        self._clock = clock
        for name in self.stock.names:
            _warm_up(self.stock.engine(name))
        self._batcher = Batcher(
            max_batch=max_batch, max_seconds=deadline_ms / 2000, clock=clock, observe=self.metrics.batch
        )
        self._add_gauges([engine.cache for engine in engines if engine.cache is not None])
        self.closing = False
        """It takes no more requests."""
        self._is_broken = False

    def _add_gauges(self, caches: Sequence[CacheCounts]) -> None:
        gauge = self.metrics.gauge
        gauge("cprec_queue_queries", "Queries that wait for an engine", lambda: self._batcher.waiting)
        gauge("cprec_batch_limit", "Queries that a batch, and the queue, may have now", lambda: self._batcher.limit)
        about_behind = "1 while changes of items by other processes cannot be taken in"
        gauge("cprec_items_behind", about_behind, lambda: self.stock.is_behind)
        gauge("cprec_cache_bytes", "Memory of kept prompts", lambda: sum(cache.num_bytes for cache in caches))
        max_bytes = sum(cache.max_bytes for cache in caches)
        gauge("cprec_cache_max_bytes", "Memory that kept prompts may take", lambda: max_bytes)
        about_hits = "Tokens of prompts that were kept and not read again"
        gauge("cprec_cache_hit_tokens", about_hits, lambda: sum(cache.hits for cache in caches))

    def close(self) -> None:
        """Answer the requests that wait, then stop."""
        self.closing = True
        self._batcher.close()
        self.stock.close()

    @property
    def is_healthy(self) -> bool:
        """False once an engine fails every time, or a model gave scores that are not finite; a restart may help."""
        return not self._is_broken and self._batcher.failures < UNHEALTHY

    def about(self) -> m.About:
        """What is served."""
        engine = self.stock.engine()
        served = [self.stock.engine(name) for name in self.stock.names]
        return m.About(
            model=engine.name,
            models=self.stock.names,
            served=[m.Served(name=each.name, domains=list(each.domains), parts=list(each.weights)) for each in served],
            domains=[m.DomainSize(name=name, num_items=size) for name, size in self.stock.sizes().items()],
            default_domain=engine.domain,
            baselines=[baseline.name for baseline in self._baselines],
            max_history=engine.max_history,
            version=__version__,
        )

    # ---- lists -------------------------------------------------------------------------------------------------------

    async def recommend(
        self, requests: Sequence[m.RecommendRequest], hung_up: HungUp = never
    ) -> list[m.RecommendResponse]:
        """A list for each request, by its deadline. Those that wait are dropped when `hung_up` returns.

        Raises Refused: 422 if a request names something that does not exist, 503 under overload or if there is neither
        time nor a baseline.
        """
        began = self._clock()
        questions = [await self._question(request, began) for request in requests]
        # Popular items answer where the model would read no event of the history.
        jobs = [
            None
            if self._popularity is not None and not each.query.text and reads_nothing(each.engine, each.query)
            else each.job()
            for each in questions
        ]
        self._submit([job for job in jobs if job is not None])
        lists = (self._list(*each) for each in zip(questions, jobs, strict=True))
        return await self._unless(hung_up, asyncio.gather(*lists))

    async def _question(self, request: m.RecommendRequest, began: float) -> _Question:
        engine, domain, history = await self._looked_up(request, [*(request.allow or ()), *request.deny])
        made = partial(
            list_query,
            engine,
            domain,
            history,
            exclude_seen=request.exclude_seen,
            allow=request.allow,
            deny=request.deny,
            text=request.query or "",
        )
        try:
            query = made() if request.query is None else await asyncio.to_thread(made)
        except DataError as error:
            raise m.Refused(422, str(error)) from None
        return _Question(engine, query, request.k, request.mode, request.deadline_ms or self._deadline_ms, began)

    async def _looked_up(
        self, request: m.RecommendRequest | m.ScoreRequest | m.ExplainRequest, ids: Sequence[str]
    ) -> tuple[Engine, str, tuple[Item, ...]]:
        """The engine, the domain and the history of a request, in which the domain has these ids.

        Where something is unknown, another process may have just added it: what it changed is taken in, and looked at.
        """
        before = self.stock.engine()
        try:
            return await self._look_up(request, ids)
        except m.Refused:
            await asyncio.to_thread(self.stock.catch_up)
            if self.stock.engine() is before:
                raise
        return await self._look_up(request, ids)

    async def _look_up(
        self, request: m.RecommendRequest | m.ScoreRequest | m.ExplainRequest, ids: Sequence[str]
    ) -> tuple[Engine, str, tuple[Item, ...]]:
        engine = self.stock.engine(request.model)
        domain = self.stock.domain(engine, request.domain)
        if domain not in engine.domains:
            can = ", ".join(engine.domains)
            raise m.Refused(422, f"domain={domain!r}: {engine.name} was made for {can}, and recommends from there")
        check_ids(engine.catalogue, domain, ids)
        if request.query is not None:
            await asyncio.to_thread(_check_words, engine, domain, request.query)
        if len(request.history) < LONG_HISTORY:
            return engine, domain, look_up_history(engine.catalogue, domain, request.history)
        return engine, domain, await asyncio.to_thread(look_up_history, engine.catalogue, domain, request.history)

    async def _list(self, question: _Question, job: Job | None) -> m.RecommendResponse:
        """The engine's list or, if that is late, short or fails, a baseline's.

        Without a job, the popular items or, if there are too few of them, the list that there would be with a job.
        """
        if job is None:
            popular = await self._popular(question)
            if popular is not None:
                return self._response(question, popular, POPULARITY, degraded=False, proven=False)
            job = question.job()
            self._submit([job])
        late, broken = False, None
        try:
            answer = await self._answer(job)
        except TimeoutError:
            late = True
        except Exception as error:
            self._failed(error)
            broken = error if isinstance(error, ModelError) else None
        else:
            late = answer.stopped
            found = self._of_engine(question, answer.rankings[0], late)
            if found is not None:
                return found
        if self._baselines or question.query.text:
            name, ranking = await asyncio.to_thread(self._stand_in, question)
            if name != WORDS or ranking.item_ids:  # of words that a system reads no item that is left may have one
                return self._response(question, ranking, name, degraded=True, proven=False)
        if broken is not None:
            raise m.Refused(500, str(broken))
        raise self._shed(1, "the model could not answer in time" if late else "the model failed")

    async def _popular(self, question: _Question) -> Ranking | None:
        """The popular items, if there are as many as the client asked for, or as are left."""
        assert self._popularity is not None
        engine, query = question.engine, question.query
        found = await asyncio.to_thread(_baseline_ranking, self._popularity, question)
        gone = query.exclude | engine.withdrawn.get(query.domain, frozenset())
        if query.allow is not None:
            num_left = len(query.allow - gone)
        else:
            num_left = len(engine.catalogue.rows_of(query.domain)) - len(gone)
        return found if len(found.item_ids) >= min(question.k, num_left) else None

    def _of_engine(self, question: _Question, ranking: Ranking, late: bool) -> m.RecommendResponse | None:
        """The engine's list; None if it is short and a baseline can stand in."""
        proven = ranking.proof is not None and ranking.proof.exact
        whole = is_whole(ranking, question.k)
        can_stand_in = self._baselines or question.query.text
        if not (proven or whole or (ranking.item_ids and not can_stand_in)):
            return None
        degraded = not whole if question.mode == "beam" else late and not proven
        mode = question.engine.way or ("exact" if proven and question.mode != "beam" else "beam")
        mode = question.mode_of_text if question.query.text else mode
        return self._response(question, ranking, mode, degraded=degraded, proven=proven)

    def _response(
        self, question: _Question, ranking: Ranking, mode: str, degraded: bool, proven: bool
    ) -> m.RecommendResponse:
        self.metrics.answered(mode, degraded)
        return m.RecommendResponse(
            items=question.items(ranking),
            mode=mode,
            degraded=degraded,
            proven=proven,
            milliseconds=self._milliseconds(question.began),
            domain=question.query.domain,
            model=question.engine.name,
        )

    def _stand_in(self, question: _Question) -> tuple[str, Ranking]:
        """The name and list of the first baseline whose list is whole, or else of the one with the longest list; for a
        query in words, the items that have them."""
        if question.query.text:
            return WORDS, _by_words(question)
        found: list[tuple[str, Ranking]] = []
        for baseline in self._baselines:
            found.append((baseline.name, _baseline_ranking(baseline, question)))
            if len(found[-1][1].item_ids) >= question.k:
                break
        return max(found, key=lambda each: len(each[1].item_ids))

    async def baselines(self, request: m.RecommendRequest) -> m.BaselinesResponse:
        """The list of each baseline, after that by the words of a query, which baselines do not read."""
        question = await self._question(request, self._clock())

        def lists() -> list[m.BaselineList]:
            found = {WORDS: _by_words(question)} if question.query.text else {}
            found |= {baseline.name: _baseline_ranking(baseline, question) for baseline in self._baselines}
            return [m.BaselineList(name=name, items=question.items(ranking)) for name, ranking in found.items()]

        return m.BaselinesResponse(lists=await asyncio.to_thread(lists))

    # ---- scores ------------------------------------------------------------------------------------------------------

    async def score(self, request: m.ScoreRequest, hung_up: HungUp = never) -> m.ScoreResponse:
        """The score of each candidate. Raises Refused as `recommend` does."""
        began = self._clock()
        engine, domain, history = await self._looked_up(request, request.candidates)
        query = score_query(domain, history, request.candidates, request.query or "")
        (ranking,) = await self._scores(engine, [query], began, request.deadline_ms, hung_up)
        score_of = dict(zip(ranking.item_ids, ranking.scores, strict=True))
        scores = [score_of[item_id] for item_id in request.candidates]
        items = scored_items(engine.catalogue, domain, request.candidates, scores)
        return m.ScoreResponse(items=items, milliseconds=self._milliseconds(began), domain=domain, model=engine.name)

    async def explain(self, request: m.ExplainRequest, hung_up: HungUp = never) -> m.ExplainResponse:
        """What each part of the score, each word of a query that the item has, each of the latest events, and all
        events of a domain add to the score of an item, compared with an average one. The score is computed again
        without the events."""
        began = self._clock()
        engine, domain, history = await self._looked_up(request, [request.item_id])
        whole = score_query(domain, history, [request.item_id], request.query or "")
        whole = replace(whole, history=engine.shown(whole))
        read = whole.history
        first = max(0, len(read) - max(MOST_LEFT_OUT, engine.max_history))
        events = read[first:]
        domains = sorted({event.domain for event in read})
        # The history without each event in turn, then without the events of each domain.
        shorter = [read[:place] + read[place + 1 :] for place in range(first, len(read))]
        shorter += [tuple(event for event in read if event.domain != name) for name in domains]
        queries = [whole, *(replace(whole, history=history) for history in shorter)]
        rankings = await self._scores(engine, queries, began, request.deadline_ms, hung_up)
        parts, *others = await asyncio.to_thread(engine.effects, queries, rankings)
        effects = [sum(parts.values()) - sum(other.values()) for other in others]
        weights, of_all = dict(engine.weights), sum(engine.weights.values())
        words: dict[str, float] = {}
        if QUERY in parts:
            weights[QUERY] = of_all
            place = engine.catalogue.find(domain, [request.item_id])[0] - engine.catalogue.rows_of(domain)[0]
            words = await asyncio.to_thread(engine.catalogue.words_of(domain).matched, place, whole.text)
        return m.ExplainResponse(
            item_id=request.item_id,
            title=title_of(engine.catalogue, domain, request.item_id),
            score=rankings[0].scores[0],
            parts=[m.PartEffect(name=name, weight=weight, effect=parts[name]) for name, weight in weights.items()],
            words=[m.WordEffect(word=word, effect=of_all * effect) for word, effect in words.items()],
            events=[
                m.EventEffect(
                    item_id=event.item_id,
                    title=title_of(engine.catalogue, event.domain, event.item_id),
                    domain=event.domain,
                    effect=effect,
                )
                for event, effect in zip(events, effects[: len(events)], strict=True)
            ],
            domains=[
                m.DomainEffect(domain=name, effect=effect)
                for name, effect in zip(domains, effects[len(events) :], strict=True)
            ],
            num_events_read=len(read),
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
        hung_up: HungUp,
    ) -> list[Ranking]:
        """Rankings of candidates for all queries, made together."""
        limit = deadline_ms or SCORE_DEADLINE_MS
        job = Job(Ask(engine, queries[0].domain, 1, None, limit), queries, began + limit / 1000)
        self._submit([job])
        try:
            return (await self._unless(hung_up, self._answer(job))).rankings
        except TimeoutError:
            raise self._shed(1, f"the scores were not there within {limit:g} ms") from None
        except m.Refused:
            raise
        except Exception as error:
            self._failed(error)
            why = str(error) if isinstance(error, ModelError) else "the model failed; the log of the service says why"
            raise m.Refused(500, why) from error

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def _submit(self, jobs: Sequence[Job]) -> None:
        try:
            self._batcher.submit(jobs)
        except Overloaded as overloaded:
            raise self._shed(overloaded.retry_after, str(overloaded)) from None

    async def _answer(self, job: Job) -> Answer:
        return await asyncio.wait_for(asyncio.wrap_future(job.future), max(0.0, job.deadline - self._clock()))

    async def _unless(self, hung_up: HungUp, work: Awaitable[T]) -> T:
        """The result of work. When the client hangs up, work is cancelled, which takes its jobs out of the queue."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(hung_up())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise m.Refused(m.HUNG_UP, "the client hung up")
            return task.result()
        finally:
            task.cancel()
            gone.cancel()

    def _shed(self, retry_after: int, message: str) -> m.Refused:
        self.metrics.refusals.inc()
        return m.Refused(503, message, retry_after=retry_after)

    def _failed(self, error: Exception) -> None:
        self.metrics.failures.inc()
        self._is_broken = self._is_broken or isinstance(error, ModelError)
        log.error("the engine failed: %s", error, exc_info=error)

    def _milliseconds(self, began: float) -> float:
        return round(1000 * (self._clock() - began), 3)


def _warm_up(engine: Engine) -> None:
    """Build what an engine builds only once, before anybody waits for it."""
    engine.catalogue.index(engine.item_fields)
    for domain in engine.domains:
        engine.rank([list_query(engine, domain, ())], 1, "beam")


def _check_words(engine: Engine, domain: str, text: str) -> None:
    """Raise Refused for a query that can be none, or whose words say nothing of the items in stock."""
    try:
        list_query(engine, domain, (), text=check_query(text))
    except (ConfigError, DataError) as error:
        raise m.Refused(422, str(error)) from None


def _by_words(question: _Question) -> Ranking:
    """The items that have a word of a query, by what its words say alone; equal ones in the order of the catalogue."""
    query, catalogue = question.query, question.engine.catalogue
    gone = query.exclude | question.engine.withdrawn.get(query.domain, frozenset())
    score_N = catalogue.words_of(query.domain).effects(query.text)[1].sum(axis=0)
    ids = catalogue.item_id[catalogue.rows_of(query.domain)]
    best = (place for place in np.argsort(-score_N, kind="stable").tolist() if score_N[place] > 0)
    left = (n for n in best if ids[n] not in gone and (query.allow is None or ids[n] in query.allow))
    chosen = list(islice(left, question.k))
    return Ranking("", tuple(ids[chosen].tolist()), tuple(score_N[chosen].tolist()))


def _baseline_ranking(baseline: Baseline, question: _Question) -> Ranking:
    """A baseline's list. It does not know items that were added, so they are left out of its query; withdrawn items are
    excluded."""
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
    exclude = known(query.exclude | question.engine.withdrawn.get(domain, frozenset()))
    allow = None if query.allow is None else known(query.allow)
    return baseline.rank([replace(query, history=history, exclude=exclude, allow=allow)], question.k)[0]
