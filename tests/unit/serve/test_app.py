"""The service over HTTP: what it answers, what it refuses, and that it never answers wrongly."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

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
