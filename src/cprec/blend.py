"""Stage: the weights of a language model, of its item head and of recommenders beside it, chosen on validation queries.

Suffixes: Q queries, N entries (a query with an item) of all queries' pools, one after the other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cprec import lineup
from cprec.baselines.item_values import ItemValuesRecommender
from cprec.data.dataset import event_files, read_split
from cprec.data.item_columns import existing
from cprec.data.splits import Split
from cprec.errors import ConfigError, DataError, LeakageError, Unsuitable
from cprec.evaluate.coverage import check_certificate
from cprec.evaluate.rankings import slug
from cprec.files import aside
from cprec.progress import Progress, say, track
from cprec.provenance import FileHashes, code_sha256, file_sha256, read_resolved
from cprec.rank.blend import FOLDER, Blend, BlendedParts, check_parts, identity, shares, write_blend
from cprec.rank.blend_file import BLEND, MODEL, Setting, read_about
from cprec.rank.config import BlendConfig, Mode
from cprec.rank.llm import LLMRecommender
from cprec.ranks import count, count_rankings, ndcg
from cprec.recommender import RankingQuery, Recommender
from cprec.schema import VALIDATION
from cprec.scoring import StoredRecommender
from cprec.train.folder import read_done, refitted_on
from cprec.tune import validation_queries

K = 10
"""Lists of this length are judged."""
DEPTH = 100
"""The weights are chosen by NDCG at this rank: deeper than the lists that are judged, it depends less on the luck of
the sample (docs/experiments.md)."""
BATCH = 64
"""Queries whose pools are made, or lists ranked, at once."""
WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)
FLOORS = (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-6, 1e-9)
"""What a weight and a floor may be."""
FLOOR = 0.01
"""Where the search for a floor begins, and what it is for a weight that is fixed."""

Questions = tuple[Sequence[RankingQuery], Sequence[str]]
"""Queries and their targets."""
Point = tuple[float, ...]
"""The weights of the model and of its item head, those of the parts, and their floors."""


def blend(config: BlendConfig, networks: Path | None = None) -> dict[str, Any]:
    """Choose the weights of a model's blend, and of the best one without the model; returns what `blend.json` holds.
    `networks` keeps what is trained for the parts, each in a folder of its own, for whoever needs the same; without it
    only unfinished training is kept.

    The numbers maximise NDCG@100 of validation queries, items of the history left out, among the items that a part, the
    model or its item head has among its best; what is chosen is then ranked over the full catalogue. A model with an
    item head has the best blend without log P, too. A blend of the same model, data and settings is reused.

    Raises ConfigError where the folder is no model, the model has no domain, or a part is none that can be stored;
    Unsuitable where there is no validation query, or no part can be made of the data; LeakageError where no clean
    certificate covers the data and the model.
    """
    check_parts(config.parts, config.columns)
    done = read_done(config.model)
    if done is None:
        raise ConfigError(f"model={config.model!r} holds no finished model of CPRec (no {MODEL})")
    if learnt := refitted_on(config.model):
        raise LeakageError(
            f"{config.model} has learnt the {', '.join(learnt)} events, and weights are chosen by validation events: "
            "blend the model that it was refitted from, and refit that"
        )
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
    if not (config.log_p or model.has_item_head(domain)):
        raise Unsuitable(
            f"log_p=false, and {config.model} has no item head for {domain!r}: nothing of the model would be in its "
            "blend. Fine-tune with item_head=true, or leave log_p out"
        )
    questions = validation_queries(split, domain, config.max_queries, config.seed)
    columns = {
        name: ItemValuesRecommender.read(name, path, split.catalogue, domain) for name, path in config.columns.items()
    }
    kept = networks or aside(Path(config.model, FOLDER))  # `write_blend` empties the latter before it writes there
    parts, left_out = made_parts(config.parts, split, domain, config.seed, kept, config.fixed)
    parts |= columns
    chosen = choose(model, domain, parts, questions, config.pool, log_p=config.log_p, fixed=config.fixed)
    about = {"asked": asked, "num_queries": len(questions[0]), "certified": certified, "left_out": left_out}
    write_blend(config.model, domain, parts, chosen, about)
    _tell(config.model, chosen)
    return read_about(config.model)


def _asked(config: BlendConfig, data: str) -> dict[str, Any]:
    """What the choice depends on, beside the model: the settings, the events and the code."""
    return {
        "parts": list(config.parts),
        "columns": {name: file_sha256(existing(path)) for name, path in config.columns.items()},
        "fixed": dict(config.fixed),
        **{name: getattr(config, name) for name in ("log_p", "max_queries", "pool", "max_nodes", "seed")},
        "data": {name: file_sha256(Path(data, name)) for name in event_files(data)},
        "code": code_sha256("cprec.blend"),
    }


def _earlier(model: str, domain: str, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The blend that is there, if it is of the same model and was chosen the same way."""
    if not Path(model, BLEND).is_file():
        return None
    try:
        about = read_about(model)
    except DataError:  # damaged, or of an older version: it is made anew
        return None
    same = (about["domain"], about["asked"], about["model"]) == (domain, asked, identity(model))
    return about if same else None


