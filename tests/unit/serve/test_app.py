"""The service over HTTP: what it answers, what it refuses, and that it never answers wrongly."""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cprec.data import catalogue as catalogue_module
from cprec.data.cleaning import spelling
from cprec.data.ragged import offsets_of
from cprec.errors import ConfigError, ModelError
from cprec.serve.config import ServeConfig
from cprec.serve.items import FILE, ItemStore
from cprec.serve.service import Service

Served = Callable[..., Any]


def ids(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def asked(client: httpx.Client, *history: Any, **fields: Any) -> httpx.Response:
    return client.post("/v1/recommend", json={"history": list(history)} | fields)


def metric(client: httpx.Client, line: str) -> float:
    found = [row for row in client.get("/metrics").text.splitlines() if row.startswith(line + " ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


# ---- lists -----------------------------------------------------------------------------------------------------------


def test_health_and_readiness(shared: httpx.Client) -> None:
    assert shared.get("/health").text == "ok\n"
    assert shared.get("/ready").status_code == 200


def test_a_list_for_ids_and_titles_mixed(shared: httpx.Client) -> None:
    answer = asked(shared, "b0", "war & peace", {"item_id": "b2"}, {"title": "Go", "domain": "games"}, k=2)
    assert ids(answer) == ["b1", "b4"]
    told = answer.json()
    assert told["items"][0] == {"item_id": "b1", "title": "Dune Messiah", "score": pytest.approx(-1 - 0.9)}
    assert (told["mode"], told["degraded"], told["proven"]) == ("exact", False, True)
    assert (told["domain"], told["model"]) == ("books", "fake") and told["milliseconds"] > 0


def test_an_id_may_be_the_title_of_another_item(engine: Any, client: httpx.Client) -> None:
    asked(client, "b1", {"item_id": "b1"}, {"title": "b1"}, {"title": "1984"})
    assert [item.item_id for item in engine.calls[-1][0].history] == ["b1", "b1", "b6", "b5"]
    answer = asked(client, {"item_id": "1984"})
    assert answer.status_code == 422 and answer.json()["unknown"] == ["1984"]


def test_filters(shared: httpx.Client) -> None:
    assert ids(asked(shared, "b0", k=2, exclude_seen=False)) == ["b0", "b1"]
    assert ids(asked(shared, "b0", k=2, deny=["b1", "b2"])) == ["b3", "b4"]
    assert ids(asked(shared, "b0", allow=["b0", "b5", "b2"])) == ["b2", "b5"]
    assert ids(asked(shared, "b0", allow=[])) == []
    assert ids(asked(shared, "b0", domain="games", k=2)) == ["g0", "g1"]
    assert ids(asked(shared, domain="games", k=50)) == ["g0", "g1", "g2", "g3"]  # all that there are


def test_several_requests_are_answered_in_their_order(engine: Any, client: httpx.Client) -> None:
    requests = [{"history": [f"b{place}"], "k": 1, "exclude_seen": False, "allow": [f"b{place}"]} for place in range(7)]
    answer = client.post("/v1/recommend", json={"requests": requests})
    assert [one["items"][0]["item_id"] for one in answer.json()["responses"]] == [f"b{place}" for place in range(7)]
    assert [len(call) for call in engine.calls[2:]] == [7]  # after two that warm it up


def test_models_are_asked_by_name(engine: Any, last_first: Any, served: Served) -> None:
    other = type(engine)(engine.catalogue, "other", "games")
    with served(Service([engine, other], [last_first], deadline_ms=60_000)) as client:
        assert asked(client, "b0", k=1).json()["model"] == "fake"
        answer = asked(client, "b0", k=1, model="other").json()
        assert (answer["model"], answer["domain"]) == ("other", "games")
        refused = asked(client, model="neither")
        assert refused.status_code == 422 and "the models here are fake, other" in refused.json()["error"]
        about = client.get("/v1/about").json()
        assert about["models"] == ["fake", "other"] and about["default_domain"] == "books"
        assert about["domains"] == [{"name": "books", "num_items": 7}, {"name": "games", "num_items": 4}]
        assert about["baselines"] == ["last first"] and about["max_history"] == 3


def test_a_blend_recommends_from_its_domain_alone(engine: Any, served: Served) -> None:
    class Blended(type(engine)):  # type: ignore[misc]
        domains = ("books",)

    with served(Service([Blended(engine.catalogue)], deadline_ms=60_000)) as client:
        assert ids(asked(client, "g0", "b0", k=1)) == ["b1"]
        refused = asked(client, "b0", domain="games")
        assert refused.status_code == 422 and "fake was made for books" in refused.json()["error"]
        (told,) = client.get("/v1/about").json()["served"]
        assert told == {"name": "fake", "domains": ["books"], "parts": ["model", "graph"]}
        assert client.get("/v1/items", params={"query": "chess", "domain": "games"}).json()["items"]


def test_scores_stand_in_the_order_of_the_candidates(shared: httpx.Client) -> None:
    answer = shared.post("/v1/score", json={"history": ["b0"], "candidates": ["b5", "b0", "b5"]})
    assert [(item["item_id"], item["score"]) for item in answer.json()["items"]] == [
        ("b5", pytest.approx(-5.1)),
        ("b0", pytest.approx(-0.1)),
        ("b5", pytest.approx(-5.1)),
    ]


def test_an_explanation_is_what_the_score_lacks_without_an_event(engine: Any, client: httpx.Client) -> None:
    history = ["b6", "b1", {"item_id": "g0", "domain": "games"}, "b1"]  # the engine reads the latest three
    answer = client.post("/v1/explain", json={"history": history, "item_id": "b2"}).json()
    assert answer["score"] == pytest.approx(-2.5) and answer["title"] == "Emma"
    effects = [(event["item_id"], event["effect"]) for event in answer["events"]]
    assert effects == [("b1", pytest.approx(-0.2)), ("g0", pytest.approx(-0.1)), ("b1", pytest.approx(-0.2))]
    assert answer["parts"] == [
        {"name": "model", "weight": 1.0, "effect": pytest.approx(3.75)},
        {"name": "graph", "weight": 2.0, "effect": pytest.approx(3.75)},
    ]
    assert {each["domain"]: each["effect"] for each in answer["domains"]} == pytest.approx(
        {"books": -0.4, "games": -0.1}
    )
    assert answer["num_events_read"] == 3 and len(engine.calls[-1]) == 6  # one batch


def test_baselines_answer_for_themselves(shared: httpx.Client) -> None:
    (found,) = shared.post("/v1/baselines", json={"history": ["b6"], "k": 2}).json()["lists"]
    assert found["name"] == "last first" and [item["item_id"] for item in found["items"]] == ["b5", "b4"]


# ---- deadlines and overload ------------------------------------------------------------------------------------------


def test_a_list_that_is_not_proven_in_time_says_so(engine: Any, client: httpx.Client) -> None:
    engine.proven = False
    whole = asked(client, "b0", k=2, mode="exact").json()
    assert (whole["mode"], whole["degraded"], whole["proven"]) == ("beam", False, False)
    late = asked(client, "b0", k=2, mode="exact", deadline_ms=1e-6).json()
    assert (late["mode"], late["degraded"], late["proven"]) == ("last first", True, False)


def test_a_busy_engine_leaves_the_answer_to_a_baseline(engine: Any, hold: Any, client: httpx.Client) -> None:
    held = hold(engine)
    answer = asked(client, "b0", k=2, deadline_ms=50).json()  # the engine answers nobody
    assert [item["item_id"] for item in answer["items"]] == ["b6", "b5"]
    assert (answer["mode"], answer["degraded"], answer["proven"]) == ("last first", True, False)
    assert metric(client, 'cprec_lists_total{degraded="true",mode="last first"}') == 1
    held.released.release(5)
    engine.before.clear()
    assert asked(client, "b0", k=2).json()["mode"] == "exact"


def test_a_short_list_is_no_list(engine: Any, last_first: Any, served: Served) -> None:
    engine.proven = False
    longer, shorter = last_first, type(last_first)(engine.catalogue, "shorter", most=1)
    with served(Service([engine], [shorter, longer], deadline_ms=60_000)) as client:
        answer = asked(client, "b0", k=8).json()  # seven books: the fake never has eight, and does not prove it
        assert answer["mode"] == "last first" and answer["degraded"] and len(answer["items"]) == 6
    with served(Service([engine], deadline_ms=60_000)) as client:
        answer = asked(client, "b0", k=8).json()  # nothing stands in: better than nothing
        assert answer["mode"] == "beam" and not answer["proven"] and len(answer["items"]) == 6


def test_overload_is_refused_at_once(engine: Any, hold: Any, served: Served) -> None:
    service = Service([engine], max_batch=2, deadline_ms=60_000)
    with served(service) as client, ThreadPoolExecutor(4) as pool:
        held = hold(engine)
        taken = [pool.submit(asked, client, "b0", k=1)]
        held.wait()
        late = client.post("/v1/recommend", json={"requests": [{"history": [], "deadline_ms": 1e-3}] * 2})
        assert late.status_code == 503  # they were queued, and nothing stands in for them: their room is free again
        taken += [pool.submit(asked, client, "b0", k=1) for _ in range(2)]
        while service._batcher.waiting < 2 or any(job.future.cancelled() for job in service._batcher._jobs):
            client.get("/health")
        for refused in (asked(client, "b0", k=1), asked(client, "b0", k=1)):
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
            assert "overloaded" in refused.json()["error"]
        assert metric(client, "cprec_shed_total") == 4 and metric(client, "cprec_queue_queries") == 2
        held.released.release(20)
        assert [ids(each.result(60)) for each in taken] == [["b1"]] * 3


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_an_engine_that_raises_is_stood_in_for_and_at_last_ill(engine: Any, client: httpx.Client) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error")

    engine.before.append(fail)
    answer = asked(client, "b0", k=2).json()
    assert (answer["mode"], answer["degraded"]) == ("last first", True)
    score = client.post("/v1/score", json={"history": [], "candidates": ["b0"]})
    assert score.status_code == 500 and "CUDA" not in score.text
    assert client.get("/health").status_code == 200
    asked(client, "b0")
    assert client.get("/health").status_code == client.get("/ready").status_code == 503
    assert metric(client, "cprec_engine_failures_total") == 3
    engine.before.clear()
    assert asked(client, "b0", k=2).json()["mode"] == "exact"
    assert client.get("/health").status_code == 200


def test_a_client_that_hangs_up_costs_nothing(engine: Any, hold: Any, served: Served) -> None:
    service = Service([engine], deadline_ms=60_000)
    with served(service) as client, ThreadPoolExecutor(1) as pool:
        held = hold(engine)
        first = pool.submit(asked, client, "b0", k=1)
        held.wait()
        body = json.dumps({"history": ["b3"], "k": 2}).encode()
        head = (
            f"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection((client.base_url.host, client.base_url.port)) as gone:
            gone.sendall(head.encode() + b"\r\n\r\n" + body)
            while service._batcher.waiting == 0:
                client.get("/health")
        while metric(client, 'cprec_request_seconds_count{method="POST",route="/v1/recommend",status="499"}') == 0:
            client.get("/health")
        held.released.release(1)
        assert ids(first.result(60)) == ["b1"]
        held.released.release(5)
        asked(client, "b4", k=1)
        assert [query.history[0].item_id for call in engine.calls[2:] for query in call] == ["b0", "b4"]


def test_a_slow_client_holds_up_nobody(engine: Any, served: Served) -> None:
    with (
        served(Service([engine], deadline_ms=60_000), body_seconds=0.3) as client,
        socket.create_connection((client.base_url.host, client.base_url.port)) as slow,
    ):
        slow.sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert ids(asked(client, "b0", k=1)) == ["b1"]
        received = b""
        while chunk := slow.recv(1000):  # until the service closes
            received += chunk
        assert received.startswith(b"HTTP/1.1 408 ")


def test_more_requests_than_there_is_room_for_are_told_to_come_back(engine: Any, hold: Any, served: Served) -> None:
    with (
        served(Service([engine], deadline_ms=60_000), max_requests=1) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        held = hold(engine)
        first = pool.submit(asked, client, "b0", k=1)
        held.wait()
        refused = asked(client, "b1", k=1)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json() == {"error": "too many requests at one time", "unknown": []}
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert metric(client, "cprec_shed_total") == 1, "which can be seen meanwhile"
        held.released.release(5)
        assert ids(first.result(60)) == ["b1"]
        assert ids(asked(client, "b1", k=1)) == ["b0"], "there is room again"


def test_requests_under_way_are_finished_on_shutdown(engine: Any, hold: Any, served: Served) -> None:
    with ThreadPoolExecutor(4) as pool:
        with served(Service([engine], deadline_ms=60_000)) as client:
            held = hold(engine)
            under_way = [pool.submit(asked, client, "b0", k=1)]
            held.wait()
            under_way += [pool.submit(asked, client, f"b{place}", k=1) for place in (1, 2)]
            while metric(client, "cprec_queue_queries") < 2:
                pass
            threading.Timer(0.2, held.released.release, [5]).start()  # after the server has begun to shut down
        assert [ids(each.result(60)) for each in under_way] == [["b1"], ["b0"], ["b0"]]


# ---- items -----------------------------------------------------------------------------------------------------------


def put(client: httpx.Client, *items: dict[str, str]) -> httpx.Response:
    return client.put("/v1/items", json={"items": [{"domain": "books"} | item for item in items]})


@pytest.mark.slow
def test_items_come_and_go_at_once_and_for_good(engine: Any, last_first: Any, served: Served, tmp_path: Path) -> None:
    with served(Service([engine], [last_first], ItemStore(tmp_path), deadline_ms=60_000)) as client:
        assert put(client, {"item_id": "a0", "title": "Aurora &amp; Co"}).json() == {
            "changed": 1,
            "in_stock": {"books": 8},
        }
        assert ids(asked(client, "Aurora & Co", k=1)) == ["b0"]
        assert ids(asked(client, "b0", k=1)) == ["a0"]
        gone = client.delete("/v1/items", params={"item_id": ["b1", "b2"], "domain": "books"})
        assert gone.json() == {"changed": 2, "in_stock": {"books": 6}}
        assert ids(asked(client, "b0", "b1", k=2)) == ["a0", "b3"]  # a history may name what is gone
        assert ids(client.get("/v1/items", params={"query": "dune"})) == ["b0"]
        (found,) = client.post("/v1/baselines", json={"history": ["a0", "b1"], "k": 9}).json()["lists"]
        assert [item["item_id"] for item in found["items"]] == ["b6", "b5", "b4", "b3", "b0"]
        put(client, {"item_id": "b2", "title": "Emma, again"}, {"item_id": "b3", "title": "War"})
        assert ids(client.get("/v1/items", params={"query": "emma"})) == ["b2"]
    with served(
        Service([engine], [last_first], ItemStore(tmp_path), deadline_ms=60_000)
    ) as client:  # the engine of the model folder
        answer = asked(client, "b0", k=3)
        assert ids(answer) == ["a0", "b2", "b3"]
        assert [item["title"] for item in answer.json()["items"]] == ["Aurora & Co", "Emma, again", "War"]
        assert client.get("/v1/about").json()["domains"][0] == {"name": "books", "num_items": 7}


def test_titles_are_looked_up_as_written_first_and_equal_ones_are_seen_together(
    engine: Any, last_first: Any, served: Served, tmp_path: Path
) -> None:
    with served(Service([engine], [last_first], ItemStore(tmp_path), deadline_ms=60_000)) as client:
        put(client, {"item_id": "c0", "title": "DUNE"}, {"item_id": "c1", "title": "Emma"})
        assert ids(asked(client, "DUNE", k=1)) == ["b0"]
        put(client, {"item_id": "c2", "title": "\u0645\u06cc\u200c\u062e Ｇｏ"})
        assert ids(client.get("/v1/items", params={"query": "go \u0645\u06cc\u062e", "domain": "books"})) == ["c2"]
        client.delete("/v1/items", params={"item_id": "c2", "domain": "books"})
        refused = asked(client, "dune", k=1)
        assert refused.status_code == 422 and refused.json()["unknown"] == ["dune"]
        assert "may mean 'Dune' (b0 of books), 'DUNE' (c0 of books)" in refused.json()["error"]
        seen = asked(client, {"title": "emma"}, k=9)
        assert not {"b2", "c1"} & set(ids(seen)) and len(ids(seen)) == 7
        assert len(ids(asked(client, "emma", k=9, exclude_seen=False))) == 9


def test_the_event_loop_spells_no_catalogue(
    engine: Any, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What look-ups by title, and of equal texts, are answered from is built before requests see the items."""
    built: list[str] = []
    monkeypatch.setattr(catalogue_module, "spelling", lambda text: built.append(text) or spelling(text))
    monkeypatch.setattr(catalogue_module, "offsets_of", lambda counts: built.append("texts") or offsets_of(counts))
    engine.catalogue = replace(engine.catalogue)  # with nothing built yet
    with served(Service([engine], store=ItemStore(tmp_path), deadline_ms=60_000)) as client:
        for new in ({"item_id": "c0", "title": "DUNE"}, {"item_id": "c1", "title": "New"}):
            built.clear()
            assert ids(asked(client, "ULYSSES", k=9, allow=["b4", "b1"])) == ["b1"]
            assert built == ["ULYSSES"]
            put(client, new)
        built.clear()
        assert asked(client, "dune").status_code == 422
        assert built == ["dune"]


def test_a_change_is_made_whole_or_not_at_all(engine: Any, served: Served, tmp_path: Path) -> None:
    with served(Service([engine], store=ItemStore(tmp_path), deadline_ms=60_000)) as client:
        wrong: list[tuple[dict[str, str], str]] = [
            ({"item_id": "x", "title": " <b></b> ..."}, "nothing is left of the title"),
            ({"item_id": "x\ny", "title": "X"}, "control characters"),
            ({"item_id": "x", "title": "X", "domain": "films"}, "name one of books, games"),
            ({"item_id": "x", "title": "X", "titel": "Y"}, "titel"),
        ]
        for item, message in wrong:
            refused = put(client, {"item_id": "good", "title": "Good"}, item)
            assert refused.status_code == 422 and message in refused.json()["error"]
        refused = client.delete("/v1/items", params={"item_id": ["b0", "b99"]})
        assert refused.status_code == 422 and refused.json()["unknown"] == ["b99"]
        assert client.get("/v1/about").json()["domains"][0]["num_items"] == 7
        assert (tmp_path / FILE).read_bytes() == b""


def test_what_cannot_be_stored_is_not_in_effect(
    engine: Any, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ItemStore(tmp_path)

    def full(_: Any) -> None:
        raise OSError(28, "No space left on device")

    with served(Service([engine], store=store)) as client:
        monkeypatch.setattr(store, "append", full)
        refused = put(client, {"item_id": "a0", "title": "A"})
        assert refused.status_code == 507 and "was not made" in refused.json()["error"]
        assert ids(asked(client, k=1)) == ["b0"]


def test_without_a_state_folder_items_stay(shared: httpx.Client) -> None:
    for refused in (put(shared, {"item_id": "a", "title": "A"}), shared.delete("/v1/items?item_id=b0")):
        assert refused.status_code == 409 and "state=FOLDER" in refused.json()["error"]


def test_items_are_found_by_words_and_by_id(shared: httpx.Client) -> None:
    def found(**params: Any) -> list[str]:
        return ids(shared.get("/v1/items", params=params))

    assert found(query="DUNE mess") == ["b1"]
    assert found(query="go") == ["g0", "g2"] and found(query="go", limit=1) == ["g0"]
    assert found(query="b1") == ["b1", "b6"]  # the id first
    assert found(query="dune", domain="games") == [] and found(query="***") == []
    assert len(found()) == 11 and len(found(domain="games")) == 4
    assert shared.get("/v1/items", params={"domain": "films"}).status_code == 422
    assert shared.get("/v1/items", params={"limit": 0}).status_code == 422


# ---- the gate, and bad input -----------------------------------------------------------------------------------------


def test_a_token_is_asked_for(engine: Any, served: Served) -> None:
    with served(Service([engine], deadline_ms=60_000), token="se-cret") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "se-cret"}):
            refused = client.post("/v1/recommend", json={"history": []}, headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=headers).status_code == 401
        client.headers["Authorization"] = "Bearer se-cret"
        assert ids(asked(client, "b0", k=1)) == ["b1"]
    with served(Service([engine], deadline_ms=60_000), token="se-cret") as client:
        assert client.get("/health").status_code == client.get("/ready").status_code == 200


def test_a_large_body_is_refused(shared: httpx.Client) -> None:
    large = b"[" + b" " * (10 << 20) + b"]"
    assert shared.post("/v1/recommend", content=large).status_code == 413
    chunks = (b" " * (1 << 20) for _ in range(10))  # without a length in its head
    assert shared.post("/v1/recommend", content=chunks).status_code == 413
    assert shared.get("/health").status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("more", [b"2\r\n, \r\n", b""], ids=["it goes on", "it ends"])
def test_a_body_just_too_large_is_answered_at_once(more: bytes, engine: Any, served: Served) -> None:
    options = {"max_body_mb": 10 / (1 << 20), "body_seconds": 1e6 if not more else 0.5}
    with (
        served(Service([engine], deadline_ms=60_000), **options) as client,
        socket.create_connection((client.base_url.host, client.base_url.port)) as sender,
    ):
        head = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        sender.settimeout(60)
        sender.sendall(head + b"b\r\n[          \r\n" + (more or b"0\r\n\r\n"))
        received = b""
        while chunk := sender.recv(1000):  # until the service closes, which does not wait for what never comes
            received += chunk
        assert received.startswith(b"HTTP/1.1 413 ") and b"send less at once" in received


@pytest.mark.slow
def test_a_history_of_100_000_events(shared: httpx.Client) -> None:
    history = ["b0", "b1", "Emma", "b3"] * 25_000
    assert ids(asked(shared, *history, k=1)) == ["b4"]
    refused = asked(shared, *(f"x{place}" for place in range(100_000)))
    assert refused.status_code == 422
    assert refused.json()["unknown"] == [f"x{place}" for place in range(100)]
    assert "and 99997 more" in refused.json()["error"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"history": ["b0"], "k": 0}, "k"),
        ({"history": ["b0"], "k": 101}, "k"),
        ({"history": "b0"}, "history"),
        ({"history": [{}]}, "history"),
        ({"history": [{"item_id": "b0", "title": "Dune"}]}, "history"),
        ({"history": ["b0"], "denny": ["b1"]}, "denny"),
        ({"history": ["b0"], "mode": "generate"}, "mode"),
        ({"history": ["b0"], "deadline_ms": -1}, "deadline_ms"),
        ({"history": ["b0"], "domain": "films"}, "name one of books, games"),
        ({"history": ["b0"], "allow": ["b99"]}, "b99"),
        ({"history": ["b0"], "deny": ["g0"]}, "g0"),
        ({"history": [{"item_id": "b0", "domain": "films"}]}, "name one of books, games"),
        ({"history": ["\u0000\u0007 \u202e"]}, "not in the catalogue"),
        ({"requests": []}, "requests"),
        ({}, "history"),
        ([], "body"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(body: Any, message: str, shared: httpx.Client) -> None:
    refused = shared.post("/v1/recommend", json=body)
    assert refused.status_code == 422 and message in refused.json()["error"], refused.text


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b'{"history": ["\\ud800"]}', b'{"history": [NaN]}', b"[" * 9999]
)
def test_what_is_no_request_is_refused(body: bytes, shared: httpx.Client) -> None:
    refused = shared.post("/v1/recommend", content=body, headers={"Content-Type": "application/json"})
    assert refused.status_code in (400, 422) and refused.json()["error"]
    assert asked(shared, "b0", k=1).status_code == 200


def test_there_is_a_page_and_no_other_way_in(shared: httpx.Client) -> None:
    page = shared.get("/").headers
    assert page["content-type"].startswith("text/") and page["content-security-policy"] == "frame-ancestors 'none'"
    assert shared.get("/v1/nothing").json()["error"] == "Not Found"
    assert shared.get("/v1/recommend").status_code == 405


def test_metrics_count_requests_batches_and_lists(client: httpx.Client) -> None:
    for _ in range(3):
        asked(client, "b0")
    asked(client, "nothing")
    assert metric(client, 'cprec_request_seconds_count{method="POST",route="/v1/recommend",status="200"}') == 3
    assert metric(client, 'cprec_request_seconds_count{method="POST",route="/v1/recommend",status="422"}') == 1
    assert metric(client, 'cprec_lists_total{degraded="false",mode="exact"}') == 3
    assert metric(client, "cprec_batch_queries_count") == 3 and metric(client, "cprec_queue_queries") == 0


# ---- a model that says no numbers, and histories that say nothing ----------------------------------------------------


@pytest.mark.slow
def test_scores_that_are_no_numbers_end_the_service(engine: Any, last_first: Any, served: Served) -> None:
    def broken(*_: Any) -> None:
        raise ModelError("runs/ft: the model's scores are not finite")

    for baselines in ([], [last_first]):
        with served(Service([engine], baselines, deadline_ms=60_000)) as client:
            assert client.get("/ready").status_code == 200
            engine.before = [broken]
            refused = client.post("/v1/score", json={"history": ["b0"], "candidates": ["b1"]})
            assert (
                refused.status_code == 500 and "runs/ft: the model's scores are not finite" in refused.json()["error"]
            )
            assert client.get("/ready").status_code == client.get("/health").status_code == 503
            listed = asked(client, "b0", k=1)
            if baselines:
                assert (listed.json()["mode"], listed.json()["degraded"]) == ("last first", True)
            else:
                assert listed.status_code == 500 and "are not finite" in listed.json()["error"]
            engine.before = []
            assert client.get("/ready").status_code == 503  # weights do not heal


def test_a_history_that_says_nothing_gets_the_popular_items(engine: Any, last_first: Any, served: Served) -> None:
    last_first.name = "popularity"
    engine.shown = lambda query: tuple(item for item in query.history if item.domain == query.domain)
    with served(Service([engine], [last_first], deadline_ms=60_000)) as client:
        warmed = len(engine.calls)
        for history in ([], ["g0"]):  # the engine reads books alone
            told = asked(client, *history, k=2, deny=["b6"]).json()
            assert [item["item_id"] for item in told["items"]] == ["b5", "b4"]
            assert (told["mode"], told["degraded"], told["proven"]) == ("popularity", False, False)
        assert ids(asked(client, k=50, allow=["b1", "b2"])) == ["b2", "b1"]  # all that there are
        assert len(engine.calls) == warmed
        answers = client.post("/v1/recommend", json={"requests": [{"history": []}, {"history": ["b0"]}]}).json()
        assert [one["mode"] for one in answers["responses"]] == ["popularity", "exact"]
        last_first.most = 1
        assert asked(client, k=2).json()["mode"] == "exact"  # too few are popular


def test_popular_items_make_nobody_wait(engine: Any, last_first: Any, served: Served) -> None:
    """Two baseline calls and the model's go on at the same time: each waits for the others."""
    last_first.name = "popularity"
    with served(Service([engine], [last_first], deadline_ms=60_000)) as client:
        together, rank = threading.Barrier(3, timeout=10), last_first.rank
        last_first.rank = lambda queries, k: together.wait() >= 0 and rank(queries, k)
        engine.before.append(lambda *_: together.wait())
        requests = [{"history": [], "domain": "games"}, {"history": []}, {"history": ["b0"]}]
        answers = client.post("/v1/recommend", json={"requests": requests}).json()["responses"]
        assert [one["mode"] for one in answers] == ["popularity", "popularity", "exact"]
        assert [one["items"][0]["item_id"] for one in answers] == ["g3", "b6", "b1"]


# ---- how it is asked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/v1/about", "/v1/items", "/openapi.json"])
def test_head_is_get_without_a_body(path: str, client: httpx.Client) -> None:
    got, head = client.get(path), client.head(path)
    assert head.status_code == got.status_code == 200 and head.content == b""
    assert head.headers["content-length"] == str(len(got.content))
    assert head.headers["content-type"] == got.headers["content-type"]
    if path.startswith("/v1"):
        assert metric(client, f'cprec_request_seconds_count{{method="HEAD",route="{path}",status="200"}}') == 1


def test_pages_of_other_origins_ask_only_if_they_may(engine: Any, served: Served, shared: httpx.Client) -> None:
    ask = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "authorization,content-type"
    assert shared.options("/v1/recommend", headers=ask).status_code == 405
    assert "access-control-allow-origin" not in asked(shared, "b0").headers
    options = {"cors": ["https://shop.example"], "token": "se-cret"}
    with served(Service([engine], deadline_ms=60_000), **options) as client:
        leave = client.options("/v1/recommend", headers=ask)  # browsers send no token with this
        assert leave.status_code == 200
        assert leave.headers["access-control-allow-origin"] == "https://shop.example"
        assert {"Authorization", "Content-Type"} <= set(leave.headers["access-control-allow-headers"].split(", "))
        for token, status in (("se-cret", 200), ("wrong", 401)):
            headers = {"Origin": "https://shop.example", "Authorization": f"Bearer {token}"}
            answer = client.post("/v1/recommend", json={"history": ["b0"]}, headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "https://shop.example"
        other = ask | {"Origin": "https://other.example"}
        assert "access-control-allow-origin" not in client.options("/v1/recommend", headers=other).headers


@pytest.mark.parametrize("prefix", ["", "/shop/rec"], ids=["stripped", "kept"])
def test_behind_a_proxy_that_adds_a_prefix(prefix: str, engine: Any, served: Served) -> None:
    with served(Service([engine], deadline_ms=60_000), root_path="/shop/rec", token="se-cret") as client:
        assert client.get(f"{prefix}/health").status_code == client.get(f"{prefix}/").status_code == 200
        assert client.get(f"{prefix}/docs").status_code == 401
        client.headers["Authorization"] = "Bearer se-cret"
        assert "'/shop/rec/openapi.json'" in client.get(f"{prefix}/docs").text
        described = client.get(f"{prefix}/openapi.json").json()
        assert described["servers"] == [{"url": "/shop/rec"}] and "/v1/recommend" in described["paths"]
        for path in ("/v1/recommend", "/v1/recommend/"):
            assert ids(client.post(prefix + path, json={"history": ["b0"], "k": 1})) == ["b1"]


def test_whole_numbers_are_ids(engine: Any, served: Served, tmp_path: Path) -> None:
    with served(Service([engine], store=ItemStore(tmp_path), deadline_ms=60_000)) as client:
        large = 2**63 + 1
        assert put(client, {"item_id": 9, "title": "Nine"}, {"item_id": large, "title": "Large"}).status_code == 200
        for nine in (9, 9.0, "9"):
            for history in ([nine, large], [{"item_id": nine}, {"item_id": str(large)}]):
                assert asked(client, *history, k=1).status_code == 200
                assert [item.item_id for item in engine.calls[-1][-1].history] == ["9", str(large)]
        assert ids(asked(client, allow=[9, large, "b0"], deny=[9])) == [str(large), "b0"]
        scored = client.post("/v1/score", json={"history": [], "candidates": [9]})
        assert ids(scored) == ["9"]
        assert client.post("/v1/explain", json={"history": [9], "item_id": large}).json()["item_id"] == str(large)
        for wrong in (True, 9.5, 1e300, None, ["9"]):
            refused = asked(client, wrong)
            assert refused.json()["error"] == "body.history.0: an id is text or a whole number"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"history": ["b0"], "k": 101}, "body.k: Input should be less than or equal to 100"),
        ({"requests": [{"history": ["b0"], "k": 0}]}, "body.requests.0.k: Input should be greater than or equal to 1"),
        ({"requests": [], "history": ["b0"]}, "body.history: there is no such field here"),
        ({"history": ["b0"], "denny": []}, "body.denny: there is no such field here"),
        ({"history": [{"item_id": True}]}, "body.history.0.item_id: an id is text or a whole number"),
        ({"history": [{}]}, "body.history.0: an event has an item_id or a title: give one of them"),
        ({}, "body: give a history, which may be empty, a query, or both"),
        (["b0"], "body: Input should be an object"),
    ],
)
def test_what_is_wrong_is_said_of_the_form_that_was_sent(body: Any, message: str, shared: httpx.Client) -> None:
    error = shared.post("/v1/recommend", json=body).json()["error"]
    assert error == message or ("requests" in body and "history" in body and error.endswith(message))


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        (b'{"history": ["b0"], "history": ["b1"]}', {}, 422, "the key 'history' occurs twice"),
        (b'{"history": [NaN]}', {}, 422, "NaN is no number of JSON"),
        (b'{"history": [' + b"9" * 5_000 + b"]}", {}, 422, "a number of 5,000 digits"),
        (b'{"history": ["b0"]', {}, 422, "body: this is not valid JSON"),
        (b"[" * 100_000, {}, 422, "body: this is not valid JSON: lists or objects are nested too deeply"),
        (b'{"history": ["\xff"]}', {}, 422, "body: this is not valid JSON: byte 14 is not UTF-8"),
        (gzip.compress(b'{"history": []}'), {"content-encoding": "gzip"}, 415, "Content-Encoding gzip is not read"),
        (b'{"history": []}', {"content-type": "text/plain"}, 415, "Content-Type: application/json (it was text/plain)"),
        (b'{"history": ["b0"]}', {"content-type": "application/json; charset=utf-8"}, 200, ""),
        (b'\xef\xbb\xbf{"history": ["b0"]}', {}, 200, ""),
    ],
    ids=["twice", "nan", "digits", "cut", "deep", "bytes", "gzip", "text", "charset", "mark"],
)
def test_bodies_in_other_forms(
    body: bytes, headers: dict[str, str], status: int, message: str, shared: httpx.Client
) -> None:
    answer = shared.post("/v1/recommend", content=body, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status and message in answer.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cors": ("https://shop.example/",)}, "without a slash at the end"),
        ({"cors": ("shop.example",)}, "an origin is scheme and host"),
        ({"root_path": "rec"}, "must begin with a slash and end without one"),
        ({"root_path": "/rec/"}, "must begin with a slash and end without one"),
        ({"root_path": "/v1/rec"}, "/v1 is a path of the service itself"),
    ],
)
def test_origins_and_prefixes_are_checked(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeConfig(models=("m",), **settings)
    ServeConfig(models=("m",), cors=("*", "http://localhost:3000"), root_path="/shop/rec-2")
