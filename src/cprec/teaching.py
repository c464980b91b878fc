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

import numpy as np

from cprec import lineup
from cprec.data.ragged import Ragged
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.progress import say, track
from cprec.provenance import code_sha256
from cprec.rank.blend import KINDS, shares
from cprec.recommender import RankingQuery
from cprec.schema import Item
from cprec.scoring import BATCH, ScoringRecommender
from cprec.train.config import FinetuneConfig
from cprec.train.trees import Chosen, Taught

MOST = 50
"""Items that may be drawn after a history: the best by all teachers together."""
FLOOR = 0.01
"""The least share of a query's best score that counts."""
KNOWN = 1_000.0
"""What an item of the history, and the one that came next, lose of their logarithmic score: they are not drawn."""
TIE = 1e-12
"""What an item's logarithmic score loses for its place in the domain, so that equal ones have an order."""


def taught_by(config: FinetuneConfig) -> Taught | None:
    """What the teachers of a run choose; None where it has none.

    Raises ConfigError for recommenders that cannot teach.
    """
    if not config.teachers:
        return None
    can_teach = [name for name in KINDS if not lineup.is_trained(name)]
    if unknown := [name for name in config.teachers if name not in can_teach]:
        raise ConfigError(f"teachers: {unknown[0]!r} cannot teach; these can: {', '.join(can_teach)}")
    return Taught({"taught": code_sha256("cprec.teaching")}, partial(_chosen, config))


def _chosen(config: FinetuneConfig, split: Split, history: Ragged, came_next: np.ndarray) -> Chosen:
    teachers, number = _teachers(config, split), config.taught_targets
    chosen = drawn(teachers, split, config.domain, history, came_next, number, config.seed)
    say(f"{config.domain}: {', '.join(config.teachers)} chose {chosen.items.size:,} more targets")
    return chosen


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


def drawn(
    teachers: Sequence[ScoringRecommender],
    split: Split,
    domain: str,
    history: Ragged,
    came_next: np.ndarray,
    number: int,
    seed: int,
) -> Chosen:
    """Items drawn after each history, all different, D of them: `number`, or all of the domain; -1 where none is left.

    One after the other is drawn, each with a chance in proportion to the product over the teachers of its share of the
    best score (`rank.blend.shares`), at least `FLOOR`, among the `MOST` items where that is highest. Items of the
    history, and the one that came next in the log, are not drawn.
    `history` and `came_next` hold catalogue rows, the latter -1 where nothing came.
    """
    rows, rng = split.catalogue.rows_of(domain), np.random.default_rng(seed)
    first, number = int(rows[0]), min(number, len(rows))
    most = min(max(MOST, number), len(rows))
    items = np.empty((len(history), number), dtype=np.int64)
    among, chance = np.empty((len(history), most), dtype=np.int64), np.empty((len(history), most), dtype=np.float32)
    with track(len(history), f"{domain}: drawing targets", unit="histories") as progress:
        for start in range(0, len(history), BATCH):
            asked = np.arange(start, min(start + BATCH, len(history)))
            part, next_Q = history.take(asked), came_next[asked]
            queries = [_query(split, domain, events) for events in map(part.__getitem__, range(len(part)))]
            log_QN = sum(np.log(np.maximum(shares(teacher, domain, queries), FLOOR)) for teacher in teachers)
            own = split.catalogue.domain[part.values] == split.catalogue.domain_index(domain)
            log_QN[part.row_of[own], part.values[own] - first] -= KNOWN
            log_QN[next_Q >= 0, next_Q[next_Q >= 0] - first] -= KNOWN
            log_QN -= TIE * np.arange(len(rows))
            best_QM = np.sort(np.argpartition(-log_QN, most - 1)[:, :most], axis=1)
            # The greatest of logarithmic chances with Gumbel noise are a draw one after the other (Yellott 1977).
            log_QM = np.take_along_axis(log_QN, best_QM, 1)
            place_QD = np.argsort(-(log_QM + rng.gumbel(size=log_QM.shape)), axis=1)[:, :number]
            may_QM = log_QM > -KNOWN / 2
            chance_QM = np.exp(log_QM - log_QM.max(1, keepdims=True)) * may_QM
            drawn_QD = np.where(np.take_along_axis(may_QM, place_QD, 1), np.take_along_axis(best_QM, place_QD, 1), -1)
            items[asked] = np.where(drawn_QD >= 0, first + drawn_QD, -1)
            among[asked] = first + best_QM
            chance[asked] = chance_QM / np.maximum(chance_QM.sum(1, keepdims=True), np.finfo(float).tiny)
            progress.advance(len(part))
    return Chosen(items, among, chance)


def _query(split: Split, domain: str, rows: np.ndarray) -> RankingQuery:
    catalogue = split.catalogue
    names = (catalogue.domains[number] for number in catalogue.domain[rows])
    history = tuple(Item(name, str(item)) for name, item in zip(names, catalogue.item_id[rows], strict=True))
    return RankingQuery("", domain, history)
