"""Stage: pre-training a language model on all domains, and an item head of any domain after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cprec.data.dataset import read_split
from cprec.data.splits import Split, as_one_domain
from cprec.errors import ConfigError
from cprec.heads import give_heads
from cprec.item_head import ItemHead, seconds_to_train
from cprec.progress import track
from cprec.rank.llm import LLMRecommender
from cprec.systems.recipes.title_sasrec import TitleSASRec
from cprec.text.shards import Shards, open_shards
from cprec.text.tokenizer import load_tokenizer
from cprec.train import pretrain as language_model
from cprec.train.config import PretrainConfig
from cprec.train.training import encoder_of

ALL = "all domains"


def pretrain(config: PretrainConfig) -> Path:
    """Continue a model's pre-training, and train its item head where asked; returns the model folder.

    The head learns from the events that the shards hold, and has the items of every domain, those too that were not
    pre-trained on. Raises what training the model and `give_heads` raise, and LeakageError where the tables of the data
    and its shards tell of other events; ConfigError where an item head is asked for and the data have no items.
    """
    if config.item_head and not Path(config.data, "items").is_dir():
        raise ConfigError(f"item_head=true reads the titles of items, and data={config.data} has none: leave it out")
    folder = language_model.pretrain(config)
    if config.item_head and not config.dry_run:
        shards = open_shards(Path(config.data) / "shards" / "train")
        weights = dict(config.mixture.domain_weights)

        def train(model: LLMRecommender, unfinished: Path) -> dict[str, ItemHead]:
            return _trained(config, read_split(config.data), shards, model, unfinished)

        give_heads(config, {"shards": shards.sha256, "domain_weights": weights}, train)
    return folder


def seconds_of_head(config: PretrainConfig) -> float:
    """About how long the item head takes to train, its reading of titles left out. Raises as `pretrain` does."""
    split, shards = read_split(config.data), open_shards(Path(config.data) / "shards" / "train")
    return seconds_to_train(_as_one(config, split, shards), ALL, config.seed)


def _domains(config: PretrainConfig, split: Split, shards: Shards) -> list[str]:
    """Those that are pre-trained on."""
    named, weights = {piece["domain"] for piece in shards.manifest["pieces"]}, config.mixture.domain_weights
    return [name for name in split.catalogue.domains if name in named and weights.get(name, 1)]


def _as_one(config: PretrainConfig, split: Split, shards: Shards) -> Split:
    """The domains that are pre-trained on as one, with the events that the shards hold."""
    data = Path(config.data)
    encoder = encoder_of(data, shards.manifest["about"], load_tokenizer(str(data / "tokenizer")))
    known = language_model.events_of_shards(split, shards, encoder)
    return as_one_domain(split, ALL, _domains(config, split, shards), known)


def _trained(
    config: PretrainConfig, split: Split, shards: Shards, model: LLMRecommender, unfinished: Path
) -> dict[str, ItemHead]:
    catalogue, domains = split.catalogue, _domains(config, split, shards)
    one = _as_one(config, split, shards)
    with track(len(catalogue), "reading titles", unit="titles") as progress:
        states_NF = model.title_states(np.arange(len(catalogue)), progress.advance)
    # Titles differ from those of their own domain: what a domain's titles share says nothing of another's.
    own_NF = np.concatenate([states_NF[rows] - states_NF[rows].mean(0) for rows in map(catalogue.rows_of, domains)])
    head = ItemHead.train(
        one,
        ALL,
        lambda rows: own_NF[rows],
        settings=TitleSASRec(own_rows=False),
        seed=config.seed,
        folder=unfinished,
    )
    return {domain: head.of(catalogue, domain, lambda rows: states_NF[rows]) for domain in catalogue.domains}
