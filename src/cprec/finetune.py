"""Stage: fine-tuning a language model on one domain, and an item head after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cprec.data.catalogue import Catalogue
from cprec.data.dataset import read_split
from cprec.heads import give_heads
from cprec.item_head import ARRAYS, FOLDER, ItemHead, load_heads
from cprec.progress import track
from cprec.provenance import file_sha256
from cprec.rank.llm import LLMRecommender
from cprec.systems.recipes.title_sasrec import TitleSASRec
from cprec.teaching import taught_by
from cprec.train import finetune as language_model
from cprec.train.config import FinetuneConfig


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune a model, and train its item head where asked; returns the model folder.

    The head goes on from that of the base, where pre-training made one. Raises what training the model and `give_heads`
    raise.
    """
    folder = language_model.finetune(config, taught_by(config))
    give_item_head(config)
    return folder


def give_item_head(config: FinetuneConfig) -> None:
    """Give the model that was trained by these settings its item head, where they ask for one."""
    if config.item_head and not config.dry_run:
        base = Path(config.model_name_or_path)
        start = head_to_start_from(base)

        def train(model: LLMRecommender, unfinished: Path) -> dict[str, ItemHead]:
            return {config.domain: _trained(config, model, start, unfinished)}

        begun = {"start": file_sha256(base / FOLDER / ARRAYS)} if start is not None else {}
        networks = config.head_networks
        give_heads(config, {"domain": config.domain, "networks": networks, **begun}, train)


def head_to_start_from(base: Path) -> ItemHead | None:
    """The head of a base model that a head of any domain can go on from."""
    heads = load_heads(base, Catalogue.read(base)) if (base / FOLDER).is_dir() else {}
    return next((head for head in heads.values() if head.serves_any_domain), None)


def _trained(config: FinetuneConfig, model: LLMRecommender, start: ItemHead | None, unfinished: Path) -> ItemHead:
    def read(rows: np.ndarray) -> np.ndarray:
        with track(len(rows), f"{config.domain}: reading titles", unit="titles") as progress:
            return model.title_states(rows, progress.advance)

    split, settings = read_split(config.data), TitleSASRec(num_networks=config.head_networks)
    return ItemHead.train(
        split, config.domain, read, settings=settings, seed=config.seed, folder=unfinished, start=start
    )
