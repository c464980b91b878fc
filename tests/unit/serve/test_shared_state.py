"""Several workers with one state folder: each shows what the others change, no change is lost, no request fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from cprec.errors import DataError
from cprec.serve import messages as m
from cprec.serve.items import FILE, ItemStore
from cprec.serve.service import Service
from cprec.serve.stock import Stock

WAIT = 60
"""Seconds after which a test gives up."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker looks by itself, so that tests say when one does."""
    monkeypatch.setattr("cprec.serve.stock.FOLLOW_SECONDS", 3600.0)


@pytest.fixture
def worker(engine: Any, tmp_path: Path) -> Iterator[Callable[[], Stock]]:
    """Makes the stock of another worker with the same folder."""
    with ExitStack() as stack:

        def start() -> Stock:
            stock = Stock([type(engine)(engine.catalogue)], ItemStore(tmp_path))
            stack.callback(stock.close)
            return stock

        yield start


def put(stock: Stock, item_id: str, title: str) -> m.Changed:
    return asyncio.run(stock.put([m.NewItem(item_id=item_id, domain="books", title=title)]))


def withdraw(stock: Stock, *item_ids: str) -> m.Changed:
    return asyncio.run(stock.withdraw("books", item_ids))


def titles(stock: Stock, query: str = "") -> dict[str, str]:
    """The books in stock."""
    found = asyncio.run(stock.find(query, "books", 100)).items
    assert stock.sizes()["books"] == len(found) or query
    return {item.item_id: item.title for item in found}


# ---- the stock -------------------------------------------------------------------------------------------------------


def test_a_worker_shows_what_another_has_changed(worker: Callable[[], Stock]) -> None:
    one, other = worker(), worker()
    put(one, "a0", "Aurora")
    withdraw(one, "b1", "b2")
    assert "a0" not in titles(other) and "b1" in titles(other)
    other.catch_up()
    assert titles(other) == titles(one) == titles(worker())
    assert titles(other)["a0"] == "Aurora" and not {"b1", "b2"} & titles(other).keys()
    put(other, "b1", "Dune, part two")
    one.catch_up()
    assert titles(one)["b1"] == "Dune, part two"
    served = other.engine()
    other.catch_up()
    assert other.engine() is served, "its own change is no news"


def test_a_change_is_made_to_what_others_have_left(worker: Callable[[], Stock]) -> None:
    """Nobody has caught up: it happens within the change."""
    one, other = worker(), worker()
    put(one, "a0", "Aurora")
    assert withdraw(other, "a0").in_stock == {"books": 7}, "the item is known"
    put(one, "b0", "Dune, newly translated")
    withdraw(other, "b0")
    one.catch_up()
    assert titles(one) == titles(other) and not {"a0", "b0"} & titles(one).keys()
    assert one.engine().catalogue.title[one.engine().catalogue.row_of_id("books", "b0")] == "Dune, newly translated"
    with pytest.raises(m.Refused, match="not in the catalogue: 'b99'"):
        withdraw(other, "b99")


