"""Stage: pre-training a language model on all domains, and an item head of any domain after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cprec.data.dataset import read_split
from cprec.data.splits import as_one_domain
from cprec.heads import give_heads
from cprec.item_head import ItemHead
from cprec.progress import track
from cprec.rank.llm import LLMRecommender
from cprec.systems.recipes.title_sasrec import TitleSASRec
from cprec.text.shards import Shards, open_shards
from cprec.train import pretrain as language_model
from cprec.train.config import PretrainConfig

ALL = "all domains"


def pretrain(config: PretrainConfig) -> Path:
    """Continue a model's pre-training, and train its item head where asked; returns the model folder.

    The head learns from the events that the shards hold, and has the items of every domain, those too that were not
    pre-trained on. Raises what training the model and `give_heads` raise, and LeakageError where the tables of the data
    and its shards tell of other events.
    """
    folder = language_model.pretrain(config)
    if config.item_head and not config.dry_run:
        shards = open_shards(Path(config.data) / "shards" / "train")
        weights = dict(config.mixture.domain_weights)

        def train(model: LLMRecommender, unfinished: Path) -> dict[str, ItemHead]:
            return _trained(config, shards, model, unfinished)

        give_heads(config, {"shards": shards.sha256, "domain_weights": weights}, train)
    return folder


def _trained(config: PretrainConfig, shards: Shards, model: LLMRecommender, unfinished: Path) -> dict[str, ItemHead]:
    split = read_split(config.data)
    catalogue = split.catalogue
    named = {piece["domain"] for piece in shards.manifest["pieces"]}
    domains = [name for name in catalogue.domains if name in named and config.mixture.domain_weights.get(name, 1)]
    one = as_one_domain(split, ALL, domains, language_model.events_of_shards(split, shards))
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
