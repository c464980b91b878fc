"""The item head that a stage of training gives its finished model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cprec import distributed
from cprec.data.dataset import event_files
from cprec.errors import ConfigError, Unsuitable
from cprec.files import aside
from cprec.item_head import FOLDER, ItemHead, made_from, save_heads
from cprec.progress import say
from cprec.provenance import code_sha256, file_sha256
from cprec.rank.llm import LLMRecommender
from cprec.train.config import TrainingConfig

Train = Callable[[LLMRecommender, Path], Mapping[str, ItemHead]]
"""Trains heads, by domain, on a finished model; the folder keeps unfinished training."""


def give_heads(config: TrainingConfig, learnt_from: Mapping[str, Any], train: Train) -> None:
    """Give the finished model of a stage its item heads, unless its folder has those that have learnt from the same:
    `learnt_from`, the events of the data, the seed and the code.

    An interrupted training goes on. Where there is nothing for a head to learn from, it says so. Raises ConfigError in
    several processes.
    """
    folder = Path(config.output_dir)
    if distributed.num_ranks() > 1:
        raise ConfigError(
            f"{folder} is finished, but its item head is trained by one process: run the same command without "
            "torchrun, which keeps the model"
        )
    asked = {
        **learnt_from,
        "data": {name: file_sha256(Path(config.data, name)) for name in event_files(config.data)},
        **{"seed": config.seed, "code": code_sha256("cprec.item_head")},
    }
    if made_from(folder) == asked:
        say(f"{folder / FOLDER}: complete, reused")
        return
    unfinished = aside(folder / FOLDER)
    try:
        heads = train(LLMRecommender.from_pretrained(folder, blend=False), unfinished)
    except Unsuitable as error:
        say(f"{folder} has no item head: {error}")
        return
    shutil.rmtree(unfinished)
    save_heads(folder, heads, asked)
    say(f"{folder / FOLDER}: written")
