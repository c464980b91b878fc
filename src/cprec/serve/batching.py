"""Micro-batching: requests that wait while the engine is busy are answered together by the thread that calls it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice

from cprec.recommender import Ranking, RankingQuery
from cprec.serve.engine import Engine


class Overloaded(Exception):
    """The queue is full; nothing was queued."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the service is overloaded: try again in {retry_after} s")
        self.retry_after = retry_after
        """Seconds after which to try again."""


@dataclass(frozen=True)
class Ask:
    """What an engine is to do; jobs that ask for the same share a batch."""

    engine: Engine
    domain: str
    k: int
    mode: str | None = None
    """exact, auto or beam; None for candidates."""
    deadline_ms: float = 0.0
    """Jobs with other deadlines have batches of their own: in a batch, the earliest deadline counts for all."""


@dataclass(frozen=True)
class Answer:
    """An engine's answer to the queries of a job."""

    rankings: list[Ranking]
    stopped: bool
    """The engine was told to stop: with more time, lists that are not proven might have been better."""


@dataclass(frozen=True, eq=False)
class Job:
    """Queries that are answered together, by a deadline."""

    ask: Ask
    queries: Sequence[RankingQuery]
    """Of one domain; with candidates or without."""
    deadline: float
    """By the clock of the batcher, in seconds."""
    future: Future[Answer] = field(default_factory=Future)


def is_whole(ranking: Ranking, k: int) -> bool:
    """Whether a list has `k` items, or all items that there are."""
    return len(ranking.item_ids) >= k or ranking.proof is None or ranking.proof.exact


class Batcher:
    """A queue before the engines that is never longer than what can be answered in time.

    No batch waits to be filled: the oldest job and those that ask for the same go as soon as the thread is free. The
    queue holds one batch at most, and a batch should take at most `max_seconds`, half a deadline: a request that comes
    as a batch begins waits for it, goes with the next one, and is in time. So a search for better lists goes on for two
    thirds of the time that the oldest job has left, or for one third if others wait. After a batch that took too long,
    batches and the queue become a quarter smaller than it was, but not less than an eighth of `max_batch`; after any
    other they grow by one query.
    """

    def __init__(
        self,
        *,
        max_batch: int,
        max_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        """`max_batch` is in queries; `observe` gets the size and the seconds of each batch."""
        self._clock, self._observe = clock, observe
        self._max_batch = max_batch
        self.limit = max_batch
        """Queries that a batch, and the queue, may have now."""
        self._least = max(1, max_batch // 8)  # still smaller batches would hardly be faster
        self._max_seconds = max_seconds
        self._jobs: deque[Job] = deque()
        self.waiting = 0
        """Queries in the queue."""
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 1.0  # of the last batch
        self.failures = 0
        """Calls of an engine that failed, one after the other; 0 after one that did not."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none; cancelling a job's future takes it out again, unless it is being answered.

        Raises Overloaded if the queue is full or closed. An empty queue takes any number.
        """
        size = sum(len(job.queries) for job in jobs)
        with self._changed:
            if self.waiting + size > self.limit:  # cancelled jobs make room
                self._jobs = deque(job for job in self._jobs if not job.future.cancelled())
                self.waiting = sum(len(job.queries) for job in self._jobs)
            if self._closed or (self.waiting and self.waiting + size > self.limit):
                raise Overloaded(max(1, round(2 * self._seconds)))
            self._jobs.extend(jobs)
            self.waiting += size
            self._changed.notify()

    def close(self) -> None:
        """Take no more jobs, answer those that wait, and return when that is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            if batch:
                self._answer(batch)

    def _next(self) -> list[Job] | None:
        """The next batch: the oldest job and those that ask for the same, as many as fit, without cancelled ones. None
        once the queue is closed and empty."""
        with self._changed:
            while not self._jobs:
                if self._closed:
                    return None
                self._changed.wait()
            batch: list[Job] = []
            left: deque[Job] = deque()
            # Jobs that ask for the same join the oldest, whoever waits between them, until the batch is full.
            size, ask = 0, self._jobs[0].ask
            for job in self._jobs:
                if job.ask == ask and (not batch or size + len(job.queries) <= self.limit):
                    batch.append(job)
                    size += len(job.queries)
                else:
                    left.append(job)
            self._jobs = left
            self.waiting -= size
        return [job for job in batch if job.future.set_running_or_notify_cancel()]

    def _answer(self, batch: list[Job]) -> None:
        ask, queries = batch[0].ask, [query for job in batch for query in job.queries]
        began = self._clock()
        third = max(0.0, (batch[0].deadline - began) / 3)
        stopped = False

        def stop() -> bool:
            nonlocal stopped
            spent = self._clock() - began
            stopped = stopped or spent >= 2 * third or (spent >= third and self.waiting > 0)
            return stopped

        try:
            rankings = ask.engine.rank(queries, ask.k, ask.mode, stop)
            if len(rankings) != len(queries):
                raise RuntimeError(f"{ask.engine.name} gave {len(rankings)} answers to {len(queries)} queries")
        except Exception as error:
            if len(batch) > 1:  # one of several may be to blame, so each is tried alone
                for job in batch:
                    self._answer([job])
            else:
                self.failures += 1
                batch[0].future.set_exception(error)
            return
        self.failures = 0
        self._adapt(ask, len(queries), self._clock() - began)
        rest = iter(rankings)
        for job in batch:
            job.future.set_result(Answer(list(islice(rest, len(job.queries))), stopped))

    def _adapt(self, ask: Ask, size: int, seconds: float) -> None:
        """Note how long a batch took, and set the limit of the next ones."""
        self._seconds = seconds
        self._observe(size, seconds)
        if ask.mode is None or seconds <= self._max_seconds:
            self.limit = min(self._max_batch, self.limit + 1)
        elif size > self._least:
            self.limit = max(self._least, 3 * size // 4)
