"""`blend.json`: the numbers of a blend, what they were chosen on, and the hashes of all that they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cprec.errors import ConfigError, DataError

BLEND, MODEL, ITEM_HEAD = "blend.json", "cprec.json", "item_head/head.safetensors"
"""Files of a model folder: the blend, what the model says of itself, and the weights of its item head."""
VERSION = 2
"""Version of the layout of `blend.json`."""
AGAIN = ": run `cprec blend` again, or open the model with blend=False"


@dataclass(frozen=True)
class Setting:
    """The numbers of a blend, and what they reached on the queries that they were chosen on."""

    model: float
    """The weight of the model's log-probability."""
    parts: Mapping[str, tuple[float, float]]
    """Weight and floor of each part; a weight may be 0."""
    ndcg: float
    item_head: float = 0.0
    """The weight of the log-probability by the model's item head."""

    def to_json(self) -> dict[str, Any]:
        parts = {name: {"weight": weight, "floor": floor} for name, (weight, floor) in self.parts.items()}
        return {"model": self.model, "item_head": self.item_head, "parts": parts, "ndcg@10": self.ndcg}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Setting:
        parts = {name: (float(part["weight"]), float(part["floor"])) for name, part in content["parts"].items()}
        head = float(content.get("item_head", 0.0))  # older files have none
        return cls(float(content["model"]), parts, float(content["ndcg@10"]), head)


SETTINGS = ("blend", "vectors", "without_model", "model_alone", "head_alone", "by_validation")
"""The blends that `blend.json` may have the numbers of."""


def read_about(model: str | Path) -> dict[str, Any]:
    """The content of `blend.json`. Raises ConfigError where there is none, DataError where it is damaged."""
    path = Path(model, BLEND)
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version = about["schema_version"]
        [about[name] for name in ("domain", "catalogue", "model", "files", "asked", "blend", "without_model")]
    except FileNotFoundError:
        raise ConfigError(f"{model} holds no blend (no {BLEND}): make one with `cprec blend {model}`") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}){AGAIN}") from None
    if version != VERSION:
        raise DataError(f"{path} has schema version {version}, this program reads {VERSION}{AGAIN}")
    return dict(about)
