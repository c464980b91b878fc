"""The service as people run it: a tiny model in a process of its own, signals, and a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from cprec.data.catalogue import Catalogue
from cprec.models import tiny_model
from cprec.rank.llm import LLMRecommender
from cprec.serve.items import FILE
from cprec.text.tokenizer import train_tokenizer

pytestmark = pytest.mark.slow  # each test starts Python and loads torch, some twice


@pytest.fixture(scope="module")
def folder(catalogue: Catalogue, write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random weights."""
    tokenizer = train_tokenizer([f" {title}" for title in catalogue.title], 300)
    model = tiny_model(len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    about = {"domain": "books", "max_title_tokens": 16}
    path = write_model(tmp_path_factory.mktemp("model") / "tiny", model, tokenizer, catalogue, **about)
    (path / "run.json").write_text(json.dumps({"config": {"data": "gone"}}))
    return path


class Served(NamedTuple):
    process: subprocess.Popen[str]
    client: httpx.Client


@pytest.fixture
def serve(folder: Path) -> Iterator[Callable[..., Served]]:
    """Starts `cprec serve`; what is left running is ended."""
    with ExitStack() as stack:

        def start(*settings: str, **environment: str) -> Served:
            return stack.enter_context(served(folder, settings, environment))

        yield start


@contextmanager
def served(folder: Path, settings: tuple[str, ...], environment: dict[str, str]) -> Iterator[Served]:
    command = [sys.executable, "-m", "cprec", "serve", str(folder), "port=0", "deadline_ms=60000", *settings]
    all_of_it = {**os.environ, "CPREC_PROGRESS": "plain", "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=all_of_it)
    assert process.stderr is not None
    try:
        said = ""
        while not (found := re.search(r"serving on (http://\S+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        url = found[1].replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield Served(process, client)
    finally:
        process.kill()
        process.communicate()


def ask(client: httpx.Client, *history: str, **fields: Any) -> Any:
    answer = client.post("/v1/recommend", json={"history": history} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_it_answers_as_the_recommender_does_and_keeps_items_over_a_kill(
    serve: Callable[..., Served], folder: Path, tmp_path: Path
) -> None:
    expected = LLMRecommender.from_pretrained(folder, mode="exact").recommend(["b0", "b2"], 3)
    state = f"state={tmp_path}"
    process, client = serve(state)
    answer = ask(client, "b0", "Emma", k=3, mode="exact")
    assert [item["item_id"] for item in answer["items"]] == [each.item_id for each in expected]
    assert [item["score"] for item in answer["items"]] == pytest.approx([each.score for each in expected], abs=1e-4)
    assert answer["proven"] and answer["model"] == "tiny"
    told = client.post("/v1/explain", json={"history": ["b0", "b2"], "item_id": expected[0].item_id}).json()
    assert told["score"] == pytest.approx(expected[0].score, abs=1e-4) and len(told["events"]) == 2
    for number in range(3):
        item = {"item_id": f"new{number}", "domain": "books", "title": f"Dune {number}"}
        assert client.put("/v1/items", json={"items": [item]}).status_code == 200
    assert client.delete("/v1/items?item_id=b1").status_code == 200
    process.kill()  # -9
    process.wait()
    with open(tmp_path / FILE, "ab") as file:
        file.write(b"0123 half a li")  # as a kill leaves it
    _, client = serve(state)
    found = {item["item_id"] for item in ask(client, k=50)["items"]}
    assert found == {"b0", "b2", "b3", "b4", "b5", "b6", "new0", "new1", "new2"}


def test_workers_share_a_folder_and_one_is_killed(serve: Callable[..., Served], tmp_path: Path) -> None:
    def in_stock(client: httpx.Client) -> set[str]:
        found = client.get("/v1/items", params={"domain": "books", "limit": 100}).json()["items"]
        return {item["item_id"] for item in found}

    state = f"state={tmp_path}"
    (killed, one), (_, other) = serve(state), serve(state)
    with ThreadPoolExecutor(2) as pool:  # both receive changes at once
        changes = [
            pool.submit(client.put, "/v1/items", json={"items": [{"item_id": name, "domain": "books", "title": name}]})
            for place in range(4)
            for name, client in ((f"new{place}", one), (f"more{place}", other))
        ]
        assert [each.result().status_code for each in changes] == [200] * 8
    assert ask(one, "more3", k=1)["items"] and ask(other, "new3", k=1)["items"], "what is confirmed is known to both"
    assert one.delete("/v1/items?item_id=b1").status_code == 200
    killed.kill()  # -9
    killed.wait()
    expected = {"b0", *(f"b{place}" for place in range(2, 7)), *(f"new{n}" for n in range(4))}
    expected |= {f"more{place}" for place in range(4)}
    while "b1" in in_stock(other):  # it looks by itself
        pass
    assert in_stock(other) == expected
    assert other.put("/v1/items", json={"items": [{"item_id": "b1", "domain": "books", "title": "Back"}]}).is_success
    _, again = serve(state)
    assert in_stock(again) == in_stock(other) == expected | {"b1"}


def test_a_damaged_item_file_stops_the_start(serve: Callable[..., Served], folder: Path, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('0123456789abcdef {"domain":"books"}\n')
    command = [sys.executable, "-m", "cprec", "serve", str(folder), "port=0", f"state={tmp_path}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "items.log, line 1: the checksum is" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_no_request_that_was_taken(serve: Callable[..., Served], number: int) -> None:
    process, client = serve()

    def until_refused() -> int:
        answered = 0
        while True:
            try:
                answer = client.post("/v1/recommend", json={"history": ["b0"], "k": 3})
            except (httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError):  # nobody is there any more
                return answered
            assert answer.status_code in (200, 503), answer.text
            if answer.status_code == 200:
                assert len(answer.json()["items"]) == 3
                answered += 1
                if answered == 5:
                    process.send_signal(number)

    with ThreadPoolExecutor(4) as pool:
        answered = list(pool.map(lambda _: until_refused(), range(4)))
    assert sum(answered) >= 5
    assert process.wait(60) == 0
    assert process.stderr is not None and "every request that was taken has its answer" in process.stderr.read()


def test_other_addresses_need_a_token(serve: Callable[..., Served], folder: Path) -> None:
    command = [sys.executable, "-m", "cprec", "serve", str(folder), "host=0.0.0.0", "port=0"]
    refused = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CPREC_TOKEN": ""})
    assert refused.returncode == 2 and "set the environment variable CPREC_TOKEN" in refused.stderr
    _, client = serve("host=0.0.0.0", CPREC_TOKEN="se-cret")
    assert client.get("/v1/about").status_code == 401
    assert client.get("/v1/about", headers={"Authorization": "Bearer se-cret"}).status_code == 200


def test_kept_prompts_stay_within_their_memory(serve: Callable[..., Served]) -> None:
    _, client = serve("cache_mb=0.05")
    values: dict[str, float] = {}
    for place in range(40):
        ask(client, *(f"b{(place + event) % 7}" for event in range(place % 9)), k=1)
        lines = client.get("/metrics").text.splitlines()
        values = {
            name: float(v) for name, _, v in (line.partition(" ") for line in lines if line[:11] == "cprec_cache")
        }
        assert values["cprec_cache_bytes"] <= values["cprec_cache_max_bytes"] == int(0.05 * (1 << 20))
    assert values["cprec_cache_bytes"] > 0 and values["cprec_cache_hit_tokens"] > 0
