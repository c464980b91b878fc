"""Stage: the weights of a language model and of recommenders beside it, chosen on validation queries.

Suffixes: Q queries, N entries (a query with an item) of all queries' pools, one after the other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cprec import lineup
from cprec.data.dataset import event_files, read_split
from cprec.data.splits import Split
from cprec.errors import ConfigError, Unsuitable
from cprec.evaluate.coverage import check_certificate
from cprec.progress import Progress, say, track
from cprec.provenance import FileHashes, code_sha256, file_sha256, read_resolved
from cprec.rank.blend import Blend, BlendedParts, check_parts, shares, write_blend
from cprec.rank.blend_file import BLEND, MODEL, Setting, read_about
from cprec.rank.config import BlendConfig
from cprec.rank.llm import LLMRecommender
from cprec.ranks import count, count_rankings, ndcg
from cprec.recommender import RankingQuery, Recommender
from cprec.schema import VALIDATION
from cprec.scoring import StoredRecommender
from cprec.train.folder import read_done
from cprec.tune import validation_queries

K = 10
"""The weights are chosen by NDCG at this rank."""
BATCH = 64
"""Queries whose pools are made, or lists ranked, at once."""
WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
FLOORS = (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-6, 1e-9)
"""What a weight and a floor may be."""

Questions = tuple[Sequence[RankingQuery], Sequence[str]]
"""Queries and their targets."""
Point = tuple[float, ...]
"""The model's weight, those of the parts, and their floors."""


def blend(config: BlendConfig) -> dict[str, Any]:
    """Choose the weights of a model's blend, and of the best one without the model; returns what `blend.json` holds.

    The numbers maximise NDCG@10 of validation queries, items of the history left out, among the items that a part or
    the model has among its best; what is chosen is then ranked over the full catalogue. A blend of the same model, data
    and settings is reused.

    Raises ConfigError where the folder is no model, the model has no domain, or a part is none that can be stored;
    Unsuitable where there is no validation query, or no part can be made of the data; LeakageError where no clean
    certificate covers the data and the model.
    """
    check_parts(config.parts)
    done = read_done(config.model)
    if done is None:
        raise ConfigError(f"model={config.model!r} holds no finished model of CPRec (no {MODEL})")
    domain = config.domain or done.get("domain")
    if not domain:
        raise ConfigError(f"{config.model} was fine-tuned for no domain: name one by domain=")
    data = config.data or read_resolved(config.model)["config"]["data"]
    asked = _asked(config, data)
    if (found := _earlier(config.model, domain, asked)) is not None:
        say(f"{Path(config.model, BLEND)}: chosen by the same settings, reused")
        return found
    hashes = FileHashes(config.model)
    trained_on = {config.model: done["trained_on"]}
    certified = check_certificate(data, domain, VALIDATION, trained_on, hashes, uncertified=config.uncertified)
    split = read_split(data)
    model = LLMRecommender.from_pretrained(config.model, blend=False, max_nodes=config.max_nodes)
    if split.catalogue.digest() != model.catalogue.digest():
        raise ConfigError(
            f"data={data!r} has another catalogue than {config.model}: give the folder that it is made of"
        )
    questions = validation_queries(split, domain, config.max_queries, config.seed)
    parts, left_out = _made(config.parts, split, domain, config.seed)
    chosen = choose(model, domain, parts, questions, config.pool)
    about = {"asked": asked, "num_queries": len(questions[0]), "certified": certified, "left_out": left_out}
    write_blend(config.model, domain, parts, chosen, about)
    _tell(config.model, chosen)
    return read_about(config.model)


def _asked(config: BlendConfig, data: str) -> dict[str, Any]:
    """What the choice depends on, beside the model: the settings, the events and the code."""
    return {
        "parts": list(config.parts),
        **{name: getattr(config, name) for name in ("max_queries", "pool", "max_nodes", "seed")},
        "data": {name: file_sha256(Path(data, name)) for name in event_files(data)},
        "code": code_sha256("cprec.blend"),
    }