def made_parts(
    names: Sequence[str], split: Split, domain: str, seed: int, folder: Path, fixed: Container[str] = ()
) -> tuple[dict[str, StoredRecommender], dict[str, str]]:
    """The parts by name, and why others cannot be made of the data. `folder` keeps what is trained, each part in a
    folder of its own, so that it goes on where it was interrupted. Raises Unsuitable where a part whose weight is
    `fixed` cannot, or none of the others can.
    """
    parts: dict[str, Any] = {}
    left_out = {}
    for name in names:
        try:
            parts[name] = lineup.settings_of(name).make(split, domain, seed=seed, folder=folder / slug(name))
        except Unsuitable as error:
            if name in fixed:
                raise Unsuitable(f"fixed.{name}: {error}") from None
            left_out[name] = str(error)
            say(f"{domain}: {name} is left out of the blend: {error}")
    free = [name for name in names if name not in fixed]
    if not set(free) & set(parts):
        raise Unsuitable(f"{domain}: none of {', '.join(free)} can be made of this data, so there is nothing to blend")
    return parts, left_out


def _tell(model: str, chosen: Mapping[str, Setting]) -> None:
    for name, setting in chosen.items():
        weights = {"model": setting.model, "item head": setting.item_head}
        weights |= {part: weight for part, (weight, _) in setting.parts.items()}
        told = ", ".join(f"{part} {weight:g}" for part, weight in weights.items())
        say(f"{model}: {name.replace('_', ' ')}: NDCG@{K} {setting.ndcg:.4f} ({told})")
    if "by_validation" in chosen:
        change = chosen["blend"].ndcg - chosen["by_validation"].ndcg
        say(f"{model}: the weights that were fixed change NDCG@{K} of the blend on validation queries by {change:+.4f}")


