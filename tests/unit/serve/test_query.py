"""Queries in words over HTTP: beside a history or instead of one, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from cprec.errors import ConfigError
from cprec.rank.recommending import Recommendation
from cprec.serve.config import RecommendConfig
from cprec.serve.items import ItemStore
from cprec.serve.recommend import recommend_one
from cprec.serve.service import Service

Served = Callable[..., Any]

# Nine words in the titles of the books, "dune" twice, "messiah" once: see `WordIndex`.
DUNE = {"b0": math.log1p(9 * 1 / (2 / 9)), "b1": math.log1p(9 * (1 / 2) / (2 / 9))}
MESSIAH = math.log1p(9 * (1 / 2) / (1 / 9))


def asked(client: httpx.Client, path: str = "recommend", **fields: Any) -> Any:
    answer = client.post(f"/v1/{path}", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(answer: Any) -> list[str]:
    return [item["item_id"] for item in answer["items"]]


def test_a_query_alone_lists_what_has_its_words(shared: httpx.Client) -> None:
    answer = asked(shared, query="DUNE messiah", k=5)
    assert ids(answer) == ["b1", "b0"]
    expected = [-1 + 3 * (DUNE["b1"] + MESSIAH), 3 * DUNE["b0"]]
    assert [item["score"] for item in answer["items"]] == pytest.approx(expected)
    assert (answer["mode"], answer["proven"], answer["degraded"]) == ("query", True, False)
    assert asked(shared, query="dune", history=[], mode="beam")["mode"] == "query"
    assert ids(asked(shared, query="go", domain="games", deny=["g0"])) == ["g2"]


def test_beside_a_history_the_words_add_to_every_score(shared: httpx.Client) -> None:
    answer = asked(shared, history=["b5"], query="messiah", k=3)
    assert answer["mode"] == "query and history" and ids(answer) == ["b1", "b0", "b2"]
    expected = [-1.6 + 3 * MESSIAH, -0.6, -2.6]
    assert [item["score"] for item in answer["items"]] == pytest.approx(expected)
    scored = asked(shared, "score", history=["b5"], query="messiah", candidates=["b0", "b1"])
    assert [item["score"] for item in scored["items"]] == pytest.approx([expected[1], expected[0]])


def test_why_names_the_words(shared: httpx.Client) -> None:
    answer = asked(shared, "explain", history=["b5"], query="messiah dune emma", item_id="b1")
    assert [(one["word"], one["effect"]) for one in answer["words"]] == [
        ("messiah", pytest.approx(3 * MESSIAH)),
        ("dune", pytest.approx(3 * DUNE["b1"])),
    ]
    assert [(part["name"], part["weight"]) for part in answer["parts"]] == [
        ("model", 1.0),
        ("graph", 2.0),
        ("query", 3.0),
    ]
    assert sum(part["effect"] for part in answer["parts"]) == pytest.approx(answer["score"] + 10)
    assert [event["effect"] for event in answer["events"]] == [pytest.approx(-0.6)]
    alone = asked(shared, "explain", query="emma", item_id="b3")
    assert (alone["words"], alone["events"]) == ([], []) and alone["parts"][-1]["name"] == "query"
    assert asked(shared, "explain", history=["b5"], item_id="b1")["words"] == []


def test_words_that_a_system_reads_are_no_part_of_their_own(engine: Any, last_first: Any, served: Served) -> None:
    engine.asked_in_words = lambda query, text: replace(query, text=text)
    engine.effects = lambda queries, rankings: [{"model": 1.0, "graph": 2.0} for _ in queries]
    with served(Service([engine], [last_first], deadline_ms=60_000)) as client:
        answer = asked(client, "explain", query="dune", item_id="b1")
        assert answer["words"] == [] and [part["name"] for part in answer["parts"]] == ["model", "graph"]
        answer = asked(client, query="dune", k=5)
        assert answer["mode"] == "query" and len(ids(answer)) == 5, "those without the word as well"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query": "quidditch"}, "no item of domain 'books' has any of its words"),
        ({"query": "mesiah", "history": ["b0"]}, "near are messiah"),
        ({"query": "chess"}, "no item of domain 'books'"),
        ({"query": "emma", "deny": ["b2"]}, "are in the history, withdrawn or filtered out"),
        ({"query": "emma", "allow": ["b0"]}, "filtered out"),
        ({"query": "emma", "history": ["b2"]}, "are in the history"),
        ({"query": ""}, "query='' has no word"),
        ({"query": "?!"}, "has no word"),
        ({"query": 7}, "query: Input should be a valid string"),
        ({"query": ["emma"]}, "query: Input should be a valid string"),
        ({"query": "emma " * 401}, "query: String should have at most 2000 characters"),
        ({}, "give a history, which may be empty, a query, or both"),
        ({"query": None}, "give a history"),
    ],
)
def test_what_is_refused(shared: httpx.Client, fields: dict[str, Any], message: str) -> None:
    answer = shared.post("/v1/recommend", json=fields)
    assert answer.status_code == 422, answer.text
    assert message in answer.json()["error"] and not answer.json()["unknown"]
    assert "items" not in answer.json()


@pytest.mark.parametrize("path", ["score", "explain", "baselines"])
def test_every_request_refuses_words_that_nothing_has(shared: httpx.Client, path: str) -> None:
    item = {"score": {"candidates": ["b0"]}, "explain": {"item_id": "b0"}, "baselines": {}}[path]
    answer = shared.post(f"/v1/{path}", json={"query": "quidditch", **item})
    assert answer.status_code == 422 and "any of its words" in answer.json()["error"]


def test_a_model_that_is_late_or_fails_leaves_the_words(engine: Any, last_first: Any, served: Served) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    with served(Service([engine], [last_first], deadline_ms=60_000)) as client:
        engine.before.append(fail)
        answer = asked(client, query="dune", history=["b5"])
        assert (answer["mode"], answer["degraded"], answer["proven"]) == ("words", True, False)
        assert ids(answer) == ["b0", "b1"]  # the shorter title is more about it
        assert [item["score"] for item in answer["items"]] == pytest.approx([DUNE["b0"], DUNE["b1"]])
    engine.before.clear()
    with served(Service([engine], deadline_ms=60_000)) as client:  # also without baselines
        engine.before.append(fail)
        assert ids(asked(client, query="dune", k=1)) == ["b0"]


def test_no_empty_list_stands_in_for_a_system_that_reads_words(engine: Any, last_first: Any, served: Served) -> None:
    """It may be asked in words that none of the items has that are left."""

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    engine.asked_in_words = lambda query, text: replace(query, text=text)
    with served(Service([engine], [last_first], deadline_ms=60_000)) as client:
        assert len(ids(asked(client, query="emma", deny=["b2"], k=3))) == 3
        engine.before.append(fail)
        assert asked(client, query="emma", k=3)["mode"] == "words"
        answer = client.post("/v1/recommend", json={"query": "emma", "deny": ["b2"], "k": 3})
        assert answer.status_code == 503 and answer.json()["error"] == "the model failed"


def test_popular_items_answer_no_query(engine: Any, last_first: Any, served: Served) -> None:
    last_first.name = "popularity"
    with served(Service([engine], [last_first], deadline_ms=60_000)) as client:
        assert asked(client, history=[], k=1)["mode"] == "popularity"
        assert asked(client, query="emma")["mode"] == "query"
        lists = {each["name"]: ids(each) for each in asked(client, "baselines", query="emma dune", k=5)["lists"]}
        assert lists == {"words": ["b2", "b0", "b1"], "popularity": ["b2", "b1", "b0"]}


def test_items_are_found_as_soon_as_they_are_there(session_service: Callable[..., Any], tmp_path: Path) -> None:
    with session_service(ItemStore(tmp_path)) as client:
        assert client.post("/v1/recommend", json={"query": "quidditch"}).status_code == 422
        new = {"item_id": "q1", "domain": "books", "title": "A Game", "brand": "Quidditch Press"}
        assert client.put("/v1/items", json={"items": [new]}).status_code == 200
        assert ids(asked(client, query="quidditch")) == ["q1"]  # by its brand
        client.delete("/v1/items", params={"item_id": "q1", "domain": "books"})
        refused = client.post("/v1/recommend", json={"query": "quidditch"})
        assert refused.status_code == 422 and "withdrawn" in refused.json()["error"]


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_shows_the_words(capsys: pytest.CaptureFixture[str]) -> None:
    class Named:
        def recommend(self, history: Any, k: int, **asked: Any) -> list[Recommendation]:
            assert (history, k, asked) == ((), 2, {"domain": None, "exclude_seen": True, "query": "red kettle"})
            return [Recommendation("a", "Red kettle", 1.5, ("kettle", "red")), Recommendation("b", "Kettle", 1.25)]

    recommend_one(RecommendConfig(model="m", query="red kettle", k=2), Named())  # type: ignore[arg-type]
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[-4:] == ["words", "of", "the", "query"]
    assert first.split()[-3:] == ["1.50", "kettle,", "red"] and second.split()[-1] == "1.25"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--query with words, or both; or --input FILE"),
        ({"query": "a", "input": "in.csv", "output": "out.csv"}, "give either --history"),
        ({"query": "a", "num_processes": 2}, "are for --input FILE"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RecommendConfig(model="m", **settings)


def test_a_system_says_how_it_ranks_and_reads_no_words(engine: Any, last_first: Any, served: Served) -> None:
    def refuse(query: Any, text: str) -> Any:
        raise ConfigError("fake reads histories, not queries in words: leave the query out")

    engine.way, engine.asked_in_words = "letters", refuse
    with served(Service([engine], [last_first], deadline_ms=60_000)) as client:
        assert asked(client, history=["b3"])["mode"] == asked(client, history=["b3"], mode="beam")["mode"] == "letters"
        for path, more in (("recommend", {}), ("score", {"candidates": ["b0"]}), ("explain", {"item_id": "b0"})):
            answer = client.post(f"/v1/{path}", json={"query": "dune", **more})
            assert answer.status_code == 422
            assert answer.json()["error"] == "fake reads histories, not queries in words: leave the query out"
