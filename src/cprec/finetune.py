"""Stage: fine-tuning a language model on one domain, and an item head after it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from cprec import distributed
from cprec.data.dataset import event_files, read_split
from cprec.errors import ConfigError, Unsuitable
from cprec.files import aside
from cprec.item_head import FOLDER, ItemHead, is_made_from
from cprec.progress import say, track
from cprec.provenance import code_sha256, file_sha256
from cprec.rank.llm import LLMRecommender
from cprec.systems.recipes.title_sasrec import TitleSASRec
from cprec.train import finetune as language_model
from cprec.train.config import FinetuneConfig


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune a model, and train its item head where asked; returns the model folder.

    A finished head of the same events, seed and code is reused, an interrupted one goes on. Where the domain has
    nothing for a head to learn from, it says so. Raises ConfigError where a head is asked for in several processes, and
    what training the model raises.
    """
    folder = language_model.finetune(config)
    if config.item_head and not config.dry_run:
        if distributed.num_ranks() > 1:
            raise ConfigError(
                f"{folder} is finished, but its item head is trained by one process: run the same command without "
                "torchrun, which keeps the model"
            )
        try:
            _train_head(config, folder)
        except Unsuitable as error:
            say(f"{folder} has no item head: {error}")
    return folder


def _train_head(config: FinetuneConfig, folder: Path) -> None:
    model = LLMRecommender.from_pretrained(folder, blend=False)
    made_from = {
        "domain": config.domain,
        "data": {name: file_sha256(Path(config.data, name)) for name in event_files(config.data)},
        **{"seed": config.seed, "code": code_sha256("cprec.item_head")},
    }
    if is_made_from(folder, made_from):
        say(f"{folder / FOLDER}: complete, reused")
        return
    split, unfinished = read_split(config.data), aside(folder / FOLDER)

    def read(rows: np.ndarray) -> np.ndarray:
        with track(len(rows), f"{config.domain}: reading titles", unit="titles") as progress:
            return model.title_states(rows, progress.advance)

    head = ItemHead.train(split, config.domain, read, settings=TitleSASRec(), seed=config.seed, folder=unfinished)
    shutil.rmtree(unfinished)
    head.save(folder, made_from)
    say(f"{folder / FOLDER}: written")