def _earlier(model: str, domain: str, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The blend that is there, if it is of the same model and was chosen the same way."""
    if not Path(model, BLEND).is_file():
        return None
    about = read_about(model)
    same = (about["domain"], about["asked"], about["model"]) == (domain, asked, file_sha256(Path(model, MODEL)))
    return about if same else None


def _made(
    names: Sequence[str], split: Split, domain: str, seed: int
) -> tuple[dict[str, StoredRecommender], dict[str, str]]:
    """The parts by name, and why others cannot be made of the data. Raises Unsuitable where none can."""
    parts: dict[str, Any] = {}
    left_out = {}
    for name in names:
        try:
            parts[name] = lineup.settings_of(name).make(split, domain, seed=seed)
        except Unsuitable as error:
            left_out[name] = str(error)
            say(f"{domain}: {name} is left out of the blend: {error}")
    if not parts:
        raise Unsuitable(f"{domain}: none of {', '.join(names)} can be made of this data, so there is nothing to blend")
    return parts, left_out


def _tell(model: str, chosen: Mapping[str, Setting]) -> None:
    for name, setting in chosen.items():
        weights = [f"model {setting.model:g}", *(f"{part} {weight:g}" for part, (weight, _) in setting.parts.items())]
        say(f"{model}: {name.replace('_', ' ')}: NDCG@{K} {setting.ndcg:.4f} ({', '.join(weights)})")


# ---- what competes for a list ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entries:
    """What the model and the parts say of the items that compete for each query's list."""

    query_N: np.ndarray
    """int64[N]: the query's number, which never falls."""
    is_target_N: np.ndarray
    """bool[N]"""
    log_prob_N: np.ndarray
    """float64[N]: the model's."""
    share_N: Mapping[str, np.ndarray]
    """float64[N] for each part: its score as a share of the query's best; see `rank.blend.shares`."""
    of_parts_N: np.ndarray
    """bool[N]: the item is among the best of a part, not of the model alone."""
    num_queries: int

    def without_model(self) -> Entries:
        """The entries that there are whatever the model says."""
        kept = self.of_parts_N
        columns = {name: getattr(self, name)[kept] for name in ("query_N", "is_target_N", "log_prob_N", "of_parts_N")}
        return replace(self, **columns, share_N={name: share_N[kept] for name, share_N in self.share_N.items()})

    def ndcg(self, setting: Setting) -> float:
        """Mean NDCG@10 of the lists by a blend; ties count with their expected value."""
        score_N = setting.model * self.log_prob_N
        for name, (weight, floor) in setting.parts.items():
            if weight:
                score_N = score_N + weight * np.log(np.maximum(self.share_N[name], floor))
        return float(ndcg(*count(self.query_N, score_N, self.is_target_N, self.num_queries), K).mean())


def entries_of(
    model: LLMRecommender,
    domain: str,
    parts: Mapping[str, StoredRecommender],
    questions: Questions,
    pool: int,
    progress: Progress,
) -> Entries:
    """The best `pool` items of each part and of the model, for each query, with what all of them say of each."""
    made = []
    for queries, targets in batches_of(questions):
        best = [one.item_ids[:pool] for one in model.rank(queries, pool)]
        of_parts: list[set[str]] = [set() for _ in queries]
        for part in parts.values():
            for mine, one in zip(of_parts, part.rank(queries, pool), strict=True):
                mine.update(one.item_ids[:pool])
        made.append(_entries(model, domain, parts, queries, targets, best, of_parts))
        progress.advance(len(queries))
    starts = np.cumsum([0, *(one.num_queries for one in made)])
    return Entries(
        query_N=np.concatenate([start + one.query_N for start, one in zip(starts, made, strict=False)]),
        is_target_N=np.concatenate([one.is_target_N for one in made]),
        log_prob_N=np.concatenate([one.log_prob_N for one in made]),
        share_N={name: np.concatenate([one.share_N[name] for one in made]) for name in parts},
        of_parts_N=np.concatenate([one.of_parts_N for one in made]),
        num_queries=int(starts[-1]),
    )


def _entries(
    model: LLMRecommender,
    domain: str,
    parts: Mapping[str, StoredRecommender],
    queries: Sequence[RankingQuery],
    targets: Sequence[str],
    best: Sequence[Sequence[str]],
    of_parts: Sequence[set[str]],
) -> Entries:
    """The entries of some queries, each with the best items of the model and those of the parts."""
    pools = [sorted(mine.union(others)) for mine, others in zip(of_parts, best, strict=True)]
    asked = [replace(query, candidates=tuple(pool)) for query, pool in zip(queries, pools, strict=True)]
    log_prob = [dict(zip(ranking.item_ids, ranking.scores, strict=True)) for ranking in model.rank(asked, K)]
    pairs = [(number, item) for number, pool in enumerate(pools) for item in pool]
    query_N = np.array([number for number, _ in pairs], dtype=np.int64)
    place_N = model.catalogue.find(domain, [item for _, item in pairs]) - model.catalogue.rows_of(domain)[0]
    return Entries(
        query_N=query_N,
        is_target_N=np.array([item == targets[number] for number, item in pairs], dtype=bool),
        log_prob_N=np.array([log_prob[number][item] for number, item in pairs], dtype=float),
        share_N={name: shares(part, domain, queries)[query_N, place_N] for name, part in parts.items()},
        of_parts_N=np.array([item in of_parts[number] for number, item in pairs], dtype=bool),
        num_queries=len(queries),
    )


def batches_of(questions: Questions) -> Iterator[Questions]:
    """Queries and their targets, some at a time."""
    queries, targets = questions
    for start in range(0, len(queries), BATCH):
        yield queries[start : start + BATCH], targets[start : start + BATCH]


# ---- the choice ------------------------------------------------------------------------------------------------------


def choose(
    model: LLMRecommender, domain: str, parts: Mapping[str, StoredRecommender], questions: Questions, pool: int
) -> dict[str, Setting]:
    """The best `blend`, the best `without_model` and the `model_alone`, each with what its lists over the full
    catalogue reach."""
    with track(4 * len(questions[0]), f"{domain}: blending", unit="queries") as progress:
        entries = entries_of(model, domain, parts, questions, pool, progress)
        found = {
            "blend": best_setting(entries, WEIGHTS),
            "without_model": best_setting(entries.without_model(), (0.0,)),
            "model_alone": Setting(1.0, dict.fromkeys(parts, (0.0, 1.0)), 0.0),
        }
        for name, setting in found.items():
            blended = Blend.of(setting, domain, parts, model.catalogue)
            recommender = _blended(model, blended) if setting.model else BlendedParts(blended)
            found[name] = replace(setting, ndcg=reached(recommender, questions, progress))
    return found


def _blended(model: LLMRecommender, blended: Blend) -> LLMRecommender:
    """The model with a blend; the one given stays as it is."""
    made = copy.copy(model)
    made.blend = blended
    return made


def best_setting(entries: Entries, model_weights: Sequence[float]) -> Setting:
    """The numbers with the highest NDCG@10 that a search one number at a time finds from several starts.

    The starts weigh all alike, and each one alone. Of equal values the first found is kept.
    """
    names = list(entries.share_N)
    grids = [model_weights, *([WEIGHTS] * len(names)), *([FLOORS] * len(names))]
    floors = (0.01,) * len(names)

    def setting(point: Point) -> Setting:
        weights, floors = point[1 : 1 + len(names)], point[1 + len(names) :]
        return Setting(point[0], dict(zip(names, zip(weights, floors, strict=True), strict=True)), 0.0)

    @cache
    def value(point: Point) -> float:
        return entries.ndcg(setting(point)) if any(point[: 1 + len(names)]) else -math.inf

    one = max(min(model_weights[-1], 1.0), 0.0)
    alone = np.diag([one, *(1.0 for _ in names)]).tolist()
    starts = [(one, *(1.0 for _ in names), *floors), *((*weights, *floors) for weights in alone if any(weights))]
    best = max((climb(value, grids, start) for start in starts), key=value)
    return replace(setting(best), ndcg=value(best))


def climb(value: Callable[[Point], float], grids: Sequence[Sequence[float]], start: Point) -> Point:
    """From a start, the best number of one grid after the other, until none is better."""
    point = start
    while True:
        before = point
        for axis, grid in enumerate(grids):
            point = max([point, *((*point[:axis], number, *point[axis + 1 :]) for number in grid)], key=value)
        if point == before:
            return point


def reached(recommender: Recommender, questions: Questions, progress: Progress) -> float:
    """Mean NDCG@10 of a recommender's lists over the full catalogue."""
    found = []
    for queries, targets in batches_of(questions):
        found.append(ndcg(*count_rankings(recommender.rank(queries, K), targets), K))
        progress.advance(len(queries))
    return float(np.concatenate(found).mean())