def test_changes_at_once_go_one_after_the_other(worker: Callable[[], Stock], engine: Any) -> None:
    """Both workers are asked at the same time, many times, for items of their own and for the same one."""
    stocks = [worker(), worker()]
    together = threading.Barrier(2, timeout=WAIT)

    def change(number: int) -> None:
        stock = stocks[number]
        for place in range(8):
            together.wait()
            put(stock, f"n{number}-{place}", f"New {number} {place}")
            put(stock, "shared", f"Shared {number} {place}")
            if place % 2:
                withdraw(stock, f"n{number}-{place}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(change, range(2)))
    for stock in stocks:
        stock.catch_up()
    shown = [titles(stock) for stock in (*stocks, worker())]
    assert shown[0] == shown[1] == shown[2]
    assert shown[0].pop("shared") in ("Shared 0 7", "Shared 1 7")
    new = {f"n{number}-{place}": f"New {number} {place}" for number in range(2) for place in (0, 2, 4, 6)}
    assert {item: title for item, title in shown[0].items() if item[0] == "n"} == new


def test_nothing_is_checked_while_another_worker_makes_a_change(worker: Callable[[], Stock], engine: Any) -> None:
    """One worker prepares to withdraw an item; what another is asked meanwhile is done after it."""
    one, other = worker(), worker()
    prepares, goes_on = threading.Event(), threading.Event()
    make = type(engine).with_items

    def held(self: Any, *of: Any) -> Any:
        prepares.set()
        assert goes_on.wait(WAIT)
        return make(self, *of)

    one.engine().with_items = held.__get__(one.engine())
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(withdraw, one, "b0")
        assert prepares.wait(WAIT)
        second = pool.submit(put, other, "b0", "Dune, newly translated")
        other.catch_up()
        assert "b0" in titles(other) and not second.done(), "readers wait for nobody"
        goes_on.set()
        first.result(WAIT)
        second.result(WAIT)
    one.catch_up()
    assert titles(one) == titles(other) and titles(one)["b0"] == "Dune, newly translated"


def test_what_others_changed_is_taken_in_though_an_own_change_is_refused(
    worker: Callable[[], Stock], engine: Any
) -> None:
    one, other = worker(), worker()
    put(one, "a0", "Aurora")
    with pytest.raises(m.Refused, match="'b99'"):
        withdraw(other, "b99")  # it was read meanwhile
    other.catch_up()
    assert titles(other) == titles(one)


def test_a_worker_that_cannot_take_changes_in_says_so_and_tries_again(
    worker: Callable[[], Stock], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = worker(), worker()
    engine = other.engine()
    engine.with_items = None
    put(one, "a0", "Aurora")
    for _ in range(3):
        other.catch_up()
        assert other.is_behind and "a0" not in titles(other)
    assert caplog.text.count("changes of items by other processes cannot be taken in") == 1
    del engine.with_items
    other.catch_up()
    assert not other.is_behind and titles(other) == titles(one)


def test_damage_is_never_written_on(worker: Callable[[], Stock], tmp_path: Path) -> None:
    one, other = worker(), worker()
    put(one, "a0", "Aurora")
    with open(tmp_path / FILE, "ab") as file:
        file.write(b"0123456789abcdef []\n")
    damaged = (tmp_path / FILE).read_bytes()
    other.catch_up()
    assert other.is_behind and "a0" not in titles(other)
    for stock in (one, other):
        with pytest.raises(m.Refused, match="was not made: .*line 2: the checksum is") as refused:
            put(stock, "a1", "Aurora again")
        assert refused.value.status == 507 and "a1" not in titles(stock)
    with pytest.raises(DataError):
        ItemStore(tmp_path)
    assert (tmp_path / FILE).read_bytes() == damaged


def test_a_change_that_others_hold_up_is_to_come_back(
    worker: Callable[[], Stock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, store = worker(), ItemStore(tmp_path)
    monkeypatch.setattr("cprec.serve.items.PATIENCE_SECONDS", 0.0)
    with store.changing(), pytest.raises(m.Refused, match="another process is changing items") as refused:
        put(stock, "a0", "Aurora")
    assert (refused.value.status, refused.value.retry_after) == (503, 1)
    put(stock, "a0", "Aurora")
    store.close()


def test_a_worker_looks_by_itself(worker: Callable[[], Stock], engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = worker()
    looked = threading.Event()
    catch_up = Stock.catch_up

    def noting(self: Stock) -> None:
        catch_up(self)
        if "a0" in titles(self):
            looked.set()

    monkeypatch.setattr("cprec.serve.stock.FOLLOW_SECONDS", 0.001)
    monkeypatch.setattr(Stock, "catch_up", noting)
    other = worker()
    put(one, "a0", "Aurora")
    assert looked.wait(WAIT) and titles(other) == titles(one)
    other.close()
    assert "items" not in {thread.name for thread in threading.enumerate() if thread is other._follower}


# ---- requests --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clients(engine: Any, last_first: Any, served: Callable[..., Any], tmp_path: Path) -> Iterator[list[httpx.Client]]:
    """Of two workers with one folder."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                served(Service([type(engine)(engine.catalogue)], [last_first], ItemStore(tmp_path), deadline_ms=60_000))
            )
            for _ in range(2)
        ]


NEW = {"items": [{"item_id": "a0", "domain": "books", "title": "Aurora"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("recommend", {"history": ["a0"]}),
        ("recommend", {"history": ["aurora"]}),
        ("recommend", {"history": [], "allow": ["a0", "b1"]}),
        ("recommend", {"requests": [{"history": []}, {"history": ["b0"], "deny": ["a0"]}]}),
        ("baselines", {"history": [{"item_id": "a0"}]}),
        ("score", {"history": [], "candidates": ["b0", "a0"]}),
        ("explain", {"history": ["b1"], "item_id": "a0"}),
    ],
)
def test_what_one_worker_has_confirmed_no_other_calls_unknown(
    path: str, body: Any, clients: list[httpx.Client]
) -> None:
    one, other = clients
    assert other.post(f"/v1/{path}", json=body).status_code == 422
    assert one.put("/v1/items", json=NEW).status_code == 200
    answer = other.post(f"/v1/{path}", json=body)
    assert answer.status_code == 200, answer.text


def test_what_is_unknown_to_all_stays_unknown(clients: list[httpx.Client], tmp_path: Path) -> None:
    one, other = clients
    assert one.put("/v1/items", json=NEW).status_code == 200
    refused = other.post("/v1/recommend", json={"history": ["b99", "a0"]})
    assert refused.status_code == 422 and refused.json()["unknown"] == ["b99"]
    (tmp_path / FILE).unlink()  # nothing can be taken in any more: what is asked is answered all the same
    refused = other.post("/v1/recommend", json={"history": ["b98"]})
    assert refused.status_code == 422 and refused.json()["unknown"] == ["b98"]
    assert other.post("/v1/recommend", json={"history": ["a0"]}).status_code == 200
    assert "\ncprec_items_behind 1.0\n" in other.get("/metrics").text
    assert "\ncprec_items_behind 0.0\n" in one.get("/metrics").text
