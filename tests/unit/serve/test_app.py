from __future__ import annotations

from typing import Any

import httpx
import pytest


def ids(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def test_health_and_readiness(client: httpx.Client) -> None:
    assert client.get("/health").text == "ok\n"
    assert client.get("/ready").status_code == 200


def test_a_list_for_ids_and_titles_mixed(client: httpx.Client) -> None:
    history: list[Any] = ["b0", "war & peace", {"item_id": "b2"}, {"title": "Go", "domain": "games"}]
    answer = client.post("/v1/recommend", json={"history": history, "k": 2})
    assert ids(answer) == ["b1", "b4"]
    told = answer.json()
    assert told["items"][0] == {"item_id": "b1", "title": "Dune Messiah", "score": pytest.approx(-1 - 0.9)}
    assert (told["mode"], told["degraded"], told["proven"]) == ("exact", False, True)
    assert (told["domain"], told["model"]) == ("books", "fake") and told["milliseconds"] > 0
