"""The Dockerfile and the compose file start the service with settings that it has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from cprec.serve.config import TOKEN, ServeConfig
from cprec.settings import from_mapping, parse_overrides

ROOT = Path(__file__).parents[3]


def config_of(words: list[str]) -> ServeConfig:
    models = [word for word in words if "=" not in word]
    return from_mapping(ServeConfig, {**parse_overrides(word for word in words if "=" in word), "models": models})


def test_the_image_serves_a_mounted_model_without_rights() -> None:
    text = (ROOT / "Dockerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.M)
    assert json.loads(entry) == ["cprec", "serve"]
    config = config_of(json.loads(re.findall(r"^CMD (.*)$", text, re.M)[-1]))
    assert (config.models, config.host, config.port, config.state) == (("/model",), "0.0.0.0", 8080, "/state")
    assert re.search(r"^USER \d+$", text, re.M) and "HEALTHCHECK" in text and f":{config.port}/health" in text
    images = re.findall(r"^FROM (\S+)", text, re.M)
    assert len(set(images)) == 1 and re.fullmatch(r"python:3\.11\.\d+-slim-\w+", images[0])
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M):
        for name in source.split():
            assert (ROOT / name).exists() and f"!{name}" in (ROOT / ".dockerignore").read_text().splitlines()


def test_compose_asks_for_a_token_and_publishes_on_loopback() -> None:
    (service,) = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"].values()
    config = config_of(service["command"])
    assert config.data == "/data" and config.host == "0.0.0.0"
    assert service["environment"][TOKEN].startswith("${CPREC_TOKEN:?")
    assert service["ports"] == [f"127.0.0.1:{config.port}:{config.port}"] and service["read_only"]
    targets = [volume.split(":")[-2 if volume.endswith(":ro") else -1] for volume in service["volumes"]]
    assert targets == [*config.models, config.data, config.state]
