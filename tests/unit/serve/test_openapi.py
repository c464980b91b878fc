"""Requests that schemathesis makes from the description of the interface: none is answered other than described."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance, unsupported_method

from cprec.serve.items import ItemStore
from cprec.serve.routes import EXPLAIN_EXAMPLES, ITEM_EXAMPLES, RECOMMEND_EXAMPLES, SCORE_EXAMPLES


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory, session_service: Any) -> Any:
    with session_service(ItemStore(tmp_path_factory.mktemp("state"))) as client:
        yield client, schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")


OPERATIONS = [
    ("POST", "/v1/recommend"),
    ("POST", "/v1/baselines"),
    ("POST", "/v1/score"),
    ("POST", "/v1/explain"),
    ("GET", "/v1/items"),
    ("PUT", "/v1/items"),
    ("DELETE", "/v1/items"),
    ("GET", "/v1/about"),
]


@pytest.mark.slow
def test_every_operation_is_tried(described: Any) -> None:
    _, schema = described
    found = {(o.ok().method.upper(), o.ok().path) for o in schema.get_all_operations()}
    assert found - {("GET", "/health"), ("GET", "/ready"), ("GET", "/metrics")} == set(OPERATIONS)


def known(value: Any, name: str = "") -> Any:
    """The same body with ids and names that the service has, so that it is answered and not only refused."""
    if isinstance(value, dict):
        return {key: known(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [known(part, name) for part in value]
    if name == "deadline_ms":
        return None  # scores that are late are a 503, as described
    if not isinstance(value, str) or name == "mode":
        return value
    return {"domain": "books", "model": "fake", "title": "Emma"}.get(name, f"b{len(value) % 7}")


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_described(method: str, path: str, described: Any) -> None:
    _, schema = described
    operation = schema[path][method]

    @settings(max_examples=10, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy(), with_known_ids=st.booleans())
    def answered(case: Any, with_known_ids: bool) -> None:
        if with_known_ids and method == "POST":
            case.body = known(case.body)
        # which ids there are, no schema says
        case.call_and_validate(excluded_checks=[unsupported_method, positive_data_acceptance])

    answered()


def test_the_examples_are_requests(described: Any) -> None:
    client, schema = described
    described_bodies = schema.raw_schema["paths"]
    for path, method, examples in (
        ("/v1/items", "put", ITEM_EXAMPLES),  # first: a query of the others has their words
        ("/v1/recommend", "post", RECOMMEND_EXAMPLES),
        ("/v1/score", "post", SCORE_EXAMPLES),
        ("/v1/explain", "post", EXPLAIN_EXAMPLES),
    ):
        shown = described_bodies[path][method]["requestBody"]["content"]["application/json"]["examples"]
        assert {name: each["value"] for name, each in shown.items()} == {n: e["value"] for n, e in examples.items()}
        for example in examples.values():
            answer = client.request(method, path, json=example["value"])
            known = answer.status_code == 200 or (answer.status_code == 422 and answer.json()["unknown"])
            assert known, answer.text  # the example's items are those of another catalogue