# ---- what competes for a list ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entries:
    """What the model and the parts say of the items that compete for each query's list."""

    query_N: np.ndarray
    """int64[N]: the query's number, which never falls."""
    is_target_N: np.ndarray
    """bool[N]"""
    log_prob_N: np.ndarray
    """float64[N]: the model's; 0 where it was not asked for."""
    item_head_N: np.ndarray
    """float64[N]: the log-probability by the model's item head; 0 where it has none."""
    share_N: Mapping[str, np.ndarray]
    """float64[N] for each part: its score as a share of the query's best; see `rank.blend.shares`."""
    of_parts_N: np.ndarray
    """bool[N]: the item is among the best of a part, not of the model alone."""
    num_queries: int
    _log_share: dict[tuple[str, float], np.ndarray] = field(default_factory=dict, init=False)
    """Logarithms that were needed, by part and floor."""

    def without_model(self) -> Entries:
        """The entries that there are whatever the model says."""
        return self._only(self.of_parts_N)

    def that_can_score(self) -> Entries:
        """The entries of queries whose target competes: a list of another query has an NDCG of 0 by any weights."""
        has_target_Q = np.zeros(self.num_queries, dtype=bool)
        has_target_Q[self.query_N[self.is_target_N]] = True
        return self._only(has_target_Q[self.query_N])

    def _only(self, kept_N: np.ndarray) -> Entries:
        columns = {name: value[kept_N] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return replace(self, **columns, share_N={name: share_N[kept_N] for name, share_N in self.share_N.items()})

    def ndcg(self, setting: Setting, k: int) -> float:
        """Mean NDCG@K of the lists by a blend; ties count with their expected value."""
        score_N = setting.model * self.log_prob_N + setting.item_head * self.item_head_N
        for name, (weight, floor) in setting.parts.items():
            if weight:
                score_N = score_N + weight * self._log(name, floor)
        return float(ndcg(*count(self.query_N, score_N, self.is_target_N, self.num_queries), k).mean())

    def _log(self, part: str, floor: float) -> np.ndarray:
        if (part, floor) not in self._log_share:
            self._log_share[part, floor] = np.log(np.maximum(self.share_N[part], floor))
        return self._log_share[part, floor]


def entries_of(
    model: LLMRecommender,
    domain: str,
    parts: Mapping[str, StoredRecommender],
    questions: Questions,
    pool: int,
    progress: Progress,
    *,
    log_p: bool = True,
) -> Entries:
    """The best `pool` items of each part, of the model and of its item head, for each query, with what all of them say
    of each; without `log_p`, titles are not read."""
    made = []
    modes: list[Mode | None] = [None] if log_p else []
    if model.has_item_head(domain):
        modes.append("vectors")
    for queries, targets in batches_of(questions):
        best: list[set[str]] = [set() for _ in queries]
        for mode in modes:
            for mine, one in zip(best, model.rank(queries, pool, mode), strict=True):
                mine.update(one.item_ids[:pool])
        of_parts: list[set[str]] = [set() for _ in queries]
        for part in parts.values():
            for mine, one in zip(of_parts, part.rank(queries, pool), strict=True):
                mine.update(one.item_ids[:pool])
        pools = [sorted(mine.union(others)) for mine, others in zip(of_parts, best, strict=True)]
        made.append(_entries(model, domain, parts, queries, targets, pools, of_parts, log_p=log_p))
        progress.advance(len(queries))
    starts = np.cumsum([0, *(one.num_queries for one in made)])
    return Entries(
        query_N=np.concatenate([start + one.query_N for start, one in zip(starts, made, strict=False)]),
        is_target_N=np.concatenate([one.is_target_N for one in made]),
        log_prob_N=np.concatenate([one.log_prob_N for one in made]),
        item_head_N=np.concatenate([one.item_head_N for one in made]),
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
    pools: Sequence[Sequence[str]],
    of_parts: Sequence[set[str]],
    *,
    log_p: bool,
) -> Entries:
    """The entries of some queries: those of their pools."""
    pairs = [(number, item) for number, pool in enumerate(pools) for item in pool]
    log_prob_N = np.zeros(len(pairs))
    if log_p:
        asked = [replace(query, candidates=tuple(pool)) for query, pool in zip(queries, pools, strict=True)]
        log_prob = [dict(zip(ranking.item_ids, ranking.scores, strict=True)) for ranking in model.rank(asked, K)]
        log_prob_N = np.array([log_prob[number][item] for number, item in pairs], dtype=float)
    query_N = np.array([number for number, _ in pairs], dtype=np.int64)
    place_N = model.catalogue.find(domain, [item for _, item in pairs]) - model.catalogue.rows_of(domain)[0]
    has_head = model.has_item_head(domain)
    return Entries(
        query_N=query_N,
        is_target_N=np.array([item == targets[number] for number, item in pairs], dtype=bool),
        log_prob_N=log_prob_N,
        item_head_N=model.item_log_probs(domain, queries)[query_N, place_N] if has_head else np.zeros(len(pairs)),
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
    model: LLMRecommender,
    domain: str,
    parts: Mapping[str, StoredRecommender],
    questions: Questions,
    pool: int,
    *,
    log_p: bool = True,
    fixed: Mapping[str, float] = {},
) -> dict[str, Setting]:
    """The best `blend`, the best `without_model` and the `model_alone`, each with what its lists over the full
    catalogue reach. Of a model with an item head also `vectors`, the best blend without log P, and the `head_alone`.

    Without `log_p` the best blend is that of `vectors`, and there is no `model_alone`. Parts with a `fixed` weight
    have no say in the choice: they are added to what was chosen, with that times the sum of its weights, and
    `by_validation` is the best blend without them.
    """
    has_head, none = model.has_item_head(domain), dict.fromkeys(parts, (0.0, 1.0))
    free = {name: part for name, part in parts.items() if name not in fixed}
    with track(len(questions[0]), f"{domain}: what the parts say", unit="queries") as progress:
        entries = entries_of(model, domain, free, questions, pool, progress, log_p=log_p)
    say(f"{domain}: choosing the weights of {len(free)} parts and the model")
    of_head = WEIGHTS if has_head else (0.0,)
    found = {"without_model": best_setting(entries.without_model(), (0.0,), (0.0,))}
    if has_head:
        found["vectors"] = best_setting(entries, (0.0,), of_head, found.values())
    if log_p:
        found["blend"] = best_setting(entries, WEIGHTS, of_head, found.values())
    if fixed:
        found = _with_fixed(found, fixed, "blend" if log_p else "vectors")
    if log_p:
        found["model_alone"] = Setting(1.0, none, 0.0)
    if has_head:
        found["head_alone"] = Setting(0.0, none, 0.0, item_head=1.0)
    recommenders: dict[str, Recommender] = {}
    for name, setting in found.items():
        blended = Blend.of(setting, domain, parts, model.catalogue)
        recommenders[name] = BlendedParts(blended) if name == "without_model" else _blended(model, blended)
    with track(len(found) * len(questions[0]), f"{domain}: ranking by the weights", unit="queries") as progress:
        reached_by = reached(recommenders, questions, progress)
    found = {name: replace(setting, ndcg=reached_by[name]) for name, setting in found.items()}
    return found if log_p else found | {"blend": found["vectors"]}


def _with_fixed(chosen: Mapping[str, Setting], fixed: Mapping[str, float], best: str) -> dict[str, Setting]:
    """The settings with the parts whose weights are fixed, and `by_validation`, the `best` of them without these."""

    def added(setting: Setting, times: float) -> Setting:
        total = setting.model + setting.item_head + sum(weight for weight, _ in setting.parts.values())
        more = {name: (times * total * weight, FLOOR) for name, weight in fixed.items()}
        return replace(setting, parts={**setting.parts, **more})

    out = {name: added(setting, 1.0) for name, setting in chosen.items()}
    return out | {"by_validation": added(chosen[best], 0.0)}


def _blended(model: LLMRecommender, blended: Blend) -> LLMRecommender:
    """The model with a blend; the one given stays as it is."""
    made = copy.copy(model)
    made.blend = blended
    return made


def best_setting(
    entries: Entries, model_weights: Sequence[float], head_weights: Sequence[float], known: Iterable[Setting] = ()
) -> Setting:
    """The numbers with the highest NDCG@100 that a search one number at a time finds from several starts.

    The starts weigh all alike, and each one alone; others are settings that are `known` to be good. Of equal values the
    first found is kept.
    """
    entries = entries.that_can_score()
    names = list(entries.share_N)
    weights = [model_weights, head_weights, *([WEIGHTS] * len(names))]
    grids = [*weights, *([FLOORS] * len(names))]

    def setting(point: Point) -> Setting:
        (model, head, *of_parts), floors = point[: len(weights)], point[len(weights) :]
        return Setting(model, dict(zip(names, zip(of_parts, floors, strict=True), strict=True)), 0.0, head)

    def point(known: Setting) -> Point:
        of_parts, floors = zip(*(known.parts[name] for name in names), strict=True)
        return (known.model, known.item_head, *of_parts, *floors)

    @cache
    def value(point: Point) -> float:
        return entries.ndcg(setting(point), DEPTH) if any(point[: len(weights)]) else -math.inf

    ones = [min(grid[-1], 1.0) for grid in weights]
    starts = [(*start, *((FLOOR,) * len(names))) for start in (ones, *np.diag(ones).tolist()) if any(start)]
    best = max((climb(value, grids, start) for start in (*starts, *map(point, known))), key=value)
    return replace(setting(best), ndcg=entries.ndcg(setting(best), K))


def climb(value: Callable[[Point], float], grids: Sequence[Sequence[float]], start: Point) -> Point:
    """From a start, the best number of one grid after the other, until none is better."""
    point = start
    while True:
        before = point
        for axis, grid in enumerate(grids):
            point = max([point, *((*point[:axis], number, *point[axis + 1 :]) for number in grid)], key=value)
        if point == before:
            return point


def reached(recommenders: Mapping[str, Recommender], questions: Questions, progress: Progress) -> dict[str, float]:
    """Mean NDCG@10 of the lists of recommenders over the full catalogue, by name. All are asked for a batch before the
    next, since those that share parts score it once."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in recommenders}
    for queries, targets in batches_of(questions):
        for name, recommender in recommenders.items():
            found[name].append(ndcg(*count_rankings(recommender.rank(queries, K), targets), K))
            progress.advance(len(queries))
    return {name: float(np.concatenate(values).mean()) for name, values in found.items()}
