"""Micro-batching: who waits while the engine is busy is answered together, in one thread that calls the engine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

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
    """What an engine is asked to do; jobs that ask alike share a batch."""

    engine: Engine
    domain: str
    k: int
    mode: str | None = None
    """exact, auto or beam; None for candidates."""
    deadline_ms: float = 0.0
    """Jobs with other deadlines go by themselves: the most hurried one of a batch decides for all."""


@dataclass(frozen=True)
class Answer:
    """What an engine said to the queries of a job."""

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
    """Whether a list has `k` items, or all that there are."""
    return len(ranking.item_ids) >= k or ranking.proof is None or ranking.proof.exact


class Batcher:
    """A queue before the engines that is never longer than what can be answered in time.

    There is no waiting for a batch to fill: the oldest job and those that ask alike go as soon as the thread is free.
    The queue takes no more than one batch, which should take `max_seconds`, half a deadline, at most: who comes as a
    batch begins waits for it, goes with the next, and is in time. So lists are searched on for two thirds of the time
    that the oldest job has left, or for one third where others wait. After a batch that took longer, batches and the
    queue are smaller than it by a quarter, down to an eighth of `max_batch`; after others they are larger by one query.
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
        self._max_batch = self._limit = max_batch
        self._least = max(1, max_batch // 8)  # what fewer take is what one takes
        self._max_seconds = max_seconds
        self._jobs: deque[Job] = deque()
        self._waiting = 0
        self._changed = threading.Condition()
        self._closed = False
        self._seconds = 1.0  # of the last batch
        self.failures = 0
        """Calls of an engine that failed, one after the other; 0 after one that did not."""
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Queries in the queue."""
        return self._waiting

    @property
    def limit(self) -> int:
        """Queries that a batch, and the queue, may have now."""
        return self._limit

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none; cancelling a job's future takes it out again, unless it is being answered.

        Raises Overloaded where the queue is full, or closed. More than it holds is taken when it is empty.
        """
        size = sum(len(job.queries) for job in jobs)
        with self._changed:
            if self._waiting + size > self._limit:  # those whose client has gone, or has a list, make room
                self._jobs = deque(job for job in self._jobs if not job.future.cancelled())
                self._waiting = sum(len(job.queries) for job in self._jobs)
            if self._closed or (self._waiting and self._waiting + size > self._limit):
                raise Overloaded(max(1, round(2 * self._seconds)))
            self._jobs.extend(jobs)
            self._waiting += size
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
        """The oldest job and those that ask alike, as many as fit, less those cancelled; None once closed and empty."""
        with self._changed:
            while not self._jobs:
                if self._closed:
                    return None
                self._changed.wait()
            batch: list[Job] = []
            left: deque[Job] = deque()
            size, ask = 0, self._jobs[0].ask
            for job in self._jobs:
                if job.ask == ask and (not batch or size + len(job.queries) <= self._limit):
                    batch.append(job)
                    size += len(job.queries)
                else:
                    left.append(job)
            self._jobs = left
            self._waiting -= size
        return [job for job in batch if job.future.set_running_or_notify_cancel()]

    def _answer(self, batch: list[Job]) -> None:
        ask, queries = batch[0].ask, [query for job in batch for query in job.queries]
        began = self._clock()
        third = max(0.0, (batch[0].deadline - began) / 3)
        stopped = False

        def stop() -> bool:
            nonlocal stopped
            spent = self._clock() - began
            stopped = stopped or spent >= 2 * third or (spent >= third and self._waiting > 0)
            return stopped

        try:
            rankings = ask.engine.rank(queries, ask.k, ask.mode, stop)
            if len(rankings) != len(queries):
                raise RuntimeError(f"{ask.engine.name} gave {len(rankings)} answers to {len(queries)} queries")
        except Exception as error:
            if len(batch) > 1:  # one of them may be to blame: the others are answered
                for job in batch:
                    self._answer([job])
                return
            self.failures += 1
            batch[0].future.set_exception(error)
            return
        self.failures = 0
        self._seconds = self._clock() - began
        self._observe(len(queries), self._seconds)
        if ask.mode is None or self._seconds <= self._max_seconds:
            self._limit = min(self._max_batch, self._limit + 1)
        elif len(queries) > self._least:
            self._limit = max(self._least, 3 * len(queries) // 4)
        at = 0
        for job in batch:
            job.future.set_result(Answer(rankings[at : at + len(job.queries)], stopped))
            at += len(job.queries)
