"""Who shares a batch, what a full queue says, and that no job is lost; events instead of sleeps, a clock by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.serve.batching import Ask, Batcher, Job, Overloaded

WAIT = 60
"""Seconds after which a test gives up."""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def batcher(clock: Clock) -> Iterator[Batcher]:
    batcher = Batcher(max_batch=4, max_seconds=0.5, clock=clock)
    yield batcher
    batcher.close()


def job(engine: Any, *events: str, k: int = 2, deadline: float = 101.0, queries: int = 1) -> Job:
    history = tuple(Item("books", event) for event in events)
    query = RankingQuery(query_id="", domain="books", history=history)
    return Job(Ask(engine, "books", k, "auto"), [query] * queries, deadline)


def test_what_waits_goes_together(engine: Any, batcher: Batcher, hold: Any) -> None:
    held = hold(engine)
    jobs = [job(engine, "b0"), *(job(engine, f"b{place}") for place in (1, 2, 3)), job(engine, "b4", k=1)]
    batcher.submit(jobs[:1])
    held.wait()
    batcher.submit(jobs[1:2])
    batcher.submit(jobs[4:])  # asks otherwise, and waits for its turn
    batcher.submit(jobs[2:4])
    assert batcher.waiting == 4
    held.released.release(3)
    answers = [each.future.result(WAIT) for each in jobs]
    sizes = [[query.history[0].item_id for query in call] for call in engine.calls]
    assert sizes == [["b0"], ["b1", "b2", "b3"], ["b4"]]
    assert [len(answer.rankings[0].item_ids) for answer in answers] == [2, 2, 2, 2, 1]
    assert [answer.rankings[0].scores[0] for answer in answers] == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5])


def test_the_search_goes_on_for_two_thirds_of_the_time_or_one_where_others_wait(
    engine: Any, batcher: Batcher, clock: Clock, hold: Any
) -> None:
    told: list[list[bool]] = []

    def search(_: Any, stop: Callable[[], bool]) -> None:
        began, asked = clock.now, []
        for share in (0.3, 0.4, 0.6, 0.7, 0.1):
            clock.now = began + share
            asked.append(stop())
        told.append(asked)

    engine.before.append(search)
    alone = job(engine, deadline=clock.now + 1)
    batcher.submit([alone])
    assert alone.future.result(WAIT).stopped
    held = hold(engine)
    engine.before.reverse()  # the other one is there before it searches
    first, second = job(engine, deadline=clock.now + 1), job(engine, deadline=clock.now + 1)
    batcher.submit([first])
    held.wait()
    batcher.submit([second])
    held.released.release(2)
    assert first.future.result(WAIT).stopped
    assert told[:2] == [[False, False, False, True, True], [False, True, True, True, True]]


def test_a_full_queue_refuses_all_of_a_submission(engine: Any, batcher: Batcher, hold: Any) -> None:
    held = hold(engine)
    batcher.submit([job(engine)])
    held.wait()
    batcher.submit([job(engine, queries=50)])  # larger than the queue, which is empty
    with pytest.raises(Overloaded, match="try again in") as refused:
        batcher.submit([job(engine), job(engine)])
    assert refused.value.retry_after >= 1 and batcher.waiting == 50
    held.released.release(2)


def test_a_cancelled_job_costs_nothing(engine: Any, batcher: Batcher, hold: Any) -> None:
    held = hold(engine)
    first, gone, last = job(engine), job(engine, "b1"), job(engine, "b2")
    batcher.submit([first])
    held.wait()
    batcher.submit([gone, last])
    assert gone.future.cancel()
    held.released.release(2)
    last.future.result(WAIT)
    assert [len(call) for call in engine.calls] == [1, 1] and batcher.waiting == 0


def test_only_the_job_to_blame_fails(engine: Any, batcher: Batcher, hold: Any) -> None:
    held = hold(engine)

    def refuse(queries: Sequence[RankingQuery], _: Any) -> None:
        if any(item.item_id == "b6" for query in queries for item in query.history):
            raise RuntimeError("poison")

    engine.before.append(refuse)
    held.released.release(100)
    first, bad, good = job(engine), job(engine, "b6"), job(engine, "b2")
    batcher.submit([first, bad, good])
    assert good.future.result(WAIT).rankings and first.future.result(WAIT).rankings
    with pytest.raises(RuntimeError, match="poison"):
        bad.future.result(WAIT)
    assert batcher.failures == 0  # a good one came after


def test_an_engine_that_loses_an_answer_is_not_believed(engine: Any, batcher: Batcher) -> None:
    engine.rank = lambda queries, *_: []
    one = job(engine)
    batcher.submit([one])
    with pytest.raises(RuntimeError, match="0 answers to 1 queries"):
        one.future.result(WAIT)
    assert batcher.failures == 1


def test_batches_and_the_queue_shrink_where_they_take_too_long_and_grow_again(engine: Any, clock: Clock) -> None:
    took = 0.6

    def slow(*_: Any) -> None:
        clock.now += took

    engine.before.append(slow)
    batcher = Batcher(max_batch=16, max_seconds=0.5, clock=clock)

    def after(number: int, mode: str | None = "auto") -> int:
        job = Job(Ask(engine, "books", 1, mode), [RankingQuery("", "books", ())] * number, 1000.0)
        batcher.submit([job])
        job.future.result(WAIT)
        return batcher.limit

    assert [after(16), after(12), after(9)] == [12, 9, 6]
    assert after(2) == 6  # so few do not say that there were too many
    assert after(50, mode=None) == 7  # scores may take longer
    assert [after(6), after(4), after(3), after(2)] == [4, 3, 2, 2]
    took = 0.4
    assert [after(2) for _ in range(15)] == [*range(3, 17), 16]
    batcher.close()


def test_closing_answers_what_waits(engine: Any, clock: Clock, hold: Any) -> None:
    batcher = Batcher(max_batch=1, max_seconds=0.5, clock=clock)
    held = hold(engine)
    jobs = [job(engine) for _ in range(4)]
    batcher.submit(jobs)
    held.wait()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    held.released.release(4)
    closing.join(WAIT)
    assert all(each.future.done() for each in jobs) and not closing.is_alive()
    with pytest.raises(Overloaded):
        batcher.submit([job(engine)])
