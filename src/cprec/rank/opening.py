"""Opens a model folder: how its model was trained, what reads its prompts, and the blend beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cprec import distributed
from cprec.data.catalogue import Catalogue
from cprec.errors import ConfigError
from cprec.models import load_model
from cprec.rank.blend import Blend, read_blend
from cprec.rank.blend_file import BLEND
from cprec.rank.config import RankConfig
from cprec.rank.vllm import VLLMReader
from cprec.text.config import PLAIN
from cprec.text.prompts import Template

Engine = Literal["transformers", "vllm"]
"""What runs a model."""


def settings_of(folder: Path) -> dict[str, Any]:
    """How the model of a folder was trained, as options of `LLMRecommender`. Raises ConfigError if the folder holds no
    finished model."""
    path = folder / "cprec.json"
    if not path.is_file():
        problem = "holds no finished model of CPRec (no cprec.json)" if folder.exists() else "does not exist"
        if any(folder.glob("checkpoint-*")):
            advice = "its training was interrupted: start the same command again to finish it"
        else:
            advice = "give the output_dir of `cprec pretrain` or `cprec finetune`"
        raise ConfigError(f"{folder} {problem}: {advice}")
    about = json.loads(path.read_text())
    if "template" not in about:
        raise ConfigError(
            f"{folder} is a base model that was trained on text: train it on a log first, by `cprec fit`, `cprec "
            "pretrain` or `cprec finetune` with model_name_or_path"
        )
    return {
        "domain": about.get("domain"),
        "template": Template(**about["template"]),
        "begin": about.get("begin", ()),
        "max_title_tokens": about["max_title_tokens"],
        "title_cut": about.get("title_cut", PLAIN),  # older folders have none
        "history": about["history"],
        "max_history": about["max_history"],
        "trained_over": "vocabulary" if about.get("softmax", "vocabulary") == "vocabulary" else "catalogue",
        "bf16": None,
        "name": folder.name,
    }


def open_model(folder: Path, engine: Engine, options: Mapping[str, Any], *, bf16: bool | None) -> Any:
    """The model of a folder, or a `Reader` that has it; `options` are those of `vllm.LLM`, which computes in bf16 if
    told to, or with None where a GPU can. Raises ConfigError if the engine is not there."""
    device = distributed.pick_device()
    if engine == "vllm":
        in_bf16 = device.type == "cuda" and distributed.use_bf16("auto", device) if bf16 is None else bf16
        return VLLMReader.open(folder, **{"dtype": "bfloat16" if in_bf16 else "float32", **options})
    return load_model(folder, device=device)


def open_blend(folder: Path, catalogue: Catalogue, ranking: RankConfig) -> Blend:
    """The blend of a model folder, with the weights that were chosen for this way of ranking.

    Raises ConfigError where none were, and as `read_blend` does.
    """
    if not ranking.suits_blends:
        raise ConfigError(
            f"{ranking}: the weights of {folder / BLEND} are for the probabilities of titles as they were "
            "trained; give blend=False with another score or normaliser"
        )
    return read_blend(folder, catalogue, "vectors" if ranking.mode == "vectors" else "blend")
