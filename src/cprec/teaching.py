"""Targets that other recommenders choose, for a language model to learn beside those of the log.

A log shows one next item after each history, where many would have done. Recommenders that have learnt the same
training events say how much speaks for each item; items drawn by that are further targets, so a language model learns
what they know in the only form that it reads. This is distillation from samples of the teachers (Kim and Rush 2016, who
take the teacher's best sequence in place of samples).

Suffixes: Q queries, N items of the domain, M items that may be drawn, D items drawn for a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from cprec import distributed, lineup
from cprec.data.dataset import event_files, read_split
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.progress import say, track
from cprec.provenance import code_sha256, file_sha256, read_resolved
from cprec.rank.blend import KINDS, shares
from cprec.recommender import RankingQuery
from cprec.schema import TRAIN, Item
from cprec.scoring import BATCH, ScoringRecommender
from cprec.text.documents import stretches
from cprec.text.shards import Shards, read_shard_manifest
from cprec.text.tokenizer import load_tokenizer
from cprec.train.config import FinetuneConfig
from cprec.train.finetune import Taught
from cprec.train.training import encoder_of

MOST = 50
"""Items that may be drawn after a history: the best by all teachers together."""
FLOOR = 0.01
"""The least share of a query's best score that counts."""
SEEN = 1_000.0
"""What an item of the history loses of its logarithmic score: it is drawn only where there is no other."""


def taught_by(config: FinetuneConfig) -> Taught | None:
    """What the teachers of a run add to its examples; None where it has none.

    Raises ConfigError for recommenders that cannot teach.
    """
    if not config.teachers:
        return None
    can_teach = [name for name in KINDS if not lineup.is_trained(name)]
    if unknown := [name for name in config.teachers if name not in can_teach]:
        raise ConfigError(f"teachers: {unknown[0]!r} cannot teach; these can: {', '.join(can_teach)}")
    made_from = {f"taught/{name}": file_sha256(Path(config.data, name)) for name in event_files(config.data)}
    made_from["taught"] = code_sha256("cprec.teaching")
    return Taught(made_from, lambda: distributed.by_first(partial(_examples, config)))


def _examples(config: FinetuneConfig) -> Shards:
    """After every training event of the domain, `taught_targets` drawn items, each the target of an example."""
    about = read_shard_manifest(Path(config.data, "examples", config.domain, TRAIN))["about"]
    most_tokens = read_resolved(config.data)["config"]["max_document_tokens"]
    split = read_split(config.data)
    encoder = encoder_of(Path(config.data), about, load_tokenizer(str(Path(config.data, "tokenizer"))))
    domain = split.catalogue.domain_index(config.domain)
    history, _, _ = stretches(split, domain, about["history"], about["max_history"])
    drawn_QD = drawn(_teachers(config, split), split, config.domain, history, config.taught_targets, config.seed)
    rows = _followed_by(history, drawn_QD)
    of_domain = np.full(len(rows), domain)
    kept = encoder.fit(about["history"], of_domain, rows, most_tokens - 1)
    tokens, target_start = encoder.documents(about["history"], of_domain, kept)
    say(f"{config.domain}: {', '.join(config.teachers)} chose the targets of {len(rows):,} more examples")
    index = {"offset": tokens.offsets[:-1], "length": tokens.lengths, "num_events": kept.lengths}
    return Shards(tokens.values, pa.table(index | {"target_start": target_start}), {})


def _teachers(config: FinetuneConfig, split: Split) -> list[ScoringRecommender]:
    made = []
    for name in config.teachers:
        try:
            teacher = lineup.settings_of(name).make(split, config.domain, seed=config.seed)
        except Unsuitable as error:
            raise ConfigError(f"teachers: {name} cannot be made of this data: {error}") from None
        assert isinstance(teacher, ScoringRecommender)
        made.append(teacher)
    return made


def _followed_by(history: Ragged, drawn_QD: np.ndarray) -> Ragged:
    """A row for each drawn item: the history that it was drawn after, and the item."""
    copies = history.take(np.arange(len(history)).repeat(drawn_QD.shape[1]))
    # A stable sort by row puts each item behind its own history.
    row = np.concatenate([copies.row_of, np.arange(len(copies))])
    items = np.concatenate([copies.values, drawn_QD.ravel()])[np.argsort(row, kind="stable")]
    return Ragged(items, copies.offsets + np.arange(len(copies.offsets)))


def drawn(
    teachers: Sequence[ScoringRecommender], split: Split, domain: str, history: Ragged, number: int, seed: int
) -> np.ndarray:
    """Items drawn after each history, with replacement: catalogue rows, int64[Q, D].

    An item's chance is the product over the teachers of its share of the best score (`rank.blend.shares`), at least
    `FLOOR`, among the `MOST` items where that is highest. Items of the history are not drawn, unless there are no
    others. `history` holds catalogue rows.
    """
    first, rng = int(split.catalogue.rows_of(domain)[0]), np.random.default_rng(seed)
    out = np.empty((len(history), number), dtype=np.int64)
    with track(len(history), f"{domain}: drawing targets", unit="histories") as progress:
        for start in range(0, len(history), BATCH):
            part = history.take(np.arange(start, min(start + BATCH, len(history))))
            queries = [_query(split, domain, rows) for rows in map(part.__getitem__, range(len(part)))]
            log_QN = sum(np.log(np.maximum(shares(teacher, domain, queries), FLOOR)) for teacher in teachers)
            own = split.catalogue.domain[part.values] == split.catalogue.domain_index(domain)
            log_QN[part.row_of[own], part.values[own] - first] -= SEEN
            best_QM = np.argpartition(-log_QN, min(MOST, log_QN.shape[1]) - 1)[:, :MOST]
            log_QM = np.take_along_axis(log_QN, best_QM, 1)
            chance_QM = np.exp(log_QM - log_QM.max(1, keepdims=True))
            up_to_QM = np.cumsum(chance_QM, 1)
            # The item whose stretch of the summed chances holds a uniform number.
            at_QD = rng.random((len(part), number)) * up_to_QM[:, -1:]
            place_QD = (up_to_QM[:, None, :] <= at_QD[:, :, None]).sum(2)
            out[start : start + len(part)] = first + np.take_along_axis(best_QM, place_QD, 1)
            progress.advance(len(part))
    return out


def _query(split: Split, domain: str, rows: np.ndarray) -> RankingQuery:
    catalogue = split.catalogue
    names = (catalogue.domains[number] for number in catalogue.domain[rows])
    history = tuple(Item(name, str(item)) for name, item in zip(names, catalogue.item_id[rows], strict=True))
    return RankingQuery("", domain, history)
